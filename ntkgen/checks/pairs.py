"""Comparison of sampled kernel entries with the reference: random pairs of samples, and some outputs of each sample.

An entry is the inner product of two Jacobian rows. Each row is computed by one backward pass of a single sample. A
limited number of rows is kept in memory.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ntkgen.blocks import Block
from ntkgen.checks.rows import ExactRows
from ntkgen.checks.sampling import Sampling
from ntkgen.jacobian.cost import Reduction
from ntkgen.jacobian.outputs import OutputMap
from ntkgen.progress import Report, ignore_report
from ntkgen.store.store import KernelStore
from ntkgen.store.view import SymmetricArray

# Maximum number of outputs compared per sample, and maximum size of their Jacobian rows in bytes.
MAX_OUTPUTS = 16
MAX_ROW_BYTES = 1 << 29
# Maximum total size in bytes of the rows that are kept for further pairs.
MAX_KEPT_BYTES = 1 << 30

FloatArray = npt.NDArray[np.float64]


# random pairs ---------------------------------------------------------------------------------------------------------


def draw_pairs(counts: tuple[int, int], sampling: Sampling) -> list[tuple[int, int]]:
    """Draw pairs of a row sample and a column sample from all pairs, without replacement.

    >>> len(draw_pairs((3, 2), Sampling(num_pairs=299)))
    6
    """
    total = counts[0] * counts[1]
    generator = np.random.default_rng([sampling.seed, 1])
    drawn = generator.choice(total, size=min(sampling.num_pairs, total), replace=False)
    return [divmod(int(number), counts[1]) for number in drawn]


def affordable_outputs(num_params: int) -> int:
    """Compute the number of outputs whose Jacobian rows are computed at the same time for one sample.

    >>> affordable_outputs(60_000), affordable_outputs(11_000_000), affordable_outputs(60_000_000)
    (16, 6, 1)
    """
    return max(1, min(MAX_OUTPUTS, MAX_ROW_BYTES // (8 * num_params)))


@dataclass(frozen=True)
class Pairs:
    """The pairs of samples that are compared, and the number of outputs per sample.

    An entry of a `trace` kernel needs all outputs. For the output `diagonal`, the same outputs are used for all
    samples. Otherwise the outputs of each sample are drawn independently.
    """

    places: tuple[tuple[int, int], ...]  # (row sample, column sample) of each pair
    total_outputs: int
    num_outputs: int
    seed: int
    are_shared: bool = False

    @classmethod
    def draw(cls, store: KernelStore, chosen: OutputMap, total_outputs: int, sampling: Sampling) -> "Pairs":
        """Draw the number of pairs that ``sampling`` gives, and choose the largest affordable number of outputs."""
        grid = store.grid
        places = sorted(draw_pairs((grid.num_samples, grid.num_cols // grid.num_outputs), sampling))
        affordable = affordable_outputs(store.manifest.plan.profile.num_params)
        most = total_outputs if chosen.reduction == "trace" else affordable
        is_shared = chosen.reduction == "diagonal"
        return cls(tuple(places), total_outputs, min(most, total_outputs), sampling.seed, is_shared)

    def outputs(self, sample: int, *, is_column: bool) -> tuple[int, ...]:
        """Return the indices of the compared outputs of a sample, in ascending order."""
        place = () if self.are_shared else (sample, int(is_column))
        drawn = np.random.default_rng([self.seed, 2, *place]).choice(
            self.total_outputs, self.num_outputs, replace=False
        )
        return tuple(sorted(drawn.tolist()))


# exact entries --------------------------------------------------------------------------------------------------------


@dataclass
class KeptRows:
    """Exact rows of the samples of pairs. The most recently used rows are kept."""

    exact: ExactRows
    reduction: Reduction
    _kept: dict[tuple[int, int, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def rows(self, side: int, sample: int, outputs: tuple[int, ...]) -> Tensor:  # (outputs, params), float64
        """Return the rows of some outputs of one sample, computed now or kept from before."""
        sides = self.exact.sides
        place = (0 if sides[0] is sides[1] else side, sample, outputs)
        rows = self._kept.pop(place, None)
        if rows is None:
            rows = self._memory(len(outputs))
            self.exact.fill(rows, sides[side][sample], outputs, list(self.exact.params.values()))
        self._kept[place] = rows  # at the end, because the first rows are the next to be forgotten
        return rows

    def _memory(self, count: int) -> Tensor:  # (count, params)
        """Return memory for rows: that of forgotten rows, or new memory, which takes longer than the passes.

        The rows that were returned last are still in use, and their memory is not given away.
        """
        num_bytes = 8 * count * self.exact.num_params
        while self._kept and (len(self._kept) + 1) * num_bytes > MAX_KEPT_BYTES:
            forgotten = self._kept.pop(next(iter(self._kept)))
            if self._kept and len(forgotten) >= count:
                return forgotten[:count]
        return self.exact.empty(count, self.exact.num_params)

    def entries(
        self, pair: tuple[int, int], outputs: tuple[tuple[int, ...], tuple[int, ...]]
    ) -> tuple[FloatArray, FloatArray]:  # (planes, rows, cols) each
        """Compute the entries between some outputs of both samples of a pair, and √(K_rr K_cc) for each entry."""
        if self.reduction == "trace":
            return self._trace(pair, outputs[0])
        left, right = (self.rows(side, pair[side], outputs[side]) for side in (0, 1))
        a, b = (torch.linalg.vector_norm(rows, dim=1) for rows in (left, right))
        if self.reduction == "diagonal":
            values, scale = _inner_products(left, right)[:, None, None], (a * b)[:, None, None]
        else:
            values, scale = (left @ right.T)[None], torch.outer(a, b)[None]
        return values.cpu().numpy(), scale.cpu().numpy()

    def _trace(self, pair: tuple[int, int], outputs: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
        sums = np.zeros(3)
        at_once = affordable_outputs(self.exact.num_params)
        for at in range(0, len(outputs), at_once):
            left, right = (self.rows(side, pair[side], outputs[at : at + at_once]) for side in (0, 1))
            sums += [float(_inner_products(a, b).sum()) for a, b in ((left, right), (left, left), (right, right))]
        return np.full((1, 1, 1), sums[0]), np.full((1, 1, 1), np.sqrt(sums[1] * sums[2]))


def _inner_products(
    left: Tensor,  # (rows, params)
    right: Tensor,  # (rows, params)
) -> Tensor:  # (rows,)
    """Multiply each row with the row of the same number, without a product of all entries in memory."""
    return torch.stack([torch.dot(a, b) for a, b in zip(left, right, strict=True)])


def mapped_kernel(
    kernel: FloatArray,  # (n₁ logits, n₂ logits)
    chosen: OutputMap,
    num_logits: int,
) -> FloatArray:  # (planes, n₁ outputs, n₂ outputs)
    """Apply an output map to the reference kernel of all logits, which gives the kernel that a store holds."""
    n1, n2 = (length // num_logits for length in kernel.shape)
    blocks = kernel.reshape(n1, num_logits, n2, num_logits)
    if chosen.reduction == "trace":
        return np.asarray(np.einsum("iaja->ij", blocks))[None]
    if chosen.reduction == "diagonal":
        return np.asarray(np.einsum("iaja->aij", blocks))
    if chosen.matrix is None:
        return kernel[None]
    A = chosen.matrix.numpy()
    return np.asarray(np.einsum("oa,iajb,pb->iojp", A, blocks, A).reshape(1, n1 * len(A), n2 * len(A)))


# stored entries -------------------------------------------------------------------------------------------------------


def kernels_of(store: KernelStore, dtype: str) -> list[SymmetricArray]:
    """View the kernel in one store dtype as a list of matrices: one matrix, or one per output."""
    planes = store.grid.num_planes
    return [store.kernel(dtype, None if planes == 1 else plane) for plane in range(planes)]


def max_pair_errors(
    store: KernelStore, pairs: Pairs, reference: KeptRows, report: Report = ignore_report
) -> dict[str, float]:
    """Find the largest |K̃_rc − K_rc| / √(K_rr K_cc) of the sampled entries, for each store dtype."""
    kernels = {dtype: kernels_of(store, dtype) for dtype in store.manifest.dtypes}
    is_rectangular, m = not store.grid.is_symmetric, store.grid.num_outputs
    largest = dict.fromkeys(kernels, 0.0)
    for done, (i, j) in enumerate(pairs.places, start=1):
        outputs = (pairs.outputs(i, is_column=False), pairs.outputs(j, is_column=is_rectangular))
        expected, scale = reference.entries((i, j), outputs)
        scale = np.where(scale > 0, scale, 1.0)  # where the scale is zero, the error is absolute
        rows, cols = (Block(index, index + 1).rows(m) for index in (i, j))
        for dtype, planes in kernels.items():
            chosen = [planes[o] for o in outputs[0]] if len(planes) > 1 else planes
            values = np.stack([kernel[rows, cols] for kernel in chosen]).astype(np.float64)
            if m > 1:
                values = values[:, outputs[0]][:, :, outputs[1]]
            largest[dtype] = max(largest[dtype], float((np.abs(values - expected) / scale).max()))
        report("pairs", done, len(pairs.places))
    return largest
