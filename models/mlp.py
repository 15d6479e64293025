"""A multilayer perceptron with tanh on the flattened image: three hidden layers of equal width.

In the standard parametrisation it starts from PyTorch's default; in NTK parametrisation from N(0, 1), see `scaled`.
"""

from typing import TYPE_CHECKING

from torch import nn

from models.scaled import ntk_linear

if TYPE_CHECKING:
    from collections.abc import Callable

PAPER = "Rumelhart, Hinton, Williams (1986), Nature 323"

_INPUTS = 3 * 32 * 32
_HIDDEN = 3


def mlp(num_classes: int = 10, width: int = 100, parametrization: str = "standard", inputs: int = _INPUTS) -> nn.Module:
    """Build the network: three hidden layers of ``width`` units, tanh after each."""
    linear: Callable[[int, int], nn.Module] = ntk_linear if parametrization == "ntk" else nn.Linear
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (inputs, *[width] * (_HIDDEN - 1)):
        layers += [linear(before, width), nn.Tanh()]
    return nn.Sequential(*layers, linear(width, num_classes))
