"""The products of a stored and of an exact kernel with some vectors → how far they differ, and what is wrong."""

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

# Ratio of a block's error to what rounding explains above which the block is suspicious.
SUSPICIOUS_RATIO = 10.0
# Share of ‖J₁‖_F ‖J₂‖_F below which a kernel J₁ J₂ᵀ is judged as if it were that large.
SMALL_PRODUCT = 1e-3
FloatArray = npt.NDArray[np.float64]


def norm_of(product: FloatArray) -> float:
    """Estimate ‖A‖_F from A V, ‖A V‖_F / √s: its square has the mean ‖A‖²_F."""
    return float(np.linalg.norm(product) / np.sqrt(product.shape[-1]))


def sample_norms(
    grid: TileGrid,
    product: FloatArray,  # (planes, rows, probes)
) -> list[FloatArray]:  # (samples,) of each block
    """Estimate ‖A_i‖_F for the rows of each sample i, block by block."""
    of_samples = product.reshape(grid.num_planes, grid.num_samples, -1)
    norms = np.linalg.norm(of_samples, axis=(0, 2)) / np.sqrt(product.shape[-1])
    return [norms[block.start : block.stop] for block in map(grid.block, range(grid.num_blocks))]


def stored_error(
    store: KernelStore,
    dtype: str,
    EV: FloatArray,  # (planes, rows, probes)
    KV: FloatArray,  # (planes, rows, probes)
    max_pair_error: float,
) -> StoredError:
    """Turn the difference of the two products into what the certificate says of a store dtype."""
    error, norm = norm_of(EV), norm_of(KV) or 1.0  # beside a kernel of zeros the error is absolute
    bound = upper_bound(error, EV.shape[-1])
    suspicious, exceeding = _wrong_blocks(store, dtype, sample_norms(store.grid, EV), sample_norms(store.grid, KV))
    return StoredError(
        dtype=dtype,
        error=error,
        bound=bound,
        relative_error=error / norm,
        relative_bound=bound / norm,
        allowed=_allowed(store, dtype, norm_of(KV)) / norm,
        max_pair_error=max_pair_error,
        block_errors=tuple(map(_joined, sample_norms(store.grid, EV))),
        suspicious=suspicious,
        exceeding=exceeding,
    )


def _joined(norms: FloatArray) -> float:
    return float(np.linalg.norm(norms))


def _wrong_blocks(
    store: KernelStore, dtype: str, errors: list[FloatArray], kernels: list[FloatArray]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Name the blocks whose error is out of line, and those whose error is too large, of the norms by sample.

    The size of a block is √(‖K_b‖_F ‖K‖_F): K_b = J_b Jᵀ inherits the rounding of both factors, and samples with small
    gradients that are orthogonal to the others have a K_b far below that. An error out of line counts where it is too
    large as well, or where the block's samples usually have it: a ReLU whose input is within rounding of zero changes
    one sample, and a wrong tile all of them.
    """
    precision, lost = store.manifest.plan.precision, _lost_in(store, dtype)
    sizes = np.sqrt(np.array(list(map(_joined, kernels))) * _joined(np.concatenate(kernels)))
    factors = _factor_norms(store)
    explained = max(UNIT_ROUNDOFF[dtype], POLICY_ROUNDOFF[precision]) * np.maximum(sizes, factors) + lost
    whole = np.array(list(map(_joined, errors)))
    usual = np.array([np.quantile(each, 0.5, method="lower") * np.sqrt(len(each)) for each in errors])
    limits = allowed_error(precision, dtype, ratio=BLOCK_RATIO) * np.maximum(sizes, SMALL_PRODUCT * factors) + lost
    exceeding = set(np.flatnonzero(whole > limits).tolist())
    counting = exceeding | set(suspicious_blocks(usual, explained))
    return tuple(b for b in suspicious_blocks(whole, explained) if b in counting), tuple(sorted(exceeding))


def _lost_in(store: KernelStore, dtype: str) -> FloatArray:  # (blocks,)
    """Bound what the rows of each block lose in a store dtype that has no smaller numbers, in the Frobenius norm.

    That is half a subnormal number per entry: float16 has no smaller ones for samples whose kernel is far below the
    largest.
    """
    grid = store.grid
    rows = np.array([len(grid.block(index)) for index in range(grid.num_blocks)]) * grid.num_outputs
    entry = HALF_SUBNORMAL[dtype] * store.scale_factor(f"ntk_{dtype}")
    return np.asarray(entry * np.sqrt(rows * float(grid.num_cols * grid.num_planes)))


def _factor_norms(store: KernelStore) -> FloatArray:  # (blocks,)
    """Find ‖J₁b‖_F ‖J₂‖_F for the rows J₁b of each block of a rectangular kernel, from the stored diagonals; else 0.

    A kernel J₁ J₂ᵀ of two sets of samples may be far smaller than its factors, whose rounding it inherits. One of a
    single set holds their squares.
    """
    grid = store.grid
    if grid.is_symmetric:
        return np.zeros(grid.num_blocks)
    rows, cols = (np.atleast_2d(store.read(diagonal)) for diagonal, _ in side_arrays(grid))  # (planes, rows), …
    places = (grid.block(index).rows(grid.num_outputs) for index in range(grid.num_blocks))
    squares = [np.sum(rows[:, place].sum(1) * cols.sum(1)) for place in places]
    return np.sqrt(np.array(squares, np.float64))


def _allowed(store: KernelStore, dtype: str, kernel_norm: float) -> float:
    """Bound the ‖E‖_F that the policy and the store dtype explain."""
    size = max(kernel_norm, SMALL_PRODUCT * _joined(_factor_norms(store)))
    explained = allowed_error(store.manifest.plan.precision, dtype) * size
    return explained + _joined(_lost_in(store, dtype))


def suspicious_blocks(
    errors: FloatArray,  # (blocks,)
    explained: FloatArray,  # (blocks,)
) -> tuple[int, ...]:
    """Name the blocks whose error is out of line.

    The ratio of a block's error to what rounding once explains is at most about 1 where storing rounds most, and
    larger, but of one size for all blocks, where the computation does. Suspicious is a block with more than ten times
    the ratio of the blocks' lower quartile, and more than ten. It is the quartile because two wrong blocks of three
    would mislead the median.

    >>> suspicious_blocks(np.array([1.0, 1.2, 40.0, 0.9, 55.0]), np.full(5, 1.0))
    (2, 4)
    >>> suspicious_blocks(np.array([100.0, 120.0, 90.0]), np.full(3, 1.0))  # all alike: a less precise computation
    ()
    """
    with np.errstate(over="ignore"):
        ratios = errors / np.maximum(explained, np.finfo(np.float64).tiny)
    usual = max(1.0, float(np.quantile(ratios, 0.25, method="lower")))
    return tuple(np.flatnonzero(ratios > SUSPICIOUS_RATIO * usual).tolist())
