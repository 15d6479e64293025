"""The spectrum of a stored kernel: all eigenvalues where they fit in memory, the largest where they do not.

With the eigenvalues λ₁ ≥ … ≥ λ_N of K,

    effective rank        exp(−Σ p log p), p = λ / Σ λ      (Roy, Vetterli 2007)
    participation ratio   (Σ λ)² / Σ λ²
    stable rank           ‖K‖_F² / ‖K‖₂² = Σ λ² / max λ²
    condition             λ₁ / λ_N

A kernel has no negative eigenvalues, but its rounded copy may: they count as zero in the effective rank, and are
counted. The stored matrix is known to ‖E‖, the certificate's bound, and so is each eigenvalue: one below that is noise.

References:
    Roy, Vetterli (2007), The effective rank: a measure of effective dimensionality.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.linalg.cholesky import FactorSettings, factored
from ntkgen.analysis.linalg.dense import eigenvalues
from ntkgen.analysis.linalg.factor import place_of_factor
from ntkgen.analysis.linalg.krylov import EPSILON, Goal, Krylov, Largest, Multiply, Sizes, run
from ntkgen.analysis.linalg.quadrature import Moments, estimate_effective_rank
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left, require_memory
from ntkgen.analysis.products import TILES_HELD, Products, reading_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.errors import InputError, NotPositiveError
from ntkgen.progress import Report, counter, ignore_report

# So many eigenvalues, where all of them do not fit and no number is given.
USUAL_TOP = 50
# Up to so many rows all eigenvalues take seconds, and --top just shortens their list.
FEW_ROWS = 4096
# Vectors in a block beyond the eigenvalues that are wanted, at least, and vectors in one at most: each takes time.
OVERSAMPLING, MAX_BLOCK = 8, 1024
# Where nobody has given memory for more: blocks of 1,024 save a pass of six, and take six times as long on two cores.
UNASKED_BLOCK = 256
# Blocks that the memory is to hold, so that this many passes need no restart; and the fewest it may hold.
BLOCKS, MIN_BLOCKS = 8, 3
# Of the Krylov space of the inverse, in which the smallest eigenvalue is looked for.
INVERSE_BLOCK, INVERSE_STEPS = 8, 24


@dataclass(frozen=True)
class SpectrumSettings(Settings):
    """What is wanted: the ``top`` largest eigenvalues, or all if they fit in memory.

    ``tolerance`` is relative to each eigenvalue; with ``condition`` the smallest is computed out of core too, from a
    Cholesky factor on disk.
    """

    top: int | None = None
    tolerance: float = 1e-6
    max_passes: int = 100
    condition: bool = False


@dataclass(frozen=True, kw_only=True)
class SpectrumAnswer(Answer):
    """Eigenvalues of a kernel, descending, with bounds on their errors, and what follows from all of them.

    Attributes:
        method: ``all`` by LAPACK, or ``largest`` by block Krylov.
        block: Vectors that block Krylov multiplies at a time.
        eigenvalues: All of them, or the largest.
        residual_bounds: For each, how far from it the nearest eigenvalue of the kernel is at most.
        error_bounds: For each, how far off it is at most (see `krylov.measure`).
        is_converged: Whether the tolerance was met.
        is_proven: Whether the error bounds are proofs.
        smallest: The smallest eigenvalue, if it was computed.
        condition: λ₁ / λ_N; None where it is not known, or λ_N is not told from zero by the computation.
        num_negative: Eigenvalues below zero, if all are known.
        error_norm: The certificate's bound of ‖E‖_F.
        num_above_error: Eigenvalues above that bound.
        passes: Passes over the stored tiles.
        not_positive: Why the smallest eigenvalue could not be computed out of core.
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
        """Shorten the lists."""
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
    """Compute eigenvalues, the largest first, with bounds on their errors, and what follows from all of them.

    Where K fits in memory, LAPACK computes all of them in 4/3 N³ FLOPs and one pass. Elsewhere, or if there are many
    and ``top`` asks for a few, block Krylov computes the largest: trace and norms come exactly from its first pass, the
    effective rank is estimated from its Gaussian vectors without a further one, and the condition is known only if
    there is something to ``solve`` with.

    Args:
        matrix: The kernel.
        settings: What is wanted.
        solve: Multiplies with K⁻¹; by default, if the settings ask for the condition, a Cholesky factor on disk.
        report: Called as tiles are read.

    Raises:
        InputError: If more eigenvalues are asked for than there are.
        BudgetError: If the memory has no room for so many vectors.
    """
    settings = settings or SpectrumSettings()
    _check(matrix, settings)
    sizes = None if is_dense(matrix, settings) else plan_sizes(matrix, settings)
    asked = {"method": "all"} if sizes is None else _asked(settings, has_inverse=solve is not None)

    def compute() -> SpectrumAnswer:
        before = matrix.tiles_read
        if sizes is None:
            found = all_eigenvalues(matrix, report)
        else:
            found = largest_eigenvalues(matrix, sizes, settings, report)
        passes = (matrix.tiles_read - before) / matrix.num_tiles
        found = dataclasses.replace(found, passes=round(passes, 6))
        if sizes is not None and (solve is not None or settings.condition):
            return _with_condition(matrix, found, (settings, solve), report)
        return found

    return recall_or_compute(matrix, SpectrumAnswer, asked, compute).first(settings.top)


def _asked(settings: SpectrumSettings, *, has_inverse: bool) -> dict[str, Any]:
    condition = settings.condition or has_inverse
    top = settings.top or USUAL_TOP
    return {"top": top, "tolerance": settings.tolerance, "max_passes": settings.max_passes, "condition": condition}


def _check(matrix: Matrix, settings: SpectrumSettings) -> None:
    if settings.top is not None and not 1 <= settings.top <= matrix.num_rows:
        raise InputError(
            f"The kernel at {matrix.name} has no {settings.top:,} eigenvalues: expected from 1 to its "
            f"{matrix.num_rows:,} rows, found --top {settings.top:,}. Is another kernel meant? Lower --top."
        )
    if not 0 < settings.tolerance < 1 or settings.max_passes < 1:
        raise InputError(
            f"Eigenvalues cannot be computed to {settings.tolerance:g} in {settings.max_passes} passes: expected a "
            "relative tolerance between 0 and 1 and at least one pass. Are the two exchanged? Correct --tolerance and "
            "--max-passes."
        )


# how ------------------------------------------------------------------------------------------------------------------


def is_dense(matrix: Matrix, settings: SpectrumSettings) -> bool:
    """Say whether all eigenvalues are to be computed: they fit in memory, and are wanted or few."""
    needed = 8 * matrix.num_rows * (matrix.num_rows + 128) + reading_bytes(matrix)
    is_wanted = settings.top is None or matrix.num_rows <= FEW_ROWS
    return is_wanted and needed <= memory_left(settings.memory_bytes)


def plan_sizes(matrix: Matrix, settings: SpectrumSettings) -> Sizes:
    """Choose the largest block of which the memory holds eight, or if need be three.

    Raises:
        BudgetError: If it does not hold three of the smallest, of some vectors more than there are eigenvalues wanted.
    """
    N, left = matrix.num_rows, memory_left(settings.memory_bytes)
    smallest = min(N, min(settings.top or USUAL_TOP, N) + OVERSAMPLING)

    def needed(sizes: Sizes) -> int:
        return sizes.bytes + reading_bytes(matrix, sizes.block)

    most = MAX_BLOCK if settings.memory_bytes is not None else UNASKED_BLOCK
    for block in range(min(N, max(most, smallest)), smallest - 1, -1):
        if needed(sizes := Sizes(N, block, BLOCKS)) <= left:
            return sizes
    for num_blocks in range(BLOCKS - 1, MIN_BLOCKS, -1):
        if needed(sizes := Sizes(N, smallest, num_blocks)) <= left:
            return sizes
    sizes = Sizes(N, smallest, MIN_BLOCKS)
    what = f"{sizes.capacity + sizes.block:,} vectors of {N:,} rows and {TILES_HELD} tiles (lower --top takes fewer)"
    require_memory(what, needed(sizes), settings.memory_bytes)
    return sizes


# all of them ----------------------------------------------------------------------------------------------------------


def all_eigenvalues(matrix: Matrix, report: Report = ignore_report) -> SpectrumAnswer:
    """Compute all eigenvalues by LAPACK, in float64, and what follows from them. Holds 8 N² bytes.

    Its eigenvalues are those of K + F with ‖F‖₂ ≤ p(N) ε ‖K‖₂ for a p that grows slowly; N is taken for it.
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
        trace=norms.trace,
        frobenius_norm=norms.frobenius_norm,
        participation_ratio=norms.participation_ratio,
        stable_rank=norms.stable_rank,
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


def effective_rank(values: FloatArray) -> float:
    """Compute exp(−Σ p log p) with p = max(λ, 0) / Σ max(λ, 0); 0 where no eigenvalue is positive.

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0, -1e-9])), 6)
    3.0
    """
    positive = values[values > 0]
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


@dataclass(frozen=True)
class _Norms:
    """What follows from the trace, ‖K‖_F and ‖K‖₂."""

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
    """Compute λ₁ / λ_N and its error; None where λ_N is not told from zero by the computation."""
    value, error = smallest
    return (None, None) if value <= error else (largest / value, largest / (value - error) - largest / value)


def _count_above_error(matrix: Matrix, values: FloatArray) -> int | None:
    """Count the eigenvalues that the error of the stored matrix leaves."""
    norm = matrix.error_norm
    return None if norm is None else int((values > norm).sum())


# the largest ----------------------------------------------------------------------------------------------------------


def largest_eigenvalues(
    matrix: Matrix, sizes: Sizes, settings: SpectrumSettings, report: Report = ignore_report
) -> SpectrumAnswer:
    """Compute the largest eigenvalues out of core, and what can be said of the others."""
    products = Products(matrix, report)
    krylov = Krylov(products, sizes)
    ranks: list[tuple[float, float]] = []

    def estimate() -> None:
        assert products.moments is not None
        if krylov.is_lanczos and products.moments.trace > 0:
            ranks.append(estimate_effective_rank(krylov, products.moments))

    goal = Goal(min(settings.top or USUAL_TOP, sizes.num_rows), settings.tolerance, settings.max_passes)
    found = run(krylov, goal, squares=lambda: products.squares, before_restart=estimate)
    estimate()
    assert products.moments is not None
    rank, error = ranks[0] if ranks else (0.0, 0.0)
    norms = _norms(products.moments, float(np.abs(found.values).max()))
    return SpectrumAnswer(
        method="largest",
        block=sizes.block,
        eigenvalues=found.values.tolist(),
        residual_bounds=found.residuals.tolist(),
        error_bounds=found.errors.tolist(),
        is_converged=found.is_converged,
        is_proven=found.is_proven,
        trace=norms.trace,
        frobenius_norm=norms.frobenius_norm,
        participation_ratio=norms.participation_ratio,
        stable_rank=norms.stable_rank,
        effective_rank=rank,
        effective_rank_error=error,
        smallest=None,
        smallest_error=None,
        condition=None,
        condition_error=None,
        num_negative=None,
        error_norm=matrix.error_norm,
        num_above_error=_count_above_error(matrix, found.values),
        passes=krylov.steps,
    )


# the smallest ---------------------------------------------------------------------------------------------------------


def smallest_eigenvalue(
    solve: Callable[[FloatArray], FloatArray], num_rows: int, tolerance: float = 1e-6
) -> tuple[float, float]:
    """Compute the smallest eigenvalue of a positive definite K and a bound on its error, by block Krylov on K⁻¹.

    Args:
        solve: Multiplies K⁻¹ with vectors; called a few times.
        num_rows: Rows of K.
        tolerance: Relative to the eigenvalue.
    """
    sizes = Sizes(num_rows, min(INVERSE_BLOCK, num_rows), INVERSE_STEPS)
    found: Largest = run(Krylov(solve, sizes), Goal(1, tolerance, INVERSE_STEPS))
    inverse, error = float(found.values[0]), float(found.errors[0])
    return 1 / inverse, error / (inverse * (inverse + error))


@contextmanager
def _solving(matrix: Matrix, settings: SpectrumSettings, report: Report) -> Iterator[Multiply]:
    """Solve with a Cholesky factor beside the store, which is made, and removed unless it was there before."""
    was_there = place_of_factor(matrix, 0.0)[0].has("zarr.json")
    with factored(matrix, FactorSettings(memory_bytes=settings.memory_bytes, keep=was_there), report) as (factor, _):
        yield factor.solve


def _with_condition(
    matrix: Matrix, found: SpectrumAnswer, how: tuple[SpectrumSettings, Multiply | None], report: Report
) -> SpectrumAnswer:
    """Compute the smallest eigenvalue and the condition, where K is positive definite to rounding."""
    settings, solve = how
    try:
        if solve is not None:
            smallest = smallest_eigenvalue(solve, matrix.num_rows)
        else:
            with _solving(matrix, settings, report) as solving:
                smallest = smallest_eigenvalue(solving, matrix.num_rows)
    except NotPositiveError as error:
        return dataclasses.replace(found, not_positive=str(error))
    condition, condition_error = _ratio(found.eigenvalues[0], smallest)
    return dataclasses.replace(
        found,
        smallest=smallest[0],
        smallest_error=smallest[1],
        condition=condition,
        condition_error=condition_error,
        num_negative=0,
    )
