"""Presets: the settings of published experiments, what their code does in another way, and their numbers.

A preset has the settings of correct behaviour. A quirk is another value of an ordinary setting, which reproduces what
the published code does; `Preset.values` uses the quirks only if it is asked for them. So a published number can be
compared with, and every other number is of correct behaviour.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ntkgen.continual import published
from ntkgen.continual.configuration import METHOD_NAMES
from ntkgen.continual.optim.names import NAMES as LEARNERS
from ntkgen.continual.published import PublishedRun
from ntkgen.continual.streams.permuted import STREAMS
from ntkgen.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class Quirk:
    """A setting that reproduces what published code does.

    Attributes:
        setting: The setting.
        value: Its value.
        source: Where the published code does so.
    """

    setting: str
    value: Any
    source: str


@dataclass(frozen=True)
class Preset:
    """The settings of a published experiment.

    Attributes:
        name: Its name.
        source: What it is from.
        settings: Settings other than the defaults, for every method.
        by_method: Settings of one method, which override the others.
        quirks: Settings that reproduce the published code.
        quirks_by_method: The same for one method.
        runs: The published numbers.
        note: What the source does not state, or what cannot be reproduced.
    """

    name: str
    source: str
    settings: Mapping[str, Any]
    by_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quirks: tuple[Quirk, ...] = ()
    quirks_by_method: Mapping[str, tuple[Quirk, ...]] = field(default_factory=dict)
    runs: tuple[PublishedRun, ...] = ()
    note: str = ""

    def quirks_of(self, method: str) -> tuple[Quirk, ...]:
        """List the quirks that concern a method."""
        return self.quirks + self.quirks_by_method.get(method, ())

    def values(self, given: Mapping[str, Any], *, compatible: bool = False) -> dict[str, Any]:
        """Combine the preset with given settings, which override it.

        Args:
            given: The given settings.
            compatible: Whether to use the quirks.
        """
        given = expanded(given)
        method = str(given.get("method", self.settings.get("method", "finetune")))
        quirks = {quirk.setting: quirk.value for quirk in self.quirks_of(method)} if compatible else {}
        return {**self.settings, **self.by_method.get(method, {}), **quirks, **given}


ALGORITHMS: dict[str, dict[str, Any]] = {
    "base": {"method": "finetune"},
    "l2": {"method": "finetune", "weight_decay": 1e-3},
    "continual-backprop": {"method": "finetune", "surgery": ("continual-backprop",)},
    "redo": {"method": "finetune", "surgery": ("redo",)},
    "shrink-and-perturb": {"method": "finetune", "surgery": ("perturb",), "weight_decay": 5e-4},
    "reset-head": {"method": "finetune", "surgery": ("reset-head",)},
    "reset-network": {"method": "finetune", "surgery": ("reset-network",)},
}
"""Names that `--method` accepts beside those of the methods: a method and what else belongs to an algorithm."""


def expanded(given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the name of an algorithm by its settings. Given settings override them.

    Raises:
        InputError: If it is a learner of streams of single samples.
        UnknownNameError: If there is no such method or algorithm.

    >>> expanded({"method": "redo", "epochs": 2})
    {'method': 'finetune', 'surgery': ('redo',), 'epochs': 2}
    """
    name = given.get("method")
    if not isinstance(name, str) or name in METHOD_NAMES:  # another kind of value is refused with the other settings
        return dict(given)
    if name not in ALGORITHMS and name in LEARNERS:
        raise InputError(
            f"`method` is {name}, a learner of streams of single samples: expected a method of task sequences, such as "
            f"{METHOD_NAMES[0]}, as no such stream is given. Was the stream forgotten? Set `stream` to "
            f"{' or '.join(STREAMS)}, or use another method."
        )
    if name not in ALGORITHMS:
        raise UnknownNameError("method or algorithm", name, [*METHOD_NAMES, *ALGORITHMS])
    return {**ALGORITHMS[name], **{k: v for k, v in given.items() if k != "method"}}


_ETH_CODE = "yufei118liu/ntk_continual, experiment-cifar10-epoch10_replay.ipynb, cell 0"
# The notebooks pass no transform, and continuum 1.2 then normalises CIFAR-10 as torchvision's users do
# (continuum/datasets/pytorch.py): with the mean and standard deviation of our data set.
_ETH = {
    "model": "mlp",
    "width": 1000,
    "method": "finetune",
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "epochs": 10,
    "batch_size": 32,
    "kernels": "1ep",
    "evaluations": "1ep",
    "dense": None,
}
_ETH_QUIRKS = (
    Quirk("evaluate_on", "validation", f"{_ETH_CODE}: CIFAR10(train=True) alone; `evaluate` gets `val_tasksets`"),
    Quirk("compatible_split", value=True, source=f"{_ETH_CODE}: split_train_val(val_split=0.1) of continuum"),
    Quirk("probe_rule", "first", f"{_ETH_CODE}: train_taskset[i] for i in range(10)"),
    Quirk("probe_parts", "both", f"{_ETH_CODE}: `fixed_train_samples` and `fixed_val_samples`"),
    Quirk("output", "sum", f"{_ETH_CODE}: `simrnn_ntk` differentiates the sum of all logits"),
    Quirk("freeze_batch_norm", value=True, source=f"{_ETH_CODE}: model.train() before the first epoch of a task alone"),
)

_INCREMENTAL = {
    "dataset": "cifar100",
    "split": "10/10",
    "model": "resnet32",
    "method": "icarl",
    "optimizer": "sgd",
    "learning_rate": 2.0,
    "lr_milestones": (49, 63),
    "lr_factor": 0.2,
    "momentum": 0.9,
    "weight_decay": 1e-5,
    "reset_optimizer": True,
    "epochs": 70,
    "batch_size": 128,
    "augment": True,
    "binary_reduction": "mean",
    "probe_per_class": 1,
    "kernels": "task",
    "evaluations": "1ep",
    "dense": None,
}
_ICARL_CODE = "srebuffi/iCaRL, iCaRL-TheanoLasagne/main_cifar_100_theano.py"
_LOP_CODE = "shibhansh/loss-of-plasticity, lop/incremental_cifar/incremental_cifar_experiment.py"
_RES_GNT = "shibhansh/loss-of-plasticity, lop/algos/res_gnt.py"
_NOTEBOOK = "rojinakashefi/LwF-iCaRL-Incremental-Learning, Incremental-learning.ipynb"

_PRESETS = (
    Preset(
        "eth-cifar10",
        "Liu, Liu, Zhang, Chen: course project, ETH Zürich; yufei118liu/ntk_continual",
        {**_ETH, "dataset": "cifar10", "split": "2/2", "probe_per_class": 5},
        by_method={"replay-mixed": {"replay": 2000}},
        quirks=_ETH_QUIRKS,
        runs=published.ETH_CIFAR10,
        note="The published runs have no seeds. Replay is replay-mixed, which keeps all earlier samples at hand.",
    ),
    Preset(
        "eth-cifar100",
        "Liu, Liu, Zhang, Chen: course project, ETH Zürich; yufei118liu/ntk_continual",
        {**_ETH, "dataset": "cifar100", "split": "10/10", "probe_per_class": 1},
        by_method={"replay-two-pass": {"replay": 500}},
        quirks=_ETH_QUIRKS,
        runs=published.ETH_CIFAR100,
        note="The published runs have no seeds. Replay is replay-two-pass, which keeps all earlier samples at hand.",
    ),
    Preset(
        "reactivation",
        "Liu, Chen, Zhang, Liu, Lanzillotta (2025), arXiv:2507.16039",
        {
            **_ETH,
            "dataset": "cifar10",
            "split": "5/5",
            "width": 512,
            "probe_per_class": 10,
            "kernels": "10it",
            "regime": "feature",
        },
        note="Tasks, widths (64 to 2048) and the distance of kernels, 10 iterations, are those of the paper. Optimizer "
        "and epochs are those of the course project before it. The paper has curves and no table: the velocity peaks "
        "and the norm falls at each switch, at every width, also in the lazy regime, and less where classes overlap; "
        "with a frequency shift there is no peak.",
    ),
    Preset(
        "icarl-cifar100",
        "Rebuffi, Kolesnikov, Sperl, Lampert (2017), arXiv:1611.07725; srebuffi/iCaRL",
        {
            **_INCREMENTAL,
            "class_order": "icarl",
            "buffer": 2000,
            "exemplars": "herding",
            "normalise": "pixel-mean",
        },
        quirks_by_method={
            "icarl": (
                Quirk("exemplar_rounding", "up", f"{_ICARL_CODE}: nb_protos_cl = int(np.ceil(…))"),
                Quirk("mirrored", value=True, source=f"{_ICARL_CODE}: class_means of D and D2, the mirror images"),
            )
        },
        runs=published.ICARL_CIFAR100,
        note="The learning rate of 2 belongs to the mean of the loss over all 100 outputs. The published numbers are "
        "means over ten random class orders.",
    ),
    Preset(
        "resnet-incremental",
        "rojinakashefi/LwF-iCaRL-Incremental-Learning",
        {**_INCREMENTAL, "buffer": 10_000, "exemplars": "random", "head": "growing", "normalise": "symmetric"},
        by_method={
            "finetune": {"loss": "binary", "head": "fixed"},
            "lwf": {"distillation": 0.3, "temperature": 1.0},
        },
        quirks=(Quirk("drop_last", value=True, source=f"{_NOTEBOOK}: DataLoader(drop_last=True)"),),
        quirks_by_method={"finetune": (Quirk("momentum", 0.0, f"{_NOTEBOOK}: MOMENTUM is not passed to SGD"),)},
        runs=published.RESNET_INCREMENTAL,
        note="Not reproduced: the best epoch was chosen on test samples, features were divided by the norm of their "
        "whole batch, exemplars were kept after augmentation, and the distillation of lwf had teacher and student "
        "exchanged.",
    ),
    Preset(
        "incremental-cifar100",
        "Dohare, Hernandez-Garcia, Lan, Rahman, Mahmood, Sutton (2024), Nature 632; shibhansh/loss-of-plasticity",
        {
            "dataset": "cifar100",
            "stream": "cumulative",
            "split": "5/5",
            "class_order": "numpy",
            "validation_per_class": 50,
            "validation_rule": "first",
            "model": "resnet18-bias",
            "head": "masked",
            "method": "finetune",
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "lr_milestones": (60, 120, 160),
            "lr_factor": 0.2,
            "epochs": 200,
            "select": "best",
            "batch_size": 90,
            "augment": True,
            "augmentation": "crop-flip-rotation",
            "replacement_rate": 1e-5,
            "replacement_count": "all",
            "maturity": 1000,
            "noise_std": 1e-5,
            "probe_per_class": 1,
            "kernels": "task",
            "evaluations": "1ep",
            "dense": 0,  # a kernel before the first task
            "lazy_error": False,
        },
        quirks=(
            Quirk("augment_evaluation", value=True, source=f"{_LOP_CODE}: get_data, transformations if not validation"),
            Quirk("activation_mean", "sum", f"{_RES_GNT}: test_features adds (1 − η) |h| and never decays"),
            Quirk("full_reset", value=False, source=f"{_LOP_CODE}: extend_classes keeps batch norm and momentum"),
            Quirk("reset_unit_optimizer", value=False, source=f"{_RES_GNT}: the optimizer's state stays"),
        ),
        note="Rotations are bilinear and precede crop and flip, and their border is black; the published ones follow "
        "them, take the nearest pixel, and have the mean colour as border. Published: curves of relative accuracy, "
        "dormant units and rank, and no table.",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}
"""All presets by name."""


def preset_of(name: str) -> Preset:
    """Look up a preset.

    Raises:
        UnknownNameError: If there is no such preset.
    """
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return PRESETS[name]
