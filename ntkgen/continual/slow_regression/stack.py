"""Networks of several algorithms and seeds that learn side by side, one sample at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.continual.slow_regression.network import FloatArray, Network
from ntkgen.continual.slow_regression.optimizers import State, make_optimizer
from ntkgen.continual.slow_regression.perturbation import Perturbation
from ntkgen.continual.slow_regression.replacement import Replacement
from ntkgen.continual.slow_regression.settings import L2, PERTURB, REPLACE, RegressionSettings
from ntkgen.continual.streams.regression import SlowRegression


@dataclass(frozen=True, eq=False)
class Trace:
    """What happened while some samples were learnt.

    Attributes:
        errors: The error f(x) − y of each sample before its step, (samples, rows).
        slopes: The derivative of each hidden unit's activation, (samples, units, rows).
    """

    errors: FloatArray
    slopes: FloatArray


class Stack:
    """The networks of a run. The rows are those of the first algorithm, one per seed, then those of the next.

    A step of every network is a few calls of NumPy, so ten networks take hardly longer than one.
    """

    def __init__(self, settings: RegressionSettings) -> None:
        seeds, algorithms = settings.seeds, settings.algorithms
        self.settings = settings
        self.streams = [SlowRegression(settings.stream, seed) for seed in seeds]
        num_rows = len(algorithms) * len(seeds)
        self.network = Network(settings.num_inputs + 1, settings.units, settings.activation, num_rows)
        self.network.initialise(seeds * len(algorithms))
        self.optimizer = make_optimizer(settings.optimizer, self.network, settings.learning_rate)
        self.replacement: Replacement | None = None
        if REPLACE in algorithms:
            self.replacement = Replacement(self.network, self.optimizer, self.rows(REPLACE), settings)
        decays = [settings.weight_decay * (name in {L2, PERTURB}) for name in algorithms]
        self._decay = np.repeat(np.array(decays, np.float32), len(seeds)) if any(decays) else None
        self._penalty = np.empty_like(self.network.parameters)
        self.perturbation: Perturbation | None = None
        if PERTURB in algorithms:
            self.perturbation = Perturbation(self.network, self.rows(PERTURB), settings)

    def rows(self, algorithm: str) -> slice:
        """The rows of an algorithm."""
        count = len(self.settings.seeds)
        first = self.settings.algorithms.index(algorithm) * count
        return slice(first, first + count)

    def learn(self, start: int, stop: int) -> Trace:
        """Learn the samples from ``start`` to before ``stop``, all of one block of the stream."""
        network, replacement, perturbation = self.network, self.replacement, self.perturbation
        x, y = self._samples(start, stop)
        trace = Trace(np.empty_like(y), np.empty((len(y), *network.hidden[:-1].shape), np.float32))
        if perturbation is not None:
            perturbation.prepare(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is told so by its errors
            for step, sample in enumerate(zip(x, y, trace.errors, trace.slopes, strict=True)):
                network.differentiate(*sample)
                if self._decay is not None:
                    np.multiply(network.parameters, self._decay, out=self._penalty)
                    np.add(network.gradient, self._penalty, out=network.gradient)
                self.optimizer.step()
                if replacement is not None:
                    replacement.after_step()
                if perturbation is not None:
                    perturbation.after_step(step)
        return trace

    def _samples(self, start: int, stop: int) -> tuple[FloatArray, FloatArray]:  # (samples, inputs, 1, rows), …
        """Arrange the samples of all seeds as `Network.differentiate` reads them."""
        inputs, targets = zip(*(stream.samples(start, stop) for stream in self.streams), strict=True)
        copies = len(self.settings.algorithms)
        return np.tile(np.stack(inputs, -1)[:, :, None], copies), np.tile(np.stack(targets, -1), copies)

    def state(self) -> dict[str, State]:
        """Return the arrays that learning changes, by what they belong to. They are not copied."""
        found: dict[str, State] = {"model": {"parameters": self.network.parameters}}
        found["optimizer"] = self.optimizer.state()
        found["replacement"] = {} if self.replacement is None else self.replacement.state()
        return found

    def load_state(self, state: Mapping[str, Mapping[str, npt.NDArray[np.generic]]]) -> None:
        """Restore what `state` has returned."""
        for part, arrays in self.state().items():
            for name, values in arrays.items():
                values[...] = state[part][name]
