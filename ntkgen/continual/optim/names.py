"""The streaming learners by name, with their options, defaults and sources. This module needs no torch.

The names are those of two published programs: ``mohmdelsayed/upgd`` (revision b75e90a), and
``yumikim381/upgd-dl-project`` (revision 27eadfc). A few more names are of this package: ``upgd``, with every option of
`UPGD`, and ``adaptive_upgd``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ntkgen.errors import InputError, UnknownNameError

Value = float | str | bool

UPGD_PAPER = "Elsayed, Mahmood (2024), ICLR, arXiv:2404.00781"
UPGD_CODE = "mohmdelsayed/upgd"
NOISE_CODE = "yumikim381/upgd-dl-project"
EWC_PAPERS = "Kirkpatrick et al. (2017), arXiv:1612.00796; online: Schwarz et al. (2018), arXiv:1805.06370"


@dataclass(frozen=True)
class Option:
    """An option of learners.

    Attributes:
        meaning: What it is, in a few words.
        kind: The type of its values.
        choices: The values of a word.
        least: Smallest value of a number.
        below: A number must be less than this.
        most: Largest value of a number.
    """

    meaning: str
    kind: type[float] | type[str] | type[bool] = float
    choices: tuple[str, ...] = ()
    least: float = 0.0
    below: float = math.inf
    most: float = math.inf

    @property
    def expected(self) -> str:
        """Say in words which values there are.

        >>> OPTIONS["lr"].expected, OPTIONS["beta_utility"].expected, OPTIONS["mixture"].expected
        ('a number of 0 or more', 'a number from 0 to less than 1', 'a number from 0 to 1')
        """
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if math.isfinite(self.below):
            return f"a number from {self.least:g} to less than {self.below:g}"
        return f"a number from {self.least:g} to {self.most:g}" if math.isfinite(self.most) else "a number of 0 or more"

    def holds(self, value: float) -> bool:
        """Say whether a number is in the range."""
        return self.least <= value <= self.most and value < self.below


def _decay(of: str) -> Option:
    return Option(f"decay rate β of the running mean of {of}, per step", below=1.0)


# Every option of the learners. A name has the same meaning in all of them.
OPTIONS: dict[str, Option] = {
    "lr": Option("learning rate α"),
    "weight_decay": Option("weight decay λ"),
    "decay": Option("weight decay λ of shrink and perturb"),
    "sigma": Option("standard deviation σ of the noise"),
    "beta_utility": _decay("utilities"),
    "beta_weight": _decay("weights"),
    "beta_fisher": _decay("squared gradients, or of their absolute values"),
    "beta_importance": _decay("importances"),
    "beta1": _decay("gradients"),
    "beta2": _decay("squared gradients in Adam"),
    "eps": Option("number ε that keeps a denominator from 0"),
    "kappa": Option("weight κ of the penalty"),
    "step_scale": Option("factor of the step along gradient and noise, but not of the weight decay"),
    "mixture": Option("share of the mean over a kernel in the utility of its weights", most=1.0),
    "largest": Option("utility that the global normalisation divides by", str, ("corrected", "raw")),
    "order": Option("order of the utility in the weight", str, ("first", "second")),
    "normalisation": Option("whether utilities are divided by the largest one or row by row", str, ("global", "local")),
    "protecting": Option("whether useful weights are protected from the gradient too", bool),
    "noise_scale": Option("what multiplies the noise of each tensor", str, ("none", "weight", "grad", "ratio")),
    "gate_noise": Option("whether useful weights are protected from the noise", bool),
    "utility_shape": Option(
        "which weights of a convolution share a utility", str, ("element", "kernel", "column", "convex")
    ),
    "published": Option("whether deviations of the published code are reproduced", bool),
}


@dataclass(frozen=True)
class LearnerNames:
    """A learner without its code.

    Attributes:
        name: Its name.
        optimizer: Name of the class in `ntkgen.continual.optim`.
        defaults: Its options with their defaults.
        fixed: Arguments of the class that the name stands for.
        quirks: What ``compat`` changes, to the behaviour of the published code.
        is_second_order: Whether its steps need the diagonal of the Hessian.
        has_gates: Whether it needs a network with gates; see `gated`.
        source: Where it is from.
    """

    name: str
    optimizer: str
    defaults: Mapping[str, Value]
    fixed: Mapping[str, Value] = field(default_factory=dict)
    quirks: Mapping[str, Value] = field(default_factory=dict)
    is_second_order: bool = False
    has_gates: bool = False
    source: str = UPGD_CODE

    @property
    def options(self) -> dict[str, Option]:
        """The options by name."""
        return {name: OPTIONS[name] for name in self.defaults}

    def quirks_in_words(self, options: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
        """Say what ``compat`` changes, without what the options replace.

        >>> NAMES["entire_kernel"].quirks_in_words({"step_scale": 1.0}), NAMES["pgd"].quirks_in_words()
        (['largest raw, not corrected'], [])
        >>> NAMES["si"].quirks_in_words()
        ['importances as in the published code']
        """
        return [
            f"{name} {_short(value)}, not {_short(self.defaults[name])}"
            if name in self.defaults
            else "importances as in the published code"
            for name, value in self.quirks.items()
            if value != self.defaults.get(name) and options.get(name, value) == value
        ]


def checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options of a learner. Words are read as numbers where a number is meant.

    Args:
        name: The learner.
        options: Values by name. A value that is neither a word nor a number, such as a tensor, is not checked.

    Raises:
        UnknownNameError: If there is no such learner, no such option, or no such choice.
        InputError: If a value is of the wrong kind or out of range.

    >>> checked_options("upgd_fo_global", {"lr": "1e-2", "sigma": 0.001})
    {'lr': 0.01, 'sigma': 0.001}
    """
    if name not in NAMES:
        raise UnknownNameError("learner", name, NAMES)
    known = NAMES[name].options
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of {name}", option, known)
    return {option: checked_value(option, value) for option, value in options.items()}


def checked_value(name: str, value: Any) -> Any:
    """Check the value of an option of `OPTIONS`; see `checked_options`.

    Raises:
        UnknownNameError: If there is no such choice.
        InputError: If it is of the wrong kind or out of range.
    """
    option = OPTIONS[name]
    if option.choices:
        if value not in option.choices:
            raise UnknownNameError(f"`{name}`", value, option.choices)
        return value
    found: float | bool | None
    if option.kind is bool:
        found = {"true": True, "false": False}.get(str(value).lower())
    elif isinstance(value, str | float | int) and not isinstance(value, bool):
        found = _number(value)
        found = found if found is not None and option.holds(found) else None
    else:
        return value if not isinstance(value, bool) else _refuse(name, value)
    return found if found is not None else _refuse(name, value)


def _short(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _refuse(name: str, value: Any) -> Any:
    raise InputError(
        f"`{name}` has a wrong value: expected {OPTIONS[name].expected}, found {value!r}. Is a sign or a unit wrong? "
        "Give another value."
    )


# the table ------------------------------------------------------------------------------------------------------------

# The settings of the published statistics on CIFAR-10 with permuted labels, where there are any.
_UPGD: dict[str, Value] = {"lr": 0.01, "beta_utility": 0.999, "sigma": 0.001, "weight_decay": 0.0, "step_scale": 1.0}
_CONSOLIDATION: dict[str, Value] = {"lr": 0.01, "beta_weight": 0.999}
_ADAM: dict[str, Value] = {"lr": 0.001, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
_RAW: dict[str, Value] = {"largest": "raw"}


def _weight_upgd() -> list[LearnerNames]:
    """The eight learners of weight UPGD."""
    made = []
    for protecting in (True, False):
        for order in ("first", "second"):
            for normalisation in ("local", "global"):
                is_global = normalisation == "global"
                made.append(
                    LearnerNames(
                        f"upgd_{'' if protecting else 'nonprotecting_'}{order[0]}o_{normalisation}",
                        "UPGD",
                        {**_UPGD, **({"largest": "corrected"} if is_global else {})},
                        {"order": order, "normalisation": normalisation, "protecting": protecting},
                        _RAW if is_global else {},
                        is_second_order=order == "second",
                        source=f"{UPGD_PAPER}; {UPGD_CODE}, weight_upgd",
                    )
                )
    return made


def _feature_upgd() -> list[LearnerNames]:
    """The eight learners of feature UPGD: as those of weight UPGD, for units."""
    return [
        LearnerNames(
            f"feature_{weight.name}",
            "FeatureUPGD",
            {name: value for name, value in weight.defaults.items() if name != "step_scale"},
            weight.fixed,
            weight.quirks,
            weight.is_second_order,
            has_gates=True,
            source=f"{UPGD_PAPER}; {UPGD_CODE}, feature_upgd",
        )
        for weight in _weight_upgd()
    ]


def _variant(name: str, step: float, *, mixture: float | None = None, **fixed: Value) -> LearnerNames:
    """Make a variant of first-order, global, protecting UPGD. The published code takes ``step`` times its step."""
    defaults = {**_UPGD, "largest": "corrected", **({} if mixture is None else {"mixture": mixture})}
    return LearnerNames(name, "UPGD", defaults, fixed, {**_RAW, "step_scale": step}, source=f"{NOISE_CODE}, {name}")


_ALL = [
    LearnerNames("sgd", "SGD", {"lr": 0.01, "weight_decay": 0.0}),
    LearnerNames(
        "sgd_with_hesscale",
        "SGD",
        {"lr": 0.01, "weight_decay": 0.0},
        is_second_order=True,
        source=f"{UPGD_CODE}; HesScale: Elsayed, Mahmood (2022), arXiv:2210.11639",
    ),
    LearnerNames("pgd", "PGD", {"lr": 0.01, "sigma": 0.005}, source=f"{UPGD_PAPER}; {UPGD_CODE}"),
    LearnerNames(
        "shrink_and_perturb",
        "ShrinkAndPerturb",
        {"lr": 0.01, "sigma": 0.005, "decay": 0.001},
        source=f"Ash, Adams (2020), arXiv:1910.08475; {UPGD_CODE}",
    ),
    LearnerNames("adam", "Adam", _ADAM, source="Kingma, Ba (2015), arXiv:1412.6980; Loshchilov, Hutter (2019), "
                 "arXiv:1711.05101"),
    LearnerNames(
        "ewc", "OnlineEWC", {**_CONSOLIDATION, "beta_fisher": 0.9999, "kappa": 10.0},
        source=f"{EWC_PAPERS}; {UPGD_CODE}",
    ),
    LearnerNames(
        "mas", "MAS", {**_CONSOLIDATION, "beta_fisher": 0.9999, "kappa": 10.0},
        source=f"Aljundi et al. (2018), arXiv:1711.09601; {UPGD_CODE}",
    ),
    LearnerNames(
        "si", "SI", {"lr": 0.001, "beta_weight": 0.999, "beta_importance": 0.9, "kappa": 1.0, "eps": 1e-3},
        quirks={"published": True}, source=f"Zenke, Poole, Ganguli (2017), arXiv:1703.04200; {UPGD_CODE}",
    ),
    LearnerNames(
        "rwalk", "RWalk", {**_CONSOLIDATION, "beta_importance": 0.999, "kappa": 0.1, "eps": 1e-3},
        quirks={"published": True}, source=f"Chaudhry et al. (2018), arXiv:1801.10112; {UPGD_CODE}",
    ),
    *_weight_upgd(),
    *_feature_upgd(),
    _variant("baseline", 1.0),
    _variant("weight_norm", 1.0, noise_scale="weight"),
    _variant("grad_norm", 1.0, noise_scale="grad"),
    _variant("ratio_norm", 1.0, noise_scale="ratio"),
    _variant("usgd", 1.0, noise_scale="ratio", gate_noise=False),
    # Its clipping threshold is twice the norm of the tensor itself, and therefore never reached.
    _variant("upgd_dynamicclippedgradient", 1.0, noise_scale="ratio"),
    _variant("entire_kernel", 2.0, utility_shape="kernel"),
    _variant("column_kernel", 2.0, utility_shape="column"),
    _variant("KernelConvexCombi", 2.0, mixture=0.2, utility_shape="convex"),
    LearnerNames(
        "upgd",
        "UPGD",
        {
            **_UPGD, "order": "first", "largest": "corrected", "normalisation": "global", "protecting": True,
            "noise_scale": "none", "gate_noise": True, "utility_shape": "element", "mixture": 0.2,
        },
        source=UPGD_PAPER,
    ),
    LearnerNames(
        "adaptive_upgd",
        "AdaptiveUPGD",
        {**_UPGD, "beta1": 0.9, "beta2": 0.999, "eps": 1e-5, "largest": "corrected"},
        quirks={**_RAW, "step_scale": 2.0},
        source=f"{UPGD_CODE}, AdaptiveUPGD",
    ),
]  # fmt: skip

NAMES: dict[str, LearnerNames] = {learner.name: learner for learner in _ALL}
"""The learners by name."""
