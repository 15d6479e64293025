"""The convolutional network of Liu et al. (2025): four convolutions with batch norm, and three linear layers.

Convolutions of 5×5, 3×3, 3×3 and 3×3 pixels without padding, 64 channels each, max-pooling after the second, then two
hidden layers of ``width`` units. Initialisation is PyTorch's default.
"""

from torch import nn

PAPER = "Liu, Chen, Zhang, Liu, Lanzillotta (2025), arXiv:2507.16039"

_CHANNELS = 64
_POSITIONS = 9 * 9  # of a 32×32 image after all convolutions


def _conv(in_channels: int, size: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, _CHANNELS, size), nn.BatchNorm2d(_CHANNELS), nn.ReLU()]


def cnn(num_classes: int = 10, width: int = 1000) -> nn.Module:
    """Build the network with two hidden layers of ``width`` units."""
    features = nn.Sequential(*_conv(3, 5), *_conv(_CHANNELS, 3), nn.MaxPool2d(2), *_conv(_CHANNELS, 3))
    features.extend(_conv(_CHANNELS, 3))
    hidden = [nn.Linear(_CHANNELS * _POSITIONS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(features, nn.Flatten(), *hidden, nn.Linear(width, num_classes))
