"""The product of two blocks of factors, which is a part of the kernel, in each exact order of multiplication."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkgen.blocks import Block, block_pairs
from ntkgen.errors import DivergedError
from ntkgen.jacobian.cost import (
    DIAGONAL_NUMBERS,
    JacobianPlan,
    Reduction,
    built_channels,
    kept_width,
    ordered_pieces,
    slices,
)
from ntkgen.jacobian.factors import BlockFactors, FactorGroup, PairFactor
from ntkgen.jacobian.precision import policy, widen
from ntkgen.jacobian.products import Products, rows_of
from ntkgen.jacobian.windows import Windows


def fill_kernel(
    rows: list[Block],
    columns: list[Block],
    factors: Callable[[Block], BlockFactors],
    plan: JacobianPlan,
) -> Tensor:  # (row samples · outputs, column samples · outputs); (rows, columns) for trace, (outputs, …) for diagonal
    """Compute a rectangle of the kernel, block by block. If rows are columns, mirror the upper triangle."""
    return fill_kernels(rows, columns, factors, plan, [None])[0]


def fill_kernels(
    rows: list[Block],
    columns: list[Block],
    factors: Callable[[Block], BlockFactors],
    plan: JacobianPlan,
    groups: Sequence[FactorGroup | None],
) -> list[Tensor]:  # each as `fill_kernel`
    """Compute the kernels of several groups of parameters, in one pass over the blocks. None means all parameters."""
    m = plan.num_outputs if plan.reduction == "none" else 1
    height, width = (blocks[-1].stop - blocks[0].start for blocks in (rows, columns))
    kernels: list[Tensor] = []
    for row, column in block_pairs(rows, columns):
        i = Block(row.start - rows[0].start, row.stop - rows[0].start).rows(m)
        j = Block(column.start - columns[0].start, column.stop - columns[0].start).rows(m)
        # without names for the factors, which would keep a third block in memory
        for number, tile in enumerate(_contract_each(factors(row), factors(column), plan, groups)):
            if number == len(kernels):
                is_whole = len(rows) == len(columns) == 1
                kernels.append(tile if is_whole else tile.new_empty(*tile.shape[:-2], height * m, width * m))
            if kernels[number] is not tile:
                kernels[number][..., i, j] = tile
                if rows == columns and row != column:
                    kernels[number][..., j, i] = tile.mT
    for kernel in kernels:
        _require_finite(kernel, m)
    return kernels


def _require_finite(kernel: Tensor, rows_per_sample: int) -> None:
    """Refuse a kernel with entries that are not finite.

    Raises:
        DivergedError: If there is such an entry. The error names the sample with the most of them.
    """
    if kernel.isfinite().all():
        return
    by_row = (~kernel.isfinite()).flatten(0, -3).sum((0, 2)) if kernel.ndim > 2 else (~kernel.isfinite()).sum(1)
    raise DivergedError(
        "The kernel is not finite: expected numbers, found infinity or NaN, most of them in the rows of sample "
        f"{int(by_row.argmax()) // rows_per_sample}, counted from 0. Is a gradient not finite, as that of sqrt or norm "
        "at zero, or are squares of gradients too large for float32? Change the function there, or use `precision` "
        "float64."
    )


def _contract_each(
    left: BlockFactors, right: BlockFactors, plan: JacobianPlan, groups: Sequence[FactorGroup | None]
) -> Iterator[Tensor]:
    for group in groups:
        yield contract(left, right, plan, group)


def contract(
    left: BlockFactors,
    right: BlockFactors,
    plan: JacobianPlan,
    group: FactorGroup | None = None,
) -> Tensor:  # (left samples · outputs, right samples · outputs), sample-major
    """Compute the kernel of two blocks, the sum over layers of K[i o, j o'] = Σ_tt' (a_t · a'_t') (g_ot · g'_o't').

    For a block with itself, each panel of rows is computed from its first row to the last column, and the result is
    mirrored from its upper triangle, so it is exactly symmetric. With the reduction ``trace`` the result is
    Σ_o K[i o, j o], of shape (left samples, right samples). With ``diagonal`` it is K[i o, j o], of shape (outputs,
    left samples, right samples). With a ``group`` the sum is only over the parameters of this group.
    """
    work = _Work.of(plan, left, right)
    out = left.logits.new_zeros(work.shape, dtype=policy(plan.precision).accumulate_dtype)
    for part in [slice(None)] if group is None else group.columns:
        _add_kept_rows(work, left.rows[..., part], right.rows[..., part], out)
    pairs = [block.pairs if group is None else group.pairs_of(block) for block in (left, right)]
    for one, other in zip(*pairs, strict=True):
        for number in range(one.plan.shape.groups):
            _add_group(work, one.group(number), other.group(number), out)
    return _mirrored(work, out) if left is right else out


def _mirrored(work: "_Work", out: Tensor) -> Tensor:
    """Copy the upper triangle of a symmetric result into the lower one, panel by panel."""
    m = work.plan.num_outputs if work.plan.reduction == "none" else 1
    for panel, _ in work.panels():
        i, below = panel.rows(m), slice(panel.rows(m).stop, None)
        square = out[..., i, i]
        out[..., i, i] = torch.triu(square) + torch.triu(square, diagonal=1).mT
        out[..., below, i] = out[..., i, below].mT
    return out


@dataclass(frozen=True)
class _Work:
    """One product of two blocks: its plan, its shape, and its matrix products."""

    plan: JacobianPlan
    rows: int
    cols: int
    is_diagonal: bool
    products: Products

    @classmethod
    def of(cls, plan: JacobianPlan, left: BlockFactors, right: BlockFactors) -> "_Work":
        products = Products(policy(plan.precision), plan.rates.route)
        return cls(plan, len(left), len(right), left is right, products)

    @property
    def shape(self) -> tuple[int, ...]:
        m = self.plan.num_outputs
        whole = (self.rows * m, self.cols * m)
        return {"none": whole, "trace": (self.rows, self.cols), "diagonal": (m, self.rows, self.cols)}[
            self.plan.reduction
        ]

    def panels(self) -> list[tuple[Block, Block]]:
        return list(self.plan.panels(self.rows, self.cols, is_diagonal=self.is_diagonal))

    def blocks(self, out: Tensor, rows: Block, cols: Block) -> Tensor:
        """View a panel of the result: (rows, m, columns, m), or its reduced shape."""
        i, j = slice(rows.start, rows.stop), slice(cols.start, cols.stop)
        if self.plan.reduction != "none":
            return out[..., i, j]
        m = self.plan.num_outputs
        return out.view(self.rows, m, self.cols, m)[i, :, j]


def _add_kept_rows(work: _Work, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add the product of the stored rows of both blocks, in slices of the parameters."""
    sides = [left] if work.is_diagonal else [left, right]
    for part in slices(left.shape[2], kept_width(work.plan, work.cols)):
        _add_rows(work, [work.products.operand(side[..., part]).contiguous() for side in sides], out)


def _add_rows(
    work: _Work,
    sides: list[Tensor],  # (rows, outputs, parameters) and (columns, outputs, parameters), or one for both
    out: Tensor,
) -> None:
    product, reduction, m = work.products.rounded, work.plan.reduction, work.plan.num_outputs
    for i, j in work.panels():
        target = work.blocks(out, i, j)
        one, other = sides[0][i.start : i.stop], sides[-1][j.start : j.stop]
        if reduction == "none":
            target += product(one.flatten(0, 1), other.flatten(0, 1)).view(len(i), m, len(j), m)
        elif reduction == "trace":
            target += product(one.flatten(1), other.flatten(1))
        else:
            for output in range(m):
                target[output] += product(one[:, output].contiguous(), other[:, output].contiguous())


def _add_group(work: _Work, left: PairFactor, right: PairFactor, out: Tensor) -> None:
    {"explicit": _add_explicit, "gram": _add_gram, "ordered": _add_ordered}[left.plan.order](work, left, right, out)


def _add_explicit(work: _Work, left: PairFactor, right: PairFactor, out: Tensor) -> None:
    """Build Jacobian rows from inputs and cotangents, in slices of the output channels, and add their product."""
    m, shape = work.plan.num_outputs, left.plan.shape
    sides = [left] if work.is_diagonal else [left, right]
    per_channel = sum(len(side.inputs) * m * shape.inputs for side in sides)
    width = min(shape.channels, built_channels(work.plan, left.plan, per_channel))
    dtype = work.products.operand(left.inputs.new_empty(0))
    memory = [dtype.new_empty(len(side.inputs) * m * width * shape.inputs) for side in sides]
    for part in slices(shape.channels, width):
        _add_rows(work, [_built(work, *each, part) for each in zip(sides, memory, strict=True)], out)


def _built(
    work: _Work, side: PairFactor, memory: Tensor, channels: slice
) -> Tensor:  # (samples, outputs, channels · k)
    """Build the rows of some output channels, panel by panel, in the memory of the last ones."""
    samples, m, _, positions = side.cotangents.shape
    width = channels.stop - channels.start
    k = side.inputs.shape[1]
    rows = memory[: samples * m * width * k].view(samples, 1, m * width, k)
    is_rounded = work.products.wide(memory[:0]).dtype != memory.dtype
    for part in slices(samples, work.plan.sizes.panel_samples):
        g = work.products.wide(side.cotangents[part, :, channels]).reshape(-1, 1, m * width, positions)
        a = work.products.wide(side.inputs[part])[:, None]
        if is_rounded:
            rows[part] = rows_of(g, a, work.products.route)
        else:
            rows_of(g, a, work.products.route, out=rows[part])
    return rows.view(samples, m, width * k)


def _input_gram(work: _Work, left: Tensor, right: Tensor, windows: Windows | None) -> Tensor:
    """Multiply inputs with inputs, A[i, t, j, t'] = a_t · a'_t'. With windows, sum the products of their pixels."""
    one, other = (work.products.operand(side).flatten(0, 1) for side in (left, right))
    product = work.products.rounded(one, other).view(len(left), left.shape[1], len(right), right.shape[1])
    return product if windows is None else windows.gram(product)


def _add_ordered(work: _Work, left: PairFactor, right: PairFactor, out: Tensor) -> None:
    """Multiply the Gram matrix of inputs with the right cotangents, H = (a a'ᵀ) g', and add K = ⟨g, H⟩."""
    height, width, outputs = ordered_pieces(work.plan, left.plan)
    for rows, columns in work.panels():
        i0 = slice(rows.start, rows.stop)
        g1 = work.products.wide(left.cotangents[i0]).permute(0, 3, 1, 2).contiguous()  # (rows, T, m, c)
        for start in range(columns.start, columns.stop, width):
            j = slice(start, min(start + width, columns.stop))
            g2 = work.products.wide(right.cotangents[j])
            for i in slices(len(rows), height):
                block = Block(rows.start + i.start, rows.start + i.stop)
                grams = _input_gram(work, left.inputs[block.start : block.stop], right.inputs[j], left.windows)
                target = work.blocks(out, block, Block(j.start, j.stop))
                _add_carried(work, g1[i], grams.permute(2, 0, 1, 3).contiguous(), g2, (target, outputs))


def _add_carried(
    work: _Work,
    g1: Tensor,  # (I, T, m, c)
    grams: Tensor,  # (J, I, T, T)
    g2: Tensor,  # (J, m, c, T)
    target: tuple[Tensor, int],  # (I, m, J, m), and the number of right outputs of H at a time
) -> None:
    """Compute H for one right sample at a time. It is then small enough to be used while it is in the cache."""
    out, step = target
    for j, (gram, g) in enumerate(zip(grams.flatten(1, 2), g2, strict=True)):
        for outputs in slices(g.shape[0], step):
            out[:, :, j, outputs] += _finished(g1, work.products.exact(gram, g[outputs].flatten(0, 1)))


def _finished(g1: Tensor, carried: Tensor) -> Tensor:  # (I, m, some m)
    """Compute ⟨g, H⟩ for H of shape (I · T, some m · c): one small product per position, then their sum."""
    rows, t, m, c = g1.shape
    products = torch.bmm(g1.view(rows * t, m, c), carried.view(rows * t, -1, c).mT)
    return products.view(rows, t, m, -1).sum(1)


def _add_gram(work: _Work, left: PairFactor, right: PairFactor, out: Tensor) -> None:
    """Multiply the Gram matrices of inputs and of cotangents entrywise, K = Σ_tt' (a a'ᵀ) ∘ (g g'ᵀ)."""
    sizes, m, t = work.plan.sizes, work.plan.num_outputs, left.plan.shape.positions
    per_pair = max(m * m * t * t, left.plan.widest**2)
    width = max(1, sizes.workspace_numbers // (sizes.panel_samples * per_pair))
    height = max(1, sizes.workspace_numbers // per_pair)
    for rows, columns in work.panels():
        for start in range(columns.start, columns.stop, width):
            j = Block(start, min(start + width, columns.stop))
            g2 = _positions_first(work, right.cotangents[j.start : j.stop])
            for part in slices(len(rows), height):
                i = Block(rows.start + part.start, rows.start + part.stop)
                one, other = left.inputs[i.start : i.stop], right.inputs[j.start : j.stop]
                grams = _input_gram(work, one, other, left.windows)
                g1 = _positions_first(work, left.cotangents[i.start : i.stop])
                _add_entrywise(work, grams, (g1, g2), work.blocks(out, i, j))


def _positions_first(work: _Work, g: Tensor) -> Tensor:  # (samples, m, T, c)
    return work.products.operand(g).mT.contiguous()


def _add_entrywise(work: _Work, grams: Tensor, sides: tuple[Tensor, Tensor], target: Tensor) -> None:
    """Multiply cotangents with cotangents, and sum the products with the weights A[i, t, j, t']."""
    (rows, m, t, _), product = sides[0].shape, work.products.rounded
    cols, reduction = len(sides[1]), work.plan.reduction
    if reduction == "none":
        outer = product(*(side.flatten(0, 2) for side in sides)).view(rows, m, t, cols, m, t)
        if t == 1:
            target.addcmul_(outer.view(rows, m, cols, m), grams.view(rows, 1, cols, 1))
        else:
            target += torch.einsum("itju,iotjpu->iojp", grams, outer)
    elif reduction == "trace":  # one product over outputs and channels together
        outer = product(*(side.transpose(1, 2).flatten(2).flatten(0, 1) for side in sides))
        target += (outer.view(rows, t, cols, t) * grams).sum((1, 3))
    else:
        for output in range(m):
            outer = product(*(side[:, output].flatten(0, 1) for side in sides))
            target[output] += (outer.view(rows, t, cols, t) * grams).sum((1, 3))


def exact_diagonal(block: BlockFactors) -> Tensor:  # (samples, outputs), float64
    """Compute the kernel's diagonal, K[i o, i o] = ‖J[i o]‖², in float64 from the factors."""
    diagonal = widen(block.logits).new_zeros(block.rows.shape[:2])
    for index in range(len(block)):
        diagonal[index] = widen(block.rows[index]).square().sum(-1)
        for layer in block.pairs:
            for number in range(layer.plan.shape.groups):
                pair = layer.group(number)
                grams = _sample_gram(pair, index)
                for outputs in slices(diagonal.shape[1], DIAGONAL_NUMBERS // grams.numel()):
                    g = widen(pair.cotangents[index, outputs])  # (some m, c, T)
                    diagonal[index, outputs] += (g.mT @ g).mul_(grams).sum((1, 2))
    return diagonal


def reduced_diagonal(
    diagonal: Tensor,  # (samples, outputs)
    reduction: Reduction,
) -> Tensor:  # (rows,), or (outputs, samples) for the reduction `diagonal`
    """Reduce the diagonal in the same way as the kernel."""
    reduced = {"none": diagonal.flatten(), "trace": diagonal.sum(1), "diagonal": diagonal.mT}[reduction]
    return reduced.contiguous()


def _sample_gram(pair: PairFactor, index: int) -> Tensor:  # (T, T), float64
    """Compute the Gram matrix of the inputs of one sample."""
    a = widen(pair.inputs[index])
    if pair.plan.order == "explicit":
        return a.mT @ a
    product = a @ a.mT
    return product if pair.windows is None else pair.windows.gram(product[None, :, None])[0, :, 0]
