"""Three methods for gradient flow: by eigendecomposition, in a Krylov space, and by numerical integration."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.integrate
import scipy.sparse.linalg
import scipy.special

from ntkgen.analysis.linalg.dense import eigenvalues_and_vectors
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, memory_left, require_memory
from ntkgen.analysis.products import reading_bytes
from ntkgen.analysis.regression import bytes_of
from ntkgen.analysis.targets import Problem
from ntkgen.errors import DivergedError
from ntkgen.progress import Report, counter

# Number of times when none are given. They begin at a tenth of the first mode's learning time.
NUM_TIMES = 25
# Maximum time by method when none are given, in learning times of the first mode.
LONGEST = {"eigh": 1e8, "krylov": 1e3, "ode": 1e4}
# Krylov space: maximum error relative to ‖y − f₀‖, maximum number of passes, and relative size below which a new
# direction counts as rounding error.
TOLERANCE, MAX_STEPS, ROUNDING = 1e-10, 300, 1e-14
# Relative and absolute tolerance of the numerical integration.
RELATIVE, ABSOLUTE = 1e-9, 1e-11
# The integral in the error bound uses 4 · POINTS points, which begin at 1 / POINTS of the shortest time scale.
POINTS = 64


@dataclass(frozen=True)
class Clock:
    """The problem, the rate of learning, and the times at which the flow is evaluated."""

    problem: Problem
    rate: float  # learning rate η
    normalisation: float  # c, by which the sum of the losses is divided
    wanted: tuple[float, ...] | None = None  # requested times; None: from the learning times of the modes
    memory_bytes: int | None = None  # memory limit of the whole process

    @property
    def speed(self) -> float:
        """η / c."""
        return self.rate / self.normalisation

    def times(self, largest: float, slowest: float, method: str) -> FloatArray:
        """Return the requested times in ascending order, or times that cover the learning times of the modes.

        Without requested times they range from a tenth of the learning time of the largest eigenvalue to ten times that
        of the slowest, or to the maximum of the method if that is earlier.
        """
        if self.wanted is not None:
            return np.array(sorted(self.wanted))
        if largest <= 0:
            return np.array([0.0])
        first = 1 / (self.speed * largest)
        return np.geomspace(first / 10, first * min(LONGEST[method], 10 * largest / slowest), NUM_TIMES)


@dataclass(frozen=True)
class Course:
    """A flow at given times: f_t = f₀ + K α_t."""

    times: FloatArray
    values: list[FloatArray]  # (rows, columns) for each time, f_t
    alphas: list[FloatArray]  # (rows, columns) for each time, α_t
    bounds: list[float | None]  # upper bound on ‖error of f_t‖ / ‖y − f₀‖; None if it is not known
    eigenvalues: FloatArray | None = None  # descending
    energies: FloatArray | None = None  # fraction of ‖y − f₀‖² in each of these modes


@dataclass(frozen=True)
class Subspace:
    """A subspace that is invariant under K up to B: K V = V Λ + Q B, where [V Q] has orthonormal columns."""

    eigenvalues: FloatArray  # (modes,), Λ; negative ones count as zero
    coordinates: FloatArray  # (modes, columns), Vᵀ (y − f₀)
    rest: FloatArray  # (columns, modes), B; it has no rows for a full eigendecomposition

    @property
    def clipped(self) -> FloatArray:
        """The eigenvalues, with zero in place of negative ones."""
        return np.maximum(self.eigenvalues, 0)

    def times(self, clock: Clock, method: str) -> FloatArray:
        """Return the requested times, or times that cover the learning times of the modes."""
        largest = float(self.clipped.max(initial=0))
        tiny = clock.problem.matrix.num_rows * EPSILON * largest
        return clock.times(largest, float(self.clipped[self.clipped > tiny].min(initial=np.inf)), method)

    def left(self, time: float) -> FloatArray:  # (modes, columns)
        """Compute Vᵀ (y − f_t), the part of the targets that is not learned yet."""
        return np.exp(-self.clipped * time)[:, None] * self.coordinates

    def learned(self, time: float) -> FloatArray:  # (modes, columns)
        """Compute Vᵀ α_t from the factors (1 − exp(−λt)) / λ, which are t for λ = 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.where(
                self.clipped * time > np.finfo(float).tiny, -np.expm1(-self.clipped * time) / self.clipped, time
            )
        return factors[:, None] * self.coordinates

    def bound(self, time: float) -> float:
        """Bound the error of V exp(−Λ t) Vᵀ r against exp(−K t) r by ∫ ‖B exp(−Λ s) Vᵀ r‖ ds from 0 to t.

        The approximation r_s = V exp(−Λ s) Vᵀ r satisfies r_s' + K r_s = Q B exp(−Λ s) Vᵀ r. Its right side is the rate
        at which the error arises, and exp(−K t) does not amplify an error, since K is positive semidefinite.
        """
        if not len(self.rest) or time == 0:
            return 0.0
        first = min(time, 1 / max(float(self.clipped.max()), np.finfo(float).tiny)) / POINTS
        points = np.concatenate([[0.0], np.geomspace(first, time, 4 * POINTS)])
        return float(np.trapezoid([float(np.linalg.norm(self.rest @ self.left(at))) for at in points], points))

    def course(self, clock: Clock, method: str, vectors: FloatArray) -> Course:
        """Compute the flow in the subspace with the vectors V, of shape (rows, modes)."""
        times, size = self.times(clock, method), float(np.sum(clock.problem.residual**2)) or 1.0
        order = np.argsort(-self.eigenvalues, kind="stable")
        return Course(
            times,
            [clock.problem.targets - vectors @ self.left(time) for time in clock.speed * times],
            [vectors @ self.learned(time) for time in clock.speed * times],
            [self.bound(time) / np.sqrt(size) for time in clock.speed * times],
            self.eigenvalues[order],
            np.sum(self.coordinates**2, axis=1)[order] / size,
        )


def by_eigenvalues(clock: Clock, report: Report) -> Course:
    """Compute the flow from the eigendecomposition of the kernel.

    Raises:
        BudgetError: If the eigenvectors do not fit in memory.
    """
    require_memory("the eigenvectors", bytes_of(clock.problem.matrix, "eigh"), clock.memory_bytes)
    values, vectors = eigenvalues_and_vectors(clock.problem.dense(report), report)
    whole = Subspace(values, vectors.T @ clock.problem.residual, np.zeros((0, len(values))))
    return whole.course(clock, "eigh", vectors)


def by_krylov(clock: Clock, report: Report) -> Course:
    """Compute the flow in the Krylov space of r, K r, K² r, … with r = y − f₀; each step is one pass over the tiles.

    The iteration ends when the error bound meets the tolerance at all times, the space is invariant, or the memory or
    the number of steps is exhausted.
    """
    problem = clock.problem
    max_steps = _max_steps(problem, clock.memory_bytes)
    step = counter(report, "solved", 0, max_steps)
    rows, columns = problem.residual.shape
    basis = np.empty((rows, min(rows, max_steps * columns)))
    products = np.zeros((basis.shape[1],) * 2)
    new, first = _orthonormal(basis[:, :0], problem.residual)
    space, rotation = _ritz(products[:0, :0], first[:0], first[:0, :0])
    width = 0
    for count in range(1, max_steps + 1):
        if not new.shape[1]:
            break
        last = slice(width, width + new.shape[1])
        basis[:, last], width = new, last.stop
        product = problem.readout.scale * problem.matrix.matmat(new)
        step()
        products[:width, last] = basis[:, :width].T @ product
        new, rest = _orthonormal(basis[:, :width], product)
        if not new.shape[1] or count == max_steps or count % max(1, count // 8) == 0:
            space, rotation = _ritz(products[:width, :width], first, rest)
            if _is_enough(space, clock):
                break
    return space.course(clock, "krylov", _rotated(basis, rotation))


def _orthonormal(basis: FloatArray, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Factor vectors = basis C + Q B, with [basis Q] orthonormal; drop directions of Q that are rounding errors."""
    remainder = vectors
    for _ in range(2):
        remainder = remainder - basis @ (basis.T @ remainder)
    Q, sizes, B = np.linalg.svd(remainder, full_matrices=False)
    is_kept = sizes > ROUNDING * max(float(np.linalg.norm(vectors)), np.finfo(float).tiny)
    Q = Q[:, is_kept]
    Q, R = np.linalg.qr(Q - basis @ (basis.T @ Q))  # directions with small singular values are not orthogonal yet
    return Q, R @ (sizes[is_kept, None] * B[is_kept])


def _max_steps(problem: Problem, memory_bytes: int | None) -> int:
    """Count the steps whose vectors fit in memory beside the tiles and the outputs at all times.

    Raises:
        BudgetError: If the vectors of ten steps do not fit.
    """
    vectors = 8 * problem.targets.size
    tiles = reading_bytes(problem.matrix, problem.targets.shape[1])
    others = tiles + (2 * NUM_TIMES + 10) * vectors
    require_memory("tiles, and vectors of ten steps", others + 10 * vectors, memory_bytes)
    return min(MAX_STEPS, len(problem.targets), (memory_left(memory_bytes) - others) // vectors)


def _ritz(products: FloatArray, first: FloatArray, rest: FloatArray) -> tuple[Subspace, FloatArray]:
    """Diagonalise K within the basis; return the subspace, and the coordinates of its modes in the basis."""
    values, rotation = np.linalg.eigh(products, UPLO="U")  # only the upper triangle of blocks was computed
    last = rotation[len(rotation) - rest.shape[1] :]
    return Subspace(values, rotation[: len(first)].T @ first, rest @ last), rotation


def _is_enough(space: Subspace, clock: Clock) -> bool:
    limit = TOLERANCE * float(np.linalg.norm(clock.problem.residual))
    return max(space.bound(time) for time in clock.speed * space.times(clock, "krylov")) <= limit


def _rotated(basis: FloatArray, rotation: FloatArray) -> FloatArray:
    """Multiply a basis with a rotation in place, 4,096 rows at a time."""
    width = len(rotation)
    for start in range(0, len(basis), 4096):
        basis[start : start + 4096, :width] = basis[start : start + 4096, :width] @ rotation
    return basis[:, :width]


# cross-entropy --------------------------------------------------------------------------------------------------------


def by_integration(clock: Clock, report: Report) -> Course:
    """Integrate f' = K α' and α' = (η/c) A (y − softmax) from f = f₀ and α = 0; A is the output map.

    Every evaluation of the right side is one product with K.
    """
    problem, shape = clock.problem, clock.problem.targets.shape
    vectors = 16 * (20 + 2 * NUM_TIMES) * problem.targets.size  # bytes of all stages of a step and of all results
    require_memory("the matrix, to integrate", bytes_of(problem.matrix, "cholesky") + vectors, clock.memory_bytes)
    K, one_hot = problem.dense(report), np.eye(problem.readout.num_logits)[problem.matrix.labels]
    largest = float(scipy.sparse.linalg.eigsh(K, k=1, v0=np.ones(len(K)), return_eigenvectors=False)[0])
    times = clock.times(largest, largest / LONGEST["ode"], "ode")

    def change(_time: float, state: FloatArray) -> FloatArray:
        scores = problem.readout.scores(state[: len(state) // 2].reshape(shape))
        pull = clock.speed * problem.readout.mapped(one_hot - scipy.special.softmax(scores, axis=1))
        return np.concatenate([(K @ pull).ravel(), pull.ravel()])

    size, state = problem.targets.size, np.concatenate([problem.offset.ravel(), np.zeros(problem.targets.size)])
    tolerances = ABSOLUTE * np.repeat([1.0, 1 / (largest or 1.0)], size)
    states = _integrated(change, state, times, tolerances, counter(report, "integrated", 0, len(times)))
    values = [state[:size].reshape(shape) for state in states]
    return Course(times, values, [state[size:].reshape(shape) for state in states], [None] * len(times))


def _integrated(
    change: Callable[[float, FloatArray], FloatArray],
    state: FloatArray,
    times: FloatArray,
    tolerances: FloatArray,
    step: Callable[[], None],
) -> list[FloatArray]:
    """Integrate from time zero, and return the state at each time.

    Raises:
        DivergedError: If the steps become too small.
    """
    states, before = [], 0.0
    for time in times:
        if time > before:
            solution = scipy.integrate.solve_ivp(
                change, (before, time), state, method="DOP853", rtol=RELATIVE, atol=tolerances, t_eval=[time]
            )
            if not solution.success:
                raise DivergedError(
                    f"The flow could not be integrated from t = {before:g} to {time:g}: expected steps that meet the "
                    f"tolerance {RELATIVE:g}, found none ({solution.message}). Are there infinite logits, or infinite "
                    "entries in the kernel? Check them."
                )
            before, state = time, solution.y[:, -1]
        states.append(state)
        step()
    return states


COURSES = {"eigh": by_eigenvalues, "krylov": by_krylov, "ode": by_integration}
