"""The numbers of a network, written into our copy of it: parameters, buffers and extra state, by name."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.errors import InputError, ShapeError
from ntkgen.jacobian.patterns import chosen_names, named_parameters, plain

EXTRA_STATE = "_extra_state"
# Names that an error lists.
FEW = 3


class StateLoader:
    """Copies the numbers of another network of the same architecture into a module.

    Args:
        module: Our copy, whose parameters and buffers are written.
        original: The network that was copied. Our copy may have fewer trainable parameters.
        patterns: Patterns of the names of the parameters that the kernel is of. None means all of them.
    """

    def __init__(self, module: nn.Module, original: nn.Module, patterns: Sequence[str] = ()) -> None:
        named = named_parameters(original)
        chosen = chosen_names(original, patterns) if patterns else named
        self._trained = {name: named[name].requires_grad for name in chosen}
        self._ties = _ties_of(named)
        self._params = dict(module.named_parameters(remove_duplicate=False))
        self._buffers = dict(module.named_buffers(remove_duplicate=False))
        self._parts_with_extra_state = dict(_parts_with_extra_state(module))
        self._persistent = set(module.state_dict(keep_vars=True))

    @property
    def has_extra_state(self) -> bool:
        """Whether a module has extra state."""
        return bool(self._parts_with_extra_state)

    def load(self, source: nn.Module | Mapping[str, Any]) -> None:
        """Copy all parameters and buffers.

        A state dict has no buffers that are not persistent. These keep their values.

        Args:
            source: A module, or its state dict.

        Raises:
            InputError: If names are missing or unknown, or a module trains or ties other parameters.
            ShapeError: If a tensor has another shape.
        """
        found = _numbers_of(source)
        self._require_names(found, needs_all=isinstance(source, nn.Module))
        if isinstance(source, nn.Module):
            params = named_parameters(source)
            self._require_same_trained(params)
            self._require_same_ties(params)
        written: dict[int, Tensor] = {}
        with torch.no_grad():
            for name, target in chain(self._params.items(), self._buffers.items()):
                if name in found:
                    _write(name, target, found[name], written)
        self._load_extra_state(source)

    def _require_names(self, found: Mapping[str, Any], *, needs_all: bool) -> None:
        known = self._params.keys() | self._buffers.keys()
        needed = known if needs_all else known & self._persistent
        missing, unknown = sorted(needed - found.keys()), sorted(found.keys() - known)
        if missing or unknown:
            lacks = f"no {_first(missing)}" if missing else f"{_first(unknown)} as well"
            raise InputError(
                "The state is that of another network: expected the parameters and buffers of the network that this "
                f"kernel function was prepared with, found {lacks}. Was its architecture changed? Prepare a new "
                "KernelFunction."
            )

    def _require_same_trained(self, params: Mapping[str, nn.Parameter]) -> None:
        known = self._trained
        changed = [name for name in known if params[name].requires_grad != known[name]]
        if changed:
            raise InputError(
                f"The network trains other parameters than before: requires_grad of {_first(changed)} has changed. The "
                "kernel is a sum over the trainable parameters. Prepare a new KernelFunction."
            )

    def _require_same_ties(self, params: Mapping[str, nn.Parameter]) -> None:
        now = _ties_of(params)
        changed = [name for name in self._ties if now[name] != self._ties[name]]
        if changed:
            name, before, after = changed[0], self._ties[changed[0]], now[changed[0]]
            was = "was not tied" if before == name else f"was tied to {before}"
            found = "not tied" if after == name else f"tied to {after}"
            raise InputError(
                f"{name} {was} when the kernel function was prepared: expected the same parameters, found that it is "
                f"{found} now. The kernel adds the derivatives of tied parameters. Was the network tied or untied? "
                "Prepare a new KernelFunction."
            )

    def _load_extra_state(self, source: nn.Module | Mapping[str, Any]) -> None:
        if not self._parts_with_extra_state:
            return
        if isinstance(source, nn.Module):
            states = {plain(name): part.get_extra_state() for name, part in _parts_with_extra_state(source)}
        else:
            states = {name[: -len(EXTRA_STATE) - 1]: state for name, state in source.items() if _is_extra(name)}
        for name, part in self._parts_with_extra_state.items():
            if name in states:
                part.set_extra_state(copy.deepcopy(states[name]))


def _numbers_of(source: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """Name the tensors of a module or of a state dict.

    Raises:
        InputError: If it is neither.
    """
    items: Iterable[tuple[str, Any]]
    if isinstance(source, nn.Module):
        items = chain(source.named_parameters(remove_duplicate=False), source.named_buffers(remove_duplicate=False))
    elif isinstance(source, Mapping):
        items = ((name, value) for name, value in source.items() if not _is_extra(name))
    else:
        raise InputError(
            f"A kernel function takes a torch.nn.Module or its state_dict(), and was given a {type(source).__name__}. "
            "Is it a checkpoint that holds a state dict under some key? Pass what lies under that key."
        )
    found = {plain(name): value for name, value in items}
    if wrong := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"A state dict must hold tensors, and {_first(wrong)} is none. Is it a checkpoint that holds a state dict "
            "under some key? Pass what lies under that key."
        )
    return found


def _write(name: str, target: Tensor, value: Tensor, written: dict[int, Tensor]) -> None:
    """Copy one tensor; a tied one is written once, and its other names must have the same values.

    Raises:
        InputError: If tied parameters have different values, or a complex tensor is to become real.
        ShapeError: If the shapes differ.
    """
    if value.shape != target.shape:
        raise ShapeError(
            f"{name} has another shape: expected {tuple(target.shape)}, as the kernel function was prepared for, found "
            f"{tuple(value.shape)}. Has the network grown? Prepare a new KernelFunction."
        )
    if value.is_complex() != target.is_complex():
        raise InputError(
            f"{name} is {value.dtype}, and was {target.dtype} when the kernel function was prepared. One of both is "
            "complex. Prepare a new KernelFunction."
        )
    before = written.get(id(target))
    if before is None:
        written[id(target)] = value
        target.copy_(value)
    elif before is not value and not torch.equal(before, value):
        raise InputError(
            f"{name} was tied to another parameter when the kernel function was prepared, and has other values than "
            "that now. Was the network untied? Prepare a new KernelFunction."
        )


def _ties_of(params: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Find the first name of each parameter, which has several names if it is tied."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(param), name) for name, param in params.items()}


def _parts_with_extra_state(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield name, part


def _is_extra(name: str) -> bool:
    return name == EXTRA_STATE or name.endswith(f".{EXTRA_STATE}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
