"""Pickles of nested dictionaries and lists of NumPy arrays, read without running anything that they name.

A pickle is a program: it names functions and calls them. Here a name is only ever looked up in a table of a few
functions of this file, which stand for those that NumPy's arrays are pickled with. They check what they get and build
the array from its bytes. Every other name is refused before it is imported.
"""

import math
import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ntkgen.errors import InputError

# Kinds of NumPy's dtypes that are read: booleans, integers and real numbers.
KINDS = "biuf"


class Refused(Exception):  # noqa: N818 - it never leaves this file
    """A pickle holds something else than plain values and arrays."""


class _Dtype:
    """Stands for `numpy.dtype` of plain numbers while a pickle is read."""

    def __init__(self, *args: Any) -> None:
        name = args[0] if args else None
        if not isinstance(name, str) or len(name) > 8:
            raise Refused("a dtype without a name")
        try:
            found = np.dtype(name)
        except TypeError as error:
            raise Refused(f"the dtype {name!r}") from error
        if found.kind not in KINDS:
            raise Refused(f"an array of {found}")
        self.dtype = found

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in {"<", ">", "|", "="}:
            raise Refused("a dtype of unknown byte order")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for `numpy.ndarray` while a pickle is read; its numbers are in ``values``."""

    def __init__(self, *_: Any) -> None:
        self.values: npt.NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("an array of unknown form")
        _, shape, dtype, is_fortran, data = state
        self.values = _built(data, dtype, shape, "F" if is_fortran else "C")


def _built(data: Any, dtype: Any, shape: Any, order: Any) -> npt.NDArray[Any]:
    """Build an array of some shape from its bytes.

    Raises:
        Refused: If they do not fit.
    """
    is_shape = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
    if not is_shape or not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise Refused("an array of unknown form")
    if math.prod(shape) * dtype.dtype.itemsize != len(data) or order not in {"C", "F"}:
        raise Refused(f"an array of shape {shape} with {len(data):,} bytes")
    return np.frombuffer(bytes(data), dtype.dtype).reshape(shape, order=order)


def _buffer(data: Any = None, dtype: Any = None, shape: Any = None, order: Any = "C") -> _Array:
    array = _Array()
    array.values = _built(data, dtype, shape, order)
    return array


def _scalar(dtype: Any = None, data: Any = None) -> Any:
    return _built(data, dtype, (), "C").item()


def _encoded(text: Any = None, encoding: Any = None) -> bytes:
    """Convert text to bytes as old protocols of pickle write them.

    Raises:
        Refused: If another encoding is named.
    """
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1"}:
        raise Refused(f"the encoding {encoding!r}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    return b""


class _Function:
    """A function of this file under the name that a pickle has for it; a pickle cannot change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call the function.

        Raises:
            Refused: If the arguments do not fit.
        """
        try:
            return self._call(*args)
        except TypeError as error:
            raise Refused("a function with other arguments than NumPy writes") from error

    def __setstate__(self, state: Any) -> None:
        raise Refused("a change of a function")


def _names() -> dict[tuple[str, str], Any]:
    functions: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encoded,
        ("builtins", "bytes"): _no_bytes,  # old protocols of pickle write empty bytes as a call
        ("__builtin__", "bytes"): _no_bytes,
    }
    for package in ("numpy.core", "numpy._core"):
        functions[f"{package}.multiarray", "_reconstruct"] = _Array
        functions[f"{package}.multiarray", "scalar"] = _scalar
        functions[f"{package}.numeric", "_frombuffer"] = _buffer
    return {name: _Function(call) for name, call in functions.items()}


_KNOWN = _names()


class _Reader(pickle.Unpickler):  # noqa: S301 - the table of names is what makes it safe
    def find_class(self, module_name: str, global_name: str) -> Any:
        """Look up a name in the table.

        Raises:
            Refused: If it is not there.
        """
        found = _KNOWN.get((module_name, global_name))
        if found is None:
            raise Refused(f"{module_name}.{global_name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to other files.

        Raises:
            Refused: Always.
        """
        raise Refused(f"a reference to something outside of the file, {str(pid)[:40]!r}")


def read_pickle(file: IO[bytes], name: str) -> Any:
    """Read a pickle of dictionaries, lists, plain values and NumPy arrays of numbers.

    Args:
        file: The file.
        name: Its name, for messages.

    Raises:
        InputError: If it names anything else, or cannot be read.
    """
    try:
        return _plain(_Reader(file).load(), 0, {})
    except Refused as error:
        raise InputError(
            f"{name} was not read, and nothing in it was run: expected numbers, lists, dictionaries and NumPy arrays "
            f"alone, found {error}. Is it another file, or has someone changed it? If it holds tensors of torch, "
            "convert them with `tensor.numpy()` where you trust the file, and pickle it again."
        ) from error
    except Exception as error:  # whatever a damaged file makes of the reader
        raise InputError(
            f"{name} cannot be read: expected a pickle, found something else ({type(error).__name__}). Was it copied "
            "in part, or is it a Git LFS pointer? Get it once more."
        ) from error


# Depth of nesting up to which a pickle is followed; a list that contains itself has no end.
MAX_DEPTH = 16


def _plain(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """Replace stand-ins by the arrays that they hold.

    Args:
        value: What a pickle holds.
        depth: How deep it is nested.
        done: What has been replaced, by identity: a small file may refer to a list a million times.

    Raises:
        Refused: If there is anything else.
    """
    if depth > MAX_DEPTH:
        raise Refused("a nesting without end")
    if isinstance(value, _Array):
        return value.values
    if value is None or type(value) in {bool, int, float, str}:
        return value
    if type(value) not in {dict, list, tuple}:
        raise Refused(f"a value of the type {type(value).__name__.strip('_')}")
    if id(value) not in done:
        if type(value) is dict:
            pairs = value.items()
            done[id(value)] = {_plain(key, depth + 1, done): _plain(each, depth + 1, done) for key, each in pairs}
        else:
            done[id(value)] = [_plain(each, depth + 1, done) for each in value]
    return done[id(value)]
