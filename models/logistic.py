"""Logistic regression (Cox 1958) on the pixels.

The network is linear in its parameters, so its kernel does not change in training.

The initialisation is PyTorch's default.
"""

from torch import nn

PAPER = "Cox (1958), Journal of the Royal Statistical Society B 20(2)"


def logistic(num_classes: int = 10) -> nn.Sequential:
    """Build one linear layer on the flattened image. Its outputs are the logits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
