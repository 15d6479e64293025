"""Networks of streaming experiments, for images of several sizes (Elsayed, Mahmood 2024).

The convolutional network has no activation after its convolutions, as in the published code. The initialisation is
PyTorch's default.
"""

from torch import nn

PAPER = "Elsayed, Mahmood (2024), ICLR, arXiv:2404.00781"

_KERNEL = 5


def lenet_stream(num_classes: int = 10, channels: int = 3, size: int = 32) -> nn.Sequential:
    """Build two convolutions with max-pooling, and three linear layers with ReLU between them.

    Args:
        num_classes: Number of outputs.
        channels: Channels of the images.
        size: Height and width of the images, 16 or more.

    >>> [sum(p.numel() for p in lenet_stream(channels=c, size=s).parameters()) for c, s in ((3, 32), (1, 28))]
    [62006, 44426]
    """
    left = ((size - _KERNEL + 1) // 2 - _KERNEL + 1) // 2  # pixels of a side after both convolutions and poolings
    return nn.Sequential(
        nn.Conv2d(channels, 6, _KERNEL),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, _KERNEL),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * left**2, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def mlp_stream(num_classes: int = 10, inputs: int = 3 * 32 * 32) -> nn.Sequential:
    """Build a multilayer perceptron with 300 and 150 hidden units and ReLU.

    >>> sum(p.numel() for p in mlp_stream(inputs=784).parameters())
    282160
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 300),
        nn.ReLU(),
        nn.Linear(300, 150),
        nn.ReLU(),
        nn.Linear(150, num_classes),
    )
