"""Preparations of networks that are asked for again, such as those of a network that is being trained.

A preparation decides how the rows of each parameter are computed, by a trial in float64. It takes longer than the
kernel of a small network. It is remembered while the user's module exists, and serves again if nothing has changed that
it depends on. The decisions are remembered, and the proof is not: the module is copied again, and every batch is
compared with autograd. A change that no comparison of modules can see, such as one of a configuration object, thus
leads to a refused batch, and then to a new preparation.
"""

import dataclasses
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import chain
from types import FunctionType
from typing import Any

from torch import nn

from ntkgen.jacobian.adapter import Given
from ntkgen.jacobian.attributes import Attributes, attributes_of
from ntkgen.jacobian.evaluation import evaluation_copy
from ntkgen.jacobian.layers import RULES, LayerRule
from ntkgen.jacobian.network import Network

# Maximum number of preparations of one module, such as those of several output maps.
PER_MODULE = 4
# Maximum number of numbers that the tensors of a preparation have: entries of parameters, and directions.
MAX_NUMBERS = 1 << 22

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Circumstances:
    """What a preparation depends on, beside the question. Numbers of parameters and samples are no part of it."""

    question: Hashable
    samples: Hashable
    tensors: Hashable
    hooks: Hashable
    attributes: Attributes
    rules: Mapping[type[nn.Module], LayerRule]

    @classmethod
    def of(cls, given: Given, question: Hashable) -> "_Circumstances":
        model = given.model
        codes = tuple(each.__code__ for each in _functions_of(given))  # a notebook may replace the code of a function
        return cls((question, codes), _form(given), _tensors(model), _hooks(model), attributes_of(model), {**RULES})


def _form(given: Given) -> Hashable:
    """Describe the samples without their values and their number."""
    if given.data is None:
        return given.rows.shape[1:], given.rows.dtype
    leaves = tuple((leaf.shape[1:], leaf.dtype) for leaf in given.data.leaves)
    return leaves, given.data.names, given.data.is_tuple


def _tensors(model: nn.Module) -> Hashable:
    """Describe parameters and buffers without their values. Tied ones share a number."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    numbers: dict[int, int] = {}
    return tuple(
        (name, numbers.setdefault(id(each), len(numbers)), each.shape, each.dtype, each.device, each.requires_grad)
        for name, each in named
    )


def _hooks(model: nn.Module) -> Hashable:
    """Identify the hooks of all modules, which may change what is computed."""
    return tuple(
        (name, kind, tuple(map(id, hooks.values())))
        for name, module in model.named_modules()
        for kind in _HOOKS
        if (hooks := getattr(module, kind))
    )


class Remembered:
    """The preparations of the modules that exist."""

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[_Circumstances, Network]]] = {}

    def find(self, given: Given, question: Hashable) -> Network | None:
        """Prepare a network as the last time, with a new copy of the module; None if something has changed."""
        known = self._known.get(id(given.network))
        if known is None or not _can_be_compared(given):
            return None
        now = _Circumstances.of(given, question)
        network = next((network for circumstances, network in known if circumstances == now), None)
        return None if network is None else _with_copy(network, given.model)

    def keep(self, given: Given, question: Hashable, network: Network) -> None:
        """Remember a preparation, without its copy of the module. One with a warning is not kept, to warn each time."""
        if network.only_in_training or not _can_be_compared(given) or _count_numbers(network) > MAX_NUMBERS:
            return
        key = id(given.network)
        if key not in self._known:
            self._known[key] = []
            weakref.finalize(given.network, self._known.pop, key, None).atexit = False
        known, now = self._known[key], _Circumstances.of(given, question)
        others = [each for each in known if each[0] != now]
        known[:] = [*others[max(0, len(others) - PER_MODULE + 1) :], (now, _without_copy(network))]

    def forget(self, given: Given) -> None:
        """Forget the preparations of a module."""
        self._known.get(id(given.network), []).clear()


def _can_be_compared(given: Given) -> bool:
    """Say whether a kernel is described by plain values, and by functions that hold nothing.

    A closure or a method refers to objects that may change, and that would be kept with the preparation.
    """
    return all(
        isinstance(each, FunctionType) and not (each.__closure__ or each.__defaults__ or each.__kwdefaults__)
        for each in _functions_of(given)
    )


def _functions_of(given: Given) -> list[Any]:
    target = given.target
    return [*target.functions, *target.columns, *([target.select] if callable(target.select) else [])]


def _count_numbers(network: Network) -> int:
    positions = [layer.positions for layer in network.layers if layer.positions is not None]
    marked = [mark.entries.positions for each in network.following.marks for mark in each if mark.entries is not None]
    return sum(each.numel() for each in chain(positions, marked, network.directions.values()))


def _without_copy(network: Network) -> Network:
    layers = (dataclasses.replace(each, module=_NONE) if each.owner is None else each for each in network.layers)
    return dataclasses.replace(network, module=_NONE, layers=tuple(layers))


def _with_copy(network: Network, model: nn.Module) -> Network:
    copied = evaluation_copy(model, network.precision.compute_dtype, network.device)
    modules: dict[str, Any] = dict(copied.named_modules())
    layers = (
        dataclasses.replace(each, module=modules[each.name]) if each.owner is None else each for each in network.layers
    )
    return dataclasses.replace(network, module=copied, layers=tuple(layers))


_NONE = nn.Identity()
REMEMBERED = Remembered()
