"""Optimizers of a stack of networks, on all parameters at once: SGD and Adam."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from ntkgen.continual.slow_regression.network import Network

# Decays of the two averages of Adam, and what keeps its denominator from 0, as in torch.
BETAS, EPSILON = (0.9, 0.999), 1e-8

State = dict[str, npt.NDArray[Any]]


class Optimizer(ABC):
    """Takes steps along the gradient of a network.

    Args:
        network: The network.
        rate: The learning rate.
    """

    def __init__(self, network: Network, rate: float) -> None:
        self.network = network
        self.rate = rate

    @abstractmethod
    def step(self) -> None:
        """Take a step. It may overwrite the gradient."""

    def forget(self, unit: int, row: int) -> None:  # noqa: ARG002 - by default there is nothing to forget
        """Forget what has been averaged for the weights of a hidden unit."""
        return

    def state(self) -> State:
        """Return the arrays that the optimizer changes. They are not copied."""
        return {}


class Sgd(Optimizer):
    """Gradient descent, w ← w − α g."""

    def step(self) -> None:
        """Take a step."""
        network = self.network
        np.multiply(network.gradient, self.rate, out=network.gradient)
        np.subtract(network.parameters, network.gradient, out=network.parameters)


class Adam(Optimizer):
    """Adam (Kingma, Ba 2015, arXiv:1412.6980), with a number of steps for each hidden unit.

    w ← w − α m̂ / (√ŝ + ε), where m̂ = m / (1 − β₁ᵗ) and ŝ = s / (1 − β₂ᵗ) are the averages of g and g² over the t steps
    since the unit was made. The weights of W and v of a unit have its t.
    """

    def __init__(self, network: Network, rate: float) -> None:
        super().__init__(network, rate)
        self.mean = np.zeros_like(network.parameters)
        self.square = np.zeros_like(network.parameters)
        # 1 − β₁ᵗ and 1 − β₂ᵗ; the last unit is the constant one, whose weight is the bias of the output
        self.corrections = np.zeros((2, *network.outgoing.shape))
        self._betas = np.array(BETAS).reshape(2, 1, 1)
        self._step = np.zeros_like(network.parameters)
        self._steps = network.parts(self._step)

    def step(self) -> None:
        """Take a step."""
        g, step = self.network.gradient, self._step
        first, second = BETAS
        self.corrections *= self._betas
        self.corrections += 1 - self._betas
        np.multiply(self.mean, first, out=self.mean)
        np.multiply(g, 1 - first, out=step)
        np.add(self.mean, step, out=self.mean)
        np.multiply(self.square, second, out=self.square)
        np.multiply(g, g, out=g)
        np.multiply(g, 1 - second, out=g)
        np.add(self.square, g, out=self.square)
        # α m̂ / (√ŝ + ε) = (α c / (1 − β₁ᵗ)) m / (√s + ε c), where c = √(1 − β₂ᵗ)
        scale = np.sqrt(self.corrections[1])
        np.sqrt(self.square, out=step)
        self._on_each_unit(np.add, EPSILON * scale)
        np.divide(self.mean, step, out=step)
        self._on_each_unit(np.multiply, self.rate * scale / self.corrections[0])
        np.subtract(self.network.parameters, step, out=self.network.parameters)

    def _on_each_unit(self, combine: np.ufunc, values: npt.NDArray[np.float64]) -> None:  # (units + 1, rows)
        """Combine what belongs to each parameter with a number of its unit."""
        rounded = values.astype(np.float32)
        of_incoming, of_outgoing = self._steps
        combine(of_incoming, rounded[:-1], out=of_incoming)
        combine(of_outgoing, rounded, out=of_outgoing)

    def forget(self, unit: int, row: int) -> None:
        """Forget what has been averaged for the weights of a hidden unit."""
        for average in (self.mean, self.square):
            of_incoming, of_outgoing = self.network.parts(average)
            of_incoming[:, unit, row] = 0
            of_outgoing[unit, row] = 0
        self.corrections[:, unit, row] = 0

    def state(self) -> State:
        """Return the arrays that the optimizer changes. They are not copied."""
        return {"mean": self.mean, "square": self.square, "corrections": self.corrections}


def make_optimizer(name: str, network: Network, rate: float) -> Optimizer:
    """Make the optimizer of a name, ``sgd`` or ``adam``."""
    return {"sgd": Sgd, "adam": Adam}[name](network, rate)
