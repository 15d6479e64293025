"""Replacement of hidden units by new ones, which at first change nothing that the network computes."""

import math

import torch
from torch import Tensor, nn

from ntkgen.continual.chance import seed_of
from ntkgen.continual.surgery.connections import Connections
from ntkgen.continual.surgery.options import SurgeryOptions
from ntkgen.continual.surgery.surgery import Subject
from ntkgen.errors import ModelError


class Replacement:
    """Gives units of hidden layers new incoming weights, a bias of zero, and outgoing weights of zero.

    Batch norm of the units begins anew too: weight 1, bias 0, running mean 0, running variance 1. All other units keep
    their bits. The weights are drawn on the host, so that they are the same on every device.

    Args:
        subject: What it acts on.
        numbers: What else the draws belong to.

    Attributes:
        layers: The connections of the hidden layers.
        generator: The source of the new weights.

    Raises:
        ModelError: If there are no hidden layers.
    """

    def __init__(self, subject: Subject, *numbers: int) -> None:
        if not subject.layers:
            raise ModelError(
                f"{type(subject.model).__name__} has no hidden units to replace: expected at least one hidden layer, "
                "found none. Is it a linear model? Use a network with hidden layers, or no surgery on units."
            )
        self.layers = [Connections(subject.model, layer) for layer in subject.layers]
        self.generator = torch.Generator().manual_seed(seed_of(subject.seed, "replacement", *numbers))
        self._options = subject.options
        self._optimizer = subject.optimizer if subject.options.reset_unit_optimizer else None

    @torch.no_grad()
    def __call__(
        self,
        layer: Connections,
        units: Tensor,  # (chosen,)
    ) -> None:
        """Replace units of a layer."""
        weight = layer.incoming.weight
        drawn = draw_weights(len(units), layer, self._options, self.generator)
        weight.index_copy_(0, units, drawn.to(weight, non_blocking=True))
        self._forget(weight, 0, units)
        self._fill(layer.incoming.bias, units, 0.0)
        self._fill(layer.outgoing.weight, layer.columns(units), 0.0, dim=1)
        if layer.norm is not None:
            self._renew_norm(layer.norm, units)

    def _renew_norm(self, norm: nn.Module, units: Tensor) -> None:
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        self._fill(norm.weight, units, 1.0)
        self._fill(norm.bias, units, 0.0)
        for buffer, value in ((norm.running_mean, 0.0), (norm.running_var, 1.0)):
            if buffer is not None:
                buffer.index_fill_(0, units, value)

    def _fill(self, param: Tensor | None, index: Tensor, value: float, dim: int = 0) -> None:
        if param is not None:
            param.index_fill_(dim, index, value)
            self._forget(param, dim, index)

    def _forget(self, param: Tensor, dim: int, index: Tensor) -> None:
        if self._optimizer is not None:
            forget_entries(self._optimizer, param, dim, index)


def draw_weights(count: int, layer: Connections, options: SurgeryOptions, generator: torch.Generator) -> Tensor:
    """Draw incoming weights of new units, (count, …), on the host; see `weight_std`."""
    shape = (count, *layer.incoming.weight.shape[1:])
    std = weight_std(layer, options.unit_init)
    if options.unit_distribution == "normal":
        return torch.randn(shape, generator=generator) * std
    return (2 * torch.rand(shape, generator=generator) - 1) * std * math.sqrt(3)


def weight_std(layer: Connections, init: str) -> float:
    """Compute the standard deviation of new incoming weights.

    It is gain / √fan_in for ``kaiming``, gain · √(2 / (fan_in + fan_out)) for ``xavier``, 1 / √fan_in for ``lecun``,
    and 1 / √(3 fan_in) for ``default``, which is that of PyTorch's own weights. Fan in and fan out are those of the
    layer, the gain is that of its activation function. The uniform distribution has the bound √3 · std.
    """
    weight = layer.incoming.weight
    fan_in = weight[0].numel()
    fan_out = len(weight) * weight[0, 0].numel()
    return {
        "kaiming": layer.gain / math.sqrt(fan_in),
        "xavier": layer.gain * math.sqrt(2 / (fan_in + fan_out)),
        "lecun": 1 / math.sqrt(fan_in),
        "default": 1 / math.sqrt(3 * fan_in),
    }[init]


def forget_entries(optimizer: torch.optim.Optimizer, param: Tensor, dim: int, index: Tensor) -> None:
    """Set to zero what an optimizer keeps of some rows or columns of a parameter.

    That is the momentum of SGD, and both moments of Adam. Adam's ``step`` is one number for the whole parameter, and
    stays: the moments of new weights are corrected as those of old ones. The first step of a new weight is therefore up
    to (1 − β₁) / √(1 − β₂) times as large as that of a new optimizer, which is 3.2 with PyTorch's defaults.
    """
    for value in optimizer.state.get(param, {}).values():
        if isinstance(value, Tensor) and value.shape == param.shape:
            value.index_fill_(dim, index, 0.0)
