"""LDLᵀ of kernels that are not positive definite: pivoting within diagonal tiles, and a check of the result."""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import ldl

from ntkgen.analysis.linalg.blas import divide_right
from ntkgen.analysis.linalg.factor import Factor
from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.errors import NotPositiveError
from ntkgen.progress import Report, counter

# Maximum of ‖(K − LDLᵀ)v‖ / ‖Kv‖.
TOLERANCE = 1e-8
# Number of random vectors v in that check.
PROBES = 4


@dataclass(frozen=True)
class PivotedTile:
    """A factored symmetric tile A = M S Mᵀ with M = Pᵀ l Q |Λ|^½ and S = sign Λ.

    It comes from the pivoted factorisation P A Pᵀ = l (QΛQᵀ) lᵀ.
    """

    factor: FloatArray  # M: (side, side)
    pivots: FloatArray  # Λ: (side,)
    lower: FloatArray  # l: (side, side), unit lower triangular
    order: FloatArray  # the permutation P: indices of the rows of A in the order of P A Pᵀ
    turned: FloatArray  # Q |Λ|^−½ S: (side, side)

    def divide(self, X: FloatArray) -> None:
        """Compute X ← X M⁻ᵀ S in place."""
        permuted = np.asfortranarray(X[:, self.order])
        divide_right(permuted, self.lower)
        X[...] = permuted @ self.turned


def pivoted(tile: FloatArray, place: str) -> PivotedTile:
    """Factor a symmetric tile with Bunch–Kaufman pivoting; only its lower triangle is read.

    References:
        Bunch, Kaufman (1977), Mathematics of Computation 31, 163–179.

    Raises:
        NotPositiveError: If the tile is singular.
    """
    turned_lower, blocks, order = ldl(np.tril(tile), lower=True)
    Q, values = _diagonalized(blocks)
    if not values.all():
        raise NotPositiveError(
            f"The tile {place} is singular: expected pivots that are not zero, found {int((values == 0).sum())} that "
            "are. Are there equal samples, or fewer parameters than rows? Set `shift` above 0."
        )
    root = np.sqrt(np.abs(values))
    factor = (turned_lower @ Q) * root
    return PivotedTile(factor, values, np.asfortranarray(turned_lower[order]), order, Q * (np.sign(values) / root))


def _diagonalized(
    blocks: FloatArray,  # (side, side), block diagonal, with 1 × 1 and 2 × 2 blocks
) -> tuple[FloatArray, FloatArray]:  # Q: (side, side), Λ: (side,)
    """Diagonalise a block-diagonal matrix as QΛQᵀ."""
    Q, values = np.eye(len(blocks)), np.diagonal(blocks).copy()
    for at in np.flatnonzero(np.diagonal(blocks, -1)):
        pair = slice(at, at + 2)
        values[pair], Q[pair, pair] = np.linalg.eigh(blocks[pair, pair])
    return Q, values


@dataclass(frozen=True)
class Examination:
    """Measures of the error of L D Lᵀ as a factorisation of K + λI."""

    max_factor: float  # max |L|
    growth: float  # max |L|² / max |(K + λI)_ii|
    residual: float  # largest ‖(K + λI − LDLᵀ)v‖ / ‖(K + λI)v‖ over random vectors v


def examined(matrix: Matrix, factor: Factor, shift: float, report: Report) -> Examination:
    """Measure the error of L D Lᵀ as a factorisation of K + λI, in one pass over the kernel and two over the factor.

    The measures are max |L|, the growth max |L|² / max |(K + λI)_ii|, and ‖(K + λI − LDLᵀ)v‖ / ‖(K + λI)v‖ for random
    vectors v. L is scaled so that the entries of D are ±1. The growth of a positive definite matrix is then at most 1.

    Raises:
        NotPositiveError: If the residual exceeds the tolerance. The factor is then removed.
    """
    V = np.random.default_rng(0).standard_normal((matrix.num_rows, PROBES))
    expected = matrix.matmat(V, step=counter(report, "stored product", 0, matrix.num_tiles)) + shift * V
    product, largest = factor.multiply(V)
    residual = float((np.linalg.norm(product - expected, axis=0) / np.linalg.norm(expected, axis=0)).max())
    if not residual <= TOLERANCE:
        factor.remove()
        raise NotPositiveError(
            f"The factor of the kernel at {matrix.name} cannot be trusted: expected ‖(K − LDLᵀ)v‖ of at most "
            f"{TOLERANCE:g} ‖Kv‖, found {residual:.3g}, with max |L| = {largest:.3g}. Pivots inside tiles were too "
            "small. Set `shift` above 0, or compute the kernel with "
            "`ntkgen compute --precision float64 --dtype float64`."
        )
    growth = largest**2 / float(np.abs(matrix.diagonal() + shift).max())
    return Examination(largest, growth, residual)
