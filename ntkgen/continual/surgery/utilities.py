"""The utility of hidden units in one step: formulas of their weights and activations."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ntkgen.continual.surgery.connections import Connections


class Observation:
    """What is seen of all hidden units in one step, each (units,), layer after layer.

    Only what is asked for is computed: a few operations per layer.

    Args:
        layers: The connections of the layers.
        features: The activations by the name of the activation module.
        dtype: The dtype of the results.
    """

    def __init__(self, layers: Sequence[Connections], features: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._layers = layers
        self._features = features
        self._dtype = dtype

    @cached_property
    def outgoing(self) -> Tensor:
        """w̄_out, the mean of the absolute outgoing weights."""
        return torch.cat([layer.outgoing_magnitude() for layer in self._layers]).to(self._dtype)

    @cached_property
    def incoming(self) -> Tensor:
        """w̄_in, the mean of the absolute incoming weights, and not zero."""
        found = torch.cat([layer.incoming_magnitude() for layer in self._layers]).to(self._dtype)
        return found.clamp_min(torch.finfo(self._dtype).tiny)

    @cached_property
    def magnitude(self) -> Tensor:
        """The mean of |h| over samples and positions."""
        return self._mean(lambda h, _: h.abs())

    @cached_property
    def mean(self) -> Tensor:
        """The mean of h over samples and positions."""
        return self._mean(lambda h, _: h)

    def deviation(
        self,
        center: Tensor,  # (units,)
    ) -> Tensor:  # (units,)
        """Compute the mean of |h − center| over samples and positions."""
        parts = center.split([layer.num_units for layer in self._layers])
        return self._mean(lambda h, k: (h - parts[k][:, None]).abs())

    def _mean(self, function: Callable[[Tensor, int], Tensor]) -> Tensor:
        found = (layer.by_unit(self._features[layer.activation]) for layer in self._layers)
        return torch.cat([function(h, k).mean((0, 2), dtype=self._dtype) for k, h in enumerate(found)])


Utility = Callable[[Observation, Tensor], Tensor]

# The utilities by name: of an observation, and of ĥ, the running mean of the activations of each unit. A `random` one
# is drawn when units are chosen.
UTILITIES: dict[str, Utility] = {
    "contribution": lambda seen, _: seen.outgoing * seen.magnitude,  # w̄_out · mean |h|
    "weight": lambda seen, _: seen.outgoing,  # w̄_out
    "adaptation": lambda seen, _: 1 / seen.incoming,  # 1 / w̄_in
    "zero-contribution": lambda seen, center: seen.outgoing * seen.deviation(center),  # w̄_out · mean |h − ĥ|
    "adaptable-contribution": lambda seen, center: seen.outgoing * seen.deviation(center) / seen.incoming,
}
# Those that need ĥ.
CENTERED = ("zero-contribution", "adaptable-contribution")
