"""MobileNetV2 (Sandler et al. 2018), Table 2, for 32×32 images: the stride is 1 up to the stage of 24 channels.

Blocks are inverted residuals with linear bottlenecks and ReLU6, as in the paper. Two details follow the common CIFAR
variant. The first block has an expansion convolution, although its expansion is 1. A block of stride 1 that changes the
number of channels has a shortcut, a 1×1 convolution with batch norm. Convolutions have He initialisation, and the last
layer has PyTorch's default.
"""

from collections import OrderedDict

from torch import nn

from models.conv import conv_bn, he_normal
from models.residual import Residual

PAPER = "Sandler, Howard, Zhu, Zhmoginov, Chen (2018), CVPR, arXiv:1801.04381"

_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280
_STAGES = (  # expansion, output channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _inverted_residual(in_channels: int, out_channels: int, expansion: int, stride: int) -> nn.Module:
    channels = expansion * in_channels
    branch = nn.Sequential(
        *conv_bn(in_channels, channels, 1),
        nn.ReLU6(),
        *conv_bn(channels, channels, 3, stride, groups=channels),
        nn.ReLU6(),
        *conv_bn(channels, out_channels, 1),
    )
    if stride > 1:
        return branch
    if in_channels == out_channels:
        return Residual(branch)
    return Residual(branch, nn.Sequential(*conv_bn(in_channels, out_channels, 1)))


def _blocks() -> nn.Sequential:
    blocks = nn.Sequential()
    in_channels = _STEM_CHANNELS
    for expansion, out_channels, depth, first_stride in _STAGES:
        for stride in (first_stride, *[1] * (depth - 1)):
            blocks.append(_inverted_residual(in_channels, out_channels, expansion, stride))
            in_channels = out_channels
    return blocks


def mobilenetv2(num_classes: int = 10) -> nn.Sequential:
    """Build MobileNetV2 with width multiplier 1."""
    layers = OrderedDict[str, nn.Module](
        stem=nn.Sequential(*conv_bn(3, _STEM_CHANNELS, 3), nn.ReLU6()),
        blocks=_blocks(),
        last=nn.Sequential(*conv_bn(_STAGES[-1][1], _LAST_CHANNELS, 1), nn.ReLU6()),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(_LAST_CHANNELS, num_classes),
    )
    return he_normal(nn.Sequential(layers))
