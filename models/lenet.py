"""LeNet-5 (LeCun et al. 1998) for three input channels, with ReLU and max-pooling instead of tanh and averaging.

The initialisation is PyTorch's default.
"""

from torch import nn

PAPER = "LeCun, Bottou, Bengio, Haffner (1998), Proceedings of the IEEE 86(11)"


def lenet(num_classes: int = 10) -> nn.Sequential:
    """Build LeNet-5: two convolutions and three linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
