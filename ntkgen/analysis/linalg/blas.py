"""Matrix products in place, on parts of larger arrays, while other threads read.

`scipy.linalg.blas` keeps Python's lock during a product, so that nothing could be read beside it, and copies what is
not contiguous. The same routines, which SciPy offers to compiled code by their addresses, do neither.

NumPy releases the lock, but its product takes a temporary array, which one thread subtracts. `scripts/bench/blas.py`
compares the three. A log-determinant of 8,000 rows with panels of 4,080 columns takes as long through NumPy on one
thread, and 1.36 times as long on two (medians of ratios in turns, on two busy cores).
"""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import blas, cython_blas

from ntkgen.analysis.matrix import FloatArray

_SIGNATURES = {
    "dgemm": "char char int int int d d int d int d d int",
    "dtrsm": "char char char char int int d d int d int",
}
_TYPES: dict[str, Any] = {"char": ctypes.c_char_p, "int": ctypes.POINTER(ctypes.c_int), "d": ctypes.c_void_p}


def subtract_product(
    C: FloatArray,  # (rows, cols), its columns contiguous
    A: FloatArray,  # (rows, depth), its rows or its columns contiguous
    B: FloatArray,  # (cols, depth), likewise
) -> None:
    """Compute C ← C − A Bᵀ in place. Costs 2 · rows · cols · depth FLOPs."""
    if C.size == 0 or A.shape[1] == 0:
        return
    if _GEMM is None:
        found = blas.dgemm(-1.0, A, B, 1.0, C, trans_b=1, overwrite_c=1)
        assert np.shares_memory(found, C)
        return
    (rows, cols), depth = C.shape, A.shape[1]
    (is_a_turned, a_step), (is_b_turned, b_step) = _order(A), _order(B)
    order = (b"T" if is_a_turned else b"N", b"N" if is_b_turned else b"T")
    _GEMM(*order, *_integers(rows, cols, depth), *_numbers(-1.0), A.ctypes.data, *_integers(a_step), B.ctypes.data,
          *_integers(b_step), *_numbers(1.0), C.ctypes.data, *_integers(_order(C)[1]))  # fmt: skip


def divide_right(
    X: FloatArray,  # (rows, side), its columns contiguous
    L: FloatArray,  # (side, side), lower triangular, its columns contiguous
) -> None:
    """Compute X ← X L⁻ᵀ in place. Costs rows · side² FLOPs."""
    if X.size == 0:
        return
    if _TRSM is None:
        found = blas.dtrsm(1.0, L, X, side=1, lower=1, trans_a=1, overwrite_b=1)
        assert np.shares_memory(found, X)
        return
    sizes = _integers(*X.shape)
    _TRSM(b"R", b"L", b"T", b"N", *sizes, *_numbers(1.0), L.ctypes.data, *_integers(_order(L)[1]), X.ctypes.data,
          *_integers(_order(X)[1]))  # fmt: skip


def _order(X: FloatArray) -> tuple[bool, int]:
    """Say whether the rows of a matrix are contiguous, and not its columns; and how far apart they lie."""
    down, right = (stride // X.itemsize for stride in X.strides)
    if down == 1 or X.shape[0] == 1:
        return False, max(right, X.shape[0])
    assert right == 1 or X.shape[1] == 1, "neither rows nor columns are contiguous"
    return True, max(down, X.shape[1])


def _integers(*values: int) -> list[Any]:
    return [ctypes.byref(ctypes.c_int(value)) for value in values]


def _numbers(value: float) -> list[Any]:
    return [ctypes.byref(ctypes.c_double(value))]


def _routine(name: str) -> Callable[..., None] | None:
    """Find a routine by its address; None where it is not called as it used to be."""
    capsule = cython_blas.__pyx_capi__.get(name)
    if capsule is None:
        return None
    name_of, address_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    written: bytes = name_of(capsule)
    arguments = written.decode().removeprefix("void (").removesuffix(")").split(", ")
    found = " ".join(argument.removesuffix(" *").rpartition("_")[2] for argument in arguments)
    if found != _SIGNATURES[name]:
        return None
    prototype = ctypes.CFUNCTYPE(None, *(_TYPES[kind] for kind in found.split()))
    return prototype(address_of(capsule, written))


_GEMM, _TRSM = _routine("dgemm"), _routine("dtrsm")
