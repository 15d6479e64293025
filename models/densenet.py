"""DenseNet-BC-121 (Huang et al. 2017), Table 1, for 32×32 images: a 3×3 stem of stride 1 and no max-pooling.

The growth rate is 32, and bottlenecks have 4 · 32 channels. Each transition halves channels, height and width.
Convolutions have He initialisation, and the last layer has PyTorch's default.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.conv import he_normal

PAPER = "Huang, Liu, van der Maaten, Weinberger (2017), CVPR, arXiv:1608.06993"

_GROWTH = 32
_BOTTLENECK = 4 * _GROWTH
_DEPTHS = (6, 12, 24, 16)


class DenseLayer(nn.Module):
    """Append ``_GROWTH`` new channels, computed from all previous channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, _BOTTLENECK, 1, bias=False),
            nn.BatchNorm2d(_BOTTLENECK),
            nn.ReLU(),
            nn.Conv2d(_BOTTLENECK, _GROWTH, 3, padding=1, bias=False),
        )

    def forward(
        self,
        x: Tensor,  # (samples, in_channels, height, width)
    ) -> Tensor:  # (samples, in_channels + _GROWTH, height, width)
        """Return x and branch(x), concatenated along the channels."""
        return torch.cat([x, self.branch(x)], dim=1)


def _transition(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels // 2, 1, bias=False),
        nn.AvgPool2d(2),
    )


def densenet121(num_classes: int = 10) -> nn.Sequential:
    """Build DenseNet-BC-121: dense blocks of 6, 12, 24 and 16 layers."""
    channels = 2 * _GROWTH
    network = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, channels, 3, padding=1, bias=False)))
    for k, depth in enumerate(_DEPTHS, start=1):
        if k > 1:
            network.add_module(f"transition{k - 1}", _transition(channels))
            channels //= 2
        network.add_module(f"block{k}", nn.Sequential(*(DenseLayer(channels + i * _GROWTH) for i in range(depth))))
        channels += depth * _GROWTH
    network.add_module("activate", nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("head", nn.Linear(channels, num_classes))
    return he_normal(network)
