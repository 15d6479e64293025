"""How gradient flow is followed: by eigenvalues, in a Krylov space, or by integration."""

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

# Where no times are given: so many, from a tenth of the first mode's learning time to so many of these at most.
NUM_TIMES = 25
LONGEST = {"eigh": 1e8, "krylov": 1e3, "ode": 1e4}
# Of a subspace: its error, relative to y − f₀; the most passes; and what is no new direction, relative.
TOLERANCE, MAX_STEPS, ROUNDING = 1e-10, 300, 1e-14
# Of the integration.
RELATIVE, ABSOLUTE = 1e-9, 1e-11
# The integral in the error bound is taken on so many points per time.
POINTS = 64


@dataclass(frozen=True)
class Clock:
    """What is learned, and how quickly."""

    problem: Problem
    rate: float  # η
    normalisation: float  # of the loss, c
    wanted: tuple[float, ...] | None = None  # times; None: those in which something is learned
    memory_bytes: int | None = None  # of the whole process

    @property
    def speed(self) -> float:
        """η / c."""
        return self.rate / self.normalisation

    def times(self, largest: float, slowest: float, method: str) -> FloatArray:
        """Take the times asked for; or those between the first mode, of the largest eigenvalue, and the slowest."""
        if self.wanted is not None:
            return np.array(sorted(self.wanted))
        if largest <= 0:
            return np.array([0.0])
        first = 1 / (self.speed * largest)
        return np.geomspace(first / 10, first * min(LONGEST[method], 10 * largest / slowest), NUM_TIMES)


@dataclass(frozen=True)
class Course:
    """A flow at some times: f_t = f₀ + K α_t."""

    times: FloatArray
    values: list[FloatArray]  # (rows, columns) for each time, f_t
    alphas: list[FloatArray]  # (rows, columns) for each time, α_t
    bounds: list[float | None]  # of ‖error of f_t‖ / ‖y − f₀‖; None where nobody knows one
    eigenvalues: FloatArray | None = None  # descending
    energies: FloatArray | None = None  # of y − f₀ in these modes


@dataclass(frozen=True)
class Subspace:
    """A space that K maps into itself, but for B: K V = V Λ + Q B with orthonormal columns V and, beside them, Q."""

    eigenvalues: FloatArray  # (modes,), Λ; what is below zero counts as zero
    energies: FloatArray  # (modes, columns), Vᵀ (y − f₀)
    rest: FloatArray  # (columns, modes), B; none of a whole eigendecomposition

    @property
    def clipped(self) -> FloatArray:
        """The eigenvalues as they count."""
        return np.maximum(self.eigenvalues, 0)

    def times(self, clock: Clock, method: str) -> FloatArray:
        """Take the times asked for, or those in which something is learned."""
        largest = float(self.clipped.max(initial=0))
        tiny = clock.problem.matrix.num_rows * EPSILON * largest
        return clock.times(largest, float(self.clipped[self.clipped > tiny].min(initial=np.inf)), method)

    def left(self, time: float) -> FloatArray:  # (modes, columns)
        """What is not learned yet, Vᵀ (y − f_t)."""
        return np.exp(-self.clipped * time)[:, None] * self.energies

    def learned(self, time: float) -> FloatArray:  # (modes, columns)
        """Find Vᵀ α_t, by (1 − exp(−λt)) / λ, which is t for λ = 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.where(
                self.clipped * time > np.finfo(float).tiny, -np.expm1(-self.clipped * time) / self.clipped, time
            )
        return factors[:, None] * self.energies

    def bound(self, time: float) -> float:
        """Bound the error of V exp(−Λ t) Vᵀ r against exp(−K t) r by ∫ ‖B exp(−Λ s) Vᵀ r‖ ds from 0 to t.

        For of the first remains r_s' + K r_s = Q B exp(−Λ s) Vᵀ r, and no flow of a kernel lets an error grow.
        """
        if not len(self.rest) or time == 0:
            return 0.0
        first = min(time, 1 / max(float(self.clipped.max()), np.finfo(float).tiny)) / POINTS
        points = np.concatenate([[0.0], np.geomspace(first, time, 4 * POINTS)])
        return float(np.trapezoid([float(np.linalg.norm(self.rest @ self.left(at))) for at in points], points))

    def course(self, clock: Clock, method: str, vectors: FloatArray) -> Course:
        """Follow the flow in the space of these vectors V, of (rows, modes)."""
        times, size = self.times(clock, method), float(np.sum(clock.problem.residual**2)) or 1.0
        order = np.argsort(-self.eigenvalues, kind="stable")
        return Course(
            times,
            [clock.problem.targets - vectors @ self.left(time) for time in clock.speed * times],
            [vectors @ self.learned(time) for time in clock.speed * times],
            [self.bound(time) / np.sqrt(size) for time in clock.speed * times],
            self.eigenvalues[order],
            np.sum(self.energies**2, axis=1)[order] / size,
        )


def by_eigenvalues(clock: Clock, report: Report) -> Course:
    """Follow the flow in all modes of the kernel.

    Raises:
        BudgetError: If the eigenvectors do not fit in memory.
    """
    require_memory("the eigenvectors", bytes_of(clock.problem.matrix, "eigh"), clock.memory_bytes)
    values, vectors = eigenvalues_and_vectors(clock.problem.dense(report), report)
    whole = Subspace(values, vectors.T @ clock.problem.residual, np.zeros((0, len(values))))
    return whole.course(clock, "eigh", vectors)


def by_krylov(clock: Clock, report: Report) -> Course:
    """Follow the flow in the space of r, K r, K² r, … with r = y − f₀, each step of which is a pass.

    It ends when the bound is met at all times, nothing new is found, or the memory is full.
    """
    problem = clock.problem
    most = _most_steps(problem, clock.memory_bytes)
    step = counter(report, "solved", 0, most)
    rows, columns = problem.residual.shape
    basis = np.empty((rows, min(rows, most * columns)))
    products = np.zeros((basis.shape[1],) * 2)
    new, first = _orthonormal(basis[:, :0], problem.residual)
    space, rotation = _ritz(products[:0, :0], first[:0], first[:0, :0])
    inside = 0
    for count in range(1, most + 1):
        if not new.shape[1]:
            break
        last = slice(inside, inside + new.shape[1])
        basis[:, last], inside = new, last.stop
        product = problem.readout.scale * problem.matrix.matmat(new)
        step()
        products[:inside, last] = basis[:, :inside].T @ product
        new, rest = _orthonormal(basis[:, :inside], product)
        if not new.shape[1] or count == most or count % max(1, count // 8) == 0:
            space, rotation = _ritz(products[:inside, :inside], first, rest)
            if _is_enough(space, clock):
                break
    return space.course(clock, "krylov", _rotated(basis, rotation))


def _orthonormal(basis: FloatArray, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Find Q and B with vectors = basis C + Q B, Q orthonormal, and as narrow as rounding allows."""
    left = vectors
    for _ in range(2):
        left = left - basis @ (basis.T @ left)
    Q, sizes, B = np.linalg.svd(left, full_matrices=False)
    is_there = sizes > ROUNDING * max(float(np.linalg.norm(vectors)), np.finfo(float).tiny)
    Q = Q[:, is_there]
    Q, R = np.linalg.qr(Q - basis @ (basis.T @ Q))  # what is small was not orthogonal enough
    return Q, R @ (sizes[is_there, None] * B[is_there])


def _most_steps(problem: Problem, memory_bytes: int | None) -> int:
    """Count the steps whose vectors fit in memory, beside the tiles and the outputs at all times.

    Raises:
        BudgetError: If ten do not.
    """
    vectors = 8 * problem.targets.size
    tiles = reading_bytes(problem.matrix, problem.targets.shape[1])
    others = tiles + (2 * NUM_TIMES + 10) * vectors
    require_memory("tiles, and vectors of ten steps", others + 10 * vectors, memory_bytes)
    return min(MAX_STEPS, len(problem.targets), (memory_left(memory_bytes) - others) // vectors)


def _ritz(products: FloatArray, first: FloatArray, rest: FloatArray) -> tuple[Subspace, FloatArray]:
    """Diagonalise K within the basis; the second of the results are the coordinates of the modes in it."""
    values, rotation = np.linalg.eigh(products, UPLO="U")  # below the diagonal blocks nothing was computed
    last = rotation[len(rotation) - rest.shape[1] :]
    return Subspace(values, rotation[: len(first)].T @ first, rest @ last), rotation


def _is_enough(space: Subspace, clock: Clock) -> bool:
    limit = TOLERANCE * float(np.linalg.norm(clock.problem.residual))
    return max(space.bound(time) for time in clock.speed * space.times(clock, "krylov")) <= limit


def _rotated(basis: FloatArray, rotation: FloatArray) -> FloatArray:
    """Multiply a basis with a rotation where it lies, some rows at a time."""
    inside = len(rotation)
    for start in range(0, len(basis), 4096):
        basis[start : start + 4096, :inside] = basis[start : start + 4096, :inside] @ rotation
    return basis[:, :inside]


# cross-entropy --------------------------------------------------------------------------------------------------------


def by_integration(clock: Clock, report: Report) -> Course:
    """Integrate f' = K α', α' = (η/c) A (y − softmax), from f₀ and zero; each step is a product with K."""
    problem, shape = clock.problem, clock.problem.targets.shape
    vectors = 16 * (20 + 2 * NUM_TIMES) * problem.targets.size  # of all stages of a step, and at all times
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
    """Integrate from time zero on, and keep the state at each time.

    Raises:
        DivergedError: If the steps become too small.
    """
    states, before = [], 0.0
    for time in times:
        if time > before:
            found = scipy.integrate.solve_ivp(
                change, (before, time), state, method="DOP853", rtol=RELATIVE, atol=tolerances, t_eval=[time]
            )
            if not found.success:
                raise DivergedError(
                    f"The flow could not be integrated from t = {before:g} to {time:g}: expected steps that meet the "
                    f"tolerance {RELATIVE:g}, found none ({found.message}). Are logits or kernel infinite? Check them."
                )
            before, state = time, found.y[:, -1]
        states.append(state)
        step()
    return states


COURSES = {"eigh": by_eigenvalues, "krylov": by_krylov, "ode": by_integration}
