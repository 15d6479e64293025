"""The settings of a run of slowly changing regression."""

from dataclasses import dataclass
from typing import ClassVar

from ntkgen.continual.settings import (
    Settings,
    freeze_lists,
    require_each_once,
    require_known_names,
    require_numbers,
)
from ntkgen.continual.slow_regression.activations import ACTIVATIONS
from ntkgen.continual.streams.regression import RegressionStreamSettings
from ntkgen.errors import InputError, UnknownNameError

BASE, L2, PERTURB, REPLACE = "base", "l2", "shrink-and-perturb", "continual-backprop"
ALGORITHMS = (BASE, L2, PERTURB, REPLACE)
OPTIMIZERS = ("sgd", "adam")
# Settings that are one of a few names.
CHOICES = {"activation": tuple(ACTIVATIONS), "optimizer": OPTIMIZERS}


@dataclass(frozen=True)
class RegressionSettings(Settings):
    """All settings of a run, with their defaults. One run has networks of several seeds and algorithms.

    Attributes:
        algorithms: ``base``: backpropagation alone; ``l2``: with weight decay; ``shrink-and-perturb``: with weight
            decay and noise; ``continual-backprop``: units of little use are replaced.
        seeds: The seeds. Each has a target function and inputs of its own. Algorithms share them, and the first
            parameters.
        num_samples: Number of samples. Each is seen once, in a batch of its own.
        bin_size: Number of samples over which errors are averaged.
        num_inputs: Number of bits of an input, without the constant one.
        slow_bits: Number of bits that change slowly.
        period: Number of samples between two changes of the slow bits.
        change: ``flip-one``: a random slow bit is flipped; ``redraw``: all slow bits are drawn anew.
        target_units: Number of linear threshold units of the target function.
        agreement: The part of the inputs that must agree with the weights of a target unit before it is 1.
        thresholds: ``counted`` or ``published``; see `RegressionStreamSettings`.
        units: Number of hidden units.
        activation: Activation of the hidden units.
        optimizer: ``sgd`` or ``adam``.
        learning_rate: Learning rate.
        weight_decay: Weight λ of the penalty λ |w|² / 2 of ``l2`` and ``shrink-and-perturb``. It is a part of the
            gradient, also for ``adam``.
        noise_std: Standard deviation of what ``shrink-and-perturb`` adds to every parameter after each step.
        replacement_rate: The part of the mature units that ``continual-backprop`` replaces in each step.
        maturity: Number of steps for which a new unit is not replaced.
        utility_decay: Decay η of the running averages of activation and utility.
        reset_unit_optimizer: Whether ``adam`` forgets what it has averaged for the weights of a unit that is replaced.
    """

    subject: ClassVar[str] = "slowly changing regression"

    algorithms: tuple[str, ...] = ALGORITHMS
    seeds: tuple[int, ...] = tuple(range(10))
    num_samples: int = 1_000_000
    bin_size: int = 20_000
    num_inputs: int = RegressionStreamSettings.num_inputs
    slow_bits: int = RegressionStreamSettings.slow_bits
    period: int = RegressionStreamSettings.period
    change: str = RegressionStreamSettings.change
    target_units: int = RegressionStreamSettings.target_units
    agreement: float = RegressionStreamSettings.agreement
    thresholds: str = RegressionStreamSettings.thresholds
    units: int = 5
    activation: str = "relu"
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 1e-3
    noise_std: float = 1e-3
    replacement_rate: float = 1e-4
    maturity: int = 100
    utility_decay: float = 0.99
    reset_unit_optimizer: bool = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: If a number is outside of its range, or something occurs twice.
            UnknownNameError: If a name is unknown.
        """
        freeze_lists(self)
        positive = ("num_samples", "bin_size", "num_inputs", "period", "target_units", "units", "learning_rate")
        not_negative = ("slow_bits", "weight_decay", "noise_std", "replacement_rate", "maturity", "utility_decay")
        require_numbers(self, positive, not_negative)
        if negative := [seed for seed in self.seeds if seed < 0]:
            raise InputError(f"`seeds` has {negative[0]}: expected numbers from 0 on. Is the sign wrong? Correct it.")
        require_known_names(self, CHOICES)
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise UnknownNameError("`algorithms`", name, ALGORITHMS)
        self._require_parts()
        self._require_bins()
        for name in ("algorithms", "seeds"):
            require_each_once(name, getattr(self, name), "Each network has a column of its own.")
        _ = self.stream

    @property
    def stream(self) -> RegressionStreamSettings:
        """The settings of the stream."""
        return self.part(RegressionStreamSettings)

    @property
    def num_bins(self) -> int:
        """Number of bins."""
        return self.num_samples // self.bin_size

    def _require_parts(self) -> None:
        """Require that a part is below 1.

        Raises:
            InputError: If one is not.
        """
        for name in ("replacement_rate", "utility_decay"):
            if getattr(self, name) >= 1:
                raise InputError(
                    f"There is no such run: found `{name}` {getattr(self, name):g}, expected a part from 0 to less "
                    "than 1. Is a percentage given? Divide it by 100."
                )

    def _require_bins(self) -> None:
        """Require that all bins are full.

        Raises:
            InputError: If the last one is not.
        """
        if self.num_samples % self.bin_size:
            raise InputError(
                f"The last bin would not be full: expected `num_samples` to be a multiple of `bin_size`, found "
                f"{self.num_samples} samples in bins of {self.bin_size}. Was one of them changed alone? Choose "
                f"{max(1, self.num_bins) * self.bin_size} samples, or other bins."
            )
