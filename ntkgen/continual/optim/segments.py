"""Parameters as matrices with a row per network, and the few operations that the optimizers need on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

# Numbers of a matrix that are treated at a time on a CPU, so that intermediate results stay in its cache. Measured with
# 20 networks of 62,006 parameters: 1.5 ms per step in blocks, 2.1 ms at once (one thread).
BLOCK = 2**18

Number = float | Tensor
"""A hyper-parameter, or what is computed from it: one number, or one per row, (rows, 1), in float64 on the CPU."""


def scale(x: Tensor, factor: Number) -> None:  # (rows, numbers)
    """Multiply in place, x ← factor · x."""
    x.mul_(factor if isinstance(factor, float) else factor.to(x))


def add(x: Tensor, number: Number) -> None:  # (rows, numbers)
    """Add a number in place, x ← x + number."""
    x.add_(number if isinstance(number, float) else number.to(x))


def add_scaled(x: Tensor, y: Tensor, factor: Number) -> None:  # (rows, numbers) each
    """Add in place, x ← x + factor · y."""
    if isinstance(factor, float):
        x.add_(y, alpha=factor)
    else:
        x.addcmul_(y, factor.to(x))


def average(trace: Tensor, value: Tensor, beta: Number) -> None:  # (rows, numbers) each
    """Update a running mean in place, trace ← β · trace + (1 − β) · value."""
    weight = 1 - beta
    trace.lerp_(value, weight if isinstance(weight, float) else weight.to(trace))


def is_zero(number: Number) -> bool:
    """Say whether a hyper-parameter is 0 in all networks, so that its term can be left out."""
    return isinstance(number, float) and number == 0


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter in the matrices.

    Attributes:
        param: The parameter. Its first axis is the network if there is a stack.
        position: Its position among all parameters of the optimizer.
        group: The group that it belongs to.
        step: Number of steps before the first one in these matrices.
        columns: Its columns in the matrices.
        shape: Its shape in one network.
    """

    param: Tensor
    position: int
    group: dict[str, Any]
    step: int
    columns: slice
    shape: torch.Size


@dataclass(eq=False)
class Segment:
    """Adjacent parameters of one group, in some rows of the matrices. A step changes ``w`` and the traces.

    It may overwrite everything else.

    Attributes:
        slots: The parameters.
        rows: The networks.
        step: Number of steps, with the present one: t.
        w: Values of the parameters, (rows, numbers).
        g: Their gradients.
        h: Their curvature, the diagonal of the Hessian, if the optimizer needs it.
        noise: Standard normal numbers, or None if nothing is drawn.
        traces: What the optimizer keeps of each number.
        scratch: Matrices for intermediate results.
    """

    slots: Sequence[Slot]
    rows: slice
    step: int
    w: Tensor
    g: Tensor
    h: Tensor | None
    noise: Tensor | None
    traces: dict[str, Tensor]
    scratch: tuple[Tensor, ...]
    _singles: list["Segment"] = field(default_factory=list, repr=False)

    def number(self, name: str) -> Number:
        """Return a hyper-parameter."""
        value = self.slots[0].group[name]
        if isinstance(value, Tensor) and value.ndim:
            return value[self.rows].to("cpu", torch.float64).unsqueeze(1)
        return float(value)

    def correction(self, beta: Number) -> Number:
        """Return 1 / (1 − βᵗ), which removes the bias of a running mean that began with 0."""
        return 1 / (1 - beta**self.step)

    def singles(self) -> list["Segment"]:
        """List segments of one parameter each. They share the matrices."""
        if not self._singles:
            self._singles = [self._single(slot) for slot in self.slots]
        for each in self._singles:
            each.step = self.step
        return self._singles

    def _single(self, slot: Slot) -> "Segment":
        first = self.slots[0].columns.start
        own = slice(slot.columns.start - first, slot.columns.stop - first)
        return Segment(
            [slot],
            self.rows,
            self.step,
            self.w[:, own],
            self.g[:, own],
            None if self.h is None else self.h[:, own],
            None if self.noise is None else self.noise[:, own],
            {name: matrix[:, own] for name, matrix in self.traces.items()},
            tuple(matrix[:, own] for matrix in self.scratch),
        )

    def parts(self, matrix: Tensor) -> tuple[Tensor, ...]:  # (rows, numbers) → (rows, numbers of a parameter) each
        """View a matrix as one matrix per parameter."""
        parts: tuple[Tensor, ...] = matrix.split([slot.shape.numel() for slot in self.slots], 1)
        return parts

    def tensors(self, matrix: Tensor) -> Iterator[Tensor]:  # (rows, numbers) → (rows, *shape of a parameter) each
        """View a matrix as one tensor per parameter."""
        return (self.tensor(matrix, slot) for slot in self.slots)

    def tensor(self, matrix: Tensor, slot: Slot) -> Tensor:
        """View the columns of one parameter in its shape."""
        first = self.slots[0].columns.start
        columns = matrix[:, slot.columns.start - first : slot.columns.stop - first]
        return columns.view(len(matrix), *slot.shape)


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows of the matrices: what is treated at a time.

    Attributes:
        rows: The networks.
        w: Values of all parameters, (rows, numbers). They are the parameters themselves, or room for a copy.
        g: Their gradients.
        h: Their curvature, if the optimizer needs it.
        segments: The same, by group.
    """

    rows: slice
    w: Tensor
    g: Tensor
    h: Tensor | None
    segments: list[Segment]

    def gather(self, matrix: Tensor, tensors: Sequence[Tensor]) -> None:  # (rows, numbers), (networks, …) each
        """Copy the rows of some tensors into a matrix."""
        torch.cat([tensor[self.rows].reshape(len(matrix), -1) for tensor in tensors], 1, out=matrix)

    def scatter(self, matrix: Tensor, tensors: Sequence[Tensor]) -> None:  # (rows, numbers), (networks, …) each
        """Copy a matrix into the rows of some tensors."""
        own = [tensor[self.rows] for tensor in tensors]
        parts = matrix.split([tensor[0].numel() for tensor in own], 1)
        torch._foreach_copy_(own, [part.view(each.shape) for part, each in zip(parts, own, strict=True)])


class Layout:
    """The matrices of some parameters: what an optimizer keeps of them, and room for a block of rows.

    Attributes:
        blocks: The blocks of rows.
        noise: Standard normal numbers of all networks, (rows, numbers), or None if nothing is drawn.
        views: What is kept of each parameter, by name, in its shape.
        kind: Type of the numbers, and device.
        num_steps: Number of steps with these matrices.
        addresses: Where the parameters were when the matrices were made.
        is_in_place: Whether a step changes the parameters themselves, because they are columns of one matrix already.

    Args:
        slots: The parameters, in their order.
        num_rows: Number of networks.
        traces: Names of what is kept.
        num_scratch: Number of matrices for intermediate results.
        has_curvature: Whether the optimizer needs the curvature.
        has_noise: Whether noise is drawn.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        num_rows: int,
        traces: Sequence[str],
        num_scratch: int,
        *,
        has_curvature: bool,
        has_noise: bool,
    ) -> None:
        self.slots, self.num_steps = slots, 0
        self.addresses = addresses_of(slots)
        together = _matrix_of(slots, num_rows)
        self.is_in_place = together is not None
        like, num_columns = slots[0].param, slots[-1].columns.stop
        in_cache = max(1, BLOCK // max(1, num_columns))
        count = min(num_rows, in_cache) if like.device.type == "cpu" else num_rows
        num_matrices = 2 + has_curvature + num_scratch
        room = torch.empty(num_matrices, count, num_columns, dtype=like.dtype, device=like.device)
        self.noise = room.new_empty(num_rows, num_columns) if has_noise else None
        self.traces = {name: room.new_zeros(num_rows, num_columns) for name in traces}
        self.kind = (like.dtype, like.device)
        self.views = [{name: self._view(name, slot) for name in traces} for slot in slots]
        starts = range(0, num_rows, count)
        blocks = [slice(k, min(k + count, num_rows)) for k in starts]
        w = [room[0, : rows.stop - rows.start] if together is None else together[rows] for rows in blocks]
        self.blocks = [self._block(*each, room[1:], has_curvature) for each in zip(blocks, w, strict=True)]

    def _block(self, rows: slice, w: Tensor, room: Tensor, has_curvature: bool) -> Block:  # noqa: FBT001 - as above
        g, *scratch = (matrix[: rows.stop - rows.start] for matrix in room)
        h = scratch.pop() if has_curvature else None
        noise = None if self.noise is None else self.noise[rows]
        runs = [list(run) for _, run in groupby(self.slots, key=lambda slot: (id(slot.group), slot.step))]
        segments = []
        for run in runs:
            own = slice(run[0].columns.start, run[-1].columns.stop)
            segment = Segment(
                run,
                rows,
                run[0].step,
                w[:, own],
                g[:, own],
                None if h is None else h[:, own],
                None if noise is None else noise[:, own],
                {name: matrix[rows, own] for name, matrix in self.traces.items()},
                tuple(matrix[:, own] for matrix in scratch),
            )
            segments.append(segment)
        return Block(rows, w, g, h, segments)

    def _view(self, trace: str, slot: Slot) -> Tensor:
        """View what is kept of a parameter in its shape."""
        view = self.traces[trace][:, slot.columns].view(-1, *slot.shape)
        return view if view.shape == slot.param.shape else view[0]


def addresses_of(slots: Sequence[Slot]) -> list[int]:
    """List where the parameters are in memory."""
    return [slot.param.data_ptr() for slot in slots]


def _matrix_of(slots: Sequence[Slot], num_rows: int) -> Tensor | None:  # (networks, numbers)
    """View the parameters of a stack as one matrix, if they are its columns in their order; else return None.

    Such parameters need not be copied before and after a step.
    """
    first = slots[0].param
    if num_rows == 1 or first.ndim < 1 or len(first) != num_rows:
        return None
    for slot in slots:
        param = slot.param
        contiguous = torch.empty(slot.shape, device="meta").stride()
        is_column = (
            param.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and param.storage_offset() == first.storage_offset() + slot.columns.start
            and param.stride() == (first.stride(0), *contiguous)
        )
        if not is_column:
            return None
    size = slots[-1].columns.stop
    return first.detach().as_strided((num_rows, size), (first.stride(0), 1), first.storage_offset())
