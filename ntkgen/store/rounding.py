"""Rounding of computed values to stored values: the power-of-two scale of float16, and the cast."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.errors import DivergedError, UnknownNameError

# Upper end of the range (2¹⁴, 2¹⁵] that the largest entry is scaled into. The largest float16 is 65504 < 2¹⁶. One bit
# is left, because computed entries have errors.
FLOAT16_TARGET = 2.0**15
# Smallest normal number of float16.
FLOAT16_NORMAL = 2.0**-14

STORE_DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Underflow:
    """Numbers of entries that float16 stores with fewer bits than usual (subnormal or zero), and as zero."""

    with_fewer_bits: int
    vanished: int


def check_dtypes(names: str | Iterable[str]) -> tuple[str, ...]:
    """Check one store dtype or several, and return each of them once, in ascending precision.

    >>> check_dtypes(["float32", "float16", "float32"])
    ('float16', 'float32')

    Raises:
        UnknownNameError: If a name is not a store dtype.
    """
    names = {names} if isinstance(names, str) else set(names)
    for name in names:
        if name not in STORE_DTYPES:
            raise UnknownNameError("dtype", name, STORE_DTYPES)
    return tuple(dtype for dtype in STORE_DTYPES if dtype in names)


def scale_of(dtype: str, max_diagonal: float) -> float:
    """Choose the scale factor of a store dtype: ``kernel = stored · scale``.

    By Cauchy–Schwarz no entry exceeds the largest diagonal entry. Therefore float16 cannot overflow with this scale.

    >>> scale_of("float16", 3e6), scale_of("float16", 32768.0), scale_of("float32", 3e6)
    (128.0, 1.0, 1.0)
    """
    if dtype != "float16" or max_diagonal == 0:
        return 1.0
    mantissa, exponent = math.frexp(max_diagonal / FLOAT16_TARGET)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def count_underflow(values: npt.NDArray[np.floating], scale: float) -> npt.NDArray[np.int64]:
    """Count the nonzero entries that float16 stores with fewer bits (subnormal or zero), and those stored as zero.

    Relative to the largest entry that the scale allows, numbers below about 2⁻²⁸ are subnormal, and numbers below about
    2⁻³⁹ become zero.

    >>> count_underflow(np.array([1.0, 1e-5, 1e-9, 0.0]), scale=1.0)
    array([2, 1])
    """
    sizes = np.abs(values) / scale
    vanished = np.count_nonzero((sizes > 0) & (sizes.astype(np.float16) == 0))
    return np.array([np.count_nonzero((sizes > 0) & (sizes < FLOAT16_NORMAL)), vanished], np.int64)


def to_stored(values: npt.NDArray[np.floating], dtype: str, scale: float) -> npt.NDArray[np.floating]:
    """Round computed values to a store dtype, after an exact division by the power-of-two scale.

    Raises:
        DivergedError: If a value is not finite, before or after the cast.
    """
    with np.errstate(over="ignore"):
        stored = (values / values.dtype.type(scale)).astype(dtype) if scale != 1 else values.astype(dtype, copy=False)
    if not np.isfinite(stored).all():
        bad = int(np.size(stored) - np.isfinite(stored).sum())
        raise DivergedError(
            f"{bad} of {stored.size} kernel entries are not finite in {dtype} (scale {scale:g}). Either the network "
            "has infinite or NaN parameters or inputs, or its gradients overflow. Check the checkpoint's training "
            "loss, or compute with `precision` float64 and store float64."
        )
    return stored
