"""Samples of any form: one tensor, several positional arguments, or several keyword arguments of a network."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ntkgen.errors import InputError, ShapeError
from ntkgen.jacobian.batches import ArrayLike, checked_batches

# One tensor, or a tuple or a dictionary of tensors or arrays whose first axis is that of the samples.
Batch = ArrayLike | tuple[ArrayLike, ...] | Mapping[str, ArrayLike]
# What a function of the user gets: a tensor, a tuple or a dictionary of tensors.
Arguments = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Data:
    """The samples of rows and columns, which no copy of a network copies.

    Attributes:
        leaves: The tensors, each (n₁ + n₂, …).
        num_rows: Number of samples of the rows, which are the first.
        names: Names of the keyword arguments, or None if there are none.
        is_tuple: Whether the tensors are several positional arguments.
    """

    leaves: tuple[Tensor, ...]
    num_rows: int
    names: tuple[str, ...] | None = None
    is_tuple: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Data":
        return self

    def __len__(self) -> int:
        return len(self.leaves[0])

    def take(
        self,
        numbers: Tensor,  # (selected,), int64
        dtype: torch.dtype,
        device: torch.device,
    ) -> Arguments:
        """Select samples. Floating-point numbers get a dtype, and integers keep theirs."""
        taken = []
        for leaf in self.leaves:
            part = leaf[numbers.to(leaf.device)]
            taken.append(part.to(device, dtype if part.is_floating_point() else None))
        if self.names is not None:
            return dict(zip(self.names, taken, strict=True))
        return tuple(taken) if self.is_tuple else taken[0]

    def sides(self) -> list[Tensor]:
        """List the tensors of the rows, then those of the columns if these have other samples. Names are in order."""
        leaves = list(self.leaves)
        if self.names is not None:
            leaves = [leaf for _, leaf in sorted(zip(self.names, leaves, strict=True), key=itemgetter(0))]
        columns = [leaf[self.num_rows :] for leaf in leaves if len(leaf) > self.num_rows]
        return [*(leaf[: self.num_rows] for leaf in leaves), *columns]

    def numbers(self, *, are_alike: bool = True) -> tuple[Tensor, Tensor | None]:
        """Number the samples of rows and columns. Equal samples at the beginning have the same number.

        The engine tries a network on different samples at the beginning, because a network that mixes equal samples
        has the right outputs.

        Args:
            are_alike: Whether equal samples of rows and columns are the same, because they have the same outputs.
        """
        numbers = torch.arange(len(self), device="cpu")
        few = [*range(min(FEW, self.num_rows)), *range(self.num_rows, min(self.num_rows + FEW, len(self)))]
        for position, index in enumerate(few):
            for other in few[:position]:
                is_same_side = are_alike or (index < self.num_rows) == (other < self.num_rows)
                if is_same_side and all(torch.equal(leaf[index], leaf[other]) for leaf in self.leaves):
                    numbers[index] = numbers[other]
                    break
        columns = numbers[self.num_rows :]
        return numbers[: self.num_rows], columns if len(columns) else None

    def copied(self) -> "Data":
        """Copy the tensors, which may share memory with those of the caller."""
        return dataclasses.replace(self, leaves=tuple(leaf.clone() for leaf in self.leaves))

    def __str__(self) -> str:
        """Name shapes and dtypes of one sample."""
        names = self.names or ("",) * len(self.leaves)
        return ", ".join(
            f"{name} {tuple(leaf.shape[1:])} of {leaf.dtype}".strip()
            for name, leaf in zip(names, self.leaves, strict=True)
        )


FEW = 16  # samples of rows and of columns that are compared


def is_one_tensor(x: object) -> bool:
    """Say whether samples are one tensor: no dictionary, and no tuple of tensors or arrays.

    A list is always one tensor. Its items, numbers or tensors, are the samples.

    >>> is_one_tensor([torch.ones(2), torch.ones(2)]), is_one_tensor((torch.ones(2), torch.ones(2)))
    (True, False)
    >>> is_one_tensor(((1.0, 2.0), (3.0, 4.0)))
    True
    """
    if isinstance(x, tuple) and not isinstance(x, PackedSequence):
        return not (x and all(isinstance(part, Tensor | np.ndarray) for part in x))
    return not isinstance(x, Mapping)


def data_of(x1: Batch, x2: Batch | None = None) -> Data:
    """Convert the samples of rows and columns.

    Raises:
        InputError: If a part is no batch of numbers, or if there is none.
        ShapeError: If the parts have different numbers of samples, or rows and columns different parts.
    """
    rows, columns = _parts(x1), None if x2 is None else _parts(x2)
    if columns is not None and set(rows) != set(columns):
        raise ShapeError(
            f"Rows and columns hold different inputs: expected {_listed(rows)} for both, found {_listed(columns)} for "
            "the columns. Is one missing? One network must accept both. Pass the same inputs for both."
        )
    pairs = [checked_batches(part, None if columns is None else columns[name]) for name, part in rows.items()]
    for side in (0, 1):
        _require_one_axis(dict(zip(rows, (pair[side] for pair in pairs), strict=True)))
    leaves = tuple(one if other is None else torch.cat([one, other.to(one)]) for one, other in pairs)
    names = tuple(map(str, rows)) if isinstance(x1, Mapping) else None
    return Data(leaves, len(pairs[0][0]), names, isinstance(x1, tuple) and not is_one_tensor(x1))


def _parts(x: Batch) -> dict[Any, Any]:
    if isinstance(x, Mapping):
        parts: dict[Any, Any] = dict(x)
        if not parts or not all(isinstance(name, str) for name in parts):
            raise InputError(
                f"Samples in a dictionary are keyword arguments of a network: expected names and tensors, found "
                f"{_listed(parts)}. Is it the data set of another library, or empty? Pass for example "
                "{'input_ids': ids, 'attention_mask': mask}."
            )
        return parts
    return {0: x} if is_one_tensor(x) else dict(enumerate(x))


def _require_one_axis(parts: dict[Any, Tensor | None]) -> None:
    counts = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ShapeError(
            f"The inputs have different numbers of samples: expected the same along the first axis of each, found "
            f"{found}. Is one of them the same for all samples, or is its first axis not that of the samples? Repeat "
            "it for each sample, or transpose it."
        )


def _listed(parts: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, parts)) or "nothing"
