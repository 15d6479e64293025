"""Kernel ridge regression on the labels, over a grid of λ, with its errors on samples left out and of a test set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import scipy.linalg

from ntkgen.analysis.eigenvalues import reading_bytes
from ntkgen.analysis.linalg.dense import eigenvalues_and_vectors
from ntkgen.analysis.linalg.factor import WORKSPACE_BYTES
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left, require_memory
from ntkgen.analysis.results import remembered
from ntkgen.analysis.targets import Problem, TestSamples
from ntkgen.errors import InputError
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.store import KernelStore

METHODS = ("auto", "eigh", "cholesky", "cg")
# Where no λ is given: times the mean eigenvalue.
DEFAULT_SHIFTS = tuple(10.0**power for power in range(-6, 3))
# Bytes per entry of the matrix that stay in memory: of its eigenvectors LAPACK's workspace is two thirds.
ENTRY_BYTES = {"eigh": 24, "cholesky": 8}
# Of conjugate gradients: residuals, relative; random vectors for the trace; passes for each λ.
TOLERANCE, TRACE_TOLERANCE = 1e-10, 1e-5
PROBES = 16
MAX_STEPS = 1000
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
    near = Nystrom.of(problem, rank)
    X, R, last, fits = np.zeros_like(B), B, 0.0, dict[float, Fit]()
    for shift in sorted(shifts, reverse=True):
        R = R - (shift - last) * X  # what is left with the last solution
        system = System(problem, shift, near, step)
        X, R = system.solve(B, X, R, limits)
        fits[shift], last = _fit_of(system, X, R, signs), shift
    return [fits[shift] for shift in shifts]


@dataclass(frozen=True)
class Nystrom:
    """An approximation U Λ Uᵀ of K, by which (K + λI) is preconditioned: P = U (Λ + λ) Uᵀ / (λ_r + λ) + (I − U Uᵀ).

    References:
        Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning, arXiv:2110.02820.
    """

    values: FloatArray  # (rank,), Λ
    vectors: FloatArray  # (rows, rank), U

    @classmethod
    def of(cls, problem: Problem, rank: int) -> "Nystrom":
        """Approximate by products with Gaussian vectors Ω, in one pass: (K Ω) (Ωᵀ K Ω)⁻¹ (K Ω)ᵀ."""
        rows = problem.matrix.num_rows
        if not rank:
            return cls(np.zeros(0), np.zeros((rows, 0)))
        gaussian = np.linalg.qr(np.random.default_rng(1).normal(size=(rows, rank)))[0]
        product = problem.readout.scale * problem.matrix.matmat(gaussian)
        values, rotation = np.linalg.eigh(gaussian.T @ product)
        is_there = values > rows * EPSILON * abs(values).max()
        root = product @ (rotation[:, is_there] / np.sqrt(values[is_there]))
        vectors, sizes, _ = np.linalg.svd(root, full_matrices=False)
        return cls(sizes**2, vectors)

    def power(self, V: FloatArray, shift: float, exponent: float) -> FloatArray:
        """Multiply with a power of P."""
        if not len(self.values):
            return V
        factors = ((self.values + shift) / (self.values[-1] + shift)) ** exponent - 1
        product: FloatArray = V + self.vectors @ (factors[:, None] * (self.vectors.T @ V))
        return product


def _fit_of(system: "System", X: FloatArray, R: FloatArray, signs: FloatArray) -> Fit:
    columns = system.problem.targets.shape[1]
    traces = np.einsum("ij,ij->j", signs, X[:, columns:])
    size = float(np.linalg.norm(system.problem.residual)) or 1.0
    return Fit(
        system.shift,
        X[:, :columns].copy(),
        float(traces.mean()),
        None,
        float(traces.std(ddof=1)) / np.sqrt(PROBES),
        float(np.linalg.norm(R[:, :columns])) / size,
    )


@dataclass(frozen=True)
class System:
    """The equations (K + λI) X = B, solved by products alone."""

    problem: Problem
    shift: float
    near: Nystrom
    step: Callable[[], None]  # called after each pass

    def multiply(self, V: FloatArray) -> FloatArray:
        """Find (K + λI) V, in one pass."""
        product: FloatArray = self.problem.readout.scale * self.problem.matrix.matmat(V) + self.shift * V
        self.step()
        return product

    def solve(
        self, B: FloatArray, X: FloatArray, R: FloatArray, limits: FloatArray
    ) -> tuple[FloatArray, FloatArray]:  # X, and the true R = B − (K + λI) X
        """Go on from X until each column of the residual R is below its limit, or rounding allows no more."""
        steps = 0
        while (np.linalg.norm(R, axis=0) > limits).any() and steps < MAX_STEPS:
            before = float(np.linalg.norm(R))
            change, taken = self._descend(R, limits, MAX_STEPS - steps)
            X = X + change
            R = B - self.multiply(X)
            steps += taken + 1
            if float(np.linalg.norm(R)) > before / 2:
                break
        return X, R

    def _descend(
        self, R: FloatArray, limits: FloatArray, max_steps: int
    ) -> tuple[FloatArray, int]:  # (K + λI)⁻¹ R, and the steps that were taken
        """Take steps of conjugate gradients whose residual P^½ Q C is kept as an orthonormal basis and coefficients.

        References:
            Dubrulle (2001), Retooling the method of block conjugate gradients, ETNA 12, algorithm BCGrQ.
        """
        (Q, C), steps, Z = np.linalg.qr(self._scaled(R, -0.5)), 0, np.zeros_like(R)
        D = Q
        while (np.linalg.norm(self._scaled(Q, 0.5) @ C, axis=0) > limits / 2).any() and steps < max_steps:
            KD = self._scaled(self.multiply(self._scaled(D, -0.5)), -0.5)
            inverse = self._inverted(D.T @ KD)
            Z += D @ (inverse @ C)
            Q, S = np.linalg.qr(Q - KD @ inverse)
            C, D, steps = S @ C, Q + D @ S.T, steps + 1
        return self._scaled(Z, -0.5), steps

    def _scaled(self, V: FloatArray, exponent: float) -> FloatArray:
        return self.near.power(V, self.shift, exponent)

    def _inverted(self, small: FloatArray) -> FloatArray:
        """Invert Dᵀ (K + λI) D, but for directions that D has twice.

        Raises:
            InputError: If it is not positive definite.
        """
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        if values[0] < -len(values) * EPSILON * values[-1]:
            _refuse(self.problem, self.shift, f"vᵀ(K + λI)v = {values[0]:.3g} for a unit vector v")
        is_there = values > len(values) * EPSILON * values[-1]
        inverse: FloatArray = (vectors[:, is_there] / values[is_there]) @ vectors[:, is_there].T
        return inverse


# all of it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """What is asked of a regression."""

    shifts: tuple[float, ...] | None = None  # λ; None: `DEFAULT_SHIFTS`
    offset: str = "zero"  # f₀
    test: KernelStore | None = None
    method: str = "auto"


def regress(
    matrix: Matrix, ridge: Ridge, memory_bytes: int | None = None, report: Report = ignore_report
) -> dict[str, Any]:
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
    problem = Problem.of(matrix, ridge.offset)
    test = None if ridge.test is None else TestSamples.of(ridge.test, problem, ridge.offset)
    shifts = ridge.shifts or _default_shifts(problem)
    method = choose_method(matrix, shifts, memory_bytes) if ridge.method == "auto" else ridge.method
    _check_shifts(problem, shifts, method)
    settings = {"shifts": shifts, "offset": ridge.offset, "method": method, "test": named(ridge.test)}

    def compute() -> dict[str, Any]:
        fits = _fit(problem, shifts, method, memory_bytes, report)
        return _described(problem, fits, test, report) | {"offset": ridge.offset, "method": method}

    return remembered(matrix, "regress", settings, compute)


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


def _fit(problem: Problem, shifts: Sequence[float], method: str, memory_bytes: int | None, report: Report) -> list[Fit]:
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


def _described(problem: Problem, fits: list[Fit], test: TestSamples | None, report: Report) -> dict[str, Any]:
    y, labels, accuracy = problem.targets, problem.matrix.labels, problem.readout.accuracy
    residuals, others = [fit.shift * fit.alpha for fit in fits], [fit.left_out for fit in fits]
    result: dict[str, Any] = {
        "shifts": [fit.shift for fit in fits],
        "train_error": [float(np.mean(residual**2)) for residual in residuals],
        "loo_error": [None if other is None else float(np.mean(other**2)) for other in others],
        "gcv": [fit.gcv for fit in fits],
        "train_accuracy": [accuracy(y - residual, labels) for residual in residuals],
        "loo_accuracy": [None if other is None else accuracy(y - other, labels) for other in others],
        "gcv_standard_error": [2 * fit.gcv * fit.trace_error / fit.trace for fit in fits],
        "residual_bounds": [fit.bound for fit in fits],
        "output": problem.readout.name,
        "samples": problem.matrix.num_samples,
        "error_norm": norm if (norm := problem.matrix.error_norm) is None else norm * problem.readout.scale,
        "passes": round(problem.matrix.passes, 3),
    }
    if test is not None:
        values = test.predict([fit.alpha for fit in fits], report)
        result["test_accuracy"], result["test_error"] = map(list, zip(*map(test.measure, values), strict=True))
        result["test_store"] = test.name
    return result
