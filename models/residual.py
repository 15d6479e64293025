"""Residual connections, and stages of residual blocks."""

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """Add a branch and a shortcut. The default shortcut is the identity."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(
        self,
        x: Tensor,  # (samples, in_channels, height, width)
    ) -> Tensor:  # (samples, out_channels, height / stride, width / stride)
        """Return branch(x) + shortcut(x)."""
        out: Tensor = self.branch(x) + self.shortcut(x)
        return out


Block = Callable[[int, int, int], nn.Module]
"""Function that builds a block from its input channels, output channels and stride."""


def stage(block: Block, depth: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Stack blocks. The first block changes the number of channels and has the stride."""
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(depth - 1)))
