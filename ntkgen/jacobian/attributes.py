"""What the forward pass of a network depends on beside its numbers: the classes of its modules and their attributes.

A prepared kernel function runs its own copy of the network. The number of the head in use, a flag or a slope may change
later in the network of the user, and the copy would not follow.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Attributes of every module: its mode, hooks, parameters, buffers and modules.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"__orig_class__"}
_NUMBERS = (bool, int, float, complex)
_PLAIN = (str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, range)
_COMPILED = "_orig_mod"

Attributes = dict[tuple[str, str], Hashable]
"""Attributes by the path of their module and their own name. The name of the class is ``__class__``."""


def attributes_of(network: nn.Module) -> Attributes:
    """List the classes and the plain attributes of all modules.

    Functions and classes are compared by name. Of other objects only the class is listed, because two networks of one
    factory may hold two of them. Tensors that are no buffers are listed by their values.
    """
    found: Attributes = {}
    for path, module in network.named_modules(remove_duplicate=False):
        parts = [part for part in path.split(".") if part != _COMPILED]
        if _COMPILED in module._modules:  # torch.compile's wrapper of the module itself
            continue
        plain = ".".join(parts)
        found[plain, "__class__"] = _name_of(type(module))
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                found[plain, name] = _comparable(value)
    return found


def first_difference(before: Attributes, now: Attributes) -> tuple[str, str, str] | None:
    """Find an attribute that differs: its full name, and both values as text; None if there is none."""
    if before == now:
        return None
    for key in dict.fromkeys([*before, *now]):
        if before.get(key, "nothing") != now.get(key, "nothing"):
            name = ".".join(part for part in key if part)
            return name, _text(before.get(key, "nothing")), _text(now.get(key, "nothing"))
    return None


def without(attributes: Attributes, changing: Mapping[tuple[str, str], Any]) -> Attributes:
    """Leave some attributes out."""
    return {key: value for key, value in attributes.items() if key not in changing} if changing else attributes


def _comparable(value: Any, depth: int = 0) -> Hashable:
    """Convert a value to one that can be compared: nested containers of plain values, and names of others."""
    if isinstance(value, _NUMBERS):
        return type(value).__name__, repr(value)  # 1, 1.0 and True differ, and NaN equals itself
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, Mapping) and depth < 4:
        return ("mapping", *((_comparable(k, depth + 1), _comparable(v, depth + 1)) for k, v in value.items()))
    if isinstance(value, list | tuple | set | frozenset) and depth < 4:
        parts = tuple(_comparable(part, depth + 1) for part in value)
        return frozenset(parts) if isinstance(value, set | frozenset) else (type(value).__name__, *parts)
    return _name_of(value) if hasattr(value, "__qualname__") else _name_of(type(value))


def _name_of(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"


def _text(value: Hashable) -> str:
    is_number = isinstance(value, tuple) and len(value) == 2 and value[0] in {kind.__name__ for kind in _NUMBERS}
    text = str(value[1] if is_number else value)  # type: ignore[index]
    return text if len(text) <= 60 else f"{text[:60]}…"
