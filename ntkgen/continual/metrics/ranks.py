"""Ranks of a matrix from its singular values σ₁ ≥ σ₂ ≥ …: measures that differ, under names that cannot be confused.

Publications on the loss of plasticity use the same names for different numbers. What the code of Dohare et al. (2024)
calls stable rank is `rank_99` here, and Kumar et al. (2021) call it effective rank. `stable_rank` is that of the
textbooks, and `effective_rank` that of Roy and Vetterli.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.linalg.quadrature import effective_rank

FloatArray = npt.NDArray[np.float64]

# The tolerance τ of a numerical rank, several of them, or None for what the precision resolves.
Tolerance = float | tuple[float, ...] | None

# The part of a sum that the counted values must reach, in `rank_99` and `rank_99_squared`.
PART = 0.99


@dataclass(frozen=True)
class Ranks:
    """Ranks of one matrix of activations, not centred. All are 0 for a matrix of zeros.

    Attributes:
        effective_rank: exp(−Σ p log p) with p = σ / Σ σ (Roy, Vetterli 2007, EUSIPCO).
        rank_99: Smallest k with Σ_{j≤k} σ_j ≥ 0.99 Σ σ (Kumar et al. 2021, arXiv:2010.14498; the "stable rank" of the
            code of Dohare et al. 2024, Nature 632).
        rank_99_squared: Smallest k with Σ_{j≤k} σ_j² ≥ 0.99 Σ σ², the "approximate rank" (Yang et al. 2020,
            arXiv:1909.12255).
        stable_rank: ‖F‖_F² / ‖F‖₂² = Σ σ² / σ₁² (Rudelson, Vershynin 2007, J. ACM 54).
        numerical_rank: Number of singular values above τ σ₁ with the tolerance τ; one for each of several tolerances.
    """

    effective_rank: float
    rank_99: int
    rank_99_squared: int
    stable_rank: float
    numerical_rank: int | tuple[int, ...]

    @classmethod
    def of(
        cls,
        F: npt.NDArray[np.floating],  # (rows, columns)
        tolerance: Tolerance = None,
    ) -> "Ranks":
        """Compute all singular values of a matrix of finite numbers, in float64.

        Args:
            F: The matrix.
            tolerance: τ of the numerical rank, or several; None for max(rows, columns) ε, where ε is the distance from
                1 to the next number in the type of the matrix, as in `numpy.linalg.matrix_rank`.
        """
        resolved = max(F.shape) * float(np.finfo(F.dtype).eps)
        values = np.linalg.svd(F.astype(np.float64), compute_uv=False)
        return cls(
            effective_rank=effective_rank(values),
            rank_99=rank_99(values),
            rank_99_squared=rank_99_squared(values),
            stable_rank=stable_rank(values),
            numerical_rank=numerical_ranks(values, tolerance, resolved),
        )


def rank_99(values: FloatArray) -> int:
    """Find the smallest k with Σ_{j≤k} σ_j ≥ 0.99 Σ σ. Values that are not positive count as zero.

    >>> rank_99(np.array([0.9, 0.08, 0.02])), rank_99(np.array([0.9, 0.095, 0.005]))
    (3, 2)
    """
    positive = np.sort(values[values > 0])[::-1]
    return 1 + int((np.cumsum(positive / positive.sum()) < PART).sum()) if len(positive) else 0


def rank_99_squared(values: FloatArray) -> int:
    """Find the smallest k with Σ_{j≤k} σ_j² ≥ 0.99 Σ σ².

    >>> rank_99_squared(np.array([0.9, 0.08, 0.02]))
    1
    """
    return rank_99(values**2)


def stable_rank(values: FloatArray) -> float:
    """Compute Σ σ² / σ₁².

    >>> stable_rank(np.array([2.0, 1.0, 1.0]))
    1.5
    """
    return float(np.square(values / values.max()).sum()) if values.any() else 0.0


def numerical_rank(values: FloatArray, tolerance: float) -> int:
    """Count the values above τ σ₁ with a tolerance τ.

    >>> numerical_rank(np.array([2.0, 1.0, 1e-9]), tolerance=1e-6)
    2
    """
    return int((values > tolerance * values.max()).sum())


def numerical_ranks(values: FloatArray, tolerance: Tolerance, resolved: float) -> int | tuple[int, ...]:
    """Count the values above τ σ₁ for one tolerance τ, or for each of several.

    >>> numerical_ranks(np.array([2.0, 1.0, 1e-9]), (0.6, 1e-6), resolved=0.0)
    (1, 2)

    Args:
        values: The values.
        tolerance: The tolerances.
        resolved: The tolerance if there is none.
    """
    if isinstance(tolerance, tuple):
        return tuple(numerical_rank(values, each) for each in tolerance)
    return numerical_rank(values, resolved if tolerance is None else tolerance)
