"""MobileNet (Howard et al. 2017), Table 1, for 32×32 images: the first convolution has stride 1.

Every depthwise and every pointwise convolution is followed by batch norm and ReLU. Convolutions have He initialisation,
and the last layer has PyTorch's default.
"""

from collections import OrderedDict

from torch import nn

from models.conv import conv_bn, he_normal

PAPER = "Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam (2017), arXiv:1704.04861"

_STEM_CHANNELS = 32
_BLOCKS = (  # output channels, stride of the depthwise convolution
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn(in_channels, in_channels, 3, stride, groups=in_channels),
        nn.ReLU(),
        *conv_bn(in_channels, out_channels, 1),
        nn.ReLU(),
    )


def mobilenet(num_classes: int = 10) -> nn.Sequential:
    """Build MobileNet with width multiplier 1."""
    channels = [_STEM_CHANNELS, *(out_channels for out_channels, _ in _BLOCKS)]
    blocks = (_separable(channels[k], out_channels, stride) for k, (out_channels, stride) in enumerate(_BLOCKS))
    layers = OrderedDict[str, nn.Module](
        stem=nn.Sequential(*conv_bn(3, _STEM_CHANNELS, 3), nn.ReLU()),
        blocks=nn.Sequential(*blocks),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(channels[-1], num_classes),
    )
    return he_normal(nn.Sequential(layers))
