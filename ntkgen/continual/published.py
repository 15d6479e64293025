"""Published numbers of runs, which presets print beside those of a run; data alone.

The numbers of the ETH course project `yufei118liu/ntk_continual` were computed from its files of metrics. Those of
iCaRL are from Table 1a of the paper, and those of `rojinakashefi/LwF-iCaRL-Incremental-Learning` from its notebook.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# What is compared, in the order in which it is printed.
QUANTITIES = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
    "backward_transfer": "backward transfer",
    "norm_first": "‖K‖ of task 0, epoch 1",
    "norm_before": "‖K‖ of task 0, its end",
    "norm_after": "‖K‖ of task 0, one epoch later",
    "norm_last": "‖K‖ of task 0, in the end",
    "distance_ratio": "distance at switches / within",
    "norm_ratio": "‖K‖ after / before a switch",
}
# Those that depend on kernels.
KERNEL_QUANTITIES = tuple(QUANTITIES)[3:]


@dataclass(frozen=True)
class PublishedRun:
    """Published numbers of one run.

    Attributes:
        model: The network.
        width: Its width; None if it has none.
        method: The method.
        numbers: Numbers by the names of `QUANTITIES`.
        source: Where they are from.
        seen: Accuracy on all classes seen so far after each task; empty if it was not published.
        exemplars: How exemplars are chosen; empty for methods without any.
    """

    model: str
    width: int | None
    method: str
    numbers: Mapping[str, float]
    source: str
    seen: tuple[float, ...] = ()
    exemplars: str = ""


def _measured(values: str) -> dict[str, float]:
    """Read numbers in the order of `QUANTITIES`; a dash stands for a missing one.

    >>> _measured("0.18 - -0.8")
    {'average_accuracy': 0.18, 'backward_transfer': -0.8}
    """
    pairs = zip(QUANTITIES, values.split(), strict=False)
    return {name: float(value) for name, value in pairs if value != "-"}


ETH = "yufei118liu/ntk_continual at a10f24c"


def _eth(model: str, width: int, file: str, values: str, method: str = "finetune") -> PublishedRun:
    return PublishedRun(model, width, method, _measured(values), f"{ETH}, {file}")


_MLP, _MLP_REPLAY = "mlp_cifar10_2_2_10epo_cuda.pkl", "mlp_cifar10_replay_2_2_10epo_cuda.pkl"
_RNN, _CNN = "rnn_cifar10_2_2_10epo_cuda.pkl", "cnn_cifar10_2_2_10epo_cuda.pkl"
_CNN_REPLAY = "cnn_cifar10_replay_10_10_10epo_cuda.pkl"
_RNN_100, _CNN_100 = "rnn_cifar100_10_10_10epo_cuda.pkl", "cnn_cifar100_10_10_10epo_cuda.pkl"
_CNN_REPLAY_100 = "cnn_cifar100_replay_10_10_10epo_cuda.pkl"

ETH_CIFAR10 = (
    _eth("ntk-rnn", 100, _RNN, ".179 .381 -.81 71 151 123 128 11.5 .93"),
    _eth("ntk-rnn", 1000, _RNN, ".179 .385 -.82 81 93 82 89 62 .93"),
    _eth("ntk-rnn", 5000, _RNN, ".184 .383 -.81 79 78 70 70 137 .97"),
    _eth("ntk-rnn", 10000, _RNN, ".181 .386 -.82 79 76 70 67 199 .98"),
    _eth("mlp", 100, _MLP, ".164 .36 -.78 5.4e4 9.6e4 1.8e4 2.2e4 1.6 .63"),
    _eth("mlp", 500, _MLP, ".169 .36 -.78 - - - - 2.1 1.04"),
    _eth("mlp", 1000, _MLP, ".164 .36 -.78 - - - - 2.5 1.02"),
    _eth("mlp", 5000, _MLP, ".205 .36 -.68 - - - - 3.1 1.0"),
    _eth("mlp", 10000, _MLP, ".175 .35 -.63 - - - - 0.6 1.0"),
    _eth("mlp", 5000, _MLP_REPLAY, ".256 .432 -.40 4.7e5 - - 2.8e5 0.8 1.0", "replay-mixed"),
    _eth("cnn", 1000, _CNN, ".184 .41 -.90 7.2e6 3.1e7 2.2e6 3.8e6 4.2 .23"),
    _eth("cnn", 5000, _CNN, ".191 .40 -.79 - - - - 5.7 .20"),
    _eth("cnn", 1000, _CNN_REPLAY, ".693 .76 -.20 7e6 4.3e7 6.1e6 2.7e6 3.0 .29", "replay-mixed"),
    _eth("cnn", 5000, _CNN_REPLAY, ".682 .76 -.20 - - - - 2.4 .23", "replay-mixed"),
)
ETH_CIFAR100 = (
    _eth("ntk-rnn", 100, _RNN_100, ".044 - - - - - - 9"),
    _eth("ntk-rnn", 500, _RNN_100, ".052 - - - - - - 17"),
    _eth("ntk-rnn", 1000, _RNN_100, ".053 - - 805 4.9e3 4.7e3 4.1e3 25"),
    _eth("ntk-rnn", 5000, _RNN_100, ".058 - - - - - - 54"),
    _eth("cnn", 1000, _CNN_100, ".065 .185 -.63 2.8e8 2.0e9 1.8e8 1.3e9 4.7 .42"),
    _eth("cnn", 5000, _CNN_100, ".060 .176 -.59 - - - - 5.0 .24"),
    _eth("cnn", 1000, _CNN_REPLAY_100, ".273 .36 -.24 5.9e8 7.6e8 2.8e8 7.1e8 3.7 .30", "replay-two-pass"),
    _eth("cnn", 5000, _CNN_REPLAY_100, ".282 .35 -.23 - - - - 2.8 .59", "replay-two-pass"),
)

_ICARL = "Rebuffi, Kolesnikov, Sperl, Lampert (2017), arXiv:1611.07725, Table 1a"
ICARL_CIFAR100 = (
    PublishedRun("resnet32", None, "icarl", _measured("- .641"), _ICARL, exemplars="herding"),
    PublishedRun("resnet32", None, "lwf-mc", _measured("- .444"), _ICARL),
)

_NOTEBOOK = "rojinakashefi/LwF-iCaRL-Incremental-Learning at 2591144, Incremental-learning.ipynb"


def _notebook(method: str, cells: str, seen: str, exemplars: str = "") -> PublishedRun:
    """Read accuracies on the classes seen so far; all tasks have as many classes, so their mean over tasks is known."""
    values = tuple(map(float, seen.split()))
    numbers = {"average_accuracy": values[-1], "average_incremental_accuracy": round(sum(values) / len(values), 4)}
    return PublishedRun("resnet32", None, method, numbers, f"{_NOTEBOOK}, cells {cells}", values, exemplars)


RESNET_INCREMENTAL = (
    _notebook("finetune", "17–21", ".739 .373 .268 .205 .167 .138 .121 .103 .097 .090"),
    _notebook("lwf", "28–32", ".809 .409 .289 .217 .178 .152 .132 .108 .105 .093"),
    _notebook("lwf-mc", "42–43", ".868 .637 .554 .473 .416 .386 .346 .325 .303 .278"),
    _notebook("icarl", "49–51", ".849 .735 .688 .641 .604 .576 .551 .518 .512 .483", "random"),
)
