"""Two blocks of factors → their part of the kernel, in each exact order of multiplication."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ntkgen.jacobian.cost import DIAGONAL_NUMBERS, JacobianPlan, intermediate_numbers, slice_samples
from ntkgen.jacobian.factors import BlockFactors, PairFactor
from ntkgen.jacobian.precision import widen
from ntkgen.kernel.tiles import Block, block_pairs


def fill_kernel(
    rows: list[Block],
    columns: list[Block],
    factors: Callable[[Block], BlockFactors],
    plan: JacobianPlan,
) -> Tensor:  # (row samples · outputs, column samples · outputs)
    """Compute a rectangle of the kernel, block by block; where rows are columns, the upper triangle and its mirror."""
    m = plan.num_outputs
    height, width = (blocks[-1].stop - blocks[0].start for blocks in (rows, columns))
    kernel: Tensor | None = None
    for row, column in block_pairs(rows, columns):
        part = contract(factors(row), factors(column), plan)  # without names, which would keep a third block alive
        if kernel is None:
            kernel = part.new_empty(height * m, width * m)
        i = Block(row.start - rows[0].start, row.stop - rows[0].start).rows(m)
        j = Block(column.start - columns[0].start, column.stop - columns[0].start).rows(m)
        kernel[i, j] = part
        if rows == columns and row != column:
            kernel[j, i] = part.T
    assert kernel is not None
    return kernel


def contract(
    left: BlockFactors,
    right: BlockFactors,
    plan: JacobianPlan,
) -> Tensor:  # (left samples · outputs, right samples · outputs), sample-major
    """Compute the kernel of two blocks, the sum over layers of K[i o, j o'] = Σ_tt' (a_t · a'_t') (g_ot · g'_o't').

    A block with itself is computed in the same way and then made exactly symmetric from its upper triangle.
    """
    out = left.rows.flatten(0, 1) @ right.rows.flatten(0, 1).T
    for one, other in zip(left.pairs, right.pairs, strict=True):
        for group in range(one.plan.shape.groups):
            _add_group(one, other, plan, group, out)
    return torch.triu(out) + torch.triu(out, diagonal=1).T if left is right else out


def _add_group(left: PairFactor, right: PairFactor, plan: JacobianPlan, group: int, out: Tensor) -> None:
    a1, g1 = left.inputs[:, group], left.cotangents[:, :, group]
    a2, g2 = right.inputs[:, group], right.cotangents[:, :, group]
    shape, order = left.plan.shape, left.plan.order
    if order == "explicit":
        _add_explicit((a1, g1), None if left is right else (a2, g2), plan.workspace_numbers, out)
        return
    m = plan.num_outputs
    blocks = out.view(len(a1), m, len(a2), m)  # (left samples, outputs, right samples, outputs)
    product = gram if order == "gram" else ordered
    numbers = intermediate_numbers(shape, m, order)
    rows, cols = slice_samples(numbers, plan.workspace_numbers, len(a1), len(a2))
    for i in _slices(len(a1), rows):
        for j in _slices(len(a2), cols):
            blocks[i, :, j] += product(a1[i], g1[i], a2[j], g2[j])


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def _add_explicit(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor] | None, limit: int, out: Tensor) -> None:
    """Build Jacobian rows of (inputs, cotangents), some output channels at a time, and add their product.

    Without a right side, that of the left with itself.
    """
    sides = [left] if right is None else [left, right]
    _, m, _, channels = left[1].shape
    per_channel = sum(len(a) * m * (a.shape[1] + a.shape[2]) for a, _ in sides)
    for part in _slices(channels, max(1, limit // per_channel)):
        rows = [jacobian_matrix(a, g[..., part]) for a, g in sides]
        out.addmm_(rows[0], rows[-1].T)


def jacobian_matrix(
    a: Tensor,  # (samples, positions, k)
    g: Tensor,  # (samples, outputs, positions, channels)
) -> Tensor:  # (samples · outputs, channels · k)
    """Build the Jacobian rows J[i o] = Σ_t g_o[t] ⊗ a[t]."""
    samples, m, positions, channels = g.shape
    rows = g.mT.reshape(samples, m * channels, positions) @ a  # one product per sample, without a copy of a per output
    return rows.view(samples * m, channels * a.shape[2])


def gram(
    a1: Tensor,  # (I, T, k)
    g1: Tensor,  # (I, m, T, c)
    a2: Tensor,  # (J, T, k)
    g2: Tensor,  # (J, m, T, c)
) -> Tensor:  # (I, m, J, m)
    """Multiply Gram matrices of inputs and of cotangents entrywise, K = Σ_tt' (a aᵀ) ∘ (g gᵀ)."""
    inputs = torch.tensordot(a1, a2, dims=([2], [2]))  # (I, T, J, T)
    grads = torch.tensordot(g1, g2, dims=([3], [3]))  # (I, m, T, J, m, T)
    return torch.einsum("itju,iotjpu->iojp", inputs, grads)


def ordered(
    a1: Tensor,  # (I, T, k)
    g1: Tensor,  # (I, m, T, c)
    a2: Tensor,  # (J, T, k)
    g2: Tensor,  # (J, m, T, c)
) -> Tensor:  # (I, m, J, m)
    """Carry the right cotangents through the Gram matrix of inputs, H = (a aᵀ) g, then K = ⟨g, H⟩."""
    inputs = torch.tensordot(a1, a2, dims=([2], [2])).transpose(1, 2)  # (I, J, T, T)
    carried = inputs[:, :, None] @ g2  # (I, J, m, T, c)
    products = g1.flatten(2) @ carried.flatten(3).flatten(1, 2).mT  # (I, m, J · m)
    kernel: Tensor = products.view(len(a1), -1, len(a2), g2.shape[1])
    return kernel


def exact_diagonal(block: BlockFactors) -> Tensor:  # (samples, outputs), float64
    """Compute the kernel's diagonal, K[i o, i o] = ‖J[i o]‖², in float64 from the factors."""
    diagonal = torch.zeros_like(widen(block.logits))
    for index in range(len(block)):
        diagonal[index] = widen(block.rows[index]).square().sum(-1)
        for pair in block.pairs:
            a = widen(pair.inputs[index])  # (q, T, k)
            inputs = a @ a.mT
            for outputs in _slices(len(pair.cotangents[index]), max(1, DIAGONAL_NUMBERS // inputs.numel())):
                g = widen(pair.cotangents[index, outputs])  # (some m, q, T, c)
                diagonal[index, outputs] += (g @ g.mT).mul_(inputs).sum((1, 2, 3))
    return diagonal
