"""Kernel ridge regression on the labels, over a grid of λ, with its errors on samples left out and of a test set."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import scipy.linalg

from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.linalg.conjugate_gradients import MAX_STEPS, Nystrom, System
from ntkgen.analysis.linalg.dense import eigenvalues_and_vectors
from ntkgen.analysis.linalg.factor import WORKSPACE_BYTES
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left, require_memory
from ntkgen.analysis.products import reading_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.analysis.targets import Problem, TestSamples
from ntkgen.errors import InputError, NotPositiveError
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.store import KernelStore

METHODS = ("auto", "eigh", "cholesky", "cg")
# Where no λ is given: times the mean eigenvalue.
DEFAULT_SHIFTS = tuple(10.0**power for power in range(-6, 3))
# Bytes per entry of the matrix that stay in memory: of its eigenvectors LAPACK's workspace is two thirds.
ENTRY_BYTES = {"eigh": 24, "cholesky": 8}
# Of conjugate gradients: residuals, relative; random vectors for the trace.
TOLERANCE, TRACE_TOLERANCE = 1e-10, 1e-5
PROBES = 16
MAX_RANK = 1024  # of their preconditioner: each vector takes time too
BLOCKS_BYTES = 2**25

# fits -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What one λ gives, with G = (K + λI)⁻¹."""

    shift: float
    alpha: FloatArray  # (rows, columns), G (y − f₀)
    trace: float  # of G
    left_out: FloatArray | None  # (rows, columns), y − f of the fit to all other samples; None where nobody knows
    trace_error: float = 0.0  # standard error
    bound: float = 0.0  # ‖(y − f₀) − (K + λI) α‖ / ‖y − f₀‖

    @property
    def gcv(self) -> float:
        """N⁻¹ ‖(I − S)(y − f₀)‖² / (N⁻¹ tr(I − S))² with I − S = λ G; the factors λ² cancel."""
        return float(np.mean(self.alpha**2)) / (self.trace / len(self.alpha)) ** 2


def left_out(
    blocks: FloatArray,  # (samples, m, m), the diagonal ones of G
    alpha: FloatArray,  # (rows, columns)
) -> FloatArray:  # (rows, columns)
    """Find the residuals of fits that leave out one sample each, (Gᵢᵢ)⁻¹ αᵢ, with all of its outputs."""
    by_sample = alpha.reshape(len(blocks), -1, alpha.shape[1])
    return np.asarray(np.linalg.solve(blocks, by_sample), np.float64).reshape(alpha.shape)


def fit_by_eigenvalues(problem: Problem, shifts: Sequence[float], report: Report) -> list[Fit]:
    """Fit for all λ from one eigendecomposition K = U Λ Uᵀ: 24 rows² bytes, about 9 rows³ FLOPs.

    Raises:
        InputError: If K + λI is not positive definite, beyond rounding.
    """
    values, vectors = eigenvalues_and_vectors(problem.dense(report), report)
    tiny = len(values) * EPSILON * float(np.abs(values).max())
    projected = vectors.T @ problem.residual
    fits = []
    for shift in shifts:
        if values[0] + shift <= tiny:
            _refuse(problem, shift, f"the eigenvalue {values[0] + shift:.3g}, known to ±{tiny:.1g}")
        weights: FloatArray = 1 / (values + shift)
        alpha = vectors @ (weights[:, None] * projected)
        blocks = _diagonal_blocks(vectors, weights, problem.matrix.num_outputs)
        fits.append(Fit(shift, alpha, float(weights.sum()), left_out(blocks, alpha)))
    return fits


def _diagonal_blocks(vectors: FloatArray, weights: FloatArray, m: int) -> FloatArray:  # (samples, m, m)
    """Find Uᵢ diag(w) Uᵢᵀ of each sample, some at a time."""
    rows, blocks = len(vectors), np.empty((len(vectors) // m, m, m))
    size = max(1, BLOCKS_BYTES // (8 * m * rows))
    for start in range(0, len(blocks), size):
        part = np.ascontiguousarray(vectors[start * m : (start + size) * m]).reshape(-1, m, rows)
        blocks[start : start + size] = (part * weights) @ part.transpose(0, 2, 1)
    return blocks


def fit_by_cholesky(problem: Problem, shift: float, report: Report) -> Fit:
    """Fit for one λ from K + λI = L Lᵀ and L⁻¹, both in place: 8 rows² bytes, 2/3 rows³ FLOPs.

    G = L⁻ᵀ L⁻¹, so that Gᵢᵢ is the product of the columns of L⁻¹ of sample i with themselves.

    Raises:
        InputError: If K + λI is not positive definite, beyond rounding.
    """
    lapack, m = scipy.linalg.lapack, problem.matrix.num_outputs
    K = problem.dense(report)
    K[np.diag_indices_from(K)] += shift
    norm = lapack.dlange("1", K)
    factor, failed = lapack.dpotrf(K, lower=1, clean=1, overwrite_a=1)
    if failed:
        sample, output = divmod(failed - 1, m)
        _refuse(problem, shift, f"a pivot that is not, of output {output} of sample {sample}")
    inverse_condition = float(lapack.dpocon(factor, norm, uplo="L")[0])
    if inverse_condition < len(K) * EPSILON:
        _refuse(problem, shift, f"a condition number of {1 / max(inverse_condition, 1e-300):.1g}")
    alpha = lapack.dpotrs(factor, problem.residual, lower=1)[0]
    inverse = lapack.dtrtri(factor, lower=1, overwrite_c=1)[0]
    parts = (inverse[row:, row : row + m] for row in range(0, len(K), m))
    blocks = np.stack([part.T @ part for part in parts])
    return Fit(shift, alpha, float(np.trace(blocks, axis1=1, axis2=2).sum()), left_out(blocks, alpha))


def _refuse(problem: Problem, shift: float, found: str) -> NoReturn:
    """Refuse to invert K + λI.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"The kernel at {problem.matrix.name} cannot be inverted with λ = {shift:.6g}: expected K + λI to be positive "
        f"definite beyond rounding, found {found}. Is the kernel singular, or stored in few digits? Give larger "
        "--shifts."
    )


# conjugate gradients --------------------------------------------------------------------------------------------------


def fit_by_conjugate_gradients(problem: Problem, shifts: Sequence[float], rank: int, report: Report) -> list[Fit]:
    """Fit for each λ by block conjugate gradients on products with the stored tiles, from the largest λ to the least.

    A step is one pass over the tiles, and one more makes a preconditioner of a rank for all λ. Beside y − f₀ the block
    holds random signs z, seeded, which let it converge earlier, and whose zᵀ G z have the mean tr G (Hutchinson 1990).
    Gᵢᵢ of every sample is out of reach.

    Raises:
        InputError: If K + λI turns out not to be positive definite.
    """
    residual = problem.residual
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (len(residual), PROBES))
    B = np.hstack([residual, signs])
    limits = np.where(np.arange(B.shape[1]) < residual.shape[1], TOLERANCE, TRACE_TOLERANCE)
    limits = limits * np.maximum(np.linalg.norm(B, axis=0), np.finfo(float).tiny)
    step = counter(report, "solved", 0, MAX_STEPS * len(shifts))

    def multiply(V: FloatArray) -> FloatArray:
        return np.asarray(problem.readout.scale * problem.matrix.matmat(V))

    near = Nystrom.of(multiply, problem.matrix.num_rows, rank)
    X, R, last, fits = np.zeros_like(B), B, 0.0, dict[float, Fit]()
    for shift in sorted(shifts, reverse=True):
        R = R - (shift - last) * X  # what is left with the last solution
        try:
            X, R = System(multiply, shift, near, step).solve(B, X, R, limits)
        except NotPositiveError as error:
            _refuse(problem, shift, str(error))
        fits[shift], last = _fit_of(problem, shift, (X, R), signs), shift
    return [fits[shift] for shift in shifts]


def _fit_of(problem: Problem, shift: float, solved: tuple[FloatArray, FloatArray], signs: FloatArray) -> Fit:
    (X, R), columns = solved, problem.targets.shape[1]
    traces = np.einsum("ij,ij->j", signs, X[:, columns:])
    size = float(np.linalg.norm(problem.residual)) or 1.0
    return Fit(
        shift,
        X[:, :columns].copy(),
        float(traces.mean()),
        None,
        float(traces.std(ddof=1)) / np.sqrt(PROBES),
        float(np.linalg.norm(R[:, :columns])) / size,
    )


# all of it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegressSettings(Settings):
    """What is asked of a regression.

    Attributes:
        shifts: λ; None: `DEFAULT_SHIFTS` times the mean eigenvalue, not below ‖E‖.
        offset: f₀, `zero` or the network's `logits`.
        test: The kernel of the same samples with test samples.
        method: One of `METHODS`.
    """

    shifts: tuple[float, ...] | None = None
    offset: str = "zero"
    test: KernelStore | None = None
    method: str = "auto"


@dataclass(frozen=True, kw_only=True)
class RegressAnswer(Answer):
    """Errors and accuracies of kernel ridge regression, one for each λ.

    Attributes:
        shifts: λ.
        train_error: Mean squares on the samples that were fitted.
        loo_error: The same on samples left out one at a time; None where it is not known.
        gcv: Generalised cross-validation.
        train_accuracy, loo_accuracy: Parts of the samples that are classified correctly.
        gcv_standard_error: Of gcv, where traces are estimated.
        residual_bounds: What the solution leaves of the right side, relative.
        output: The output map of the kernel.
        samples: Samples that were fitted.
        error_norm: The certificate's bound of ‖E‖_F, of the kernel as it is used.
        passes: Passes over the stored tiles.
        test_accuracy, test_error, test_store: Of the test samples, if there are any.
        offset, method: As they were used.
    """

    shifts: Sequence[float]
    train_error: Sequence[float]
    loo_error: Sequence[float | None]
    gcv: Sequence[float]
    train_accuracy: Sequence[float]
    loo_accuracy: Sequence[float | None]
    gcv_standard_error: Sequence[float]
    residual_bounds: Sequence[float]
    output: str
    samples: int
    error_norm: float | None
    passes: float
    test_accuracy: Sequence[float] | None = None
    test_error: Sequence[float] | None = None
    test_store: str | None = None
    offset: str
    method: str

    QUESTION: ClassVar[str] = "regress"


def regress(
    matrix: Matrix, settings: RegressSettings | None = None, *, report: Report = ignore_report
) -> RegressAnswer:
    """Fit one-hot labels by kernel ridge regression, for each λ, and measure how it does on samples it has not seen.

    f(x) = f₀(x) + K(x, X) α with α = G (y − f₀) and G = (K + λI)⁻¹ on the rows of the kernel: one per sample and
    output, or per sample, for all outputs at once, where the kernel is of the trace, then divided by m. λ is in the
    units of the kernel. Errors are means of squares over the entries of y: of the residual y − f = λα; of the one that
    a fit without the sample would leave, (Gᵢᵢ)⁻¹ αᵢ with the m × m block of all of the sample's outputs; and the
    generalised cross-validation N⁻¹ ‖λα‖² / (N⁻¹ tr λG)². Where the matrix fits in memory, one eigendecomposition
    serves all λ (24 rows² bytes), or a Cholesky factorisation each, or the only one (8 rows²). Otherwise conjugate
    gradients find α, with the residual that is left, and tr G with a standard error; nothing is then known of samples
    left out.

    References:
        Golub, Heath, Wahba (1979), Generalized cross-validation as a method for choosing a good ridge parameter.
        Wei, Hu, Steinhardt (2022), arXiv:2203.06176.
        Pahikkala, Boberg, Salakoski (2006), Fast n-fold cross-validation for regularized least-squares.

    Raises:
        InputError: If there are no labels, or a λ is not positive where it must be.
        FingerprintError: If the test kernel is not of these training samples.
        BudgetError: If the memory is too small.
    """
    settings = settings or RegressSettings()
    problem = Problem.of(matrix, settings.offset)
    test = None if settings.test is None else TestSamples.of(settings.test, problem, settings.offset)
    shifts, method = settings.shifts or _default_shifts(problem), settings.method
    if method == "auto":
        method = choose_method(matrix, shifts, settings.memory_bytes)
    _check_shifts(problem, shifts, method)
    asked = {"shifts": shifts, "offset": settings.offset, "method": method, "test": named(settings.test)}
    chosen = dataclasses.replace(settings, shifts=shifts, method=method)

    def compute() -> RegressAnswer:
        fits = _fit(problem, shifts, chosen, report)
        answer = _described(problem, fits, chosen)
        return answer if test is None else _with_test(answer, test, [fit.alpha for fit in fits], report)

    return recall_or_compute(matrix, RegressAnswer, asked, compute)


def named(store: KernelStore | None) -> list[Any] | None:
    """Tell a second store from others, for results that depend on it."""
    return None if store is None else [store.manifest.fingerprint, store.manifest.replanned]


def _default_shifts(problem: Problem) -> tuple[float, ...]:
    """Take `DEFAULT_SHIFTS`, but for those below the error of the kernel, which may have negative eigenvalues there."""
    mean, least = float(problem.matrix.diagonal().mean()), problem.matrix.error_norm or 0.0
    factors = [factor for factor in DEFAULT_SHIFTS if factor * mean >= least or factor == DEFAULT_SHIFTS[-1]]
    return tuple(problem.readout.scale * factor * mean for factor in factors)


def choose_method(matrix: Matrix, shifts: Sequence[float], memory_bytes: int | None) -> str:
    """Choose the quickest of the methods that fit."""
    left = memory_left(memory_bytes)
    wanted = ("eigh", "cholesky") if len(shifts) > 1 else ("cholesky",)
    return next((method for method in wanted if bytes_of(matrix, method) <= left), "cg")


def bytes_of(matrix: Matrix, method: str, columns: int = 1) -> int:
    """Count what a method holds: the matrix, with some tiles while it is read; or blocks of vectors, and the tiles."""
    rows, m = matrix.num_rows, matrix.num_outputs
    if method == "cg":
        return reading_bytes(matrix, columns + PROBES) + 10 * 8 * rows * (columns + PROBES)
    solving = ENTRY_BYTES[method] * rows**2 + 8 * rows * (m + 64) + BLOCKS_BYTES + WORKSPACE_BYTES
    return max(8 * rows**2 + reading_bytes(matrix), solving)


def _check_shifts(problem: Problem, shifts: Sequence[float], method: str) -> None:
    least = min(shifts)
    if not np.isfinite(shifts).all() or least < 0 or (least == 0 and method == "cg"):
        why = " for conjugate gradients, which this matrix needs in this memory" if method == "cg" else ""
        raise InputError(
            f"λ must {'be positive' if method == 'cg' else 'not be negative'}{why}: found {least:.6g} for "
            f"{problem.matrix.name}. Is it a logarithm of λ? Give --shifts above zero."
        )


def _fit(problem: Problem, shifts: Sequence[float], settings: RegressSettings, report: Report) -> list[Fit]:
    method, memory_bytes = settings.method, settings.memory_bytes
    needed = bytes_of(problem.matrix, method, problem.targets.shape[1])
    require_memory({"cg": "tiles and vectors"}.get(method, f"the matrix (method {method})"), needed, memory_bytes)
    if method == "cg":
        rank = _rank(problem, memory_bytes)
        return fit_by_conjugate_gradients(problem, shifts, rank, report)
    if method == "eigh":
        return fit_by_eigenvalues(problem, shifts, report)
    return [fit_by_cholesky(problem, shift, report) for shift in shifts]


def _rank(problem: Problem, memory_bytes: int | None) -> int:
    """Choose the rank of the preconditioner: what half of the memory holds that nothing else takes, four times."""
    room = memory_left(memory_bytes) - bytes_of(problem.matrix, "cg", problem.targets.shape[1])
    return max(0, min(MAX_RANK, problem.matrix.num_rows // 4, room // (2 * 4 * 8 * problem.matrix.num_rows)))


def _described(problem: Problem, fits: list[Fit], settings: RegressSettings) -> RegressAnswer:
    y, labels, accuracy = problem.targets, problem.matrix.labels, problem.readout.accuracy
    residuals, others = [fit.shift * fit.alpha for fit in fits], [fit.left_out for fit in fits]
    return RegressAnswer(
        shifts=[fit.shift for fit in fits],
        train_error=[float(np.mean(residual**2)) for residual in residuals],
        loo_error=[None if other is None else float(np.mean(other**2)) for other in others],
        gcv=[fit.gcv for fit in fits],
        train_accuracy=[accuracy(y - residual, labels) for residual in residuals],
        loo_accuracy=[None if other is None else accuracy(y - other, labels) for other in others],
        gcv_standard_error=[2 * fit.gcv * fit.trace_error / fit.trace for fit in fits],
        residual_bounds=[fit.bound for fit in fits],
        output=problem.readout.name,
        samples=problem.matrix.num_samples,
        error_norm=norm if (norm := problem.matrix.error_norm) is None else norm * problem.readout.scale,
        passes=round(problem.matrix.passes, 3),
        offset=settings.offset,
        method=settings.method,
    )


def _with_test(answer: RegressAnswer, test: TestSamples, alphas: list[FloatArray], report: Report) -> RegressAnswer:
    """Add accuracies and errors on test samples."""
    measured = [test.measure(values) for values in test.predict(alphas, report)]
    return dataclasses.replace(
        answer,
        test_accuracy=[accuracy for accuracy, _ in measured],
        test_error=[error for _, error in measured],
        test_store=test.name,
    )
