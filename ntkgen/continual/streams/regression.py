"""Slowly changing regression: a fixed function of binary inputs. Some inputs change slowly (Dohare et al. 2024).

The inputs are slow bits, then bits that are drawn anew for each sample, then a constant one. Every few thousand samples
one slow bit is flipped, or all of them are drawn anew. A small network must track the part of the function that it sees
at the time. The stream never ends, and each sample is a function of the seed and its position.

References:
    Dohare, Sutton, Mahmood (2021), arXiv:2108.06325, where it is called the bit-flipping problem; Dohare et al. (2024),
    Loss of plasticity in deep continual learning, Nature 632, Methods and Extended Data Fig. 2.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.continual.chance import generator_of
from ntkgen.errors import InputError, UnknownNameError

FloatArray = npt.NDArray[np.float32]
BitArray = npt.NDArray[np.uint8]

CHANGES = ("flip-one", "redraw")
THRESHOLDS = ("counted", "published")
# Samples whose fast bits one generator draws.
BLOCK = 1000


@dataclass(frozen=True)
class RegressionStreamSettings:
    """Settings of slowly changing regression.

    Attributes:
        num_inputs: Number m of bits of an input, without the constant one.
        slow_bits: Number of bits that change slowly.
        period: Number of samples between two changes of the slow bits.
        change: ``flip-one``: a random slow bit is flipped; ``redraw``: all slow bits are drawn anew.
        target_units: Number of linear threshold units of the target function.
        agreement: The part β of the inputs that must agree with the weights of a target unit before it is 1.
        thresholds: ``counted``: the threshold of a target unit is τ = β (m + 1) − S, where S counts its negative
            weights, that of the constant input included; ``published``: S has the other sign for the weight b of the
            constant input, as in the published code, S = (m − Σ w + b) / 2. Units with b = −1 are then almost always 0.
    """

    num_inputs: int = 20
    slow_bits: int = 15
    period: int = 10_000
    change: str = "flip-one"
    target_units: int = 100
    agreement: float = 0.7
    thresholds: str = "counted"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: If there are more slow bits than inputs, or β is no part.
            UnknownNameError: If a name is unknown.
        """
        if not 0 <= self.slow_bits <= self.num_inputs or not 0 < self.agreement < 1:
            raise InputError(
                f"There is no such stream: found `slow_bits` {self.slow_bits} of `num_inputs` {self.num_inputs}, and "
                f"`agreement` {self.agreement:g}; expected at most as many slow bits as inputs, and a part between 0 "
                "and 1. Is a percentage given? Divide it by 100, or choose fewer slow bits."
            )
        for name, known in (("change", CHANGES), ("thresholds", THRESHOLDS)):
            if getattr(self, name) not in known:
                raise UnknownNameError(f"`{name}`", getattr(self, name), known)


class SlowRegression:
    """The stream of a seed: a target function, and inputs whose slow bits change.

    The target is y = c₀ + Σ_i c_i [w_i · x > τ_i], where all weights w and c are ±1. With counted thresholds, a unit is
    1 if more than the part β of its m + 1 inputs agree with its weights: 1 agrees with a weight of 1, and 0 with −1.

    Args:
        settings: The settings.
        seed: The seed of the run.
    """

    def __init__(self, settings: RegressionStreamSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        rng = generator_of(seed, "target")
        self.incoming = _signs(rng, (settings.num_inputs + 1, settings.target_units))  # the last are of the constant
        self.outgoing = _signs(rng, (settings.target_units,))
        self.offset = _signs(rng, (1,))  # c₀
        self.thresholds = thresholds(self.incoming, settings)
        self._slow_bits = [generator_of(seed, "shift").integers(0, 2, settings.slow_bits, dtype=np.uint8)]

    def samples(self, start: int, stop: int) -> tuple[FloatArray, FloatArray]:  # (samples, m + 1), (samples,)
        """Compute inputs and targets of the samples from ``start`` to before ``stop``."""
        inputs = self.inputs(start, stop)
        return inputs, self.targets(inputs)

    def inputs(self, start: int, stop: int) -> FloatArray:  # (samples, m + 1)
        """Compute the inputs of the samples from ``start`` to before ``stop``."""
        slow = self.settings.slow_bits
        found = np.ones((stop - start, self.settings.num_inputs + 1), np.float32)
        changes = np.arange(start, stop) // self.settings.period
        found[:, :slow] = np.array([self.slow_bits(change) for change in range(changes[0], changes[-1] + 1)])[
            changes - changes[0]
        ]
        found[:, slow:-1] = self._fast_bits(start, stop)
        return found

    def targets(self, inputs: FloatArray) -> FloatArray:  # (samples, m + 1) -> (samples,)
        """Compute the targets of some inputs. All sums are of a few ±1, so they are exact in any order."""
        is_on = (inputs @ self.incoming > self.thresholds).astype(np.float32)
        return is_on @ self.outgoing + self.offset

    def slow_bits(self, change: int) -> BitArray:  # (slow bits,)
        """Return the slow bits after a number of changes."""
        while len(self._slow_bits) <= change:
            self._slow_bits.append(self._changed(self._slow_bits[-1], len(self._slow_bits)))
        return self._slow_bits[change]

    def _changed(self, bits: BitArray, change: int) -> BitArray:
        rng = generator_of(self.seed, "shift", change)
        if self.settings.change == "redraw" or not len(bits):
            return rng.integers(0, 2, len(bits), dtype=np.uint8)
        changed = bits.copy()
        changed[rng.integers(len(bits))] ^= 1
        return changed

    def _fast_bits(self, start: int, stop: int) -> BitArray:
        """Draw whole blocks, and keep the part that is asked for."""
        first, last = start // BLOCK, (stop - 1) // BLOCK
        shape = (BLOCK, self.settings.num_inputs - self.settings.slow_bits)
        blocks = [
            generator_of(self.seed, "batches", block).integers(0, 2, shape, dtype=np.uint8)
            for block in range(first, last + 1)
        ]
        return np.concatenate(blocks)[start - first * BLOCK : stop - first * BLOCK]


def thresholds(incoming: FloatArray, settings: RegressionStreamSettings) -> FloatArray:  # (m + 1, units) -> (units,)
    """Compute the threshold τ of each target unit.

    >>> weights = np.array([[1, -1], [-1, -1], [1, -1]], np.float32)  # two inputs and the constant, two units
    >>> found = [thresholds(weights, RegressionStreamSettings(2, 1, thresholds=name)) for name in THRESHOLDS]
    >>> np.array(found, float).round(3).tolist()
    [[1.1, -0.9], [0.6, 0.6]]
    """
    of_bits, of_constant = incoming[:-1], incoming[-1]
    num_negative = (len(of_bits) - of_bits.sum(0) + of_constant) / 2
    if settings.thresholds == "counted":
        num_negative = (incoming < 0).sum(0)
    return np.asarray(settings.agreement * len(incoming) - num_negative, np.float32)


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    return (2 * rng.integers(0, 2, shape) - 1).astype(np.float32)
