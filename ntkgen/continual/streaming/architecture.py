"""What the networks of a run are beside the numbers of their parameters, so that a resumed run has the same ones."""

import hashlib
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ntkgen.errors import FingerprintError
from ntkgen.jacobian.attributes import attributes_of

if TYPE_CHECKING:
    from ntkgen.continual.streaming.network import StackedNetwork
    from ntkgen.files.folder import Folder

CLASS = "__class__"
# The names that the forward pass of a class of the user's uses, such as relu.
NAMES = "forward"
# Classes that a user does not edit.
OF_OTHERS = ("torch.", "models.", "ntkgen.")
# Letters of a longer value that are kept, before its hash.
SHOWN = 60


def architecture_of(network: nn.Module) -> dict[str, str]:
    """Describe the layers of a network by plain values: their classes, attributes and frozen parameters, as text.

    >>> architecture_of(nn.Sequential(nn.Tanh()))
    {'__class__': 'torch.nn.modules.container.Sequential', '0.__class__': 'torch.nn.modules.activation.Tanh'}
    """
    found = {".".join(filter(None, key)): _text(value) for key, value in attributes_of(network).items()}
    for path, module in network.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and not type(module).__module__.startswith(OF_OTHERS):
            found[".".join(filter(None, (path, NAMES)))] = _text(tuple(code.co_names))
    frozen = [name for name, values in network.named_parameters() if not values.requires_grad]
    return found | {f"{name}.requires_grad": "False" for name in frozen}


def require_same_networks(folder: "Folder", checkpoint: Mapping[str, Any], network: "StackedNetwork") -> None:
    """Require that a checkpoint is of these networks. An older one, without their layers, has shapes alone.

    Raises:
        FingerprintError: If it is of others.
    """
    stored = {name: str(tuple(values.shape[1:])) for name, values in checkpoint["model"].items()}
    now = {name: str(tuple(values.shape[1:])) for name, values in network.parameters.items()}
    differing = first_difference(stored, now)
    if differing is None and "architecture" in checkpoint:
        differing = first_difference(checkpoint["architecture"], network.architecture)
    if differing is None:
        learnt = sum(len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
        if learnt != len(network.trainable):
            differing = "parameters that learn", str(learnt), str(len(network.trainable))
    if differing is not None:
        name, before, after = differing
        raise FingerprintError(
            f"The run at {folder} was begun with another network: expected {name} {before}, found {after}. Was the "
            "code of the network changed? Two networks would be mixed. Use another `out`, or the original network."
        )


def first_difference(stored: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Find what differs: its name and both values; None if nothing does.

    An attribute that only one of the two has is of another version of a library, unless its layer is new.

    >>> first_difference({"0.__class__": "ReLU", "0.inplace": "False"}, {"0.__class__": "Tanh"})
    ('0.__class__', 'ReLU', 'Tanh')
    >>> first_difference({"weight": "(3, 2)"}, {"weight": "(4, 2)"})
    ('weight', '(3, 2)', '(4, 2)')
    >>> first_difference({"0.__class__": "ReLU"}, {"0.__class__": "ReLU", "0.new": "1"})
    """
    for name in dict.fromkeys([*stored, *now]):
        is_of_one = name not in stored or name not in now
        if is_of_one and name.rpartition(".")[2] not in {CLASS, "weight", "bias", "requires_grad"}:
            continue
        before, after = stored.get(name, "none"), now.get(name, "none")
        if before != after:
            return name, before, after
    return None


def _text(value: Hashable) -> str:
    """Write a value so that all processes write it alike; of a long one its beginning and its hash."""
    text = _written(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _written(value: Any) -> str:
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_written, value)))}}}"  # the order of a set differs between processes
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))})"
    return str(value)
