"""The connections of the units of a hidden layer: the weights that enter them, and those that leave them."""

import math

import torch
from torch import Tensor, nn

from ntkgen.continual.units import ACTIVATIONS, HiddenLayer
from ntkgen.errors import ShapeError

# Gains of activation functions; others, such as GELU, are close to ReLU.
GAINS = {nn.Tanh: 5 / 3, nn.SELU: 3 / 4, nn.Sigmoid: 1.0}
RELU_GAIN = math.sqrt(2)


class Connections:
    """The modules around the units of one hidden layer.

    A unit of a convolution that a linear layer reads after flattening owns a block of ``block`` inputs of this layer,
    one for each pixel. In all other cases ``block`` is 1.

    Args:
        model: The network.
        layer: The names of the modules.
    """

    def __init__(self, model: nn.Module, layer: HiddenLayer) -> None:
        self.name = layer.incoming
        self.activation = layer.activation
        self.incoming = _weighted(model, layer.incoming)
        self.outgoing = _weighted(model, layer.outgoing)
        self.norm = None if layer.norm is None else model.get_submodule(layer.norm)
        self.num_units = len(self.incoming.weight)
        self.block = self.outgoing.weight.shape[1] // self.num_units
        self.gain = gain_of(model, layer)

    def incoming_magnitude(self) -> Tensor:  # (units,)
        """Compute the mean of the absolute weights that enter each unit."""
        return self.incoming.weight.abs().flatten(1).mean(1)

    def outgoing_magnitude(self) -> Tensor:  # (units,)
        """Compute the mean of the absolute weights that leave each unit."""
        return self._outgoing_by_unit().abs().mean((0, 2))

    def contribution(
        self,
        units: Tensor,  # (chosen,)
        activations: Tensor,  # (chosen,)
    ) -> Tensor:  # (outputs of the next layer,)
        """Compute what units with constant activations add to each output of the next layer."""
        return self._outgoing_by_unit()[:, units].sum(2) @ activations

    def by_unit(
        self,
        features: Tensor,  # the activations, (samples, units, height, width), or flattened
    ) -> Tensor:  # (samples, units, positions)
        """Bring activations into one shape.

        Raises:
            ShapeError: If they are not those of the units.
        """
        if features.ndim not in {2, 4} or features.shape[1] % self.num_units:
            raise ShapeError(
                f"The activations of {self.name} do not fit: expected (samples, {self.num_units}, …) with two or four "
                f"dimensions, found {tuple(features.shape)}. Does the network act on sequences? Use a network without "
                "them, or no surgery on units."
            )
        return features.reshape(len(features), self.num_units, -1)

    def columns(
        self,
        units: Tensor,  # (chosen,)
    ) -> Tensor:  # (chosen · block,)
        """List the inputs of the next layer that units own."""
        return (units[:, None] * self.block + torch.arange(self.block, device=units.device)).flatten()

    def _outgoing_by_unit(self) -> Tensor:  # (outputs, units, block · kernel)
        weight = self.outgoing.weight
        return weight.reshape(len(weight), self.num_units, -1)


def gain_of(model: nn.Module, layer: HiddenLayer) -> float:
    """Find the gain of the activation function of a layer, for the size of new weights: 1 if there is none.

    The function is the activation module of the layer, or the first one that is registered between the layer that
    computes the units and the activation module.

    >>> chain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> round(gain_of(chain, HiddenLayer("1", "0", None, "2")), 3)
    1.667
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    last = names.index(layer.activation)
    candidates = [layer.activation, *names[names.index(layer.incoming) : last]]
    modules = (model.get_submodule(name) for name in candidates)
    function = next((module for module in modules if isinstance(module, ACTIVATIONS)), None)
    if function is None:
        return 1.0
    if isinstance(function, nn.LeakyReLU):
        return math.sqrt(2 / (1 + function.negative_slope**2))
    return GAINS.get(type(function), RELU_GAIN)


def _weighted(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    return module
