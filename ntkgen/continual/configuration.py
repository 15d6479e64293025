"""The settings of a run of continual learning, read from a file or from options, and checked."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from ntkgen.continual.optim.names import checked_options
from ntkgen.continual.optim.options import BATCH_LEARNERS, LearnerOptions
from ntkgen.continual.schedule import Schedule
from ntkgen.continual.settings import Settings, freeze_lists, require_known_names, require_numbers
from ntkgen.continual.streams.incremental import STREAMS, Split, StreamSettings
from ntkgen.continual.surgery.options import SURGERY_NAMES, SurgeryOptions
from ntkgen.errors import InputError, UnknownNameError

OPTIMIZERS = ("adam", "sgd", *BATCH_LEARNERS)
METHOD_NAMES = ("finetune", "joint", "replay", "replay-mixed", "replay-two-pass", "lwf", "lwf-mc", "icarl", "ewc")
# Settings that are one of a few names.
CHOICES = {
    "optimizer": OPTIMIZERS,
    "normalise": ("dataset", "symmetric", "none", "pixel-mean"),
    "evaluate_on": ("test", "validation"),
    "loss": ("cross-entropy", "binary"),
    "binary_reduction": ("sum", "mean"),
    "exemplar_rounding": ("down", "up"),
    "regime": ("feature", "lazy"),
    "head": ("fixed", "growing", "masked"),
    "stream": STREAMS,
    "validation_rule": ("random", "first"),
    "select": ("last", "best"),
    "augmentation": ("dataset", "crop-flip-rotation"),
    "probe_rule": ("balanced", "first"),
    "probe_parts": ("train", "both"),
}
# Settings whose options have other names, as they may also be written in a file.
ALIASES = {"lr": "learning_rate", "bs": "batch_size", "memory_kind": "memory", "tasks": "num_tasks"}
# Numbers that must be positive, and numbers that may also be 0.
POSITIVE = (
    "buffer", "replay", "temperature", "learning_rate", "lr_factor", "epochs", "batch_size", "probe_per_class",
)  # fmt: skip
NOT_NEGATIVE = ("weight_decay", "seed", "distillation", "penalty", "dense")
# The width at which the lazy regime has the learning rate that was asked for.
LAZY_WIDTH = 64


@dataclass(frozen=True)
class MethodOptions:
    """Options of the methods. Each option is used by some of the methods.

    Attributes:
        buffer: Maximum number of samples of earlier tasks that are kept.
        memory: How replay selects these samples: ``reservoir`` or ``balanced``.
        replay: Number of samples of each earlier task per epoch, for ``replay-mixed`` and ``replay-two-pass``.
        exemplars: How exemplars are chosen: ``herding`` or ``random``.
        exemplar_rounding: Whether the number of exemplars per class, K / t, is rounded ``down`` or ``up``.
        mirrored: Whether the mean of exemplars also has the features of their mirror images.
        distillation: Weight λ of the distillation loss of LwF.
        temperature: Temperature T of the distillation loss of LwF.
        penalty: Weight λ of the penalty of EWC.
        loss: Loss of finetune, joint, the kinds of replay and EWC: ``cross-entropy``, or ``binary`` for the binary
            cross-entropy of each output.
        binary_reduction: Whether a binary cross-entropy is the ``sum`` or the ``mean`` over outputs.
    """

    buffer: int = 200
    memory: str = "reservoir"
    replay: int = 500
    exemplars: str = "herding"
    exemplar_rounding: str = "down"
    mirrored: bool = False
    distillation: float = 1.0
    temperature: float = 2.0
    penalty: float = 1000.0
    loss: str = "cross-entropy"
    binary_reduction: str = "sum"


@dataclass(frozen=True)
class RunSettings(LearnerOptions, SurgeryOptions, Settings):
    """All settings of a run, with their defaults.

    Attributes:
        dataset: Name of a data set.
        stream: ``disjoint``: a task trains on the samples of its own classes; ``cumulative``: on those of all classes
            so far.
        split: Number of classes of the first task and of each later one, such as ``2/2``.
        class_order: ``natural``, ``random``, ``icarl``, ``numpy``, or a list; see `class_order`.
        overlap: Fraction of the classes of each later task that are classes of the first task.
        frequency_shift: Change of the class proportions, or None; see `StreamSettings`.
        blend_steps: Number of iterations over which samples of the previous task fade out after a switch.
        num_tasks: Number of tasks; None for all.
        compatible_split: Whether to hold out the same validation samples as the package continuum 1.2.
        validation_per_class: Number of validation samples of each class; None for a tenth of the class.
        validation_rule: Which samples of a class are held out: ``random`` ones, or the ``first`` of the data set.
        normalise: ``dataset``: images are normalised with mean and standard deviation of the data set;
            ``symmetric``: they are scaled to [−1, 1]; ``none``: to [0, 1]; ``pixel-mean``: to [0, 1], and the mean of
            all training images is subtracted.
        evaluate_on: ``test``: tasks are evaluated on the test split, if there is one; ``validation``: on the validation
            samples.
        model: Name of a network, or ``package.module:factory``.
        width: Width of the network; None for its default.
        parametrization: ``standard`` or ``ntk``, for networks that have both.
        head: ``fixed``, with the outputs of all classes from the beginning; ``growing``, with those of the classes seen
            so far; ``masked``, as fixed, and loss and predictions use only the outputs of the classes seen so far.
        method: Name of a method.
        buffer: Maximum number of samples of earlier tasks that the method keeps.
        memory: How replay selects these samples: ``reservoir`` or ``balanced``.
        replay: Samples of each earlier task per epoch, for ``replay-mixed`` and ``replay-two-pass``.
        exemplars: How exemplars are chosen: ``herding`` or ``random``.
        exemplar_rounding: Whether the number of exemplars per class is rounded ``down`` or ``up``.
        mirrored: Whether the mean of exemplars also has the features of their mirror images.
        distillation: Weight of the distillation loss of LwF.
        temperature: Temperature of the distillation loss of LwF.
        penalty: Weight of the penalty of EWC.
        loss: Loss of finetune, joint, the kinds of replay and EWC: ``cross-entropy``, or ``binary``, the binary
            cross-entropy of each output.
        binary_reduction: Whether a binary cross-entropy, also that of LwF.MC and iCaRL, is the ``sum`` or the ``mean``
            over outputs.
        surgery: Names of what acts on units after a step, or on parameters at a boundary, of `SURGERY_NAMES`. The
            options of `SurgeryOptions` are settings too.
        optimizer: ``adam`` or ``sgd`` of torch, or one of `BATCH_LEARNERS`, such as ``upgd``. The options of
            `LearnerOptions` are settings too.
        learning_rate: Learning rate.
        momentum: Momentum of ``sgd``.
        weight_decay: Weight decay.
        lr_milestones: Epochs of each task, counted from 0, at which the learning rate is multiplied by ``lr_factor``.
        lr_factor: Factor of the learning rate at each milestone.
        reset_optimizer: Whether each task begins with a new optimizer.
        regime: ``feature``: the learning rate is used as it is; ``lazy``: it is multiplied by `LAZY_WIDTH` / width.
        freeze_batch_norm: Whether batch norm uses its running statistics, and keeps them, from the second epoch of each
            task on. Dropout is off in these epochs too.
        epochs: Epochs per task.
        select: ``last``: each task ends with the parameters of its last epoch; ``best``: with those of the epoch that
            has the largest accuracy on the validation samples of the classes so far, the first of several.
        batch_size: Samples per iteration.
        drop_last: Whether the last batch of an epoch is left out if it is not full.
        augment: Whether training images are augmented.
        augmentation: ``dataset``: as the data set says, or by a random crop after padding with four pixels and a random
            flip if it says nothing; ``crop-flip-rotation``: by these, with mirrored pixels at the border, and by a
            rotation of 0 to 15 degrees.
        augment_evaluation: Whether the images of the test split are augmented too, as in one published code.
        probe_per_class: Probe samples of each class of each task, for kernels.
        probe_rule: ``balanced``: as many random samples of each class; ``first``: the first samples of each task, as
            many in all.
        probe_parts: ``train``: probe samples are training samples; ``both``: there are as many validation samples too.
        output: Output map of the kernels.
        precision: Precision of the kernels.
        per_layer: Whether to store also one kernel per module.
        lazy_error: Whether to record how far the outputs move from those of the linearised network.
        kernels: Schedule of the kernels; see `Schedule`.
        evaluations: Schedule of the evaluations; there is always one before the training.
        dense: Last of the iterations 1, 2, 4, … of each task after which kernels are also computed; None for none.
        seed: Seed of all random numbers.
    """

    other_names: ClassVar[tuple[str, ...]] = tuple(ALIASES)

    dataset: str = "digits"
    stream: str = "disjoint"
    split: str = "2/2"
    class_order: str | tuple[int, ...] = "natural"
    overlap: float = 0.0
    frequency_shift: float | None = None
    blend_steps: int = 0
    num_tasks: int | None = None
    compatible_split: bool = False
    validation_per_class: int | None = None
    validation_rule: str = "random"
    normalise: str = "dataset"
    evaluate_on: str = "test"
    model: str = "mlp"
    width: int | None = None
    parametrization: str = "standard"
    head: str = "fixed"
    method: str = "finetune"
    buffer: int = MethodOptions.buffer
    memory: str = MethodOptions.memory
    replay: int = MethodOptions.replay
    exemplars: str = MethodOptions.exemplars
    exemplar_rounding: str = MethodOptions.exemplar_rounding
    mirrored: bool = MethodOptions.mirrored
    distillation: float = MethodOptions.distillation
    temperature: float = MethodOptions.temperature
    penalty: float = MethodOptions.penalty
    loss: str = MethodOptions.loss
    binary_reduction: str = MethodOptions.binary_reduction
    surgery: tuple[str, ...] = ()
    optimizer: str = "adam"
    learning_rate: float = 3e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_milestones: tuple[int, ...] = ()
    lr_factor: float = 0.2
    reset_optimizer: bool = False
    regime: str = "feature"
    freeze_batch_norm: bool = False
    epochs: int = 5
    select: str = "last"
    batch_size: int = 32
    drop_last: bool = False
    augment: bool = False
    augmentation: str = "dataset"
    augment_evaluation: bool = False
    probe_per_class: int = 10
    probe_rule: str = "balanced"
    probe_parts: str = "train"
    output: str = "trace"
    precision: str = "float32"
    per_layer: bool = False
    lazy_error: bool = True
    kernels: str = "1ep"
    evaluations: str = "1ep"
    dense: int | None = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: If a number is too small, or the lazy regime has no width.
            UnknownNameError: If a name is unknown.
        """
        freeze_lists(self)
        super().__post_init__()
        for name in self.surgery:
            if name not in SURGERY_NAMES:
                raise UnknownNameError("surgery", name, SURGERY_NAMES)
        require_numbers(self, POSITIVE, NOT_NEGATIVE)
        if early := [epoch for epoch in self.lr_milestones if epoch < 1]:
            raise InputError(
                f"`lr_milestones` has the epoch {early[0]}: expected epochs after the first one, which is epoch 0. Was "
                "a lower rate meant from the beginning? Give it as `learning_rate`."
            )
        require_known_names(self, CHOICES)
        if self.regime == "lazy" and self.width is None:
            raise InputError(
                "The lazy regime divides the learning rate by the width: expected a `width`, found none. Is the "
                "network one without widths? Give a `width`, or use the regime feature."
            )
        _ = self.stream_settings, self.kernel_schedule, self.evaluation_schedule, self.optimizer_options

    @property
    def stream_settings(self) -> StreamSettings:
        """The settings of the stream."""
        return self.part(StreamSettings, split=Split.parse(self.split), order=self.class_order)

    def evaluated_on(self, *, has_test_split: bool) -> str:
        """Say on which samples the tasks are evaluated."""
        if has_test_split and self.evaluate_on == "test":
            return "test samples"
        reason = ", because the data set has no test split" * (self.evaluate_on == "test")
        caveat = "; best epochs are chosen on the same samples" * (self.select == "best")
        return f"validation samples{reason}{caveat}"

    @property
    def step_size(self) -> float:
        """The learning rate of the optimizer at the beginning.

        In the lazy regime it falls as 1 / width, so that wide networks stay close to their linearisation (Liu et al.
        2025, arXiv:2507.16039).
        """
        if self.regime == "feature" or self.width is None:
            return self.learning_rate
        return self.learning_rate * LAZY_WIDTH / self.width

    def step_size_at(self, epoch: int) -> float:
        """The learning rate in an epoch of each task, counted from 0: η · lr_factor^k after k milestones.

        >>> settings = RunSettings(learning_rate=2.0, lr_milestones=(49, 63))
        >>> [round(settings.step_size_at(epoch), 12) for epoch in (0, 48, 49, 63)]
        [2.0, 2.0, 0.4, 0.08]
        """
        return self.step_size * self.lr_factor ** sum(epoch >= milestone for milestone in self.lr_milestones)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The hyper-parameters of the optimizer that are given, by its own names.

        Raises:
            UnknownNameError: If the optimizer has no such option, or an option no such value.
            InputError: If a value is out of range.
        """
        given: dict[str, Any] = {"lr": self.step_size} | (
            {"weight_decay": self.weight_decay} if self.weight_decay else {}
        )
        if self.optimizer in BATCH_LEARNERS:
            return checked_options(self.optimizer, given | self.given_learner_options)
        for name in self.given_learner_options:
            raise UnknownNameError(f"option of {self.optimizer}", name, ("learning_rate", "weight_decay"))
        return given

    @property
    def surgery_options(self) -> SurgeryOptions:
        """The options of the surgeries."""
        return self.part(SurgeryOptions)

    @property
    def method_options(self) -> MethodOptions:
        """The options of the method."""
        return self.part(MethodOptions)

    @property
    def kernel_schedule(self) -> Schedule:
        """When kernels are computed."""
        return Schedule.parse(self.kernels, self.dense)

    @property
    def evaluation_schedule(self) -> Schedule:
        """When the network is evaluated, also before the training, which forward transfer needs."""
        return Schedule.parse(self.evaluations, dense=0)

    def differences_beside_seed(self, other: "RunSettings") -> list[str]:
        """List what keeps two runs from being read together: settings that differ, but not the seed and the width.

        A default width, which is not stated, cannot be compared with another one.
        """
        differing = self.differences(dataclasses.replace(other, seed=self.seed, width=self.width))
        if (self.width is None) != (other.width is None):
            differing.append(f"width {self.width}, now {other.width}")
        return differing
