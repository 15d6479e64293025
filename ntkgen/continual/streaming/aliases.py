"""The names of published programs for streams and networks, and the settings that they stand for.

References:
    Elsayed, Mahmood (2024), arXiv:2404.00781, code ``mohmdelsayed/upgd``; code ``yumikim381/upgd-dl-project``.
"""

from collections.abc import Mapping
from typing import Any

from ntkgen.continual.streaming.settings import OTHER_NAMES
from ntkgen.continual.streams.permuted import LABELS, PIXELS
from ntkgen.errors import InputError

_STREAMS: dict[str, dict[str, Any]] = {
    "input_permuted_mnist": {"stream": PIXELS, "dataset": "mnist"},
    "input_permuted_mnist_restarts": {"stream": PIXELS, "dataset": "mnist", "restarts": True},
    "label_permuted_cifar10": {"stream": LABELS, "dataset": "cifar10"},
    "label_permuted_emnist": {"stream": LABELS, "dataset": "emnist"},
    "label_permuted_emnist_offline": {
        "stream": LABELS, "dataset": "emnist", "compounding": False, "held_out": 250
    },
    # its features are a file of the user's, `dataset` FILE.npz
    "label_permuted_mini_imagenet": {"stream": LABELS},
}  # fmt: skip
STREAM_ALIASES = {**_STREAMS, **{f"{name}_stats": values for name, values in _STREAMS.items()}}
"""Settings of each published task. Those that end with ``_stats`` measure more, which ours always do."""

MODEL_ALIASES = {
    "convolutional_network_relu": "lenet-stream",
    "convolutional_network_relu_with_hooks": "lenet-stream",
    "conv_mnist": "lenet-stream",
    "fully_connected_relu": "mlp-stream",
    "fully_connected_relu_with_hooks": "mlp-stream",
}
"""Our network for each published one."""


def without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace published names in settings by what they stand for. Other settings precede those of an alias.

    Raises:
        InputError: If the data set of an alias is a file of the user's, and none is given.

    >>> without_aliases({"stream": "input_permuted_mnist_stats", "model": "conv_mnist"})
    {'stream': 'input-permuted', 'dataset': 'mnist', 'model': 'lenet-stream'}
    """
    meant = STREAM_ALIASES.get(str(values.get("stream")), {})
    if meant and "dataset" not in {**meant, **values}:
        raise InputError(
            f"`stream` is {values['stream']}, whose data set is not part of ntkgen: expected `dataset` with a file of "
            "its features, found none. Was it expected to be there? Make an .npz file of the features and labels, and "
            "set `dataset` to FILE.npz."
        )
    found = {**meant, **{name: value for name, value in values.items() if name != "stream" or not meant}}
    if "model" in found:
        found["model"] = MODEL_ALIASES.get(found["model"], found["model"])
    if found.get("compat") == "published":
        found["compat"] = True
    return found


def with_own_names(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Give settings their own names. They may also be named as their options, such as ``lr`` or ``kernels-every``.

    Args:
        values: The settings.
        place: Where they are from, for the error.

    Raises:
        InputError: If a setting occurs under two names.

    >>> with_own_names({"lr": 0.1, "stats-every": 5}, "a file")
    {'learning_rate': 0.1, 'stats_every': 5}
    """
    found: dict[str, Any] = {}
    for written, value in values.items():
        name = own_name(written)
        if name in found:
            raise InputError(
                f"The settings in {place} have {name} twice: expected one value, found {written} beside another name "
                "of it. Are they parts of two files? Remove one of the two."
            )
        found[name] = value
    return found


def own_name(written: str) -> str:
    """Return the name of a setting that may be written as its option."""
    name = written.replace("-", "_")
    return OTHER_NAMES.get(name, name)
