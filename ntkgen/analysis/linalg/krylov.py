"""Block Krylov iteration with full reorthogonalisation: the largest eigenvalues of a symmetric operator K.

Let Q = [Q₁ … Q_q] be orthonormal, T = Qᵀ K Q, and Q⁺ the orthonormal block that K Q_q adds to Q. Then

    K Q = Q T + Q⁺ B Eᵀ,

where E selects the columns of Q that are coupled to Q⁺. Q₁ spans Gaussian vectors. Each step multiplies one block with
K. If K is a stored kernel, that is one pass over the tiles. When the memory for Q is full, a thick restart keeps the
best Ritz vectors and Q⁺, for which the same identity holds.

References:
    Golub, Underwood (1977), The block Lanczos method for computing eigenvalues.
    Musco, Musco (2015), arXiv:1504.05477.
    Wu, Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh, solve_triangular

from ntkgen.analysis.matrix import FloatArray

Multiply = Callable[[FloatArray], FloatArray]

EPSILON = float(np.finfo(np.float64).eps)
# Maximum number of fixed-point iterations for the extrapolated bound h (see `measure`).
MAX_ITERATIONS = 60
# Maximum entry of |QᵀQ − I| at which columns count as orthonormal, and maximum number of Cholesky rounds of `tall_qr`.
ORTHONORMAL, MAX_ROUNDS = 1e-13, 6
# Number of rows that are treated at a time, so that intermediate results need less memory than a block.
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Sizes:
    """Maximum size of a Krylov space."""

    num_rows: int
    block: int  # number of vectors that are multiplied at a time, b
    num_blocks: int  # number of blocks before a restart

    @property
    def capacity(self) -> int:
        """Maximum number of columns of Q."""
        return min(self.num_rows, self.block * self.num_blocks)

    @property
    def bytes(self) -> int:
        """Memory in bytes: of Q, of the block that is added to it, of T, of a copy of T and of its eigenvectors.

        >>> Sizes(20_000, 300, 8).bytes // 10**6
        624
        """
        columns = self.capacity + self.block
        return 8 * columns * (self.num_rows + 33 * columns // 10)


class Krylov:
    """The Krylov space of an operator K: Q, T, B and Q⁺, and the steps that extend them."""

    def __init__(self, multiply: Multiply, sizes: Sizes, seed: int = 0) -> None:
        self.sizes = sizes
        self.width = 0  # number of columns of Q
        self.steps = 0
        self.is_lanczos = True  # whether Q begins with Q₁, that is, without a restart so far
        self._multiply = multiply
        self._basis = np.empty((sizes.num_rows, sizes.capacity))
        self._projected = np.zeros((sizes.capacity, sizes.capacity))
        block = min(sizes.block, sizes.capacity)
        self._next = np.random.default_rng(seed).standard_normal((sizes.num_rows, block))
        self.start = tall_qr(self._next)  # R with Ω = Q₁ R, where Ω are the Gaussian start vectors
        self.coupling = np.zeros((block, 0))  # B
        self.coupled = slice(0, 0)  # the columns of Q that E selects

    @property
    def basis(self) -> FloatArray:  # (rows, width)
        """Q."""
        return self._basis[:, : self.width]

    @property
    def projected(self) -> FloatArray:  # (width, width)
        """T."""
        return self._projected[: self.width, : self.width]

    @property
    def added(self) -> int:
        """Number of columns of Q⁺; 0 if the span of Q is invariant under K."""
        return int(self._next.shape[1])

    @property
    def is_full(self) -> bool:
        """Whether Q has no room for the columns of Q⁺."""
        return self.width + self.added > self.sizes.capacity

    def advance(self) -> None:
        """Append Q⁺ to Q, and multiply it with K.

        Costs one product with K and about 12 · rows · width · block FLOPs.
        """
        assert self.added
        old, new = self.width, slice(self.width, self.width + self.added)
        self._basis[:, new] = self._next
        self._next = np.empty((0, 0))  # frees the memory for the product
        self.width, self.steps = new.stop, self.steps + 1
        product = self._multiply(self._basis[:, new])
        columns = subtract_span(self.basis, product)
        columns += subtract_span(self.basis, product)
        columns[new] = (columns[new] + columns[new].T) / 2
        self.projected[:, new] = columns
        self.projected[new, :old] = columns[:old].T
        self._add(product, new)

    def _add(self, product: FloatArray, new: slice) -> None:
        """Compute Q⁺ and B from the part of a product that is orthogonal to Q; drop directions of rounding errors."""
        factor = tall_qr(product)
        left, sizes, right = np.linalg.svd(factor, full_matrices=False)
        is_kept = sizes > 10 * EPSILON * np.linalg.norm(self.projected)
        count = min(int(is_kept.sum()), self.sizes.num_rows - self.width)
        self.coupled = new
        if not count:
            self.coupling, self._next = np.zeros((0, len(factor))), np.empty((len(product), 0))
            return
        for rows in chunks(len(product)):
            product[rows, :count] = product[rows] @ left[:, :count]
        kept = product if count == product.shape[1] else np.ascontiguousarray(product[:, :count])
        subtract_span(self.basis, kept)
        self.coupling = tall_qr(kept) @ (sizes[:count, None] * right[:count])
        self._next = kept

    def ritz(self, count: int) -> tuple[FloatArray, FloatArray]:  # (count,), (width, count)
        """Compute the largest eigenvalues of T in descending order, and their eigenvectors S.

        They are the Ritz values of K, and Q S are the Ritz vectors.
        """
        return largest_eigenpairs(np.array(self.projected, order="F"), min(count, self.width))

    def residuals(
        self,
        S: FloatArray,  # (width, count): eigenvectors of T
    ) -> FloatArray:  # (count,)
        """Compute the residuals ‖K y − θ y‖ = ‖B Eᵀ s‖ of the Ritz vectors y = Q s, without a product with K."""
        return np.asarray(np.linalg.norm(self.coupling @ S[self.coupled], axis=0))

    def bordered(self, corner: float) -> FloatArray:  # (width + added, width + added)
        """Build [[T, E Bᵀ], [B Eᵀ, corner · I]]."""
        width = self.width
        M = np.zeros((width + self.added, width + self.added), order="F")
        M[:width, :width] = self.projected
        M[width:, self.coupled] = self.coupling
        M[self.coupled, width:] = self.coupling.T
        np.einsum("ii->i", M)[width:] = corner
        return M

    def restart(self, count: int) -> None:
        """Replace Q by the Ritz vectors with the largest Ritz values. Costs 2 · rows · width · count FLOPs."""
        values, S = self.ritz(count)
        for rows in chunks(len(self._basis)):
            self._basis[rows, : len(values)] = self.basis[rows] @ S
        self.coupling, self.coupled = self.coupling @ S[self.coupled], slice(0, len(values))
        self.width, self.is_lanczos = len(values), False
        self.projected[...] = np.diag(values)

    def vectors(
        self,
        S: FloatArray,  # (width, count)
    ) -> FloatArray:  # (rows, count)
        """Compute Q S."""
        return np.concatenate([self.basis[rows] @ S for rows in chunks(len(self._basis))])


def chunks(num_rows: int, size: int = CHUNK_ROWS) -> Iterator[slice]:
    """Divide rows into consecutive parts.

    >>> list(chunks(5, 3))
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return (slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size))


def largest_eigenpairs(
    T: FloatArray,  # (width, width), in Fortran order; overwritten
    count: int,
) -> tuple[FloatArray, FloatArray]:  # (count,), (width, count)
    """Compute the largest eigenvalues of a symmetric matrix in descending order, and their eigenvectors."""
    indices = [len(T) - count, len(T) - 1]
    values, S = eigh(T, subset_by_index=indices, overwrite_a=True, check_finite=False)
    return values[::-1], S[:, ::-1]


def tall_qr(
    W: FloatArray,  # (rows, cols), rows ≥ cols; becomes Q
) -> FloatArray:  # (cols, cols)
    """Factor W = Q R in place, for some rows at a time, and return R.

    Repeated Cholesky factorisations of Wᵀ W orthonormalise W with fast matrix products. If W is too badly conditioned
    for that, Wᵀ W is shifted. If W is rank deficient, Householder's method is used. Q is orthonormal up to rounding for
    any condition number of W. Costs about 8 · rows · cols² FLOPs.

    References:
        Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa (2020), arXiv:1809.11085 (shifted CholeskyQR).
    """
    factor = np.eye(W.shape[1])
    for _ in range(MAX_ROUNDS):
        gram: FloatArray = W.T @ W
        if np.abs(gram - np.eye(len(gram))).max() <= ORTHONORMAL:
            return factor
        lower = _cholesky(gram)
        if lower is None:
            break
        for rows in chunks(len(W)):
            W[rows] = solve_triangular(lower, W[rows].T, lower=True, check_finite=False).T
        factor = lower.T @ factor
    return householder_qr(W) @ factor


def _cholesky(gram: FloatArray) -> FloatArray | None:
    """Factor a Gram matrix, with a shift if it is not positive definite; return None if that fails too."""
    for shift in (0.0, 100 * EPSILON * float(np.trace(gram))):
        try:
            return np.asarray(np.linalg.cholesky(gram + shift * np.eye(len(gram))))
        except np.linalg.LinAlgError:
            continue
    return None


def householder_qr(
    W: FloatArray,  # (rows, cols), rows ≥ cols; becomes Q
) -> FloatArray:  # (cols, cols)
    """Factor W = Q R by Householder's method in place, for some rows at a time, and return R.

    References:
        Demmel, Grigori, Hoemmen, Langou (2012), arXiv:0808.2664 (TSQR).
    """
    parts = list(chunks(len(W), max(CHUNK_ROWS, 2 * W.shape[1])))
    factors = []
    for rows in parts:
        Q, R = np.linalg.qr(W[rows])
        W[rows, : Q.shape[1]] = Q
        factors.append(R)
    joint, R = np.linalg.qr(np.concatenate(factors))
    at = 0
    for rows, factor in zip(parts, factors, strict=True):
        W[rows] = W[rows, : len(factor)] @ joint[at : at + len(factor)]
        at += len(factor)
    return np.asarray(R)


def subtract_span(
    Q: FloatArray,  # (rows, width), orthonormal
    W: FloatArray,  # (rows, cols); becomes (I − Q Qᵀ) W
) -> FloatArray:  # (width, cols)
    """Subtract from W its projection onto the span of Q, in place; return Qᵀ W."""
    C: FloatArray = Q.T @ W
    for rows in chunks(len(W)):
        W[rows] -= Q[rows] @ C
    return C


# largest eigenvalues --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """The stopping criterion: the number of eigenvalues, their accuracy and the number of steps."""

    count: int  # number of eigenvalues
    tolerance: float  # maximum error of an eigenvalue, relative to it
    max_steps: int  # maximum number of steps


@dataclass(frozen=True)
class Largest:
    """Approximations θ of the largest eigenvalues λ after the last step, in descending order.

    The residual ‖K y − θ y‖ of a Ritz vector y is a proven bound: K has an eigenvalue within this distance of θ. The
    errors bound λ_i − θ_i ≥ 0, unless the iteration has missed an eigenvector. ``is_proven`` states that it cannot have
    missed one.
    """

    values: FloatArray  # (count,), θ
    residuals: FloatArray  # (count,)
    errors: FloatArray  # (count,)
    is_proven: bool
    is_converged: bool


def measure(krylov: Krylov, goal: Goal, squares: float | None = None) -> Largest:
    """Compute the largest Ritz values, and bound their distance to the largest eigenvalues.

    In a basis [Q, Q⁺, …] K is [[T, E Bᵀ], [B Eᵀ, H]], where H is the part of K on the complement of Q. If no eigenvalue
    of H exceeds h, replacing H by h I does not decrease any eigenvalue of the matrix. Therefore

        θ_i ≤ λ_i ≤ the i-th eigenvalue of [[T, E Bᵀ], [B Eᵀ, h I]].

    The difference of these two bounds is about r²/(θ_i − h), where r is the residual. ‖H‖_F is a proven value for h. It
    follows exactly from ‖H‖_F² = ‖K‖_F² − ‖T‖_F² − 2‖B‖_F². If it is far below the θ_i, no eigenvector can have been
    missed, and the error bound is proven. Otherwise h is extrapolated (`_extrapolated_bound`). The error bound may then
    be wrong in two cases: before convergence, when it is large anyway, and if an eigenvector is nearly orthogonal to
    the b Gaussian start vectors.

    The upper bounds are computed only if they can meet the tolerance, or after the last step.

    Args:
        krylov: The Krylov space after a step.
        goal: The stopping criterion.
        squares: ‖K‖_F²; None if it is not known.
    """
    theta, S = krylov.ritz(goal.count)
    residuals = krylov.residuals(S)
    rounding = EPSILON * np.sqrt(krylov.sizes.num_rows) * float(np.abs(theta).max())
    h, is_proven = _bound_on_rest(krylov, float(theta[-1]), squares)
    errors = residuals
    is_worth_it = krylov.steps >= goal.max_steps or bool((residuals**2 <= goal.tolerance * theta**2).all())
    if krylov.added and h < theta[-1] and is_worth_it:
        upper = _largest_values(krylov.bordered(h), len(theta))
        errors = np.minimum(residuals, np.maximum(upper - theta, 0.0))
    errors = errors + rounding
    is_close = bool((errors <= np.maximum(goal.tolerance * theta, 2 * rounding)).all())
    is_converged = not krylov.added or (is_close and len(theta) == goal.count)
    return Largest(theta, residuals + rounding, errors, is_proven=is_proven, is_converged=is_converged)


def _bound_on_rest(krylov: Krylov, theta: float, squares: float | None) -> tuple[float, bool]:
    """Return an upper bound h on the eigenvalues of H (see `measure`), and whether it is proven and below θ."""
    extrapolated = _extrapolated_bound(krylov, theta)
    if squares is None:
        return extrapolated, False
    known = float(np.linalg.norm(krylov.projected)) ** 2 + 2 * float(np.linalg.norm(krylov.coupling)) ** 2
    proven = math.sqrt(max(squares - known, 1e3 * EPSILON * squares))
    is_proven = proven <= max(extrapolated, theta / 2) and proven < theta
    return (proven, True) if is_proven else (extrapolated, False)


def _extrapolated_bound(krylov: Krylov, theta: float) -> float:
    """Extrapolate h as if the next blocks of T were equal to the last: h = λ_max(T_qq + Bᵀ B / (θ − h)).

    The eigenvalues of K depend on H only through (θ − H)⁻¹ between vectors of Q⁺. That is a block continued fraction of
    the next blocks of T. These blocks become smaller from step to step, so that the last one is taken as a bound on
    them. The result is infinite if there is no such h below θ.
    """
    last = krylov.projected[krylov.coupled, krylov.coupled]
    squared = krylov.coupling.T @ krylov.coupling
    h = float(np.linalg.eigvalsh(last)[-1])
    for _ in range(MAX_ITERATIONS):
        if h >= theta:
            return math.inf
        before, h = h, float(np.linalg.eigvalsh(last + squared / (theta - h))[-1])
        if h - before <= 1e-3 * (theta - h):
            return h
    return math.inf


def _largest_values(M: FloatArray, count: int) -> FloatArray:
    last = len(M) - 1
    values = eigh(M, eigvals_only=True, subset_by_index=[last + 1 - count, last], overwrite_a=True, check_finite=False)
    return np.asarray(values[::-1])


def run(
    krylov: Krylov,
    goal: Goal,
    *,
    squares: Callable[[], float | None] = lambda: None,
    before_restart: Callable[[], None] = lambda: None,
) -> Largest:
    """Take steps until the largest eigenvalues meet the tolerance, or the maximum number of steps is reached.

    Args:
        krylov: The Krylov space to extend.
        goal: The stopping criterion.
        squares: Called after each step; returns ‖K‖_F², or None if it is not known.
        before_restart: Called before each restart.
    """
    while True:
        if krylov.is_full:
            before_restart()
            krylov.restart(krylov.sizes.capacity - krylov.sizes.block * max(1, krylov.sizes.num_blocks // 2))
        krylov.advance()
        largest = measure(krylov, goal, squares())
        if largest.is_converged or krylov.steps >= goal.max_steps:
            return largest
