"""What kernels of one probe over time show: size, spectrum, motion, alignment with the labels, and cross-task blocks.

Kernels are (n, n), one row per sample, or (n m, n m), sample-major. Rows of outputs that do not exist yet are NaN, and
are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.linalg.quadrature import effective_rank
from ntkgen.continual.metrics.ranks import Tolerance, numerical_ranks, rank_99

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Relative rounding ε of a kernel by its precision: the distance from 1 to the next number. With float64-accumulate only
# J is rounded to float32. This moves the roots of the eigenvalues by ε₃₂ √λ₁, hence the smallest ones by ε₃₂² λ₁.
ROUNDING = {
    "float64": 2.0**-52,
    "float64-accumulate": 2.0**-46,
    "float32": 2.0**-23,
    "tf32": 2.0**-10,
    "bfloat16": 2.0**-7,
}


@dataclass(frozen=True)
class Spectrum:
    """Numbers that follow from the eigenvalues of one kernel of N rows.

    Eigenvalues up to N ε λ₁ are not resolved: the rounding ε of the kernel moves eigenvalues by about as much. This is
    also the tolerance of `numpy.linalg.matrix_rank`.

    Attributes:
        frobenius_norm: ‖K‖_F.
        trace: tr K.
        largest: λ₁, the largest eigenvalue.
        smallest: λ_N, the smallest eigenvalue.
        condition: λ₁ / λ_N; NaN if λ_N is not resolved.
        condition_bound: λ₁ / (λ_N + N ε λ₁), the smallest condition number within the rounding of the kernel.
        effective_rank: exp(−Σ p log p) with p = λ / Σ λ (Roy, Vetterli 2007). Negative eigenvalues count as zero.
        rank_99: Smallest k with Σ_{j≤k} λ_j ≥ 0.99 Σ λ; see `ntkgen.continual.metrics.ranks`. Negative eigenvalues
            count as zero.
        participation_ratio: (tr K)² / ‖K‖_F².
        numerical_rank: Number of eigenvalues above τ λ₁ with the tolerance τ; one for each of several tolerances.
        num_negative: Number of eigenvalues below zero.
    """

    frobenius_norm: float
    trace: float
    largest: float
    smallest: float
    condition: float
    condition_bound: float
    effective_rank: float
    rank_99: int
    participation_ratio: float
    numerical_rank: int | tuple[int, ...]
    num_negative: int

    @classmethod
    def of(cls, K: FloatArray, rounding: float = ROUNDING["float64"], tolerance: Tolerance = None) -> "Spectrum":
        """Compute all eigenvalues of a symmetric kernel.

        Args:
            K: The kernel.
            rounding: Relative rounding ε of its entries.
            tolerance: τ of the numerical rank, or several; None for N ε.
        """
        values = np.asarray(np.linalg.eigvalsh(K)[::-1], np.float64)
        resolution = len(K) * rounding
        squares = float(np.sum(K**2))
        return cls(
            frobenius_norm=squares**0.5,
            trace=float(np.trace(K)),
            largest=float(values[0]),
            smallest=float(values[-1]),
            condition=float(values[0] / values[-1]) if values[-1] > resolution * values[0] else float("nan"),
            condition_bound=float(values[0] / (max(values[-1], 0) + resolution * values[0]))
            if values[0] > 0
            else float("nan"),
            effective_rank=effective_rank(values),
            rank_99=rank_99(values),
            participation_ratio=float(np.trace(K)) ** 2 / squares if squares else 0.0,
            numerical_rank=numerical_ranks(values, tolerance, resolution),
            num_negative=int((values < 0).sum()),
        )


def distance(K: FloatArray, L: FloatArray) -> float:
    """Kernel distance S = 1 − ⟨K, L⟩ / (‖K‖ ‖L‖), not centred (Fort et al. 2020, arXiv:2010.15110, §2).

    Entries without values in one of the two are left out of both. If none are left, the distance is NaN.
    """
    known = ~(np.isnan(K) | np.isnan(L))
    if not known.all():
        K, L = (np.where(known, each, 0) for each in (K, L))
    return float(np.maximum(0.0, 1 - _cosine(K, L)))  # rounding alone makes it negative


def centred_distance(K: FloatArray, L: FloatArray, num_outputs: int) -> float:
    """Centred kernel distance 1 − CKA(K, L), that of the centred kernels (Kornblith et al. 2019, arXiv:1905.00414).

    Rows without values in one of the two are left out of both. If other entries are missing, it is NaN.
    """
    kept = ~(np.isnan(np.diagonal(K)) | np.isnan(np.diagonal(L)))
    blocks = [each[np.ix_(kept, kept)] for each in (K, L)]
    num_kept = int(kept[:num_outputs].sum())
    if not num_kept or any(np.isnan(block).any() for block in blocks):
        return float("nan")
    return distance(*(centred_kernel(block, num_kept) for block in blocks))


def velocity(
    distance_of: Callable[[int, int], float], iterations: IntArray, dt: int
) -> tuple[IntArray, FloatArray, FloatArray]:
    """Kernel velocity between snapshots that are dt iterations apart (Fort et al. 2020, arXiv:2010.15110).

    Args:
        distance_of: Gives the distance of the kernels at two times.
        iterations: Iteration of each time, (times,).
        dt: Number of iterations between two snapshots. Only pairs with exactly this distance are used.

    Returns:
        The iterations t at which a pair begins, S(K_t, K_{t+dt}) / dt, and arccos(1 − S) / dt, in radians.
    """
    place = {int(iteration): time for time, iteration in enumerate(iterations)}
    starts = [iteration for iteration in place if iteration + dt in place]
    S = np.array([distance_of(place[start], place[start + dt]) for start in starts])
    return np.array(starts, np.int64), S / dt, np.arccos(np.clip(1 - S, -1, 1)) / dt


def usual_step(iterations: IntArray) -> int:
    """The step between consecutive iterations that the most pairs are apart; of equally frequent ones the largest.

    >>> usual_step(np.array([0, 1, 2, 4, 10, 20, 30]))
    10
    """
    steps = np.unique(np.diff(iterations))
    counts = np.array([np.isin(iterations + step, iterations).sum() for step in steps])
    return int(steps[np.flatnonzero(counts == counts.max())[-1]]) if len(steps) else 1


def label_alignment(K: FloatArray, Y: FloatArray, num_outputs: int, *, centred: bool) -> float:
    """Alignment ⟨K, T⟩ / (‖K‖ ‖T‖) with the labels' target T = Y Yᵀ (Cristianini et al. 2001).

    For an (n, n) kernel Y has the one-hot labels as rows, (n, m). For an (n m, n m) kernel it is one column with the
    one-hot labels of all samples one below the other. If centred, both K and T are multiplied from both sides with
    H = I_n − 1 1ᵀ / n, or H ⊗ I_m (Cortes, Mohri, Rostamizadeh 2012, arXiv:1203.0550).

    Args:
        K: The kernel.
        Y: The targets of its rows, (N, columns).
        num_outputs: Rows per sample.
        centred: Whether to centre.
    """
    T = Y @ Y.T
    if centred:
        K, T = (centred_kernel(each, num_outputs) for each in (K, T))
    return _cosine(K, T)


def centred_kernel(K: FloatArray, num_outputs: int) -> FloatArray:
    """Multiply (H ⊗ I_m) K (H ⊗ I_m), H = I_n − 1 1ᵀ / n: subtract the mean over samples for each output."""
    n, m = len(K) // num_outputs, num_outputs
    blocks = K.reshape(n, m, n, m)
    blocks = blocks - blocks.mean(0, keepdims=True)
    return np.asarray((blocks - blocks.mean(2, keepdims=True)).reshape(K.shape))


def interference(K: FloatArray, row_tasks: IntArray) -> FloatArray:  # (tasks, tasks)
    """Cross-task interference ‖Θ_ab‖_F / √(‖Θ_aa‖_F ‖Θ_bb‖_F) of the blocks of each two tasks.

    Entries without values are left out; NaN for blocks without any values.
    """
    tasks = np.unique(row_tasks)
    norms = np.array([[_norm(K[np.ix_(row_tasks == a, row_tasks == b)]) for b in tasks] for a in tasks])
    return np.asarray(norms / np.sqrt(np.outer(np.diag(norms), np.diag(norms))))


def _norm(block: FloatArray) -> float:
    known = block[~np.isnan(block)]
    return float(np.linalg.norm(known)) if len(known) else float("nan")


def _cosine(K: FloatArray, L: FloatArray) -> float:
    norms = float(np.linalg.norm(K)) * float(np.linalg.norm(L))
    return float(np.sum(K * L)) / norms if norms else float("nan")
