"""Residual networks (He et al. 2016) in their CIFAR form: a 3×3 stem of stride 1, no max-pooling, four stages.

ResNet-20, -32 and -56 are the small networks with three stages of 16, 32 and 64 channels (§4.2 of the paper) that
class-incremental learning uses. ResNet-56 has nine bottlenecks in each stage.

Depths 18, 34, 50, 101 and 152 are those of Table 1 in the paper. Depths 9 and 68 stack its basic block 1, 1, 1, 1 and
3, 4, 23, 3 times. If the shape changes, the shortcut is a 1×1 convolution with batch norm (option B of the paper).
Convolutions have He initialisation, and the last layer has PyTorch's default.

ResNet-10 and -18 with bias are those of the experiments on loss of plasticity (Dohare et al. 2024): every convolution
has a bias, also that of a shortcut, and weights are drawn by fan in, see `fan_in_normal`.

Every network declares its hidden layers, see `models.hidden`.
"""

from collections import OrderedDict
from functools import partial

from torch import nn

from models.conv import conv_bn, fan_in_normal, he_normal
from models.hidden import main_path
from models.residual import Block, Residual, stage

PAPER = "He, Zhang, Ren, Sun (2016), CVPR, arXiv:1512.03385"
PAPER_WITH_BIAS = "Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton (2024), Nature 632, arXiv:2306.13812"

_EXPANSION = 4  # output channels of a bottleneck per channel of its 3×3 convolution


def _with_shortcut(
    branch: nn.Module, in_channels: int, out_channels: int, stride: int, *, bias: bool = False
) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential(Residual(branch), nn.ReLU())
    shortcut = nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride, bias=bias))
    return nn.Sequential(Residual(branch, shortcut), nn.ReLU())


def _basic(in_channels: int, out_channels: int, stride: int, *, bias: bool = False) -> nn.Sequential:
    branch = nn.Sequential(
        *conv_bn(in_channels, out_channels, 3, stride, bias=bias),
        nn.ReLU(),
        *conv_bn(out_channels, out_channels, 3, bias=bias),
    )
    return _with_shortcut(branch, in_channels, out_channels, stride, bias=bias)


def _bottleneck(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    channels = out_channels // _EXPANSION
    branch = nn.Sequential(
        *conv_bn(in_channels, channels, 1),
        nn.ReLU(),
        *conv_bn(channels, channels, 3, stride),
        nn.ReLU(),
        *conv_bn(channels, out_channels, 1),
    )
    return _with_shortcut(branch, in_channels, out_channels, stride)


def _resnet(
    block: Block, depths: tuple[int, ...], num_classes: int, width: int, expansion: int = 1, *, bias: bool = False
) -> nn.Sequential:
    channels = [width, *(expansion * width * 2**k for k in range(len(depths)))]
    stages = (
        stage(block, depth, channels[k], channels[k + 1], stride=1 if k == 0 else 2) for k, depth in enumerate(depths)
    )
    layers = OrderedDict[str, nn.Module](
        stem=nn.Sequential(*conv_bn(3, width, 3, bias=bias), nn.ReLU()),
        stages=nn.Sequential(*stages),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(channels[-1], num_classes),
    )
    network = nn.Sequential(layers)
    network.hidden_layers = main_path(network)  # type: ignore[assignment] # for torch, only a tensor or a module
    return fan_in_normal(network) if bias else he_normal(network)


def resnet9(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-9: basic blocks 1, 1, 1, 1, the first stage with ``width`` channels."""
    return _resnet(_basic, (1, 1, 1, 1), num_classes, width)


def resnet18(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-18: basic blocks 2, 2, 2, 2, the first stage with ``width`` channels."""
    return _resnet(_basic, (2, 2, 2, 2), num_classes, width)


def resnet34(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-34: basic blocks 3, 4, 6, 3, the first stage with ``width`` channels."""
    return _resnet(_basic, (3, 4, 6, 3), num_classes, width)


def resnet50(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-50: bottlenecks 3, 4, 6, 3, the first stage with 4 · ``width`` channels."""
    return _resnet(_bottleneck, (3, 4, 6, 3), num_classes, width, _EXPANSION)


def resnet68(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-68: basic blocks 3, 4, 23, 3, the first stage with ``width`` channels."""
    return _resnet(_basic, (3, 4, 23, 3), num_classes, width)


def resnet101(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-101: bottlenecks 3, 4, 23, 3, the first stage with 4 · ``width`` channels."""
    return _resnet(_bottleneck, (3, 4, 23, 3), num_classes, width, _EXPANSION)


def resnet152(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-152: bottlenecks 3, 8, 36, 3, the first stage with 4 · ``width`` channels."""
    return _resnet(_bottleneck, (3, 8, 36, 3), num_classes, width, _EXPANSION)


def resnet20(num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Build ResNet-20: basic blocks 3, 3, 3, the first stage with ``width`` channels."""
    return _resnet(_basic, (3, 3, 3), num_classes, width)


def resnet32(num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Build ResNet-32: basic blocks 5, 5, 5, the first stage with ``width`` channels."""
    return _resnet(_basic, (5, 5, 5), num_classes, width)


def resnet56(num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """Build ResNet-56: bottlenecks 9, 9, 9, the first stage with 4 · ``width`` channels."""
    return _resnet(_bottleneck, (9, 9, 9), num_classes, width, _EXPANSION)


def resnet10_bias(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-10 with bias: basic blocks 1, 1, 1, 1, the first stage with ``width`` channels."""
    return _resnet(partial(_basic, bias=True), (1, 1, 1, 1), num_classes, width, bias=True)


def resnet18_bias(num_classes: int = 10, width: int = 64) -> nn.Sequential:
    """Build ResNet-18 with bias: basic blocks 2, 2, 2, 2, the first stage with ``width`` channels.

    It is the network of incremental CIFAR-100 in Dohare et al. (2024), Nature 632: with 100 classes it has 11,224,932
    parameters and 3,904 hidden units in 17 layers.
    """
    return _resnet(partial(_basic, bias=True), (2, 2, 2, 2), num_classes, width, bias=True)
