"""The factors of a block of samples in memory: Jacobian rows, or inputs and cotangents, for each layer."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ntkgen.jacobian.cost import LayerPlan
from ntkgen.jacobian.windows import Windows


@dataclass(frozen=True)
class PairFactor:
    """The inputs and cotangents of one layer, or of one of its groups, without the axis of groups.

    For the order ``explicit``, which builds rows, the axis of positions is the last axis of the inputs. For the other
    orders, which multiply positions with positions, it comes before the axis of inputs.
    """

    plan: LayerPlan
    inputs: Tensor  # (samples, groups, k, T) for explicit, (samples, groups, T, k), or pixels (samples, groups, P, k/w)
    cotangents: Tensor  # (samples, outputs, groups, channels, T)
    windows: Windows | None = None  # how pixels become inputs

    def group(self, number: int) -> "PairFactor":
        """Take one group of channels."""
        return dataclasses.replace(self, inputs=self.inputs[:, number], cotangents=self.cotangents[:, :, number])


@dataclass(frozen=True)
class BlockFactors:
    """All factors of a block of samples. Products with other blocks are computed from them."""

    logits: Tensor  # (samples, logits)
    rows: Tensor  # (samples, outputs, row parameters)
    pairs: tuple[PairFactor, ...]

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.logits)

    def repeated(self, samples: int) -> "BlockFactors":
        """Repeat the samples up to a number. A measurement of products then needs no passes for a whole block."""

        def repeat(values: Tensor) -> Tensor:
            return values.repeat(-(-samples // len(values)), *[1] * (values.ndim - 1))[:samples].contiguous()

        pairs = tuple(
            dataclasses.replace(pair, inputs=repeat(pair.inputs), cotangents=repeat(pair.cotangents))
            for pair in self.pairs
        )
        return BlockFactors(repeat(self.logits), repeat(self.rows), pairs)


@dataclass(frozen=True)
class FactorGroup:
    """The factors of a group of parameters, as a part of the factors of every block.

    Attributes:
        columns: The stored Jacobian rows of these parameters. Neighbours are joined.
        layers: Names of the layers whose inputs and cotangents belong to them.
    """

    columns: tuple[slice, ...]
    layers: frozenset[str]

    def pairs_of(self, block: BlockFactors) -> tuple[PairFactor, ...]:
        """Take the inputs and cotangents of the group."""
        return tuple(pair for pair in block.pairs if pair.plan.shape.name in self.layers)
