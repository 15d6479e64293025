"""VGG-11 and VGG-13 (Simonyan, Zisserman 2015), columns A and B of Table 1, for 32×32 images.

Every convolution is followed by batch norm. After five max-poolings there is one position with 512 channels, so one
linear layer replaces the three of the paper. Convolutions have He initialisation, and the last layer has PyTorch's
default.
"""

from collections import OrderedDict

from torch import nn

from models.conv import conv_bn, he_normal

PAPER = "Simonyan, Zisserman (2015), ICLR, arXiv:1409.1556"

_CHANNELS = (64, 128, 256, 512, 512)  # output channels of the convolutions before each of the five max-poolings


def _vgg(depths: tuple[int, int, int, int, int], num_classes: int) -> nn.Sequential:
    features = nn.Sequential()
    in_channels = 3
    for depth, channels in zip(depths, _CHANNELS, strict=True):
        for _ in range(depth):
            features.extend((*conv_bn(in_channels, channels, 3, bias=True), nn.ReLU()))
            in_channels = channels
        features.append(nn.MaxPool2d(2))
    head = nn.Linear(in_channels, num_classes)
    layers = OrderedDict[str, nn.Module](features=features, flatten=nn.Flatten(), head=head)
    return he_normal(nn.Sequential(layers))


def vgg11(num_classes: int = 10) -> nn.Sequential:
    """Build VGG-11: 1, 1, 2, 2, 2 convolutions."""
    return _vgg((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes: int = 10) -> nn.Sequential:
    """Build VGG-13: 2, 2, 2, 2, 2 convolutions."""
    return _vgg((2, 2, 2, 2, 2), num_classes)
