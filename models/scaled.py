"""A factor on activations, for networks in NTK parametrisation.

The weights of such a network are N(0, 1), and each layer divides by the root of its fan-in (Jacot, Gabriel, Hongler
2018, arXiv:1806.07572, §3). Here the activations that enter `nn.Linear` are divided, not its weights. The function and
the kernel are the same, and the layer keeps the structure that makes its kernel fast.
"""

import math

from torch import Tensor, nn


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self,
        x: Tensor,  # any shape
    ) -> Tensor:  # the same shape
        """Return factor · x."""
        return x * self.factor

    def extra_repr(self) -> str:
        """Say the factor."""
        return f"{self.factor:g}"


def ntk_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Sequential:
    """Build W x / √in_features + b, with W from N(0, 1) and b = 0."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return nn.Sequential(Scale(1 / math.sqrt(in_features)), linear)
