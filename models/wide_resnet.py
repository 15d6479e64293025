"""Wide residual networks WRN-28-k (Zagoruyko, Komodakis 2016): three stages of four blocks, k times wider.

A block is BN-ReLU-conv-BN-ReLU-conv (pre-activation). Only its second convolution has a bias. If the shape changes, the
shortcut is a 1×1 convolution of the activated input, without batch norm. There is no dropout. Convolutions have He
initialisation, and the last layer has PyTorch's default.
"""

from collections import OrderedDict

from torch import nn

from models.conv import he_normal
from models.residual import Residual, stage

PAPER = "Zagoruyko, Komodakis (2016), BMVC, arXiv:1605.07146"

_STEM_CHANNELS = 16


def _preactivation(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    activate = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
    branch = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
    )
    if stride == 1 and in_channels == out_channels:
        return Residual(nn.Sequential(*activate, *branch))
    return nn.Sequential(*activate, Residual(branch, nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)))


def _wrn_28(widening: int, num_classes: int) -> nn.Sequential:
    narrow, middle, wide = (widening * channels for channels in (16, 32, 64))
    layers = OrderedDict[str, nn.Module](
        stem=nn.Conv2d(3, _STEM_CHANNELS, 3, padding=1, bias=False),
        stage1=stage(_preactivation, 4, _STEM_CHANNELS, narrow, stride=1),
        stage2=stage(_preactivation, 4, narrow, middle, stride=2),
        stage3=stage(_preactivation, 4, middle, wide, stride=2),
        activate=nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU()),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(wide, num_classes),
    )
    return he_normal(nn.Sequential(layers))


def wrn_28_2(num_classes: int = 10) -> nn.Sequential:
    """Build WRN-28-2: 32, 64 and 128 channels."""
    return _wrn_28(2, num_classes)


def wrn_28_5(num_classes: int = 10) -> nn.Sequential:
    """Build WRN-28-5: 80, 160 and 320 channels."""
    return _wrn_28(5, num_classes)


def wrn_28_10(num_classes: int = 10) -> nn.Sequential:
    """Build WRN-28-10: 160, 320 and 640 channels."""
    return _wrn_28(10, num_classes)
