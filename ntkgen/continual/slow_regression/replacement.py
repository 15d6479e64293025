"""Continual backpropagation: hidden units of little use are replaced by new ones, a few at a time."""

import math

import numpy as np
import numpy.typing as npt

from ntkgen.continual.chance import generator_of
from ntkgen.continual.slow_regression.network import Network
from ntkgen.continual.slow_regression.optimizers import Optimizer, State
from ntkgen.continual.slow_regression.settings import RegressionSettings

IntArray = npt.NDArray[np.int64]


class Replacement:
    """Continual backpropagation on some rows of a network (Dohare et al. 2024, Methods, eq. 1).

    The utility of a unit with activation h and outgoing weight v is the running average of |h v|, and ĥ is that of h:
    u ← η u + (1 − η) |h v|, both divided by 1 − ηᵃ at age a. A unit of more than ``maturity`` steps may be replaced.
    ⌊ρ N⌋ units are replaced in all, where N adds up the number of such units over all steps; those of least utility
    come first. The incoming weights of a new unit are drawn as at the beginning, with a bias of 0. v ĥ is added to the
    bias of the output, and v becomes 0.

    Args:
        network: The network.
        optimizer: Its optimizer.
        rows: The rows with continual backpropagation.
        settings: The settings, with the seed of each of these rows.
    """

    def __init__(self, network: Network, optimizer: Optimizer, rows: slice, settings: RegressionSettings) -> None:
        self.network = network
        self.optimizer = optimizer
        self.settings = settings
        self.rows = rows
        shape = (network.units, len(settings.seeds))
        self.averages = np.zeros((2, *shape), np.float32)  # of |h v|, and of h
        self.age = np.zeros(shape, np.int64)
        self.mature_steps = np.zeros(len(settings.seeds), np.int64)  # N
        self.replaced = np.zeros(len(settings.seeds), np.int64)
        self._hidden = network.hidden[:-1, rows]
        self._outgoing = network.outgoing[:-1, rows]
        self._now = np.zeros_like(self.averages)

    def after_step(self) -> None:
        """Update the averages after a step of the optimizer, and replace units."""
        decay, now = self.settings.utility_decay, self._now
        np.multiply(self._hidden, self._outgoing, out=now[0])
        np.absolute(now[0], out=now[0])
        now[1] = self._hidden
        np.multiply(now, 1 - decay, out=now)
        np.multiply(self.averages, decay, out=self.averages)
        np.add(self.averages, now, out=self.averages)
        self.age += 1
        self.mature_steps += np.add.reduce(self.age > self.settings.maturity, axis=0)
        due = self.mature_steps * self.settings.replacement_rate - self.replaced
        if due.max() >= 1:
            for index in np.flatnonzero(due >= 1):
                self._replace(int(index), math.floor(due[index]))

    def _replace(self, index: int, count: int) -> None:
        """Replace the mature units of least utility of one row."""
        age = self.age[:, index]
        mature = np.flatnonzero(age > self.settings.maturity)
        utility, activation = self.averages[:, :, index] / (1 - self.settings.utility_decay**age)
        for unit in mature[np.argsort(utility[mature], kind="stable")[:count]]:
            self.replaced[index] += 1
            self._renew(int(unit), index, float(activation[unit]))

    def _renew(self, unit: int, index: int, activation: float) -> None:
        network, row = self.network, self.rows.start + index
        rng = generator_of(self.settings.seeds[index], "init", int(self.replaced[index]))
        network.incoming[:, unit, row] = network.draw_incoming(rng)
        network.outgoing[-1, row] += network.outgoing[unit, row] * np.float32(activation)
        network.outgoing[unit, row] = 0
        self.averages[:, unit, index] = 0
        self.age[unit, index] = 0
        if self.settings.reset_unit_optimizer:
            self.optimizer.forget(unit, row)

    def state(self) -> State:
        """Return the arrays that are changed. They are not copied."""
        names = ("averages", "age", "mature_steps", "replaced")
        return {name: getattr(self, name) for name in names}
