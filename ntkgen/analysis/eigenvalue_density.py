"""The density of the eigenvalues of a stored kernel on a logarithmic axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.eigenvalues import SpectrumSettings, is_dense, spectrum
from ntkgen.analysis.linalg.krylov import EPSILON, Krylov, Sizes
from ntkgen.analysis.linalg.quadrature import Moments, Quadrature, gauss, standard_error
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left, require_memory
from ntkgen.analysis.products import Products, reading_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import InputError
from ntkgen.progress import Report, ignore_report

# Vectors more than this take time and make it little better; with fewer nothing can be said of the error.
MAX_PROBES, MIN_PROBES = 64, 4
# Points of the axis for each bandwidth; how many bandwidths it is longer than what lies on it.
POINTS_PER_BANDWIDTH, MARGIN = 4, 4.0
# Nodes of a rule lie closer than this many bandwidths where it resolves the density.
RESOLVED = 2.0


@dataclass(frozen=True)
class DensitySettings(Settings):
    """How the density is computed: in how many ``passes``, where the eigenvalues cannot be; and how smooth it is.

    ``bandwidth`` is the standard deviation, in decades, of the Gaussian that each eigenvalue is drawn as.
    """

    passes: int = 20
    bandwidth: float = 0.1


@dataclass(frozen=True, kw_only=True)
class DensityAnswer(Answer):
    """The density of log₁₀ λ, at points of an axis.

    Attributes:
        method: From ``all`` eigenvalues, or by ``lanczos``.
        probes: Gaussian vectors, of Lanczos.
        log10_eigenvalues: The points of the axis.
        density: Part of the eigenvalues per decade, at each point.
        density_errors: Twice the standard error at each point; None below ``resolved_above``.
        fraction_above: Part of the eigenvalues above each point, not smoothed.
        fraction_off_axis: Part that is not positive, or indistinguishable from zero.
        resolved_above: The eigenvalue below which nodes are too far apart; None if all is resolved.
        bandwidth: As asked for.
        error_norm: The certificate's bound of ‖E‖_F.
        passes: Passes over the stored tiles.
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
    """Compute the density of log₁₀ λ: the part of the eigenvalues per decade, each drawn as a Gaussian.

    From all eigenvalues where they fit in memory. Elsewhere by stochastic Lanczos quadrature, in the given number of
    passes with as many Gaussian vectors as fit: large eigenvalues become single nodes, and small ones are resolved only
    down to ``resolved_above``. Below it the nodes are further apart than they are broad, and what they stand for lies
    somewhere around them.

    Raises:
        InputError: If a setting makes no sense.
        BudgetError: If the memory has no room for the vectors.
    """
    settings = settings or DensitySettings()
    _check(settings)
    exactly = SpectrumSettings(memory_bytes=settings.memory_bytes)
    is_exact = is_dense(matrix, exactly)
    asked = {"bandwidth": settings.bandwidth, "passes": None if is_exact else settings.passes}

    def compute() -> DensityAnswer:
        before, probes = matrix.tiles_read, None
        if is_exact:
            rule = exact_rule(np.asarray(spectrum(matrix, exactly, report=report).eigenvalues))
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
            "expected from 0.001 to 10 decades, and at least 2 passes. Are the two exchanged? Correct --bandwidth and "
            "--passes."
        )


# rules ----------------------------------------------------------------------------------------------------------------


def exact_rule(values: FloatArray) -> Quadrature:
    """Take all eigenvalues as nodes of the weight 1."""
    return Quadrature.of(values, np.ones((len(values), 1)), len(values))


def plan_probes(matrix: Matrix, settings: DensitySettings) -> Sizes:
    """Choose as many vectors as the memory holds in each pass, up to a number.

    Raises:
        BudgetError: If it does not hold a few.
    """
    left = memory_left(settings.memory_bytes)
    for block in range(min(MAX_PROBES, matrix.num_rows), 0, -1):
        sizes = Sizes(matrix.num_rows, block, settings.passes)
        needed = sizes.bytes + reading_bytes(matrix, block)
        if needed <= left or block <= MIN_PROBES:
            break
    what = f"{sizes.capacity + block:,} vectors of {matrix.num_rows:,} rows (fewer --passes take fewer)"
    require_memory(what, needed, settings.memory_bytes)
    return sizes


def sampled_rule(matrix: Matrix, settings: DensitySettings, report: Report = ignore_report) -> tuple[Quadrature, int]:
    """Build the rule of a block Krylov space, and give each probe's weights the sum that they have in the mean."""
    products, sizes = Products(matrix, report), plan_probes(matrix, settings)
    krylov = Krylov(products, sizes)
    while krylov.steps < settings.passes and krylov.added and not krylov.is_full:
        krylov.advance()
    rule = gauss(krylov)
    assert products.moments is not None
    return normalized(rule, products.moments), sizes.block


def normalized(rule: Quadrature, moments: Moments) -> Quadrature:
    """Scale the weights of each probe such that they add up to the number of eigenvalues."""
    rest = rule.weights[rule.num_known :]
    if len(rest):
        rest *= (moments.count - rule.num_known) / rest.sum(axis=0)
    return rule


# the axis -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A rule, drawn; the fields are those of `DensityAnswer`."""

    log10_eigenvalues: list[float]
    density: list[float]
    density_errors: list[float | None]
    fraction_above: list[float]
    fraction_off_axis: float
    resolved_above: float | None


def draw(rule: Quadrature, num_rows: int, bandwidth: float) -> Curve:
    """Draw the nodes of a rule on a logarithmic axis."""
    largest = float(np.abs(rule.nodes).max())
    is_on_axis = rule.nodes > num_rows * EPSILON * largest  # below, LAPACK does not tell them from zero
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
    """Lay points from below the smallest eigenvalue to above the largest; the powers of ten are among them.

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
    """Find the eigenvalue below which the nodes are too far apart; None, if there is nothing below it.

    At the top single eigenvalues are far apart too, and known: it is the lower half of the nodes that is looked at.
    """
    gaps = np.diff(places[: len(places) // 2 + 1])
    wide = np.flatnonzero(gaps > RESOLVED * bandwidth)
    return None if is_exact or not len(wide) else float(10 ** places[wide[-1] + 1])
