"""LDLᵀ of kernels that are not positive definite: pivoting inside tiles of the diagonal, and how far to trust it."""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import ldl

from ntkgen.analysis.linalg.blas import divide_right
from ntkgen.analysis.linalg.factor import Factor
from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.errors import NotPositiveError
from ntkgen.progress import Report, counter

# ‖(K − LDLᵀ)v‖ may be this fraction of ‖Kv‖.
TOLERANCE = 1e-8
PROBES = 4


@dataclass(frozen=True)
class PivotedTile:
    """A symmetric tile A = M S Mᵀ, M = Pᵀ l Q |Λ|^½ and S = sign Λ, where P A Pᵀ = l (QΛQᵀ) lᵀ has been pivoted."""

    factor: FloatArray  # M: (side, side)
    pivots: FloatArray  # Λ: (side,)
    lower: FloatArray  # l: (side, side), unit lower triangular
    order: FloatArray  # the rows of A in the order of P A Pᵀ
    turned: FloatArray  # Q |Λ|^−½ S: (side, side)

    def divide(self, X: FloatArray) -> None:
        """Compute X ← X M⁻ᵀ S in place."""
        permuted = np.asfortranarray(X[:, self.order])
        divide_right(permuted, self.lower)
        X[...] = permuted @ self.turned


def pivoted(tile: FloatArray, place: str) -> PivotedTile:
    """Factor a symmetric tile, of which the lower triangle is read, by the pivoting of Bunch and Kaufman.

    References:
        Bunch, Kaufman (1977), Mathematics of Computation 31, 163–179.

    Raises:
        NotPositiveError: If it is singular.
    """
    turned_lower, blocks, order = ldl(np.tril(tile), lower=True)
    Q, values = _diagonalized(blocks)
    if not values.all():
        raise NotPositiveError(
            f"The tile {place} is singular: expected pivots that are not zero, found {int((values == 0).sum())} that "
            "are. Are there equal samples, or fewer parameters than rows? Add --shift."
        )
    root = np.sqrt(np.abs(values))
    factor = (turned_lower @ Q) * root
    return PivotedTile(factor, values, np.asfortranarray(turned_lower[order]), order, Q * (np.sign(values) / root))


def _diagonalized(
    blocks: FloatArray,  # (side, side), its diagonal of 1 × 1 and 2 × 2 blocks
) -> tuple[FloatArray, FloatArray]:  # Q: (side, side), Λ: (side,)
    """Diagonalise a matrix of blocks on the diagonal, QΛQᵀ."""
    Q, values = np.eye(len(blocks)), np.diagonal(blocks).copy()
    for at in np.flatnonzero(np.diagonal(blocks, -1)):
        pair = slice(at, at + 2)
        values[pair], Q[pair, pair] = np.linalg.eigh(blocks[pair, pair])
    return Q, values


@dataclass(frozen=True)
class Examination:
    """How well L D Lᵀ is K + λI."""

    max_factor: float  # max |L|
    growth: float  # max |L|² / max |K_ii|
    residual: float  # ‖(K + λI − LDLᵀ)v‖ / ‖(K + λI)v‖ of random v, the largest


def examined(matrix: Matrix, factor: Factor, shift: float, report: Report) -> Examination:
    """Measure how well L D Lᵀ is K + λI: max |L|, its growth, and ‖(K + λI − LDLᵀ)v‖ / ‖(K + λI)v‖ of random v.

    In one pass over the kernel and two over the factor. L is scaled so that D is of ±1: |L|² exceeds no entry of a
    positive definite kernel, and the growth max |L|² / max |K_ii| is at most 1.

    Raises:
        NotPositiveError: If the residual shows that the factor cannot be trusted; it is then removed.
    """
    V = np.random.default_rng(0).standard_normal((matrix.num_rows, PROBES))
    expected = matrix.matmat(V, step=counter(report, "stored product", 0, matrix.num_tiles)) + shift * V
    found, largest = factor.multiply(V)
    residual = float((np.linalg.norm(found - expected, axis=0) / np.linalg.norm(expected, axis=0)).max())
    if not residual <= TOLERANCE:
        factor.remove()
        raise NotPositiveError(
            f"The factor of the kernel at {matrix.name} cannot be trusted: expected ‖(K − LDLᵀ)v‖ of at most "
            f"{TOLERANCE:g} ‖Kv‖, found {residual:.3g}, with max |L| = {largest:.3g}. Pivots inside tiles were too "
            "small. Add --shift, or compute the kernel with --precision float64 --dtype float64."
        )
    growth = largest**2 / float(np.abs(matrix.diagonal() + shift).max())
    return Examination(largest, growth, residual)
