"""Values of attributes, converted to ones that can be compared by content and shown in a message."""

import argparse
import enum
import functools
import hashlib
import logging
import types
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_NUMBERS = (bool, int, float, complex)
_NAMES_OF_NUMBERS = frozenset(kind.__name__ for kind in _NUMBERS)
_PLAIN = (str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, range)
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
# Objects of these classes are compared by class, although they hold plain values.
_BY_CLASS = (nn.Module, Tensor, logging.Logger, types.ModuleType)
# Names in a configuration of transformers that a forward pass does not use. `save_pretrained` changes some of them.
_OF_FILES = frozenset(
    ("architectures", "dtype", "torch_dtype", "name_or_path", "_name_or_path", "transformers_version", "_commit_hash")
)
# Containers and objects inside each other that are compared by content.
_MAX_DEPTH = 4
# Maximum number of values in one object. A larger one is compared by class.
_MAX_VALUES = 5000
# Bytes of a tensor that are kept. Of a larger one a hash is kept.
_MAX_BYTES = 1 << 20


class TensorValue(NamedTuple):
    """A tensor or an array."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


class Computed(TensorValue):
    """A tensor with a graph. It equals a tensor of the same values without one."""

    __slots__ = ()


class ObjectValue(NamedTuple):
    """An object, or a function that holds values."""

    name: str
    fields: tuple[tuple[str, Hashable], ...]


class _NotPlainError(Exception):
    """An object holds something else than plain values."""


class Converter:
    """Converts the values of the attributes of one network at one time.

    Plain values, containers of them, tensors and arrays are compared by content. So are functions, by their name and by
    the values that they hold, and records: dataclasses and namespaces. Other objects are compared by content if they
    hold plain values only. If not, they are compared by class, because two networks of one factory may hold two of
    them.

    Args:
        network: The network. Its parameters are compared by name.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._objects: dict[int, Hashable] = {}
        self._count = 0

    @functools.cached_property
    def _params(self) -> dict[int, str]:
        return {id(param): name for name, param in self._network.named_parameters()}

    def __call__(self, value: Any) -> Hashable:
        """Convert a value."""
        return self._converted(value, 0, must_be_plain=False)

    def _converted(self, value: Any, depth: int, *, must_be_plain: bool) -> Hashable:
        if isinstance(value, _NUMBERS):
            return type(value).__name__, repr(value)  # 1, 1.0 and True differ, and NaN equals itself
        if isinstance(value, _PLAIN):
            return value
        if must_be_plain:
            self._count += 1
            if self._count > _MAX_VALUES:
                raise _NotPlainError
        if depth < _MAX_DEPTH and isinstance(value, _CONTAINERS):
            return self._of_container(value, depth, must_be_plain=must_be_plain)
        if isinstance(value, type):
            return name_of(value)
        if hasattr(value, "__qualname__") or isinstance(value, functools.partial):
            return self._of_function(value, depth)
        return self._of_other(value, depth, must_be_plain=must_be_plain)

    def _of_other(self, value: Any, depth: int, *, must_be_plain: bool) -> Hashable:
        if isinstance(value, Tensor) and not must_be_plain:
            return self._of_tensor(value)
        if isinstance(value, np.ndarray) and not must_be_plain:
            return self._of_array(value, depth)
        if isinstance(value, np.generic | slice):
            return name_of(type(value)), repr(value)
        if isinstance(value, enum.Enum):
            return name_of(type(value)), value.name
        return self._of_object(value, depth, must_be_plain=must_be_plain)

    def _of_container(self, value: Any, depth: int, *, must_be_plain: bool) -> Hashable:
        def part(value: Any) -> Hashable:
            return self._converted(value, depth + 1, must_be_plain=must_be_plain)

        if isinstance(value, Mapping):
            return ("mapping", *((part(key), part(each)) for key, each in value.items()))
        parts = tuple(map(part, value))
        return frozenset(parts) if isinstance(value, set | frozenset) else (type(value).__name__, *parts)

    def _of_tensor(self, value: Tensor) -> Hashable:
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            return name_of(type(value))
        if isinstance(value, nn.Parameter) and id(value) in self._params:
            return f"parameter {self._params[id(value)]}"  # whose values are loaded
        numbers = value.detach().resolve_conj().resolve_neg().cpu().reshape(-1).view(torch.uint8).numpy()
        kind = TensorValue if value.grad_fn is None else Computed
        return kind(str(value.dtype), tuple(value.shape), _content(numbers.tobytes()))

    def _of_array(self, value: Any, depth: int) -> Hashable:
        if value.dtype.hasobject:
            return self._converted([name_of(type(value)), *value.ravel()], depth, must_be_plain=False)
        return TensorValue(f"numpy.{value.dtype}", value.shape, _content(value.tobytes()))

    def _of_function(self, value: Any, depth: int) -> Hashable:
        """Convert a function to its name, and to the values that it holds if there are any."""
        found: dict[str, Any] = {}
        if isinstance(value, functools.partial):
            name = "functools.partial"
            found = {"func": value.func, "args": value.args, "keywords": value.keywords}
        else:
            name = name_of(value)
            if isinstance(value, types.MethodType):
                found["self"] = value.__self__
            inner = getattr(value, "__func__", value)
            found |= _held_by(inner) if isinstance(inner, types.FunctionType) else {}
        if not found or depth >= _MAX_DEPTH:
            return name
        return ObjectValue(name, tuple((key, self._held(each, depth + 1)) for key, each in found.items()))

    def _held(self, value: Any, depth: int) -> Hashable:
        return self._converted(value, depth, must_be_plain=False)

    def _of_object(self, value: Any, depth: int, *, must_be_plain: bool) -> Hashable:
        """Convert an object once, because the modules of a network may share one.

        Raises:
            _NotPlainError: If a caller needs plain values, and the object holds others.
        """
        name = name_of(type(value))
        if id(value) not in self._objects:
            self._objects[id(value)] = name  # which ends a cycle
            if not must_be_plain:
                self._count = 0
            is_record = isinstance(value, types.SimpleNamespace | argparse.Namespace) or hasattr(
                type(value), "__dataclass_fields__"
            )
            try:
                fields = tuple(
                    (key, self._converted(each, depth + 1, must_be_plain=must_be_plain or not is_record))
                    for key, each in _fields_of(value, depth)
                )
                self._objects[id(value)] = ObjectValue(name, fields)
            except _NotPlainError:
                self._objects[id(value)] = name
        found = self._objects[id(value)]
        if must_be_plain and isinstance(found, str):
            raise _NotPlainError
        return found


def _fields_of(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """List the attributes of an object that a forward pass may use.

    Raises:
        _NotPlainError: If the object has no attributes in Python, or is compared by class.
    """
    kind = type(value)
    fields = getattr(value, "__dict__", None)
    if fields is None and hasattr(kind, "__dataclass_fields__"):
        fields = {name: getattr(value, name, None) for name in kind.__dataclass_fields__}
    if fields is None or depth >= _MAX_DEPTH or isinstance(value, _BY_CLASS) or kind.__name__ == "GenerationConfig":
        raise _NotPlainError
    left_out = _OF_FILES if hasattr(kind, "save_pretrained") else ()
    return ((name, each) for name, each in list(fields.items()) if name not in left_out)


def _held_by(function: types.FunctionType) -> dict[str, Any]:
    """List the values that a function has captured, and the defaults of one that was made inside another."""
    held: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            held[name] = None
    if "<" in function.__qualname__:
        held |= {"defaults": function.__defaults__} if function.__defaults__ else {}
        held |= {"keyword defaults": function.__kwdefaults__} if function.__kwdefaults__ else {}
    return held


def _content(content: bytes) -> bytes:
    return content if len(content) <= _MAX_BYTES else hashlib.blake2b(content).digest()


def name_of(value: Any) -> str:
    """Return the name of a function or a class with its module."""
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"


def holds_computed(value: Hashable) -> bool:
    """Say whether a converted value has a tensor with a graph."""
    if isinstance(value, Computed):
        return True
    return isinstance(value, tuple) and any(map(holds_computed, value))


def text_of(value: Hashable) -> str:
    """Show a converted value.

    >>> text_of(Converter(nn.Identity())({"size": [1, 2.5], "mask": torch.ones(2, 3)}))
    '{size: [1, 2.5], mask: a torch.float32 tensor of (2, 3)}'
    """
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(text_of, value)))}}}"
    return _text_of_tuple(value) if isinstance(value, tuple) and value else str(value)


def _text_of_tuple(value: tuple[Any, ...]) -> str:
    if isinstance(value, TensorValue):
        return f"a {value.dtype} tensor of {value.shape}"
    if isinstance(value, ObjectValue):
        return f"{value.name}({', '.join(f'{name}={text_of(each)}' for name, each in value.fields)})"
    if len(value) == 2 and value[0] in _NAMES_OF_NUMBERS:
        return str(value[1])
    if value[0] == "mapping":
        return f"{{{', '.join(f'{text_of(key)}: {text_of(each)}' for key, each in value[1:])}}}"
    return f"[{', '.join(map(text_of, value[1:]))}]"
