"""What the forward pass of a network depends on beside its numbers: classes, attributes and hooks of its modules.

A prepared kernel function runs its own copy of the network. The number of the head in use, a flag or a slope may change
later in the network of the user, and the copy would not follow.
"""

from collections.abc import Hashable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ntkgen.jacobian.comparable import Converter, ObjectValue, holds_computed, name_of, text_of

# Attributes of every module: its mode, hooks, parameters, buffers and modules.
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"__orig_class__"}
_COMPILED = "_orig_mod"
_HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
}
_NOTHING = "nothing"
# Letters of a value that an error shows.
_SHOWN = 60

Attributes = dict[tuple[str, str], Hashable]
"""Attributes by the path of their module and their own name. The name of the class is ``__class__``."""


def attributes_of(network: nn.Module) -> Attributes:
    """List the classes, the attributes and the hooks of all modules, as `Converter` compares them."""
    found: Attributes = {}
    convert = Converter(network)
    for path, module in network.named_modules(remove_duplicate=False):
        parts = [part for part in path.split(".") if part != _COMPILED]
        if _COMPILED in module._modules:  # torch.compile's wrapper of the module itself
            continue
        plain = ".".join(parts)
        found[plain, "__class__"] = name_of(type(module))
        fields = vars(module)
        for name, value in fields.items():
            if name not in _OF_EVERY_MODULE and not (isinstance(value, Tensor) and _is_derived(module, name)):
                found[plain, name] = convert(value)
        for kind, name in _HOOKS.items():
            if hooks := fields[kind]:
                found[plain, name] = ("list", *map(_name_of_hook, hooks.values()))
                values = (_code_and_values(hook, convert) for hook in hooks.values())
                found[plain, f"values of {name}"] = ("list", *values)
    return found


def first_difference(before: Attributes, now: Attributes) -> tuple[str, str, str] | None:
    """Find an attribute that differs: its full name, and both values as text; None if there is none."""
    if before == now:
        return None
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, _NOTHING), now.get(key, _NOTHING)
        if old != new:
            name, old, new = _narrowed(".".join(part for part in key if part), old, new)
            shown = _shortened(text_of(old)), _shortened(text_of(new))
            return name, shown[0], shown[1] if shown[0] != shown[1] else f"{shown[1]} with other values"
    return None


def changed_by_forward(before: Attributes, after: Attributes) -> frozenset[tuple[str, str]]:
    """Find the attributes that forward passes change or compute, such as a counter or a normalised weight.

    Args:
        before: The attributes of a network.
        after: Those of its copy, after forward passes.
    """
    return frozenset(key for key, value in before.items() if after.get(key) != value or holds_computed(after.get(key)))


def without(attributes: Attributes, left_out: Iterable[tuple[str, str]]) -> Attributes:
    """Leave some attributes out."""
    left_out = frozenset(left_out)
    return {key: value for key, value in attributes.items() if key not in left_out} if left_out else attributes


def _is_derived(module: nn.Module, name: str) -> bool:
    """Say whether the weight normalisation or the pruning of torch computes a tensor from parameters in each call."""
    params = module._parameters
    return f"{name}_orig" in params or (f"{name}_g" in params and f"{name}_v" in params)


def _name_of_hook(hook: Any) -> str:
    return name_of(hook if hasattr(hook, "__qualname__") else type(hook))


def _code_and_values(hook: Any, convert: Converter) -> Hashable:
    """Convert a hook with its code, because the functions without a name have the same name."""
    function = getattr(hook, "__func__", hook)
    code = function.__code__ if isinstance(function, FunctionType) else None
    plain = () if code is None else (code.co_code, code.co_names, *map(repr, filter(_is_plain, code.co_consts)))
    return ObjectValue(_name_of_hook(hook), (("code", plain), ("values", convert(hook))))


def _is_plain(constant: Any) -> bool:
    return constant is None or isinstance(constant, bool | int | float | complex | str | bytes)


def _narrowed(name: str, old: Hashable, new: Hashable) -> tuple[str, Hashable, Hashable]:
    """Find the field in which two objects of one class differ."""
    if not (isinstance(old, ObjectValue) and isinstance(new, ObjectValue) and old.name == new.name):
        return name, old, new
    fields: tuple[Mapping[str, Hashable], ...] = (dict(old.fields), dict(new.fields))
    for key in dict.fromkeys([*fields[0], *fields[1]]):
        values = [each.get(key, _NOTHING) for each in fields]
        if values[0] != values[1]:
            return _narrowed(f"{name}.{key}", values[0], values[1])
    return name, old, new


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
