"""What a forward pass has shown: the uses of layers and junctions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Use:
    """One call of a layer, or one junction.

    ``x`` is its detached input, or what a rule of junctions takes, and ``output`` its output in the graph.
    ``passes_back`` says whether gradients go on to earlier layers. ``shapes`` are the shapes of input and output for
    the whole batch, with its padding.
    """

    x: Any
    output: Tensor
    passes_back: bool
    shapes: tuple[torch.Size, torch.Size]


@dataclass
class Recording:
    """The result of a forward pass: the network's outputs and, for each recorded layer, its uses in order.

    The first ``count`` samples of the batch belong to the block. The others are padding.
    """

    count: int
    uses: dict[str, list[Use]] = field(default_factory=dict)
    outputs: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32, device="cpu"))
