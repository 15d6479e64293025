"""Kernel ridge regression on the labels for several λ, with leave-one-out errors and errors on test samples."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import scipy.linalg

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.linalg.conjugate_gradients import MAX_STEPS, Nystrom, System
from ntkgen.analysis.linalg.dense import eigenvalues_and_vectors
from ntkgen.analysis.linalg.factor import WORKSPACE_BYTES
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left, require_memory
from ntkgen.analysis.products import reading_bytes
from ntkgen.analysis.results import recall_or_compute
from ntkgen.analysis.targets import Problem, TestSamples
from ntkgen.errors import InputError, NotPositiveError, UnknownNameError
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.store import KernelStore

METHODS = ("auto", "eigh", "cholesky", "cg")
# Values of λ when none are given, relative to the mean eigenvalue.
DEFAULT_SHIFTS = tuple(10.0**power for power in range(-6, 3))
# Memory in bytes per entry of the matrix. Two thirds of that of an eigendecomposition are LAPACK's workspace.
ENTRY_BYTES = {"eigh": 24, "cholesky": 8}
# Maximum relative residuals of conjugate gradients: for the labels, and for the random vectors that estimate the trace.
TOLERANCE, TRACE_TOLERANCE = 1e-10, 1e-5
# Number of random vectors that estimate the trace.
PROBES = 16
# Maximum rank of the preconditioner of conjugate gradients, since each of its vectors takes time in every step.
MAX_RANK = 1024
# Memory in bytes of the eigenvectors that are multiplied at a time for the diagonal blocks of G.
BLOCKS_BYTES = 2**25

# fits -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The fit for one λ, with G = (K + λI)⁻¹."""

    shift: float  # λ
    alpha: FloatArray  # (rows, columns), G (y − f₀)
    trace: float  # tr G
    left_out: FloatArray | None  # (rows, columns), residual of the fit without the row's sample; None if not known
    trace_error: float = 0.0  # standard error of tr G
    bound: float = 0.0  # ‖(y − f₀) − (K + λI) α‖ / ‖y − f₀‖

    @property
    def gcv(self) -> float:
        """N⁻¹ ‖(I − S)(y − f₀)‖² / (N⁻¹ tr(I − S))² with I − S = λ G; the factors λ² cancel."""
        return float(np.mean(self.alpha**2)) / (self.trace / len(self.alpha)) ** 2


def left_out(
    blocks: FloatArray,  # (samples, m, m), the diagonal blocks of G
    alpha: FloatArray,  # (rows, columns)
) -> FloatArray:  # (rows, columns)
    """Compute the leave-one-out residuals (Gᵢᵢ)⁻¹ αᵢ, where each fit leaves out one sample with all its outputs."""
    by_sample = alpha.reshape(len(blocks), -1, alpha.shape[1])
    return np.asarray(np.linalg.solve(blocks, by_sample), np.float64).reshape(alpha.shape)


def fit_by_eigenvalues(problem: Problem, shifts: Sequence[float], report: Report) -> list[Fit]:
    """Fit for all λ from one eigendecomposition K = U Λ Uᵀ.

    Costs about 9 rows³ FLOPs, and holds 24 rows² bytes in memory.

    Raises:
        InputError: If K + λI is not positive definite beyond rounding.
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
    """Compute Uᵢ diag(w) Uᵢᵀ for each sample i, for some samples at a time."""
    rows, blocks = len(vectors), np.empty((len(vectors) // m, m, m))
    size = max(1, BLOCKS_BYTES // (8 * m * rows))
    for start in range(0, len(blocks), size):
        part = np.ascontiguousarray(vectors[start * m : (start + size) * m]).reshape(-1, m, rows)
        blocks[start : start + size] = (part * weights) @ part.transpose(0, 2, 1)
    return blocks


def fit_by_cholesky(problem: Problem, shift: float, report: Report) -> Fit:
    """Fit for one λ from K + λI = L Lᵀ and L⁻¹, both computed in place.

    Costs 2/3 rows³ FLOPs, and holds 8 rows² bytes in memory. Since G = L⁻ᵀ L⁻¹, the block Gᵢᵢ is CᵀC with the columns C
    of L⁻¹ that belong to sample i.

    Raises:
        InputError: If K + λI is not positive definite beyond rounding.
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
    """Raise the error that K + λI cannot be inverted.

    Raises:
        InputError: Always.
    """
    raise InputError(
        f"The kernel at {problem.matrix.name} cannot be inverted with λ = {shift:.6g}: expected K + λI to be positive "
        f"definite beyond rounding, found {found}. Is the kernel singular, or stored in few digits? Give larger "
        "`shifts`."
    )


# conjugate gradients --------------------------------------------------------------------------------------------------


def fit_by_conjugate_gradients(problem: Problem, shifts: Sequence[float], rank: int, report: Report) -> list[Fit]:
    """Fit for each λ, in descending order, by block conjugate gradients on products with the stored tiles.

    Each step is one pass over the tiles. One further pass builds a preconditioner of the given rank for all λ. The
    block consists of y − f₀ and of seeded random sign vectors z. They speed up the convergence, and the mean of zᵀ G z
    estimates tr G (Hutchinson 1990). This method does not give the blocks Gᵢᵢ, and so no leave-one-out residuals.

    Raises:
        InputError: If K + λI is found not to be positive definite.
    """
    residual = problem.residual
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (len(residual), PROBES))
    B = np.hstack([residual, signs])
    limits = np.where(np.arange(B.shape[1]) < residual.shape[1], TOLERANCE, TRACE_TOLERANCE)
    limits = limits * np.maximum(np.linalg.norm(B, axis=0), np.finfo(float).tiny)
    step = counter(report, "solved", 0, MAX_STEPS * len(shifts))

    def multiply(V: FloatArray) -> FloatArray:
        return np.asarray(problem.readout.scale * problem.matrix.matmat(V))

    preconditioner = Nystrom.of(multiply, problem.matrix.num_rows, rank)
    X, R, last, fits = np.zeros_like(B), B, 0.0, dict[float, Fit]()
    for shift in sorted(shifts, reverse=True):
        R = R - (shift - last) * X  # residual of the previous solution for this λ
        try:
            X, R = System(multiply, shift, preconditioner, step).solve(B, X, R, limits)
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


# regression -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegressSettings(Settings):
    """Settings of `regress`.

    Attributes:
        shifts: Values of λ in units of the kernel. None means 10⁻⁶ to 10² times the mean eigenvalue, without the values
            below the error bound ‖E‖ of the kernel.
        offset: Outputs f₀ to which the fit is added: ``zero``, or the ``logits`` of the network.
        test: Store of the kernel with the training samples as rows and the test samples as columns.
        method: ``eigh`` (eigendecomposition), ``cholesky`` (Cholesky factorisation), ``cg`` (conjugate gradients), or
            ``auto`` for the fastest of them that fits in memory.
    """

    shifts: tuple[float, ...] | None = None
    offset: str = defaults.OFFSET
    test: KernelStore | None = None
    method: str = defaults.METHOD


@dataclass(frozen=True, kw_only=True)
class RegressAnswer(Answer):
    """Errors and accuracies of kernel ridge regression; each list has one entry per λ.

    Attributes:
        shifts: Values of λ in units of the kernel.
        train_error: Mean squared error on the training samples.
        loo_error: Mean squared leave-one-out error; None if it is not known.
        gcv: Generalised cross-validation score.
        train_accuracy: Fraction of the training samples that are classified correctly.
        loo_accuracy: Fraction of the samples that are classified correctly if the sample is left out of the fit; None
            if it is not known.
        gcv_standard_error: Standard error of the cross-validation score; 0 if the trace is exact.
        residual_bounds: Norm of the residual of the linear system, relative to the norm of its right-hand side; 0 for
            direct methods.
        output: Name of the output map that the kernel was computed with.
        samples: Number of training samples.
        error_norm: Upper bound on ‖E‖_F, from the certificate of the store, in units of the kernel that the regression
            uses; None without a certificate.
        passes: Number of passes over the stored tiles.
        test_accuracy: Fraction of the test samples that are classified correctly; None without test samples.
        test_error: Mean squared error on the test samples; None without test samples.
        test_store: Path of the store with the test samples; None without one.
        offset: Outputs f₀ to which the fit is added, ``zero`` or ``logits``.
        method: Method that was used, ``eigh``, ``cholesky`` or ``cg``.
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
    """Fit the one-hot labels by kernel ridge regression for each λ, and estimate the error on unseen samples.

    The fit is f(x) = f₀(x) + K(x, X) α with α = G (y − f₀) and G = (K + λI)⁻¹. The kernel has one row per sample and
    output. A trace kernel has one row per sample. It is divided by the number m of outputs and is then used for all
    outputs. λ is in units of the kernel.

    Errors are mean squares over the entries of y. The training error is the mean square of the residual y − f = λα. The
    leave-one-out error is the mean square of (Gᵢᵢ)⁻¹ αᵢ, where Gᵢᵢ is the m × m block of all outputs of sample i. The
    generalised cross-validation score is N⁻¹ ‖λα‖² / (N⁻¹ tr λG)².

    If memory allows, one eigendecomposition is used for all λ (24 rows² bytes). With less memory, or for a single λ,
    each λ takes one Cholesky factorisation (8 rows² bytes). Otherwise conjugate gradients compute α with its residual,
    and estimate tr G with a standard error. The leave-one-out error is then not known.

    References:
        Golub, Heath, Wahba (1979), Generalized cross-validation as a method for choosing a good ridge parameter.
        Wei, Hu, Steinhardt (2022), arXiv:2203.06176.
        Pahikkala, Boberg, Salakoski (2006), Fast n-fold cross-validation for regularized least-squares.

    Raises:
        InputError: If the store has no labels, a λ is negative, or K + λI cannot be inverted; conjugate gradients also
            refuse λ = 0.
        UnknownNameError: If the name of the method is unknown.
        FingerprintError: If the rows of the test kernel are not these training samples.
        BudgetError: If the memory limit is too small.
    """
    settings = settings or RegressSettings()
    if settings.method not in METHODS:
        raise UnknownNameError("method", settings.method, METHODS)
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
    """Return the values that identify a second store in a saved answer."""
    return None if store is None else [store.manifest.fingerprint, store.manifest.replanned]


def _default_shifts(problem: Problem) -> tuple[float, ...]:
    """Scale `DEFAULT_SHIFTS`, without those below the kernel's error: its eigenvalues may be negative by that much."""
    mean, least = float(problem.matrix.diagonal().mean()), problem.matrix.error_norm or 0.0
    factors = [factor for factor in DEFAULT_SHIFTS if factor * mean >= least or factor == DEFAULT_SHIFTS[-1]]
    return tuple(problem.readout.scale * factor * mean for factor in factors)


def choose_method(matrix: Matrix, shifts: Sequence[float], memory_bytes: int | None) -> str:
    """Choose the fastest method that fits in memory."""
    left = memory_left(memory_bytes)
    wanted = ("eigh", "cholesky") if len(shifts) > 1 else ("cholesky",)
    return next((method for method in wanted if bytes_of(matrix, method) <= left), "cg")


def bytes_of(matrix: Matrix, method: str, columns: int = 1) -> int:
    """Count the bytes that a method needs: for the matrix and its workspace, or for vectors and tiles."""
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
            f"{problem.matrix.name}. Is it a logarithm of λ? Give `shifts` above zero."
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
    """Choose the rank of the preconditioner: four arrays of its size may take half of the remaining memory."""
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
