"""The scale of float16, and what is stored with it."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ntkgen.errors import DivergedError
from ntkgen.store.rounding import STORE_DTYPES, scale_of, to_stored

diagonals = st.floats(1e-300, 1e300)


@given(diagonals | st.integers(-900, 900).map(lambda exponent: 2.0**exponent))
def test_the_largest_diagonal_entry_comes_just_below_the_top_of_float16(largest):
    scale = scale_of("float16", largest)
    assert 2.0**14 < largest / scale <= 2.0**15
    assert math.frexp(scale)[0] == 0.5  # a power of two


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_a_kernel_of_zeros_has_the_scale_one(dtype):
    assert scale_of(dtype, 0.0) == 1.0


@given(diagonals, st.sampled_from(["float32", "float64"]))
def test_wider_dtypes_are_stored_as_they_are(largest, dtype):
    assert scale_of(dtype, largest) == 1.0


factors = arrays(np.float64, (6, 4), elements=st.floats(-1e3, 1e3, width=32))


@given(factors, st.integers(-60, 60))
def test_no_entry_of_a_kernel_overflows_float16(J, exponent):
    K = (J @ J.T) * 2.0**exponent
    scale = scale_of("float16", K.diagonal().max())
    stored = to_stored(K, "float16", scale)
    assert stored.dtype == np.float16
    # half a unit in the last place, or of the smallest subnormal number
    assert (np.abs(stored.astype(np.float64) * scale - K) <= np.maximum(np.abs(K) * 2.0**-11, scale * 2.0**-25)).all()


@given(factors, st.sampled_from(["float32", "float64"]))
def test_wider_dtypes_are_rounded_once(J, dtype):
    K = J @ J.T
    stored = to_stored(K, dtype, 1.0)
    assert stored.dtype == dtype
    assert np.array_equal(stored, K.astype(dtype))


BAD = {
    "nan": (np.nan, "float64", 1.0),
    "infinite": (np.inf, "float32", 1.0),
    "minus infinite": (-np.inf, "float16", 4.0),
    "too large for float16": (65520.0, "float16", 1.0),
    "too large for float16 after the scale": (2.0**20, "float16", 8.0),
    "too large for float32": (1e39, "float32", 1.0),
    "too large for the scale": (1e300, "float64", 1e-20),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_finite_is_refused_in_one_line(what):
    value, dtype, scale = BAD[what]
    values = np.array([[1.0, value], [value, 2.0]])
    before = values.copy()
    with pytest.raises(DivergedError, match=f"^2 of 4 kernel entries are not finite in {dtype}") as raised:
        to_stored(values, dtype, scale)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, FloatingPointError)
    assert np.array_equal(values, before, equal_nan=True)


def test_rounding_leaves_its_argument_as_it_was_and_warns_of_nothing():
    values = np.array([[1e-30, 3e4]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = to_stored(values, "float16", 2.0)
    assert values.tolist() == [[np.float32(1e-30), 3e4]]
    assert stored.tolist() == [[0.0, 1.5e4]]
