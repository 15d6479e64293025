"""The settings of a run that learns a stream, one sample at a time."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ntkgen.continual.configuration import METHOD_NAMES
from ntkgen.continual.optim.names import NAMES, OPTIONS, LearnerNames, checked_options
from ntkgen.continual.settings import Settings, freeze_lists, require_each_once, require_known_names, require_numbers
from ntkgen.continual.streaming.bins import KINDS, TASKS, bin_ends
from ntkgen.continual.streams.permuted import STREAMS, PermutedStreamSettings
from ntkgen.errors import InputError, UnknownNameError

# Other names of settings: those of their options. A file and a grid may use both.
OTHER_NAMES = {"lr": "learning_rate", "samples": "num_samples"}
# What a setting is called as an option of a learner, where the names differ.
OPTION_NAMES = {"learning_rate": "lr"}
# Settings that are options of learners. Several values of a number make several networks per seed.
LEARNER_SETTINGS = tuple(OTHER_NAMES.get(option, option) for option in OPTIONS if option != "published")
# Settings whose default depends on the stream.
STREAM_SETTINGS = ("samples_per_task", "compounding")
NORMALISATIONS = ("symmetric", "dataset", "none")
CHOICES = {"stream": STREAMS, "bins": KINDS, "normalise": NORMALISATIONS}

Numbers = float | tuple[float, ...] | None


@dataclass(frozen=True)
class StreamingSettings(Settings):
    """All settings of a run, with their defaults. One run has networks of several seeds and hyper-parameters.

    Where None stands for the default of the learner or of the stream, that default takes its place at once. An option
    that the learner does not have stays None.

    Attributes:
        dataset: Name of a data set.
        stream: ``label-permuted`` or ``input-permuted``.
        method: Name of a learner, see `ntkgen.continual.optim.names`.
        model: Name of a network, or ``package.module:factory``.
        width: Width of the network; None for its default.
        seeds: The seeds. Each has a stream of its own, and first parameters of its own.
        num_samples: Number of samples. Each is seen once, in a batch of its own.
        samples_per_task: Number of samples of a task; None for 2,500 with labels and 5,000 with pixels.
        compounding: Whether a permutation is applied to what the last one has made; see `PermutedStreamSettings`.
        normalise: ``symmetric``: images are scaled to [−1, 1]; ``dataset``: by mean and standard deviation of the data
            set; ``none``: to [0, 1].
        compat: Whether the learner does what its published code does, where that differs.
        learning_rate: Learning rate. This and the settings up to ``utility_shape`` are options of learners, see
            `ntkgen.continual.optim.names.OPTIONS`. Numbers may be lists; then there are networks of every combination.
            None for the default of the learner.
        restarts: Whether every task begins with a new network.
        held_out: Number of test samples on which each task is evaluated at its end, under its own permutation.
        bins: Samples over which measures are averaged: ``tasks``, or ``published``, see `bin_ends`.
        stats_every: Number of samples between two measurements of norms and ranks.
        kernels_every: Number of tasks between two kernels; 0 for no kernels.
        probe_per_class: Number of probe samples of each class.
        output: Output map of the kernels.
        precision: Precision of the kernels.
        save_every: Number of samples between two files of parameters; 0 for none but the last.
    """

    other_names: ClassVar[tuple[str, ...]] = tuple(OTHER_NAMES)
    subject: ClassVar[str] = "a stream of single samples"

    dataset: str = "digits"
    stream: str = "label-permuted"
    method: str = "sgd"
    model: str = "mlp-stream"
    width: int | None = None
    seeds: tuple[int, ...] = (0,)
    num_samples: int = 1_000_000
    samples_per_task: int | None = None
    compounding: bool | None = None
    normalise: str = "symmetric"
    compat: bool = False
    learning_rate: Numbers = None
    weight_decay: Numbers = None
    decay: Numbers = None
    sigma: Numbers = None
    beta_utility: Numbers = None
    beta_weight: Numbers = None
    beta_fisher: Numbers = None
    beta_importance: Numbers = None
    beta1: Numbers = None
    beta2: Numbers = None
    eps: Numbers = None
    kappa: Numbers = None
    step_scale: Numbers = None
    mixture: Numbers = None
    largest: str | None = None
    order: str | None = None
    normalisation: str | None = None
    protecting: bool | None = None
    noise_scale: str | None = None
    gate_noise: bool | None = None
    utility_shape: str | None = None
    restarts: bool = False
    held_out: int = 0
    bins: str = TASKS
    stats_every: int = 250
    kernels_every: int = 0
    probe_per_class: int = 2
    output: str = "trace"
    precision: str = "float32"
    save_every: int = 0

    def __post_init__(self) -> None:
        """Check the settings, and put defaults in the place of None.

        Raises:
            InputError: If a number is outside of its range.
            UnknownNameError: If a name is unknown, or an option does not belong to the learner.
        """
        freeze_lists(self)
        require_numbers(
            self,
            ("num_samples", "stats_every", "probe_per_class", "samples_per_task"),
            ("held_out", "kernels_every", "save_every"),
        )
        if negative := [seed for seed in self.seeds if seed < 0]:
            raise InputError(f"`seeds` has {negative[0]}: expected numbers from 0 on. Is the sign wrong? Correct it.")
        require_known_names(self, CHOICES)
        require_each_once("seeds", self.seeds, "Each seed has a network of its own.")
        self._require_own_options()
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def learner(self) -> LearnerNames:
        """The learner.

        Raises:
            InputError: If it is a method of task sequences.
            UnknownNameError: If there is none of this name.
        """
        if self.method not in NAMES and self.method in METHOD_NAMES:
            raise InputError(
                f"`method` is {self.method}, a method of task sequences: expected a learner of single samples, such as "
                f"sgd or upgd_fo_global, as `stream` is {self.stream}. Was it copied from another command? Use a "
                "learner, or another stream."
            )
        if self.method not in NAMES:
            raise UnknownNameError("learner", self.method, NAMES)
        return NAMES[self.method]

    @property
    def permuted(self) -> PermutedStreamSettings:
        """The settings of the stream."""
        return self.part(PermutedStreamSettings)

    @property
    def num_tasks(self) -> int:
        """Number of tasks. The last one may have fewer samples."""
        return -(-self.num_samples // self.permuted.period)

    @property
    def ends(self) -> list[int]:
        """Position after the last sample of each bin."""
        return bin_ends(self.num_samples, self.permuted.period, self.bins)

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """The options of each combination, by the names of the learner, defaults included.

        >>> StreamingSettings(learning_rate=(0.1, 0.2), sigma=0.5, method="pgd").combinations
        [{'lr': 0.1, 'sigma': 0.5}, {'lr': 0.2, 'sigma': 0.5}]
        """
        given = self._learner_options
        values = [value if isinstance(value, tuple) else (value,) for value in given.values()]
        return [dict(zip(given, each, strict=True)) for each in itertools.product(*values)]

    @property
    def num_members(self) -> int:
        """Number of networks."""
        return len(self.combinations) * len(self.seeds)

    def _defaults(self) -> dict[str, Any]:
        """The defaults of the learner and of the stream, by the names of the settings."""
        options = {**self.learner.defaults, **(self.learner.quirks if self.compat else {})}
        named = {OTHER_NAMES.get(option, option): value for option, value in options.items()}
        stream = self.permuted
        return {
            **{name: value for name, value in named.items() if name in LEARNER_SETTINGS},
            "samples_per_task": stream.period,
            "compounding": stream.is_compounding,
        }

    @property
    def _learner_options(self) -> dict[str, Any]:
        """The options of the learner that have values, by its names."""
        given = {name: getattr(self, name) for name in LEARNER_SETTINGS}
        return {OPTION_NAMES.get(name, name): value for name, value in given.items() if value is not None}

    def _require_own_options(self) -> None:
        """Require that the learner has the options that are given, and that their values are possible.

        Raises:
            InputError: If a value is not.
            UnknownNameError: If the learner has no such option.
        """
        for name, value in self._learner_options.items():
            values = value if isinstance(value, tuple) else (value,)
            require_each_once(name, values, "Each combination has networks of its own.")
            for each in values:
                checked_options(self.learner.name, {name: each})


def without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of all settings of a run what is a default of its learner or stream.

    With the rest, another learner or stream has its own defaults. Settings that are not complete stay as they are: what
    a user has written is no default.

    >>> values = StreamingSettings(method="sgd", weight_decay=0.5).to_json()
    >>> [StreamingSettings.from_json({**without_defaults(values), "method": "adam"}).combinations[0][name]
    ...  for name in ("lr", "weight_decay")]
    [0.001, 0.5]
    """
    if {field.name for field in fields(StreamingSettings)} - values.keys():
        return dict(values)
    own = (*LEARNER_SETTINGS, *STREAM_SETTINGS)
    usual = StreamingSettings.from_json({**values, **dict.fromkeys(own)}).to_json()
    return {name: value for name, value in values.items() if name not in own or value != usual[name]}
