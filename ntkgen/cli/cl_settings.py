"""The options of `ntkgen cl-run` that are settings of a run."""

import dataclasses
from typing import Any

import click

from ntkgen.cli.options import POSITIVE, FiniteRange, Function, ManyOption, WholeNumber
from ntkgen.continual.configuration import CHOICES, METHOD_NAMES, RunSettings
from ntkgen.continual.optim.names import NAMES as LEARNERS
from ntkgen.continual.presets import ALGORITHMS
from ntkgen.continual.streaming.aliases import STREAM_ALIASES
from ntkgen.continual.streaming.settings import LEARNER_SETTINGS, StreamingSettings
from ntkgen.continual.streams.permuted import STREAMS as PERMUTED
from ntkgen.continual.surgery.options import SURGERY_CHOICES, SURGERY_NAMES

_DEFAULTS = RunSettings()
_NAMES = {**CHOICES, **SURGERY_CHOICES}
# The defaults of streams of single samples.
_OF_STREAMS = {field.name: field.default for field in dataclasses.fields(StreamingSettings) if field.name != "stream"}


class Integers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """Integers that are separated by commas, such as ``49,63``."""

    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read the integers."""
        try:
            return tuple(int(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers. Write for example 49,63.", param, ctx)


class StreamName(click.Choice[str]):
    """A stream by its name, or by one of the names of published programs, which the help does not list."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        return str(value) if value in STREAM_ALIASES else super().convert(value, param, ctx)


def _setting(flag: str, name: str, meaning: str, **attributes: Any) -> Any:
    """Make an option of a setting. Its defaults are shown. They stand in `RunSettings`, and the names of a choice too.

    Streams of single samples have some of the settings too, with defaults of their own.
    """
    default = getattr(_DEFAULTS, name)
    if name in _NAMES:
        attributes.setdefault("type", click.Choice(_NAMES[name]))
    if attributes.get("is_flag"):
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    shown = "" if default in (None, ()) or "is_flag" in attributes else f" [{default}{_default_of_streams(name)}]"
    return click.option(flag, name, default=None, help=f"{meaning}{shown}.", **attributes)


def _default_of_streams(name: str) -> str:
    """Say which default streams of single samples have, if it is another one."""
    if name not in _OF_STREAMS or _OF_STREAMS[name] == getattr(_DEFAULTS, name):
        return ""
    default = "that of the learner" if name in LEARNER_SETTINGS else _OF_STREAMS[name]
    return f"; streams of single samples: {default}"


_SETTINGS = [
    _setting("--dataset", "dataset", "Name of a data set, or FILE.npz"),
    _setting(
        "--stream",
        "stream",
        "disjoint: a task trains on its own classes; cumulative: on all classes so far; label-permuted and "
        "input-permuted: single samples whose labels or pixels are permuted anew for every task; slow-regression: "
        "slowly changing regression, whose other settings are read from --config",
        type=StreamName([*CHOICES["stream"], *PERMUTED, "slow-regression"]),
    ),
    _setting("--split", "split", "Classes of the first task / of each later one", metavar="FIRST/LATER"),
    _setting(
        "--class-order", "class_order", "natural, random, icarl, numpy, or labels separated by commas", metavar="ORDER"
    ),
    _setting("--overlap", "overlap", "Fraction of each later task's classes that belong to the first task", type=float),
    _setting("--frequency-shift", "frequency_shift", "Change of the class proportions, 0 to 1", type=float),
    _setting(
        "--blend-steps",
        "blend_steps",
        "Iterations over which samples of the previous task fade out",
        type=WholeNumber(),
    ),
    _setting("--tasks", "num_tasks", "Number of tasks [all that the split gives]", type=WholeNumber()),
    _setting(
        "--compatible-split", "compatible_split", "Hold out the same validation samples as continuum 1.2", is_flag=True
    ),
    _setting(
        "--validation-per-class",
        "validation_per_class",
        "Validation samples of each class [a tenth of it]",
        type=WholeNumber(),
    ),
    _setting(
        "--validation-rule",
        "validation_rule",
        "Which samples of a class are held out: random ones, or the first of the data set",
    ),
    _setting(
        "--normalise",
        "normalise",
        "dataset: by mean and standard deviation; symmetric: to [−1, 1]; none: to [0, 1]; pixel-mean: to [0, 1], minus "
        "the mean image",
    ),
    _setting(
        "--evaluate-on",
        "evaluate_on",
        "Samples on which tasks are evaluated",
    ),
    _setting("--model", "model", "Name from `ntkgen models`, or package.module:factory"),
    _setting(
        "--width",
        "width",
        "Width of the network; several are one run per width and seed",
        cls=ManyOption,
        type=WholeNumber(min=1),
        metavar="WIDTH...",
    ),
    _setting(
        "--parametrization", "parametrization", "Parametrization of the weights", type=click.Choice(["standard", "ntk"])
    ),
    _setting(
        "--head",
        "head",
        "Outputs of the network: of all classes (fixed); of the classes seen so far (growing); of all classes, but the "
        "loss and predictions use those of the classes seen so far (masked)",
    ),
    _setting(
        "--method",
        "method",
        f"{', '.join(METHOD_NAMES)}; or an algorithm, which is finetune with other settings: {', '.join(ALGORITHMS)}; "
        f"for streams of single samples a learner: {', '.join(LEARNERS)}",
    ),
    _setting("--buffer", "buffer", "Samples of earlier tasks that replay and iCaRL keep", type=WholeNumber()),
    _setting(
        "--memory-kind",
        "memory",
        "How replay selects the samples that it keeps",
        type=click.Choice(["reservoir", "balanced"]),
    ),
    _setting(
        "--replay",
        "replay",
        "Samples of each earlier task per epoch, for replay-mixed and -two-pass",
        type=WholeNumber(),
    ),
    _setting("--exemplars", "exemplars", "How iCaRL chooses exemplars", type=click.Choice(["herding", "random"])),
    _setting(
        "--exemplar-rounding",
        "exemplar_rounding",
        "Whether iCaRL rounds the number of exemplars per class down or up",
    ),
    _setting("--mirrored", "mirrored", "Add mirror images to the means of iCaRL's exemplars", is_flag=True),
    _setting("--distillation", "distillation", "Weight of the distillation loss of LwF", type=FiniteRange(0)),
    _setting("--temperature", "temperature", "Temperature of the distillation loss of LwF", type=POSITIVE),
    _setting("--penalty", "penalty", "Weight of the penalty of EWC", type=FiniteRange(0)),
    _setting(
        "--loss",
        "loss",
        "Loss of finetune, joint, replay and ewc; binary is the binary cross-entropy of each output",
    ),
    _setting(
        "--binary-reduction",
        "binary_reduction",
        "Sum or mean of the binary cross-entropy over the outputs",
    ),
    _setting(
        "--surgery",
        "surgery",
        f"What acts on units after a step or on parameters at a boundary: {', '.join(SURGERY_NAMES)}",
        cls=ManyOption,
        metavar="NAME...",
    ),
    _setting(
        "--replacement-rate",
        "replacement_rate",
        "Fraction of units that continual backpropagation replaces at each step",
        type=FiniteRange(0, 1),
    ),
    _setting(
        "--replacement-count",
        "replacement_count",
        "Units that --replacement-rate is a fraction of: the eligible ones, or all",
    ),
    _setting(
        "--replacement-draw",
        "replacement_draw",
        "How a fraction of a unit becomes a whole number",
    ),
    _setting("--maturity", "maturity", "Steps after which a new unit may be replaced", type=WholeNumber()),
    _setting(
        "--unit-utility",
        "unit_utility",
        "Utility of units; those with the smallest one are replaced",
    ),
    _setting("--utility-decay", "utility_decay", "Decay rate of the running means of a unit", type=float),
    _setting(
        "--activation-mean",
        "activation_mean",
        "Running mean of the activations (ema), or their sum as in one published code",
    ),
    _setting(
        "--transfer-bias",
        "transfer_bias",
        "Add the mean contribution of a replaced unit to the bias of the next layer; this is the default",
        is_flag=True,
    ),
    _setting(
        "--unit-init",
        "unit_init",
        "Size of the incoming weights of a new unit",
    ),
    _setting(
        "--unit-distribution",
        "unit_distribution",
        "Their distribution",
    ),
    _setting(
        "--reset-unit-optimizer",
        "reset_unit_optimizer",
        "Set the optimizer's state of a replaced unit to zero; this is the default",
        is_flag=True,
    ),
    _setting("--redo-period", "redo_period", "Steps between two resets of dormant units by redo", type=WholeNumber()),
    _setting(
        "--redo-threshold",
        "redo_threshold",
        "Mean activation, relative to that of its layer, up to which redo resets a unit",
        type=FiniteRange(0),
    ),
    _setting("--noise-std", "noise_std", "Standard deviation of the noise of perturb", type=FiniteRange(0)),
    _setting(
        "--full-reset",
        "full_reset",
        "A reset also concerns batch norm and the optimizer; this is the default",
        is_flag=True,
    ),
    _setting(
        "--optimizer",
        "optimizer",
        "sgd, adam, or a learner of streams such as upgd, ratio_norm, pgd or shrink_and_perturb, with its options",
        metavar="NAME",
    ),
    _setting("--lr", "learning_rate", "Learning rate", type=POSITIVE),
    _setting("--momentum", "momentum", "Momentum of sgd", type=FiniteRange(0)),
    _setting("--weight-decay", "weight_decay", "Weight decay", type=FiniteRange(0)),
    _setting(
        "--lr-milestones",
        "lr_milestones",
        "Epochs of each task, from 0 and separated by commas, at which the learning rate is multiplied by --lr-factor",
        type=Integers(),
        metavar="EPOCHS",
    ),
    _setting("--lr-factor", "lr_factor", "Factor of the learning rate at each of --lr-milestones", type=POSITIVE),
    _setting("--reset-optimizer", "reset_optimizer", "Begin each task with a new optimizer", is_flag=True),
    _setting(
        "--regime",
        "regime",
        "feature: use --lr as it is; lazy: multiply it by 64 / width",
    ),
    _setting(
        "--freeze-batch-norm",
        "freeze_batch_norm",
        "Keep the statistics of batch norm from the second epoch of each task on",
        is_flag=True,
    ),
    _setting("--epochs", "epochs", "Epochs per task", type=WholeNumber()),
    _setting(
        "--select",
        "select",
        "End each task with the parameters of its last epoch, or of the best one on the validation samples",
    ),
    _setting("--bs", "batch_size", "Samples per iteration", type=WholeNumber()),
    _setting("--drop-last", "drop_last", "Leave out the last batch of an epoch if it is not full", is_flag=True),
    _setting("--augment", "augment", "Augment training images", is_flag=True),
    _setting(
        "--augmentation",
        "augmentation",
        "dataset: that of the data set, for photographs a random crop and flip; or crop, flip and a rotation up to 15°",
    ),
    _setting(
        "--augment-evaluation",
        "augment_evaluation",
        "Also augment the images of the test split, as in one published code",
        is_flag=True,
    ),
    _setting("--probe-per-class", "probe_per_class", "Probe samples of each class of each task", type=WholeNumber()),
    _setting(
        "--probe-rule",
        "probe_rule",
        "balanced: the same number of random samples of each class; first: the first samples of each task",
    ),
    _setting(
        "--probe-parts",
        "probe_parts",
        "train: probe samples are training samples; both: as many validation samples are added",
    ),
    _setting(
        "--output",
        "output",
        "Output map of the kernels: trace, full, sum, centered, seen (classes seen so far), …",
        metavar="MAP",
    ),
    _setting("--precision", "precision", "Precision of the kernels"),
    _setting("--per-layer", "per_layer", "Also store one kernel per layer", is_flag=True),
    _setting(
        "--lazy-error",
        "lazy_error",
        "Record how far the outputs move from those of the linearised network; this is the default",
        is_flag=True,
    ),
    _setting(
        "--kernels",
        "kernels",
        "Compute kernels every 10 iterations (10it), every epoch (1ep) or per task (task)",
        metavar="SCHEDULE",
    ),
    _setting(
        "--evaluations",
        "evaluations",
        "When the network is evaluated, written as for --kernels; it is always evaluated before the training",
        metavar="SCHEDULE",
    ),
    _setting(
        "--dense",
        "dense",
        "Also compute kernels after 1, 2, 4, … iterations of each task, up to this number",
        type=WholeNumber(),
    ),
]


def with_settings(command: Function) -> Function:
    """Give a command an option for each setting of a run."""
    for option in reversed(_SETTINGS):
        command = option(command)
    return command
