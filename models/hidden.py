"""The hidden layers of a network: the modules that compute hidden units, and those that read them.

A network that is no plain chain of modules declares them in its attribute ``hidden_layers``. They are names, so that a
copy of the network, or its parameters on disk, has the same ones.
"""

from typing import NamedTuple

from torch import nn


class HiddenLayer(NamedTuple):
    """The names of the modules of one hidden layer. A unit is one output channel of ``incoming``."""

    activation: str
    """The module whose outputs are the activations of the units."""
    incoming: str
    """The `nn.Linear` or `nn.Conv2d` that computes the units."""
    norm: str | None
    """The batch norm between ``incoming`` and ``activation``; None if there is none."""
    outgoing: str
    """The `nn.Linear` or `nn.Conv2d` on the main path that reads the units."""


def main_path(network: nn.Sequential) -> tuple[HiddenLayer, ...]:
    """List the hidden layers of a residual network, without those of its shortcuts.

    Every convolution must be followed by a batch norm and a ReLU, the last one also by ``pool``, ``flatten`` and
    ``head``, and the modules must be registered in the order of the computation. The activations of the last layer are
    the pooled ones, as in Dohare et al. (2024), Nature 632.
    """
    path = [(name, module) for name, module in network.named_modules() if "shortcut" not in name.split(".")]
    convs, norms, activations = (
        [name for name, module in path if isinstance(module, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
    )
    activations[-1] = "flatten"
    columns = activations, convs, norms, [*convs[1:], "head"]
    return tuple(HiddenLayer(*names) for names in zip(*columns, strict=True))
