"""What kernels of one probe over time show: size, spectrum, motion, alignment with the labels, and cross-task blocks.

Kernels are (n, n), one row per sample, or (n m, n m), sample-major. A kernel with outputs that do not exist yet (NaN)
is reduced to the rows that have values.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Eigenvalues below this part of the largest one count as zero in the numerical rank.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Numbers that follow from the eigenvalues of one kernel.

    Attributes:
        frobenius_norm: ‖K‖_F.
        trace: tr K.
        largest: λ₁, the largest eigenvalue.
        smallest: λ_N, the smallest eigenvalue.
        condition: λ₁ / λ_N; NaN if λ_N is not positive.
        effective_rank: exp(−Σ p log p) with p = λ / Σ λ (Roy, Vetterli 2007). Negative eigenvalues count as zero.
        participation_ratio: (tr K)² / ‖K‖_F².
        numerical_rank: Number of eigenvalues above `RANK_TOLERANCE` · λ₁.
        num_negative: Number of eigenvalues below zero.
    """

    frobenius_norm: float
    trace: float
    largest: float
    smallest: float
    condition: float
    effective_rank: float
    participation_ratio: float
    numerical_rank: int
    num_negative: int

    @classmethod
    def of(cls, K: FloatArray) -> "Spectrum":
        """Compute all eigenvalues of a symmetric kernel."""
        values = np.linalg.eigvalsh(K)[::-1]
        clamped = np.maximum(values, 0)
        total = clamped.sum()
        p = clamped[clamped > 0] / total if total > 0 else np.zeros(0)
        squares = float(np.sum(K**2))
        return cls(
            frobenius_norm=squares**0.5,
            trace=float(np.trace(K)),
            largest=float(values[0]),
            smallest=float(values[-1]),
            condition=float(values[0] / values[-1]) if values[-1] > 0 else float("nan"),
            effective_rank=float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0,
            participation_ratio=float(np.trace(K)) ** 2 / squares if squares else 0.0,
            numerical_rank=int((values > RANK_TOLERANCE * values[0]).sum()),
            num_negative=int((values < 0).sum()),
        )


def distance(K: FloatArray, L: FloatArray) -> float:
    """Kernel distance S = 1 − ⟨K, L⟩ / (‖K‖ ‖L‖), not centred (Fort et al. 2020, arXiv:2010.15110, §2)."""
    return 1 - _cosine(K, L)


def velocity(kernels: FloatArray, iterations: IntArray, dt: int) -> tuple[IntArray, FloatArray, FloatArray]:
    """Kernel velocity between snapshots that are dt iterations apart (Fort et al. 2020, arXiv:2010.15110).

    Args:
        kernels: Kernels over time, (times, N, N).
        iterations: Iteration of each time, (times,).
        dt: Number of iterations between two snapshots. Only pairs with exactly this distance are used.

    Returns:
        The iterations t at which a pair begins, S(K_t, K_{t+dt}) / dt, and arccos(1 − S) / dt, in radians.
    """
    place = {int(iteration): time for time, iteration in enumerate(iterations)}
    starts = [iteration for iteration in place if iteration + dt in place]
    S = np.array([distance(kernels[place[start]], kernels[place[start + dt]]) for start in starts])
    return np.array(starts, np.int64), S / dt, np.arccos(np.clip(1 - S, -1, 1)) / dt


def usual_step(iterations: IntArray) -> int:
    """The most frequent difference of consecutive iterations; of equally frequent ones the largest.

    >>> usual_step(np.array([0, 1, 2, 4, 10, 20, 30]))
    10
    """
    steps, counts = np.unique(np.diff(iterations), return_counts=True)
    return int(steps[np.flatnonzero(counts == counts.max())[-1]]) if len(steps) else 1


def label_alignment(K: FloatArray, labels: IntArray, num_outputs: int, *, centred: bool) -> float:
    """Alignment ⟨K, T⟩ / (‖K‖ ‖T‖) with the labels' target T.

    For an (n, n) kernel T = Y Yᵀ with the one-hot labels Y, (n, m). For an (n m, n m) kernel T = vec(Y) vec(Y)ᵀ. If
    centred, both K and T are multiplied from both sides with H = I_n − 1 1ᵀ / n, or H ⊗ I_m (Cortes, Mohri,
    Rostamizadeh 2012, arXiv:1203.0550).

    Args:
        K: The kernel.
        labels: The label of each sample, (n,).
        num_outputs: Rows per sample.
        centred: Whether to centre.
    """
    classes = np.unique(labels)
    if num_outputs == 1:
        Y = (labels[:, None] == classes).astype(np.float64)
    else:
        Y = (labels[:, None] == np.arange(num_outputs)).astype(np.float64)
    T = Y @ Y.T if num_outputs == 1 else np.outer(Y.ravel(), Y.ravel())
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
    """Cross-task interference ‖Θ_ab‖_F / √(‖Θ_aa‖_F ‖Θ_bb‖_F) of the blocks of each two tasks."""
    tasks = np.unique(row_tasks)
    norms = np.array([[np.linalg.norm(K[np.ix_(row_tasks == a, row_tasks == b)]) for b in tasks] for a in tasks])
    return np.asarray(norms / np.sqrt(np.outer(np.diag(norms), np.diag(norms))))


def _cosine(K: FloatArray, L: FloatArray) -> float:
    norms = float(np.linalg.norm(K)) * float(np.linalg.norm(L))
    return float(np.sum(K * L)) / norms if norms else float("nan")
