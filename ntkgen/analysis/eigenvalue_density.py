"""The density of the eigenvalues of a stored kernel on a logarithmic axis.

The certificate of a store is a measured bound on the error of the stored kernel. Eigenvalues below it may be noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.eigenvalues import SpectrumSettings, is_dense, spectrum
from ntkgen.analysis.linalg.krylov import EPSILON, Krylov, Sizes
from ntkgen.analysis.linalg.quadrature import Moments, Quadrature, gauss, standard_error
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left
from ntkgen.analysis.products import Products, require_space, space_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import InputError
from ntkgen.progress import Report, ignore_report

# Maximum and minimum number of probe vectors. More take time and improve the density little; fewer give no usable
# estimate of its error.
MAX_PROBES, MIN_PROBES = 64, 4
# Number of axis points per bandwidth, and length of the axis beyond the outermost nodes, in bandwidths.
POINTS_PER_BANDWIDTH, MARGIN = 4, 4.0
# Maximum distance between neighbouring nodes, in bandwidths, where a quadrature rule resolves the density.
RESOLVED = 2.0


@dataclass(frozen=True)
class DensitySettings(Settings):
    """Settings of `density`.

    Attributes:
        passes: Number of passes over the stored tiles if the matrix does not fit in memory.
        bandwidth: Standard deviation, in decades, of the Gaussian that replaces each eigenvalue.
    """

    passes: int = defaults.DENSITY_PASSES
    bandwidth: float = defaults.BANDWIDTH


@dataclass(frozen=True, kw_only=True)
class DensityAnswer(Answer):
    """The density of log₁₀ λ at the points of an axis.

    Attributes:
        method: ``all`` if it was computed from all eigenvalues, ``lanczos`` if by stochastic Lanczos quadrature.
        probes: Number of Gaussian probe vectors of the quadrature; None with ``all``.
        log10_eigenvalues: Points of the axis, log₁₀ λ.
        density: Fraction of the eigenvalues per decade at each point.
        density_errors: Two standard errors of the density at each point; None below ``resolved_above``.
        fraction_above: Fraction of the eigenvalues above each point, without smoothing.
        fraction_off_axis: Fraction of the eigenvalues that are negative or indistinguishable from zero.
        resolved_above: Eigenvalue above which the quadrature resolves the density; None if it does so everywhere.
        bandwidth: Standard deviation of the Gaussians in decades.
        error_norm: Upper bound on ‖E‖_F, from the certificate of the store; None without one.
        passes: Number of passes over the stored tiles.
    """

    method: str
    probes: int | None
    log10_eigenvalues: Sequence[float]
    density: Sequence[float]
    density_errors: Sequence[float | None]
    fraction_above: Sequence[float]
    fraction_off_axis: float
    resolved_above: float | None
    bandwidth: float
    error_norm: float | None
    passes: float

    QUESTION: ClassVar[str] = "density"


def density(
    matrix: Matrix, settings: DensitySettings | None = None, *, report: Report = ignore_report
) -> DensityAnswer:
    """Compute the density of log₁₀ λ: the fraction of the eigenvalues per decade.

    Each eigenvalue is replaced by a Gaussian on the logarithmic axis. If the matrix fits in memory, the density is that
    of all eigenvalues. Otherwise it comes from stochastic Lanczos quadrature, in the given number of passes and with as
    many Gaussian probe vectors as fit in memory. The quadrature finds large eigenvalues as single nodes. Small
    eigenvalues are resolved only above ``resolved_above``. Below this value, neighbouring nodes are too far apart, and
    each node represents eigenvalues in a range around it.

    Raises:
        InputError: If a setting is out of range.
        BudgetError: If the memory limit is too small for the vectors.
    """
    settings = settings or DensitySettings()
    _check(settings)
    spectrum_settings = SpectrumSettings(memory_bytes=settings.memory_bytes)
    is_exact = is_dense(matrix, spectrum_settings)
    asked = {"bandwidth": settings.bandwidth, "passes": None if is_exact else settings.passes}

    def compute() -> DensityAnswer:
        before, probes = matrix.tiles_read, None
        if is_exact:
            rule = exact_rule(np.asarray(spectrum(matrix, spectrum_settings, report=report).eigenvalues))
        else:
            rule, probes = sampled_rule(matrix, settings, report)
        curve = draw(rule, matrix.num_rows, settings.bandwidth)
        return DensityAnswer(
            method="all" if is_exact else "lanczos",
            probes=probes,
            log10_eigenvalues=curve.log10_eigenvalues,
            density=curve.density,
            density_errors=curve.density_errors,
            fraction_above=curve.fraction_above,
            fraction_off_axis=curve.fraction_off_axis,
            resolved_above=curve.resolved_above,
            bandwidth=settings.bandwidth,
            error_norm=matrix.error_norm,
            passes=round((matrix.tiles_read - before) / matrix.num_tiles, 6),
        )

    return recall_or_compute(matrix, DensityAnswer, asked, compute)


def _check(settings: DensitySettings) -> None:
    if not 1e-3 <= settings.bandwidth <= 10 or settings.passes < 2:
        raise InputError(
            f"A density cannot be drawn with a bandwidth of {settings.bandwidth:g} in {settings.passes} passes: "
            "expected from 0.001 to 10 decades, and at least 2 passes. Are the two exchanged? Correct `bandwidth` "
            "and `passes`."
        )


# quadrature rules -----------------------------------------------------------------------------------------------------


def exact_rule(values: FloatArray) -> Quadrature:
    """Build the rule whose nodes are all eigenvalues, each with the weight 1."""
    return Quadrature.of(values, np.ones((len(values), 1)), len(values))


def plan_probes(matrix: Matrix, settings: DensitySettings) -> Sizes:
    """Choose the largest number of probe vectors, up to `MAX_PROBES`, that fits in memory.

    Raises:
        BudgetError: If the memory limit is too small for `MIN_PROBES` vectors.
    """
    left = memory_left(settings.memory_bytes)
    for block in range(min(MAX_PROBES, matrix.num_rows), 0, -1):
        sizes = Sizes(matrix.num_rows, block, settings.passes)
        if space_bytes(matrix, sizes) <= left or block <= MIN_PROBES:
            break
    require_space(matrix, sizes, settings.memory_bytes, "fewer `passes` take fewer")
    return sizes


def sampled_rule(matrix: Matrix, settings: DensitySettings, report: Report = ignore_report) -> tuple[Quadrature, int]:
    """Build the Gauss rule of a block Krylov space, with the weights of each probe scaled to their expected sum."""
    products, sizes = Products(matrix, report), plan_probes(matrix, settings)
    krylov = Krylov(products, sizes)
    while krylov.steps < settings.passes and krylov.added and not krylov.is_full:
        krylov.advance()
    rule = gauss(krylov)
    assert products.moments is not None
    return normalized(rule, products.moments), sizes.block


def normalized(rule: Quadrature, moments: Moments) -> Quadrature:
    """Scale the weights of each probe so that they add up to the number of eigenvalues."""
    rest = rule.weights[rule.num_known :]
    if len(rest):
        rest *= (moments.count - rule.num_known) / rest.sum(axis=0)
    return rule


# the axis -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Density of a quadrature rule; the fields are those of `DensityAnswer`."""

    log10_eigenvalues: list[float]
    density: list[float]
    density_errors: list[float | None]
    fraction_above: list[float]
    fraction_off_axis: float
    resolved_above: float | None


def draw(rule: Quadrature, num_rows: int, bandwidth: float) -> Curve:
    """Compute the density of a rule's nodes at the points of a logarithmic axis."""
    largest = float(np.abs(rule.nodes).max())
    is_on_axis = rule.nodes > num_rows * EPSILON * largest  # rounding hides smaller ones
    places, weights = np.log10(rule.nodes[is_on_axis]), rule.weights[is_on_axis] / num_rows
    axis = _axis(places, bandwidth)
    smooth = np.exp(-(((axis[:, None] - places) / bandwidth) ** 2) / 2) / (bandwidth * math.sqrt(2 * math.pi))
    samples = smooth @ weights
    errors = 2 * standard_error(samples) if rule.num_known < len(rule.nodes) else np.zeros(len(axis))
    order = np.argsort(places)
    resolved = _resolved_above(np.sort(places), bandwidth, is_exact=rule.num_known == len(rule.nodes))
    known = np.ones(len(axis), dtype=bool) if resolved is None else axis >= math.log10(resolved)
    above = np.append(np.cumsum(weights.mean(axis=1)[order][::-1])[::-1], 0.0)
    return Curve(
        log10_eigenvalues=axis.tolist(),
        density=samples.mean(axis=1).tolist(),
        density_errors=[float(error) if is_known else None for error, is_known in zip(errors, known, strict=True)],
        fraction_above=above[np.searchsorted(places[order], axis, side="right")].tolist(),
        fraction_off_axis=float(rule.weights[~is_on_axis].mean(axis=1).sum() / num_rows),
        resolved_above=resolved,
    )


def _axis(places: FloatArray, bandwidth: float) -> FloatArray:
    """Choose points from below the smallest eigenvalue to above the largest, with the powers of ten among them.

    >>> _axis(np.array([0.1]), 1.0)
    array([-4.  , -3.75, -3.5 , -3.25, -3.  , -2.75, -2.5 , -2.25, -2.  ,
           -1.75, -1.5 , -1.25, -1.  , -0.75, -0.5 , -0.25,  0.  ,  0.25,
            0.5 ,  0.75,  1.  ,  1.25,  1.5 ,  1.75,  2.  ,  2.25,  2.5 ,
            2.75,  3.  ,  3.25,  3.5 ,  3.75,  4.  ,  4.25])
    """
    if not len(places):
        return np.empty(0)
    per_decade = math.ceil(POINTS_PER_BANDWIDTH / bandwidth)
    low, high = places.min() - MARGIN * bandwidth, places.max() + MARGIN * bandwidth
    return np.arange(math.floor(low * per_decade), math.ceil(high * per_decade) + 1) / per_decade


def _resolved_above(places: FloatArray, bandwidth: float, *, is_exact: bool) -> float | None:
    """Find the eigenvalue below which the nodes are too far apart; return None if there is no such eigenvalue.

    Only the lower half of the nodes is searched. The largest eigenvalues are far apart, too, but they are known.
    """
    gaps = np.diff(places[: len(places) // 2 + 1])
    wide = np.flatnonzero(gaps > RESOLVED * bandwidth)
    return None if is_exact or not len(wide) else float(10 ** places[wide[-1] + 1])
