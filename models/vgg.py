"""VGG-11 and VGG-13 (Simonyan, Zisserman 2015): columns A and B of its Table 1, for 32×32 images.

Batch norm follows every convolution, and one linear layer replaces the paper's three: five max-poolings leave one
position of 512 channels. Convolutions start from He's initialisation, the last layer from PyTorch's default.
"""

from collections import OrderedDict

from torch import nn

from models.conv import conv_bn, he_normal

PAPER = "Simonyan, Zisserman (2015), ICLR, arXiv:1409.1556"

_CHANNELS = (64, 128, 256, 512, 512)  # of the convolutions before each of the five max-poolings


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
