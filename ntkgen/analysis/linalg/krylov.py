"""Block Krylov with full reorthogonalisation: the largest eigenvalues of an operator that is multiplied with blocks.

With Q = [Q₁ … Q_q], orthonormal, T = Qᵀ K Q and Q⁺ the orthonormal block that K Q_q adds,

    K Q = Q T + Q⁺ B Eᵀ,

where E picks the columns that are coupled to Q⁺. Q₁ spans Gaussian vectors. A step multiplies one block: with a stored
kernel it is one pass over the tiles. When the memory for Q is full, the best Ritz vectors and Q⁺ are kept (a thick
restart), and the same identity holds of them.

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
# Of the iteration for the height of what is beside Q.
MAX_ITERATIONS = 60
# Columns are orthonormal, if their products are so close to those of the identity; rounds to get there, at most.
ORTHONORMAL, MAX_ROUNDS = 1e-13, 6
# Rows that are worked on at a time, so that no product needs as much memory as a block.
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Sizes:
    """How large a Krylov space may become."""

    num_rows: int
    block: int  # vectors that are multiplied at a time, b
    num_blocks: int  # blocks that the memory holds before a restart

    @property
    def capacity(self) -> int:
        """Columns that Q may have."""
        return min(self.num_rows, self.block * self.num_blocks)

    @property
    def bytes(self) -> int:
        """Bytes of Q, of the block that is added to it, and of T, a copy of it and its eigenvectors.

        >>> Sizes(20_000, 300, 8).bytes // 10**6
        624
        """
        columns = self.capacity + self.block
        return 8 * columns * (self.num_rows + 33 * columns // 10)


class Krylov:
    """Q, T, B and Q⁺ of an operator K, and how they grow."""

    def __init__(self, multiply: Multiply, sizes: Sizes, seed: int = 0) -> None:
        self.sizes = sizes
        self.width = 0  # columns of Q
        self.steps = 0
        self.is_lanczos = True  # Q starts with Q₁, and was not restarted
        self._multiply = multiply
        self._basis = np.empty((sizes.num_rows, sizes.capacity))
        self._projected = np.zeros((sizes.capacity, sizes.capacity))
        block = min(sizes.block, sizes.capacity)
        self._next = np.random.default_rng(seed).standard_normal((sizes.num_rows, block))
        self.start = tall_qr(self._next)  # R with Ω = Q₁ R: the Gaussian vectors of the beginning
        self.coupling = np.zeros((block, 0))  # B
        self.coupled = slice(0, 0)  # the columns of Q that E picks

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
        """Columns of Q⁺; none where Q is invariant under K."""
        return int(self._next.shape[1])

    @property
    def is_full(self) -> bool:
        """Say whether Q⁺ has no room in Q."""
        return self.width + self.added > self.sizes.capacity

    def advance(self) -> None:
        """Append Q⁺ to Q, and multiply it. Costs one product, and about 12 · rows · width · block FLOPs."""
        assert self.added
        old, new = self.width, slice(self.width, self.width + self.added)
        self._basis[:, new] = self._next
        self._next = np.empty((0, 0))  # its memory is that of the product
        self.width, self.steps = new.stop, self.steps + 1
        product = self._multiply(self._basis[:, new])
        columns = subtract_span(self.basis, product)
        columns += subtract_span(self.basis, product)
        columns[new] = (columns[new] + columns[new].T) / 2
        self.projected[:, new] = columns
        self.projected[new, :old] = columns[:old].T
        self._add(product, new)

    def _add(self, product: FloatArray, new: slice) -> None:
        """Make Q⁺ and B of what is left of a product, but for directions that are rounding alone."""
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
        """Compute the largest eigenvalues of T, descending, and their eigenvectors S: the Ritz vectors are Q S."""
        return largest_eigenpairs(np.array(self.projected, order="F"), min(count, self.width))

    def residuals(
        self,
        S: FloatArray,  # (width, count): eigenvectors of T
    ) -> FloatArray:  # (count,)
        """Compute ‖K y − θ y‖ = ‖B Eᵀ s‖ of Ritz vectors y = Q s, without another product."""
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
        """Keep the best Ritz vectors of Q. Costs 2 · rows · width · count FLOPs."""
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
    """Cut rows into parts.

    >>> list(chunks(5, 3))
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return (slice(at, min(at + size, num_rows)) for at in range(0, num_rows, size))


def largest_eigenpairs(
    T: FloatArray,  # (width, width), in Fortran's order; overwritten
    count: int,
) -> tuple[FloatArray, FloatArray]:  # (count,), (width, count)
    """Compute the largest eigenvalues of a symmetric matrix, descending, and their eigenvectors."""
    wanted = [len(T) - count, len(T) - 1]
    values, S = eigh(T, subset_by_index=wanted, overwrite_a=True, check_finite=False)
    return values[::-1], S[:, ::-1]


def tall_qr(
    W: FloatArray,  # (rows, cols), rows ≥ cols; becomes Q
) -> FloatArray:  # (cols, cols)
    """Factor W = Q R in place, in parts of rows, and return R.

    By the Cholesky factors of Wᵀ W, again and again, which are matrix products and quick; shifted where W is too badly
    conditioned for that, and by Householder's method where its rank is deficient. Q is orthonormal to rounding whatever
    the condition of W. Costs about 8 · rows · cols² FLOPs.

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
    """Factor a Gram matrix, shifted if it is not positive definite to rounding; None, if it is not even so."""
    for shift in (0.0, 100 * EPSILON * float(np.trace(gram))):
        try:
            return np.asarray(np.linalg.cholesky(gram + shift * np.eye(len(gram))))
        except np.linalg.LinAlgError:
            continue
    return None


def householder_qr(
    W: FloatArray,  # (rows, cols), rows ≥ cols; becomes Q
) -> FloatArray:  # (cols, cols)
    """Factor W = Q R by Householder's method, in place and in parts of rows; return R.

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
    """Subtract from W its part in the span of Q, in place, once; return Qᵀ W."""
    C: FloatArray = Q.T @ W
    for rows in chunks(len(W)):
        W[rows] -= Q[rows] @ C
    return C


# the largest eigenvalues ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What is wanted: how many eigenvalues, how well, relative to each, and in how many steps at most."""

    count: int
    tolerance: float
    max_steps: int


@dataclass(frozen=True)
class Largest:
    """The largest eigenvalues, descending, as the last step left them.

    ``residuals`` are ‖K y − θ y‖ of the Ritz vectors y: within that of θ there is an eigenvalue, for certain.
    ``errors`` bound λ_i − θ_i ≥ 0, unless an eigenvector was missed; ``is_proven`` says that none can have been.
    """

    values: FloatArray  # (count,)
    residuals: FloatArray  # (count,)
    errors: FloatArray  # (count,)
    is_proven: bool
    is_converged: bool


def measure(krylov: Krylov, goal: Goal, squares: float | None = None) -> Largest:
    """Compute the largest Ritz values, and bound how far they are from the largest eigenvalues.

    In a basis [Q, Q⁺, …] K is [[T, E Bᵀ], [B Eᵀ, H]], H being its part beside Q. Where no eigenvalue of H is above h,
    K is below the same matrix with h I for H, and so is each of its eigenvalues:

        θ_i ≤ λ_i ≤ the i-th eigenvalue of [[T, E Bᵀ], [B Eᵀ, h I]].

    That difference is about r²/(θ_i − h), r being the residual. h ≤ ‖H‖_F, and ‖H‖_F² = ‖K‖_F² − ‖T‖_F² − 2‖B‖_F²
    exactly: where this is far below the θ_i, nothing can have been missed, and the bound is a proof. Elsewhere h is
    extrapolated (`_extrapolated_height`), and the bound misleads before anything has converged, when it is large
    anyway, or if an eigenvector is all but orthogonal to the b Gaussian vectors of the beginning.

    These upper bounds are computed only where they can be close enough, or after the last step.

    Args:
        krylov: What is there after a step.
        goal: What is wanted.
        squares: ‖K‖_F², where it is known.
    """
    theta, S = krylov.ritz(goal.count)
    residuals = krylov.residuals(S)
    rounding = EPSILON * np.sqrt(krylov.sizes.num_rows) * float(np.abs(theta).max())
    height, is_proven = _height(krylov, float(theta[-1]), squares)
    errors = residuals
    is_worth_it = krylov.steps >= goal.max_steps or bool((residuals**2 <= goal.tolerance * theta**2).all())
    if krylov.added and height < theta[-1] and is_worth_it:
        upper = _largest_values(krylov.bordered(height), len(theta))
        errors = np.minimum(residuals, np.maximum(upper - theta, 0.0))
    errors = errors + rounding
    is_close = bool((errors <= np.maximum(goal.tolerance * theta, 2 * rounding)).all())
    is_converged = not krylov.added or (is_close and len(theta) == goal.count)
    return Largest(theta, residuals + rounding, errors, is_proven=is_proven, is_converged=is_converged)


def _height(krylov: Krylov, theta: float, squares: float | None) -> tuple[float, bool]:
    """Bound H, as seen from Q⁺ and at θ, from above; and say whether that is proven to lie below θ."""
    guess = _extrapolated_height(krylov, theta)
    if squares is None:
        return guess, False
    seen = float(np.linalg.norm(krylov.projected)) ** 2 + 2 * float(np.linalg.norm(krylov.coupling)) ** 2
    proven = math.sqrt(max(squares - seen, 1e3 * EPSILON * squares))
    is_proven = proven <= max(guess, theta / 2) and proven < theta
    return (proven, True) if is_proven else (guess, False)


def _extrapolated_height(krylov: Krylov, theta: float) -> float:
    """Extrapolate what of H matters, as if the next blocks were like the last: h = λ_max(T_qq + Bᵀ B / (θ − h)).

    Only the part (θ − H)⁻¹ between vectors of Q⁺ enters the eigenvalues of K, and it is that of a matrix which begins
    with the next block of T and goes on like this (a block continued fraction). What is left beside Q becomes smaller
    with every step, so that the last block stands above the next. Infinite, if there is no such h below θ.
    """
    last = krylov.projected[krylov.coupled, krylov.coupled]
    squared = krylov.coupling.T @ krylov.coupling
    height = float(np.linalg.eigvalsh(last)[-1])
    for _ in range(MAX_ITERATIONS):
        if height >= theta:
            return math.inf
        before, height = height, float(np.linalg.eigvalsh(last + squared / (theta - height))[-1])
        if height - before <= 1e-3 * (theta - height):
            return height
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
    """Take steps until the largest eigenvalues are as accurate as wanted, or there were enough of them.

    Args:
        krylov: What to begin with.
        goal: What is wanted.
        squares: Says what ‖K‖_F² is, asked after each step.
        before_restart: Called before each restart.
    """
    while True:
        if krylov.is_full:
            before_restart()
            krylov.restart(krylov.sizes.capacity - krylov.sizes.block * max(1, krylov.sizes.num_blocks // 2))
        krylov.advance()
        found = measure(krylov, goal, squares())
        if found.is_converged or krylov.steps >= goal.max_steps:
            return found
