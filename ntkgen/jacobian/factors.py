"""What is kept of a block of samples: dense Jacobian rows, or (inputs, cotangents), per layer."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ntkgen.jacobian.cost import LayerPlan
from ntkgen.jacobian.windows import Windows


@dataclass(frozen=True)
class PairFactor:
    """The inputs and cotangents of one layer, or of one of its groups, without the axis of groups.

    Positions come last where rows are built of them, and before the numbers of one position where they are multiplied
    with other positions.
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
    """Everything that is kept of a block of samples: what its products with other blocks are made of."""

    logits: Tensor  # (samples, logits)
    rows: Tensor  # (samples, outputs, row parameters)
    pairs: tuple[PairFactor, ...]

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.logits)

    def repeated(self, samples: int) -> "BlockFactors":
        """Repeat the samples until there are this many: a block of the same size to multiply, without its passes."""

        def repeat(values: Tensor) -> Tensor:
            return values.repeat(-(-samples // len(values)), *[1] * (values.ndim - 1))[:samples].contiguous()

        pairs = tuple(
            dataclasses.replace(pair, inputs=repeat(pair.inputs), cotangents=repeat(pair.cotangents))
            for pair in self.pairs
        )
        return BlockFactors(repeat(self.logits), repeat(self.rows), pairs)
