"""The spectrum of a stored kernel: all eigenvalues if the matrix fits in memory, otherwise the largest.

With the eigenvalues λ₁ ≥ … ≥ λ_N of K,

    effective rank        exp(−Σ p log p), p = λ / Σ λ      (Roy, Vetterli 2007)
    participation ratio   (Σ λ)² / Σ λ²
    stable rank           ‖K‖_F² / ‖K‖₂² = Σ λ² / max λ²
    condition             λ₁ / λ_N

An exact kernel has no negative eigenvalues, but a rounded one may. The effective rank counts them as zero, and the
answer reports their number. The certificate of a store is a measured bound on the error E of the stored matrix. ‖E‖
bounds the error of each eigenvalue, so that an eigenvalue below ‖E‖ may be noise.

References:
    Roy, Vetterli (2007), The effective rank: a measure of effective dimensionality.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.linalg.cholesky import FactorSettings, factored
from ntkgen.analysis.linalg.dense import eigenvalues
from ntkgen.analysis.linalg.factor import place_of_factor
from ntkgen.analysis.linalg.krylov import EPSILON, Goal, Krylov, Largest, Multiply, Sizes, run
from ntkgen.analysis.linalg.quadrature import Moments, effective_rank, estimate_effective_rank
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left
from ntkgen.analysis.products import Products, reading_bytes, require_space, space_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import InputError, NotPositiveError
from ntkgen.progress import Report, counter, ignore_report

# Maximum number of rows for which all eigenvalues are computed even if ``top`` is given, since that takes seconds.
FEW_ROWS = 4096
# Minimum number of vectors in a block beyond the wanted eigenvalues, and maximum number of vectors in a block.
OVERSAMPLING, MAX_BLOCK = 8, 1024
# Maximum number of vectors in a block without a memory limit. 1,024 would save one pass of six, but take six times as
# long on two cores.
UNASKED_BLOCK = 256
# Number of blocks that should fit in memory, so that the first passes need no restart, and minimum number of blocks.
BLOCKS, MIN_BLOCKS = 8, 3
# Block size and maximum number of steps of block Krylov on the inverse, which finds the smallest eigenvalue.
INVERSE_BLOCK, INVERSE_STEPS = 8, 24


@dataclass(frozen=True)
class SpectrumSettings(Settings):
    """Settings of `spectrum`.

    Attributes:
        top: Number of the largest eigenvalues to compute. None means all if the matrix fits in memory, otherwise 50.
        tolerance: Largest accepted error of an eigenvalue, relative to that eigenvalue.
        max_passes: Maximum number of passes over the stored tiles.
        condition: Whether to compute the smallest eigenvalue and the condition number even if the matrix does not fit
            in memory. That needs a Cholesky factor on disk.
    """

    top: int | None = None
    tolerance: float = defaults.TOLERANCE
    max_passes: int = defaults.MAX_PASSES
    condition: bool = False


@dataclass(frozen=True, kw_only=True)
class SpectrumAnswer(Answer):
    """Eigenvalues of a kernel in descending order, bounds on their errors, and quantities of the whole spectrum.

    The module's docstring defines the ranks and the condition number.

    Attributes:
        method: ``all`` if LAPACK computed all eigenvalues, ``largest`` if block Krylov computed the largest.
        block: Number of vectors that block Krylov multiplies at a time; None with ``all``.
        eigenvalues: All eigenvalues or the largest ones, in descending order.
        residual_bounds: Upper bound on the distance of each value to the nearest eigenvalue of the stored kernel.
        error_bounds: Upper bound on the error of each eigenvalue; see `krylov.measure`.
        is_converged: Whether the eigenvalues meet the tolerance.
        is_proven: Whether the error bounds are proven. Otherwise they are based on an extrapolation.
        trace: Trace of the kernel.
        frobenius_norm: Frobenius norm of the kernel, ‖K‖_F.
        participation_ratio: Participation ratio of the eigenvalues.
        stable_rank: Stable rank of the kernel.
        effective_rank: Effective rank of the kernel.
        effective_rank_error: Estimated error of the effective rank; 0 if all eigenvalues are known.
        smallest: Smallest eigenvalue; None if it was not computed.
        smallest_error: Upper bound on the error of the smallest eigenvalue; None if it was not computed.
        condition: Condition number λ₁ / λ_N; None if λ_N was not computed or does not exceed its error bound.
        condition_error: Error of the condition number that follows from ``smallest_error``; None without one.
        num_negative: Number of negative eigenvalues; None if it is not known.
        error_norm: Upper bound on ‖E‖_F, from the certificate of the store; None without one.
        num_above_error: Number of computed eigenvalues above ``error_norm``; None without a certificate.
        passes: Number of passes over the stored tiles.
        not_positive: Reason why the smallest eigenvalue could not be computed out of core; None otherwise.
    """

    method: str
    block: int | None = None
    eigenvalues: Sequence[float]
    residual_bounds: Sequence[float]
    error_bounds: Sequence[float]
    is_converged: bool
    is_proven: bool
    trace: float
    frobenius_norm: float
    participation_ratio: float
    stable_rank: float
    effective_rank: float
    effective_rank_error: float
    smallest: float | None
    smallest_error: float | None
    condition: float | None
    condition_error: float | None
    num_negative: int | None
    error_norm: float | None
    num_above_error: int | None
    passes: float
    not_positive: str | None = None

    QUESTION: ClassVar[str] = "spectrum"

    def first(self, top: int | None) -> "SpectrumAnswer":
        """Return the answer with only the first ``top`` entries of its lists."""
        return dataclasses.replace(
            self,
            eigenvalues=self.eigenvalues[:top],
            residual_bounds=self.residual_bounds[:top],
            error_bounds=self.error_bounds[:top],
        )


def spectrum(
    matrix: Matrix,
    settings: SpectrumSettings | None = None,
    *,
    solve: Multiply | None = None,
    report: Report = ignore_report,
) -> SpectrumAnswer:
    """Compute eigenvalues in descending order, bounds on their errors, and quantities of the whole spectrum.

    If K fits in memory, LAPACK computes all eigenvalues in 4/3 N³ FLOPs and one pass. Otherwise, or if K has more than
    4,096 rows and ``top`` is given, block Krylov computes the largest eigenvalues. Its first pass gives the exact trace
    and Frobenius norm, and its Gaussian vectors give an estimate of the effective rank without a further pass. The
    condition number then needs ``solve``, or ``condition`` in the settings.

    Args:
        matrix: The kernel.
        settings: The settings; None means the defaults.
        solve: Multiplies vectors with K⁻¹. If it is None and the settings ask for the condition number, a Cholesky
            factor on disk is used.
        report: Called as tiles are read.

    Raises:
        InputError: If ``top`` exceeds the number of eigenvalues, or another setting is out of range.
        BudgetError: If the memory limit is too small for the vectors.
    """
    settings = settings or SpectrumSettings()
    _check(matrix, settings)
    sizes = None if is_dense(matrix, settings) else plan_sizes(matrix, settings)
    asked = {"method": "all"} if sizes is None else _settings_of(settings, has_inverse=solve is not None)

    def compute() -> SpectrumAnswer:
        before = matrix.tiles_read
        if sizes is None:
            answer = all_eigenvalues(matrix, report)
        else:
            answer = largest_eigenvalues(matrix, sizes, settings, report)
        passes = (matrix.tiles_read - before) / matrix.num_tiles
        answer = dataclasses.replace(answer, passes=round(passes, 6))
        if sizes is not None and (solve is not None or settings.condition):
            return _with_condition(matrix, answer, (settings, solve), report)
        return answer

    return recall_or_compute(matrix, SpectrumAnswer, asked, compute).first(settings.top)


def _settings_of(settings: SpectrumSettings, *, has_inverse: bool) -> dict[str, Any]:
    condition = settings.condition or has_inverse
    top = settings.top or defaults.SPECTRUM_TOP
    return {"top": top, "tolerance": settings.tolerance, "max_passes": settings.max_passes, "condition": condition}


def _check(matrix: Matrix, settings: SpectrumSettings) -> None:
    if settings.top is not None and not 1 <= settings.top <= matrix.num_rows:
        raise InputError(
            f"The kernel at {matrix.name} has no {settings.top:,} eigenvalues: expected from 1 to its "
            f"{matrix.num_rows:,} rows, found `top` {settings.top:,}. Is another kernel meant? Lower `top`."
        )
    if not 0 < settings.tolerance < 1 or settings.max_passes < 1:
        raise InputError(
            f"Eigenvalues cannot be computed to {settings.tolerance:g} in {settings.max_passes} passes: expected a "
            "relative tolerance between 0 and 1 and at least one pass. Are the two exchanged? Correct `tolerance` "
            "and `max_passes`."
        )


# choice of method and sizes -------------------------------------------------------------------------------------------


def is_dense(matrix: Matrix, settings: SpectrumSettings) -> bool:
    """Return whether to compute all eigenvalues: the matrix fits in memory, and is small or ``top`` is not given."""
    needed = 8 * matrix.num_rows * (matrix.num_rows + 128) + reading_bytes(matrix)
    is_wanted = settings.top is None or matrix.num_rows <= FEW_ROWS
    return is_wanted and needed <= memory_left(settings.memory_bytes)


def plan_sizes(matrix: Matrix, settings: SpectrumSettings) -> Sizes:
    """Choose the block size: the largest with which eight blocks fit in memory.

    If not even eight of the smallest blocks fit, choose the largest number of them, three at least, that fits.

    Raises:
        BudgetError: If three of the smallest blocks do not fit.
    """
    N, left = matrix.num_rows, memory_left(settings.memory_bytes)
    smallest = min(N, min(settings.top or defaults.SPECTRUM_TOP, N) + OVERSAMPLING)

    most = MAX_BLOCK if settings.memory_bytes is not None else UNASKED_BLOCK
    for block in range(min(N, max(most, smallest)), smallest - 1, -1):
        if space_bytes(matrix, sizes := Sizes(N, block, BLOCKS)) <= left:
            return sizes
    for num_blocks in range(BLOCKS - 1, MIN_BLOCKS, -1):
        if space_bytes(matrix, sizes := Sizes(N, smallest, num_blocks)) <= left:
            return sizes
    sizes = Sizes(N, smallest, MIN_BLOCKS)
    require_space(matrix, sizes, settings.memory_bytes, "a lower `top` takes fewer")
    return sizes


# all eigenvalues ------------------------------------------------------------------------------------------------------


def all_eigenvalues(matrix: Matrix, report: Report = ignore_report) -> SpectrumAnswer:
    """Compute all eigenvalues by LAPACK in float64, and the quantities that follow from them.

    LAPACK returns the eigenvalues of K + F with ‖F‖₂ ≤ p(N) ε ‖K‖₂, where p grows slowly. The error bounds use
    p(N) = N. Holds 8 N² bytes in memory.
    """
    K = matrix.dense(step=counter(report, "spectrum", 0, matrix.num_tiles))
    moments = Moments(len(K), float(np.trace(K)), float(np.linalg.norm(K)) ** 2)
    values = eigenvalues(K, report)
    bound = len(values) * EPSILON * float(np.abs(values).max())
    smallest = float(values[-1])
    norms, condition = _norms(moments, float(np.abs(values).max())), _ratio(float(values[0]), (smallest, bound))
    return SpectrumAnswer(
        method="all",
        eigenvalues=values.tolist(),
        residual_bounds=[bound] * len(values),
        error_bounds=[bound] * len(values),
        is_converged=True,
        is_proven=True,
        **vars(norms),
        effective_rank=effective_rank(values),
        effective_rank_error=0.0,
        smallest=smallest,
        smallest_error=bound,
        condition=condition[0],
        condition_error=condition[1],
        num_negative=int((values < 0).sum()),
        error_norm=matrix.error_norm,
        num_above_error=_count_above_error(matrix, values),
        passes=1.0,
    )


@dataclass(frozen=True)
class _Norms:
    """Quantities that follow from the trace, ‖K‖_F and ‖K‖₂."""

    trace: float
    frobenius_norm: float
    participation_ratio: float
    stable_rank: float


def _norms(moments: Moments, norm: float) -> _Norms:
    return _Norms(
        trace=moments.trace,
        frobenius_norm=float(np.sqrt(moments.squares)),
        participation_ratio=moments.trace**2 / moments.squares if moments.squares else 0.0,
        stable_rank=moments.squares / norm**2 if norm else 0.0,
    )


def _ratio(largest: float, smallest: tuple[float, float]) -> tuple[float, float] | tuple[None, None]:
    """Compute λ₁ / λ_N and its error from λ₁ and (λ_N, its error); return None twice if λ_N ≤ its error."""
    value, error = smallest
    return (None, None) if value <= error else (largest / value, largest / (value - error) - largest / value)


def _count_above_error(matrix: Matrix, values: FloatArray) -> int | None:
    """Count the eigenvalues above the error bound of the stored matrix; return None without a certificate."""
    norm = matrix.error_norm
    return None if norm is None else int((values > norm).sum())


# largest eigenvalues --------------------------------------------------------------------------------------------------


def largest_eigenvalues(
    matrix: Matrix, sizes: Sizes, settings: SpectrumSettings, report: Report = ignore_report
) -> SpectrumAnswer:
    """Compute the largest eigenvalues out of core, the exact trace and norms, and an estimate of the effective rank."""
    products = Products(matrix, report)
    krylov = Krylov(products, sizes)
    ranks: list[tuple[float, float]] = []

    def estimate() -> None:
        assert products.moments is not None
        if krylov.is_lanczos and products.moments.trace > 0:
            ranks.append(estimate_effective_rank(krylov, products.moments))

    goal = Goal(min(settings.top or defaults.SPECTRUM_TOP, sizes.num_rows), settings.tolerance, settings.max_passes)
    largest = run(krylov, goal, squares=lambda: products.squares, before_restart=estimate)
    estimate()
    assert products.moments is not None
    rank, error = ranks[0] if ranks else (0.0, 0.0)
    norms = _norms(products.moments, float(np.abs(largest.values).max()))
    return SpectrumAnswer(
        method="largest",
        block=sizes.block,
        eigenvalues=largest.values.tolist(),
        residual_bounds=largest.residuals.tolist(),
        error_bounds=largest.errors.tolist(),
        is_converged=largest.is_converged,
        is_proven=largest.is_proven,
        **vars(norms),
        effective_rank=rank,
        effective_rank_error=error,
        smallest=None,
        smallest_error=None,
        condition=None,
        condition_error=None,
        num_negative=None,
        error_norm=matrix.error_norm,
        num_above_error=_count_above_error(matrix, largest.values),
        passes=krylov.steps,
    )


# smallest eigenvalue --------------------------------------------------------------------------------------------------


def smallest_eigenvalue(
    solve: Callable[[FloatArray], FloatArray], num_rows: int, tolerance: float = defaults.TOLERANCE
) -> tuple[float, float]:
    """Compute the smallest eigenvalue of a positive definite K and a bound on its error, by block Krylov on K⁻¹.

    Args:
        solve: Multiplies vectors with K⁻¹; called a few times.
        num_rows: Number of rows of K.
        tolerance: Largest accepted error, relative to the eigenvalue.
    """
    sizes = Sizes(num_rows, min(INVERSE_BLOCK, num_rows), INVERSE_STEPS)
    largest: Largest = run(Krylov(solve, sizes), Goal(1, tolerance, INVERSE_STEPS))
    inverse, error = float(largest.values[0]), float(largest.errors[0])
    return 1 / inverse, error / (inverse * (inverse + error))


@contextmanager
def _solving(matrix: Matrix, settings: SpectrumSettings, report: Report) -> Iterator[Multiply]:
    """Provide a solver with a Cholesky factor beside the store; remove the factor afterwards if it is new."""
    was_there = place_of_factor(matrix, 0.0)[0].has("zarr.json")
    with factored(matrix, FactorSettings(memory_bytes=settings.memory_bytes, keep=was_there), report) as (factor, _):
        yield factor.solve


def _with_condition(
    matrix: Matrix, answer: SpectrumAnswer, settings_and_solve: tuple[SpectrumSettings, Multiply | None], report: Report
) -> SpectrumAnswer:
    """Add the smallest eigenvalue and the condition number; if K is not positive definite, add that message instead."""
    settings, solve = settings_and_solve
    try:
        if solve is not None:
            smallest = smallest_eigenvalue(solve, matrix.num_rows)
        else:
            with _solving(matrix, settings, report) as solving:
                smallest = smallest_eigenvalue(solving, matrix.num_rows)
    except NotPositiveError as error:
        return dataclasses.replace(answer, not_positive=str(error))
    condition, condition_error = _ratio(answer.eigenvalues[0], smallest)
    return dataclasses.replace(
        answer,
        smallest=smallest[0],
        smallest_error=smallest[1],
        condition=condition,
        condition_error=condition_error,
        num_negative=0,
    )
