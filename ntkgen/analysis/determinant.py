"""The log-determinant of a kernel, exact and out of core, with those of all its leading principal blocks."""

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

# Of the subspace in which the smallest eigenvalue is looked for.
VECTORS, ITERATIONS = 8, 3
# Rounded to these, a number has an error that is felt in every small eigenvalue.
COARSE = ("float16", "bfloat16")


@dataclass(frozen=True)
class LogdetSettings(FactorSettings):
    """What is factored and how; with ``prefixes`` the answer has those of the leading principal blocks too."""

    prefixes: bool = False


@dataclass(frozen=True)
class Inertia:
    """How many pivots, and so eigenvalues, have which sign."""

    positive: int
    negative: int


@dataclass(frozen=True, kw_only=True)
class LogdetAnswer(Answer):
    """log |det(K + λI)| and its sign, with what says how far to trust it.

    Attributes:
        logdet: In nats.
        sign: Of the determinant.
        shift: λ.
        logdet_per_row: The same, divided by the rows.
        inertia: Signs of the eigenvalues.
        smallest_pivot: In magnitude.
        tile_rows, panel_rows, panels: How the factor was cut.
        bytes_kept_planned, bytes_read_planned, factor_bytes: What it takes in memory, reads, and takes on disk.
        gflops: Speed of this process, in GFLOP/s; None where it found the factor there.
        error_norm: The certificate's bound of ‖E‖_F.
        prefixes: Log-determinants of the leading blocks.
        prefix_rows: Rows of these blocks: every number where the kernel is positive definite, else where tiles end.
        prefix_signs: Signs of their determinants.
        max_factor, growth, residual: How well L D Lᵀ is K + λI, of a kernel that may be indefinite.
        smallest_eigenvalue_bound: The smallest eigenvalue is at most this; None of an indefinite kernel.
        warnings: What is not to be trusted.
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
        """Read what was kept."""
        return super().from_json({**found, "inertia": Inertia(**found["inertia"])})

    def by_samples(self, num_outputs: int) -> tuple[list[int], list[float]]:  # samples, log-determinants
        """Pick the prefixes that are of whole samples."""
        pairs = [
            (rows // num_outputs, value)
            for rows, value in zip(self.prefix_rows or (), self.prefixes or (), strict=True)
            if rows % num_outputs == 0
        ]
        return [samples for samples, _ in pairs], [value for _, value in pairs]


def logdet(matrix: Matrix, settings: LogdetSettings | None = None, *, report: Report = ignore_report) -> LogdetAnswer:
    """Compute log |det(K + λI)| and its sign, by a Cholesky factor on disk; or by LDLᵀ, if the settings say so.

    Costs N³/3 FLOPs; see `factored`.

    Raises:
        NotPositiveError: If a pivot is not positive, and must be; or LDLᵀ cannot be trusted.
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
    elif not settings.keep and not answer.remembered:  # only now that the answer is on the disk
        remove_factor(matrix, settings.shift)
    if settings.prefixes:
        return answer
    return dataclasses.replace(answer, prefixes=None, prefix_rows=None, prefix_signs=None)


def remove_factor(matrix: Matrix, shift: float) -> None:
    """Remove the factor of K + λI, if there is one."""
    folder, _ = place_of_factor(matrix, shift)
    with write_lock(folder):
        remove_folder(folder)


def _measured(matrix: Matrix, settings: LogdetSettings, made: tuple[Factor, Work], report: Report) -> LogdetAnswer:
    factor, work = made
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
    """List the log-determinants of leading blocks, where they are known: not inside tiles that were pivoted.

    Returns:
        Rows of the blocks, log-determinants and signs.
    """
    every, signs = prefix_logdets(pivots), np.cumprod(np.sign(pivots))
    is_positive = bool((pivots > 0).all())
    rows = np.arange(1, len(pivots) + 1) if is_positive else [plan.rows(block).stop for block in range(plan.num_blocks)]
    at = np.asarray(rows) - 1
    return (at + 1).tolist(), every[at].tolist(), signs[at].astype(int).tolist()


def _speed(plan: FactorPlan, work: Work) -> float | None:
    """Say at how many GFLOP/s this process has worked; None where it found the factor there."""
    fraction = work.products / plan.num_products if plan.num_products else 1.0
    return fraction * plan.num_rows**3 / 3 / work.seconds / 1e9 if fraction else None


def _smallest_eigenvalue(matrix: Matrix, factor: Factor, pivots: FloatArray) -> float | None:
    """Bound the smallest eigenvalue of a positive definite K + λI from above, so closely that its error is judged.

    No pivot is below it. Where these do not settle whether ‖E‖ reaches it, or no ‖E‖ is known, it is at most the
    reciprocal of a Ritz value of the inverse, by a few steps of subspace iteration on the factor.
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
    """Say what of a log-determinant is not to be trusted."""
    norm, precision = matrix.error_norm, matrix.store.manifest.plan.precision
    known = (
        "it has no certificate, so that its error is not known"
        if norm is None
        else f"its certificate bounds the error of every eigenvalue by ‖E‖ ≤ {norm:.3g}, with 95 % confidence"
    )
    found = []
    if coarse := [name for name in (matrix.dtype, precision) if name in COARSE]:
        found.append(f"The kernel at {matrix.name} is of {' and '.join(coarse)} numbers; {known}.")
    negative = int((pivots < 0).sum())
    if negative:
        found.append(
            f"The kernel at {matrix.name} has {negative:,} negative eigenvalues, which the true one has not: they, and "
            f"as many small ones, are errors; {known}."
        )
    if norm is not None and smallest is not None and norm >= smallest:
        found.append(
            f"The error of the kernel at {matrix.name} may exceed its smallest eigenvalue: {known}, and the smallest "
            f"eigenvalue is at most {smallest:.3g}. The log-determinant is that of the stored numbers alone."
        )
    return found
