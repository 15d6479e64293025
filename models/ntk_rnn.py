"""A recurrent network with erf in NTK parametrisation (Alemohammad et al. 2021, arXiv:2006.10246).

The flattened image is cut into parts of equal length, one for each time step,

    h_t = erf(U x_t / √d + W h_{t−1} / √w + b),    f = V h_T / √w,

with all weights from N(0, 1), b = 0 and h_0 = 0. With one time step, as in Liu et al. (2025), arXiv:2507.16039, it is
a network of one hidden layer, and W has no effect.
"""

import math

import torch
from torch import Tensor, nn

PAPER = "Alemohammad, Wang, Balestriero, Baraniuk (2021), ICLR, arXiv:2006.10246"

_INPUTS = 3 * 32 * 32


class NTKRNN(nn.Module):
    """The network; activations are scaled, not weights, so that every layer is a plain `nn.Linear`."""

    def __init__(self, inputs: int, width: int, outputs: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.input = nn.Linear(inputs // num_steps, width)
        self.state = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, outputs, bias=False)
        for layer in (self.input, self.state, self.head):
            nn.init.normal_(layer.weight)
        nn.init.zeros_(self.input.bias)

    def forward(
        self,
        x: Tensor,  # (samples, …), inputs numbers each
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs after the last time step."""
        parts = x.flatten(1).unflatten(1, (self.num_steps, -1)) / math.sqrt(self.input.in_features)
        root = math.sqrt(self.head.in_features)
        h = torch.erf(self.input(parts[:, 0]))
        for step in range(1, self.num_steps):
            h = torch.erf(self.input(parts[:, step]) + self.state(h / root))
        out: Tensor = self.head(h / root)
        return out


def ntk_rnn(num_classes: int = 10, width: int = 100, num_steps: int = 1, inputs: int = _INPUTS) -> nn.Module:
    """Build the network with ``width`` units; ``num_steps`` must divide the number of inputs."""
    return NTKRNN(inputs, width, num_classes, num_steps)
