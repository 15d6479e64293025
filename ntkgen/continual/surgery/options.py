"""The options of the surgeries."""

from dataclasses import dataclass

from ntkgen.errors import InputError, UnknownNameError

# Names of the surgeries, in the order in which they act after a step.
SURGERY_NAMES = ("continual-backprop", "redo", "perturb", "reset-head", "reset-network")
# Options that are one of a few names.
SURGERY_CHOICES = {
    "unit_utility": (
        "contribution",
        "weight",
        "adaptation",
        "zero-contribution",
        "adaptable-contribution",
        "random",
    ),
    "activation_mean": ("ema", "sum"),
    "replacement_count": ("eligible", "all"),
    "replacement_draw": ("accumulate", "bernoulli"),
    "unit_init": ("kaiming", "xavier", "lecun", "default"),
    "unit_distribution": ("normal", "uniform"),
}
# The utilities that the published code computes from a sum of activations.
SUMMED_UTILITIES = ("contribution", "weight")


@dataclass(frozen=True)
class SurgeryOptions:
    """Options of the surgeries. Each option is used by some of the surgeries.

    Attributes:
        replacement_rate: Fraction ρ of the units of a layer that continual backpropagation replaces at each step.
        replacement_count: Whether ρ is the fraction of the ``eligible`` units, as in the paper, or of ``all`` units of
            the layer.
        replacement_draw: How a fraction of a unit becomes a whole number: ``accumulate``: fractions add up until they
            are one; ``bernoulli``: the fraction is the probability of one more unit.
        maturity: A unit is eligible for replacement if its age in steps is more than this.
        unit_utility: Utility of a unit: ``contribution``, ``weight``, ``adaptation``, ``zero-contribution``,
            ``adaptable-contribution``, or ``random``. Units with the smallest one are replaced. Formulas: `UTILITIES`.
        utility_decay: Decay rate η of the running means, per step.
        activation_mean: ``ema``: the utility is a running mean, without the bias of its beginning; ``sum``: it is
            computed from the sum of all mean activations since the beginning of the run, which a replacement does not
            reset. For ``contribution`` and ``weight`` alone.
        transfer_bias: Whether what a replaced unit has contributed in the mean is added to the bias of the next layer.
            Only where this layer has a bias, and where neither of the two layers has batch norm.
        unit_init: Size of the new incoming weights: ``kaiming``, ``xavier``, ``lecun``, or ``default`` for PyTorch's.
        unit_distribution: Distribution of the new incoming weights: ``normal`` or ``uniform``.
        reset_unit_optimizer: Whether the optimizer's state of the weights of a replaced unit becomes zero.
        redo_period: Steps between two resets of dormant units by ReDo.
        redo_threshold: ReDo resets units whose mean activation is at most this fraction of the mean of their layer.
        noise_std: Standard deviation of the noise that ``perturb`` adds to every parameter after each step.
        full_reset: Whether the reset of the head or of the network also resets the statistics of batch norm, what the
            optimizer keeps of the parameters, and, if it is the network, what other surgeries keep of its units.
    """

    replacement_rate: float = 1e-4
    replacement_count: str = "eligible"
    replacement_draw: str = "accumulate"
    maturity: int = 100
    unit_utility: str = "contribution"
    utility_decay: float = 0.99
    activation_mean: str = "ema"
    transfer_bias: bool = True
    unit_init: str = "kaiming"
    unit_distribution: str = "normal"
    reset_unit_optimizer: bool = True
    redo_period: int = 1000
    redo_threshold: float = 0.1
    noise_std: float = 1e-5
    full_reset: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: If a number is out of range, or if there is no such utility of a sum of activations.
            UnknownNameError: If a name is unknown.
        """
        for name, known in SURGERY_CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(f"`{name}`", getattr(self, name), known)
        ranges = {
            "replacement_rate": ("from 0 to 1", 0 <= self.replacement_rate <= 1),
            "maturity": ("0 or more", self.maturity >= 0),
            "utility_decay": ("from 0 to less than 1", 0 <= self.utility_decay < 1),
            "redo_period": ("1 or more", self.redo_period >= 1),
            "redo_threshold": ("0 or more", self.redo_threshold >= 0),
            "noise_std": ("0 or more", self.noise_std >= 0),
        }
        for name, (expected, is_right) in ranges.items():
            if not is_right:
                raise InputError(
                    f"There is no such surgery: found `{name}` {getattr(self, name):g}, expected a number {expected}. "
                    "Is a sign wrong, or was a percentage given? Correct it."
                )
        if self.activation_mean == "sum" and self.unit_utility not in SUMMED_UTILITIES:
            raise InputError(
                f"There is no utility {self.unit_utility} of a sum of activations: expected one of "
                f"{', '.join(SUMMED_UTILITIES)} with `activation_mean` sum. Was the published code meant, which has "
                "these alone? Use one of them, or the `activation_mean` ema."
            )
