"""The log-determinant of a kernel and of all its leading principal blocks, exact and out of core.

The certificate of a store is a measured bound on the error E of the stored kernel. An eigenvalue below that bound, and
its contribution to the log-determinant, may be pure error.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ntkgen.analysis.answer import Answer
from ntkgen.analysis.linalg.cholesky import FactorSettings, Work, factored
from ntkgen.analysis.linalg.factor import Factor, FactorPlan, place_of_factor, prefix_logdets, remove_folder
from ntkgen.analysis.linalg.indefinite import examined
from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.results import recall_or_compute
from ntkgen.files.lock import write_lock
from ntkgen.progress import Report, ignore_report

# Number of vectors and of steps of the subspace iteration for the smallest eigenvalue.
VECTORS, ITERATIONS = 8, 3
# Data types and precisions whose rounding errors are visible in every small eigenvalue.
COARSE = ("float16", "bfloat16")


@dataclass(frozen=True)
class LogdetSettings(FactorSettings):
    """Settings of `logdet`.

    Attributes:
        prefixes: Whether the answer also has the log-determinants of the leading principal blocks.
    """

    prefixes: bool = False


@dataclass(frozen=True)
class Inertia:
    """Numbers of positive and of negative pivots, which are those of the eigenvalues (Sylvester's law of inertia).

    Attributes:
        positive: Number of positive eigenvalues.
        negative: Number of negative eigenvalues.
    """

    positive: int
    negative: int


@dataclass(frozen=True, kw_only=True)
class LogdetAnswer(Answer):
    """log |det(K + λI)| and its sign, with measures of their reliability.

    Attributes:
        logdet: log |det(K + λI)| in nats.
        sign: Sign of the determinant, 1 or −1.
        shift: Shift λ that was added to the diagonal.
        logdet_per_row: Log-determinant divided by the number of rows, in nats.
        inertia: Numbers of positive and of negative eigenvalues of K + λI.
        smallest_pivot: Smallest absolute value of a pivot.
        tile_rows: Number of rows of a tile of the factor.
        panel_rows: Number of columns of a panel, the part of the factor that is held in memory.
        panels: Number of panels.
        bytes_kept_planned: Memory of a panel in bytes.
        bytes_read_planned: Number of bytes that the factorisation reads from its own finished tiles.
        factor_bytes: Size of the factor on disk in bytes.
        gflops: Speed of the factorisation by this process in GFLOP/s; None if the factor was complete before.
        error_norm: Upper bound on ‖E‖_F, from the certificate of the store; None without one.
        prefixes: Log-determinants of the leading blocks in nats; None unless the settings ask for them.
        prefix_rows: Numbers of rows of these blocks. If all pivots are positive, there is a block for every number of
            rows. Otherwise there are only the blocks that end where a tile of the factor ends.
        prefix_signs: Signs of the determinants of these blocks.
        max_factor: Largest |L| of the factorisation L D Lᵀ. This and the next two fields are None unless ``indefinite``
            was set.
        growth: max |L|² / max |(K + λI)_ii|, which is at most 1 for a positive definite matrix.
        residual: Largest ‖(K + λI − LDLᵀ)v‖ / ‖(K + λI)v‖ over a few random vectors v.
        smallest_eigenvalue_bound: Upper bound on the smallest eigenvalue of K + λI; None if a pivot is negative.
        warnings: Warnings about the result, for example that the error may exceed the smallest eigenvalue.
    """

    logdet: float
    sign: int
    shift: float
    logdet_per_row: float
    inertia: Inertia
    smallest_pivot: float
    tile_rows: int
    panel_rows: int
    panels: int
    bytes_kept_planned: int
    bytes_read_planned: int
    factor_bytes: int
    gflops: float | None
    error_norm: float | None
    prefixes: Sequence[float] | None = None
    prefix_rows: Sequence[int] | None = None
    prefix_signs: Sequence[int] | None = None
    max_factor: float | None = None
    growth: float | None = None
    residual: float | None = None
    smallest_eigenvalue_bound: float | None
    warnings: Sequence[str]

    QUESTION: ClassVar[str] = "logdet"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "LogdetAnswer":
        """Build an answer from a saved dictionary."""
        return super().from_json({**found, "inertia": Inertia(**found["inertia"])})

    def by_samples(self, num_outputs: int) -> tuple[list[int], list[float]]:  # samples, log-determinants
        """Select the prefixes that consist of whole samples."""
        pairs = [
            (rows // num_outputs, value)
            for rows, value in zip(self.prefix_rows or (), self.prefixes or (), strict=True)
            if rows % num_outputs == 0
        ]
        return [samples for samples, _ in pairs], [value for _, value in pairs]


def logdet(matrix: Matrix, settings: LogdetSettings | None = None, *, report: Report = ignore_report) -> LogdetAnswer:
    """Compute log |det(K + λI)| and its sign from a Cholesky factor on disk.

    With ``indefinite`` in the settings, the factorisation is L D Lᵀ, and negative eigenvalues are allowed. The
    factorisation costs N³/3 FLOPs (see `factored`).

    Raises:
        NotPositiveError: If a pivot is not positive and ``indefinite`` is not set, or if the residual of L D Lᵀ is too
            large.
    """
    settings = settings or LogdetSettings()
    keeping = dataclasses.replace(settings, keep=True)

    def compute() -> LogdetAnswer:
        with factored(matrix, keeping, report) as (factor, work):
            return _measured(matrix, settings, (factor, work), report)

    asked = {"shift": float(settings.shift), "indefinite": settings.indefinite}
    answer = recall_or_compute(matrix, LogdetAnswer, asked, compute)
    if settings.keep and answer.remembered:
        with factored(matrix, keeping, report):
            pass
    elif not settings.keep and not answer.remembered:  # not earlier: now the answer is on disk
        remove_factor(matrix, settings.shift)
    if settings.prefixes:
        return answer
    return dataclasses.replace(answer, prefixes=None, prefix_rows=None, prefix_signs=None)


def remove_factor(matrix: Matrix, shift: float) -> None:
    """Remove the factor of K + λI, if there is one."""
    folder, _ = place_of_factor(matrix, shift)
    with write_lock(folder):
        remove_folder(folder)


def _measured(matrix: Matrix, settings: LogdetSettings, result: tuple[Factor, Work], report: Report) -> LogdetAnswer:
    factor, work = result
    plan, pivots = factor.plan, factor.pivots()
    rows, prefixes, signs = _prefixes(pivots, plan)
    examination = examined(matrix, factor, settings.shift, report) if settings.indefinite else None
    smallest = _smallest_eigenvalue(matrix, factor, pivots)
    answer = LogdetAnswer(
        logdet=prefixes[-1],
        sign=signs[-1],
        shift=float(settings.shift),
        logdet_per_row=prefixes[-1] / len(pivots),
        inertia=Inertia(positive=int((pivots > 0).sum()), negative=int((pivots < 0).sum())),
        smallest_pivot=float(np.abs(pivots).min()),
        tile_rows=plan.side,
        panel_rows=plan.panel_rows,
        panels=-(-plan.num_blocks // plan.panel_tiles),
        bytes_kept_planned=plan.panel_bytes,
        bytes_read_planned=plan.bytes_read,
        factor_bytes=plan.factor_bytes,
        gflops=_speed(plan, work),
        error_norm=matrix.error_norm,
        prefixes=prefixes,
        prefix_rows=rows,
        prefix_signs=signs,
        smallest_eigenvalue_bound=smallest,
        warnings=warnings_of(matrix, pivots, smallest),
    )
    return answer if examination is None else dataclasses.replace(answer, **vars(examination))


def _prefixes(pivots: FloatArray, plan: FactorPlan) -> tuple[list[int], list[float], list[int]]:
    """List the log-determinants of the leading blocks; those that end inside a pivoted tile are not known.

    Returns:
        Numbers of rows of the blocks, log-determinants and signs.
    """
    logdets, signs = prefix_logdets(pivots), np.cumprod(np.sign(pivots))
    is_positive = bool((pivots > 0).all())
    rows = np.arange(1, len(pivots) + 1) if is_positive else [plan.rows(block).stop for block in range(plan.num_blocks)]
    at = np.asarray(rows) - 1
    return (at + 1).tolist(), logdets[at].tolist(), signs[at].astype(int).tolist()


def _speed(plan: FactorPlan, work: Work) -> float | None:
    """Compute the speed of this process in GFLOP/s; None if the factor was complete before."""
    fraction = work.products / plan.num_products if plan.num_products else 1.0
    return fraction * plan.num_rows**3 / 3 / work.seconds / 1e9 if fraction else None


def _smallest_eigenvalue(matrix: Matrix, factor: Factor, pivots: FloatArray) -> float | None:
    """Bound the smallest eigenvalue of a positive definite K + λI from above, closely enough to compare it with ‖E‖.

    No pivot is below the smallest eigenvalue, so the smallest pivot is a first bound. If ‖E‖ is known and below that
    bound, a few steps of subspace iteration with the factor improve it: the reciprocal of a Ritz value of the inverse
    is a bound, too.
    """
    if (pivots < 0).any():
        return None
    bound, limit = float(pivots.min()), matrix.error_norm
    if limit is None or bound <= limit:
        return bound
    X = np.random.default_rng(0).standard_normal((len(pivots), min(VECTORS, len(pivots))))
    for _ in range(ITERATIONS):
        Q = np.linalg.qr(X)[0]
        X = factor.solve(Q)
        bound = min(bound, 1 / float(np.linalg.eigvalsh(Q.T @ X)[-1]))
        if bound <= limit:
            break
    return bound


def warnings_of(matrix: Matrix, pivots: FloatArray, smallest: float | None) -> list[str]:
    """Describe the limits of a log-determinant: low precision, negative eigenvalues, and errors above the smallest."""
    norm, precision = matrix.error_norm, matrix.store.manifest.plan.precision
    certificate = matrix.store.manifest.certificate
    confidence = "" if certificate is None or certificate.is_exact else ", with 95 % confidence"
    known = (
        "its error is not known, because it has no certificate (a measured error bound)"
        if norm is None
        else f"its certificate bounds the error of every eigenvalue by ‖E‖ ≤ {norm:.3g}{confidence}"
    )
    warnings = []
    if coarse := [name for name in (matrix.dtype, precision) if name in COARSE]:
        warnings.append(f"The kernel at {matrix.name} has {' and '.join(coarse)} precision; {known}.")
    negative = int((pivots < 0).sum())
    if negative:
        warnings.append(
            f"The kernel at {matrix.name} has {negative:,} negative eigenvalues. The exact kernel has none, so these "
            f"eigenvalues, and others of the same size, are errors; {known}."
        )
    if norm is not None and smallest is not None and norm >= smallest:
        warnings.append(
            f"The error of the kernel at {matrix.name} may exceed its smallest eigenvalue: {known}, and the smallest "
            f"eigenvalue is at most {smallest:.3g}. The log-determinant is exact for the stored numbers only."
        )
    return warnings
