"""Judgement of a stored kernel: the size of its error, and the blocks of samples whose error rounding cannot explain.

Its input is the error matrix and the exact kernel, or their products with random vectors.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.plan.tiles import TileGrid
from ntkgen.store.certificate import (
    BLOCK_RATIO,
    HALF_SUBNORMAL,
    POLICY_ROUNDOFF,
    UNIT_ROUNDOFF,
    StoredError,
    allowed_error,
    upper_bound,
)
from ntkgen.store.schema import side_arrays
from ntkgen.store.store import KernelStore

# Factor by which a block's error must exceed that of the other blocks, and the error of rounding, to be suspicious.
SUSPICIOUS_RATIO = 10.0
# Smallest size, relative to ‖J₁‖_F ‖J₂‖_F, by which the error of a kernel J₁ J₂ᵀ is judged.
SMALL_PRODUCT = 1e-3
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The error E of a stored kernel and the exact kernel K, as matrices or as products with random vectors V.

    Attributes:
        error: E V, or E itself.
        kernel: K V, or K itself.
        max_entry_error: Largest |E_rc| / √(K_rr K_cc) of the entries that were compared.
        num_probes: Number of random vectors. Zero stands for the matrices themselves.
    """

    error: FloatArray  # (planes, rows, probes or columns)
    kernel: FloatArray  # (planes, rows, probes or columns)
    max_entry_error: float
    num_probes: int = 0

    def norm_of(self, product: FloatArray) -> float:
        """Compute ‖A‖_F, or estimate it from A V by ‖A V‖_F / √s, whose square has the mean ‖A‖²_F."""
        return float(np.linalg.norm(product)) / math.sqrt(self.num_probes or 1)

    def sample_norms(self, grid: TileGrid, product: FloatArray) -> list[FloatArray]:  # (samples,) for each block
        """Compute or estimate ‖A_i‖_F for the rows of each sample i, block by block."""
        by_sample = product.reshape(grid.num_planes, grid.num_samples, -1)
        norms = np.linalg.norm(by_sample, axis=(0, 2)) / math.sqrt(self.num_probes or 1)
        return [norms[block.start : block.stop] for block in map(grid.block, range(grid.num_blocks))]


def stored_error(store: KernelStore, dtype: str, found: Comparison) -> StoredError:
    """Compute the error of one store dtype from its comparison with the exact kernel."""
    size = found.norm_of(found.kernel)
    error, norm = found.norm_of(found.error), size or 1.0  # if the kernel is zero, the error is absolute
    bound = upper_bound(error, found.num_probes) if found.num_probes else error
    errors, kernels = (found.sample_norms(store.grid, product) for product in (found.error, found.kernel))
    suspicious, exceeding = _wrong_blocks(store, dtype, errors, kernels)
    return StoredError(
        dtype=dtype,
        error=error,
        bound=bound,
        relative_error=error / norm,
        relative_bound=bound / norm,
        allowed=_allowed(store, dtype, size) / norm,
        max_pair_error=found.max_entry_error,
        block_errors=tuple(map(_combined_norm, errors)),
        suspicious=suspicious,
        exceeding=exceeding,
    )


def _combined_norm(norms: FloatArray) -> float:
    """Compute the norm of a matrix from the norms of its parts."""
    return float(np.linalg.norm(norms))


def _wrong_blocks(
    store: KernelStore, dtype: str, errors: list[FloatArray], kernels: list[FloatArray]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the suspicious blocks, and the blocks whose error is too large, from the norms by sample.

    The size of a block is √(‖K_b‖_F ‖K‖_F). K_b = J_b Jᵀ inherits the rounding errors of both factors, and ‖K_b‖_F can
    be much smaller than this size for samples with small gradients that are orthogonal to the others. A block whose
    error is suspicious is reported only if the error is also too large, or if the median of its samples is suspicious.
    The reason is that a ReLU input whose sign changes by rounding affects one sample, and a wrong tile affects all
    samples of its block.
    """
    precision, underflow = store.manifest.plan.precision, _underflow_bounds(store, dtype)
    sizes = np.sqrt(np.array(list(map(_combined_norm, kernels))) * _combined_norm(np.concatenate(kernels)))
    factors = _factor_norms(store)
    explained = max(UNIT_ROUNDOFF[dtype], POLICY_ROUNDOFF[precision]) * np.maximum(sizes, factors) + underflow
    whole = np.array(list(map(_combined_norm, errors)))
    usual = np.array([np.quantile(norms, 0.5, method="lower") * np.sqrt(len(norms)) for norms in errors])
    limits = allowed_error(precision, dtype, ratio=BLOCK_RATIO) * np.maximum(sizes, SMALL_PRODUCT * factors) + underflow
    exceeding = set(np.flatnonzero(whole > limits).tolist())
    confirmed = exceeding | set(suspicious_blocks(usual, explained))
    return tuple(b for b in suspicious_blocks(whole, explained) if b in confirmed), tuple(sorted(exceeding))


def _underflow_bounds(store: KernelStore, dtype: str) -> FloatArray:  # (blocks,)
    """Bound the Frobenius norm of the underflow error in the rows of each block, for a store dtype.

    The error of an entry is at most half the smallest subnormal number times the scale. In float16 it matters for
    samples whose entries are far below the largest one.
    """
    grid = store.grid
    rows = np.array([len(grid.block(index)) for index in range(grid.num_blocks)]) * grid.num_outputs
    entry = HALF_SUBNORMAL[dtype] * store.scale_factor(f"ntk_{dtype}")
    return np.asarray(entry * np.sqrt(rows * float(grid.num_cols * grid.num_planes)))


def _factor_norms(store: KernelStore) -> FloatArray:  # (blocks,)
    """Compute ‖J₁b‖_F ‖J₂‖_F for the rows J₁b of each block of a rectangular kernel, from the stored diagonals.

    A kernel J₁ J₂ᵀ of two sets of samples can be far smaller than this product, but inherits the rounding errors of
    both factors. A symmetric kernel contains the squared norms of its rows on the diagonal, and gets zeros here.
    """
    grid = store.grid
    if grid.is_symmetric:
        return np.zeros(grid.num_blocks)
    rows, cols = (np.atleast_2d(store.read(diagonal)) for diagonal, _ in side_arrays(grid))  # (planes, rows), …
    places = (grid.block(index).rows(grid.num_outputs) for index in range(grid.num_blocks))
    squares = [np.sum(rows[:, place].sum(1) * cols.sum(1)) for place in places]
    return np.sqrt(np.array(squares, np.float64))


def _allowed(store: KernelStore, dtype: str, kernel_norm: float) -> float:
    """Bound the ‖E‖_F that the precision policy and the store dtype explain."""
    size = max(kernel_norm, SMALL_PRODUCT * _combined_norm(_factor_norms(store)))
    explained = allowed_error(store.manifest.plan.precision, dtype) * size
    return explained + _combined_norm(_underflow_bounds(store, dtype))


def suspicious_blocks(
    errors: FloatArray,  # (blocks,)
    explained: FloatArray,  # (blocks,)
) -> tuple[int, ...]:
    """Find the blocks whose error is much larger than that of the others.

    The ratio of a block's error to the error of a single rounding is at most about 1 if rounding to the store dtype
    dominates. If rounding in the computation dominates, the ratio is larger, but similar in all blocks. A block is
    suspicious if its ratio exceeds 10 and also 10 times the lower quartile of all ratios. The median would not do: with
    two wrong blocks out of three, the median is wrong too.

    >>> suspicious_blocks(np.array([1.0, 1.2, 40.0, 0.9, 55.0]), np.full(5, 1.0))
    (2, 4)
    >>> suspicious_blocks(np.array([100.0, 120.0, 90.0]), np.full(3, 1.0))  # all similar: a less precise computation
    ()
    """
    with np.errstate(over="ignore"):
        ratios = errors / np.maximum(explained, np.finfo(np.float64).tiny)
    usual = max(1.0, float(np.quantile(ratios, 0.25, method="lower")))
    return tuple(np.flatnonzero(ratios > SUSPICIOUS_RATIO * usual).tolist())
