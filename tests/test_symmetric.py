"""A stored kernel as a NumPy-like matrix: the same rules as the dense array, mirrored and scaled."""

import pickle
from types import SimpleNamespace

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, slices

from ntkgen.kernel.symmetric import SymmetricArray

SIDE, ROWS = 4, 14  # 4 × 4 tiles, the last block ragged


def stored(dtype="float32", layout="upper", scale=1.0):
    """A kernel as a store has it, and the true values."""
    J = np.random.default_rng(0).normal(size=(ROWS, 5))
    K = (J @ J.T).astype(dtype)
    array = zarr.create_array({}, shape=K.shape, chunks=(SIDE, SIDE), dtype=dtype, fill_value=np.nan)
    array.attrs.update({} if scale == 1 else {"scale_factor": scale})
    for i in range(0, ROWS, SIDE):
        for j in range(i if layout == "upper" else 0, ROWS, SIDE):
            array[i : i + SIDE, j : j + SIDE] = K[i : i + SIDE, j : j + SIDE]
    truth = K.astype(np.float32) * np.float32(scale) if dtype == "float16" else K
    return SymmetricArray(array, is_upper=layout == "upper", token="3f2a"), truth


KINDS = {
    "upper": stored(),
    "full": stored(layout="full"),
    "scaled float16": stored("float16", scale=2.0**-7),
    "full float64": stored("float64", layout="full"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def assert_same(found, expected):
    assert np.shape(found) == np.shape(expected)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@every_kind
@given(key=keys(ROWS))
def test_an_index_means_what_it_means_to_numpy(kind, key):
    K, dense = KINDS[kind]
    assert_same(K[key], dense[key])


EXPLICIT = {
    "row": 3,
    "last row": -1,
    "entry": (3, -2),
    "NumPy integers": (np.int64(3), np.uint8(9)),
    "everything": (slice(None), slice(None)),
    "dots": Ellipsis,
    "dots and a column": (Ellipsis, 5),
    "block": (slice(2, 11), slice(7, 14)),
    "strides": (slice(None, None, 3), slice(1, None, 5)),
    "reversed": (slice(None, None, -1), slice(10, 2, -3)),
    "empty": (slice(5, 5), slice(None)),
    "both empty": (slice(9, 2), slice(0, 0)),
    "list": [1, 12, 1],
    "empty list": [],
    "paired": ([1, 12, 3], [0, 5, -1]),
    "array and integer": ([1, 12, 3], 4),
    "array and slice": (np.array([[9, 1], [0, 9]]), slice(2, 7)),
    "crossed": np.ix_([13, 0, 5], [2, 2]),
    "mask": np.arange(ROWS) % 3 == 0,
    "mask and slice": (slice(3, 6), np.arange(ROWS) > 9),
    "two masks": (np.arange(ROWS) < 3, np.arange(ROWS) >= 11),
    "no row in the mask": np.zeros(ROWS, bool),
    "broadcast": (np.array([[1], [12]]), np.array([3, 4, 5])),
}


@every_kind
@pytest.mark.parametrize("what", EXPLICIT)
def test_every_way_to_index(kind, what):
    K, dense = KINDS[kind]
    assert_same(K[EXPLICIT[what]], dense[EXPLICIT[what]])


WRONG = {
    "row": ROWS,
    "negative row": -ROWS - 1,
    "column": (0, ROWS),
    "array": [0, ROWS],
    "array of columns": (slice(None), [-ROWS - 1]),
    "too many": (0, 0, 0),
    "too many with dots": (0, Ellipsis, 0, 0),
    "short mask": np.ones(ROWS - 1, bool),
    "mask of two axes": np.ones((ROWS, ROWS), bool),
    "shapes that do not fit": ([1, 2], [1, 2, 3]),
    "text": "ntk",
    "float": 1.5,
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_out_of_range_is_an_index_error(what):
    K, _ = KINDS["upper"]
    with pytest.raises(IndexError):
        K[WRONG[what]]


@every_kind
def test_looks_like_a_matrix(kind):
    K, dense = KINDS[kind]
    assert (K.shape, K.ndim, len(K), K.dtype) == (dense.shape, 2, ROWS, dense.dtype)
    assert np.array_equal(np.asarray(K), dense)
    assert np.asarray(K, dtype=np.float64).dtype == np.float64
    assert "14 × 14" in repr(K)


def test_the_values_are_symmetric_and_true():
    K, dense = KINDS["upper"]
    assert np.array_equal(K[:], K[:].T)
    scaled, truth = KINDS["scaled float16"]
    assert scaled.scale == 2.0**-7
    np.testing.assert_allclose(truth, dense * 2.0**-7, rtol=1e-3, atol=1e-5)


def test_what_is_not_stored_yet_reads_as_nan():
    K, dense = stored()
    K._array[4:8, 8:12] = np.nan
    expected = dense.copy()
    expected[4:8, 8:12] = expected[8:12, 4:8] = np.nan
    np.testing.assert_array_equal(K[:], expected)


class Counting:
    """A Zarr array that notes what is read of it."""

    def __init__(self, array):
        self._array, self.read = array, []

    def __getattr__(self, name):
        return getattr(self._array, name)

    def __getitem__(self, region):
        self.read.append(tuple((part.start // SIDE, (part.stop - 1) // SIDE) for part in region))
        return self._array[region]


@given(slices(ROWS), slices(ROWS))
def test_only_the_tiles_that_are_needed_are_read_each_once_and_from_above_the_diagonal(rows, cols):
    K, _ = KINDS["upper"]
    counting = Counting(K._array)
    SymmetricArray(counting, is_upper=True, token="")[rows, cols]
    needed = {(i // SIDE, j // SIDE) for i in range(ROWS)[rows] for j in range(ROWS)[cols]}
    assert len(counting.read) == len(needed)
    tiles = [
        (first[0], second[0]) for first, second in counting.read if first[0] == first[1] and second[0] == second[1]
    ]
    assert sorted(tiles) == sorted((min(tile), max(tile)) for tile in needed)


# dask -----------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("chunks", ["as stored", 3, (5, -1), ROWS, ((1, 13), (7, 7))])
def test_dask_gives_the_same_matrix_in_any_chunks(kind, chunks):
    K, dense = KINDS[kind]
    array = K.to_dask() if chunks == "as stored" else K.to_dask().rechunk(chunks)
    assert_same(array.compute(scheduler="synchronous"), dense)


@given(slices(ROWS), slices(ROWS))
def test_dask_slices_the_same_matrix(rows, cols):
    K, dense = KINDS["upper"]
    assert_same(K.to_dask()[rows, cols].compute(scheduler="synchronous"), dense[rows, cols])


@every_kind
def test_dask_has_one_task_per_tile(kind):
    array = KINDS[kind][0].to_dask()
    assert array.chunks == ((4, 4, 4, 2), (4, 4, 4, 2))
    assert len(dict(array.__dask_graph__())) == 16


def test_dask_reads_one_tile_for_one_tile():
    K, dense = KINDS["upper"]
    counting = Counting(K._array)
    array = SymmetricArray(counting, is_upper=True, token="").to_dask()
    assert_same(array[9:11, 1:3].compute(scheduler="synchronous"), dense[9:11, 1:3])
    assert counting.read == [((0, 0), (2, 2))]


def test_dask_names_the_contents():
    K = KINDS["upper"][0]
    other = SymmetricArray(K._array, is_upper=True, token="91bc")
    assert K.to_dask().name == K.to_dask().name != other.to_dask().name
    assert K.to_dask().name != SymmetricArray(stored("float64")[0]._array, is_upper=True, token="3f2a").to_dask().name
    assert dask.base.tokenize(K) == dask.base.tokenize(stored()[0])


@given(st.integers(1, 20))
def test_reductions_over_dask_are_those_of_the_matrix(chunk):
    K, dense = KINDS["upper"]
    array = K.to_dask().rechunk(chunk)
    with dask.config.set(scheduler="synchronous"):
        np.testing.assert_allclose(array.sum(axis=0).compute(), dense.sum(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(da.diag(array).compute(), np.diag(dense))


def test_can_be_sent_to_a_worker(tmp_path):
    _, dense = KINDS["upper"]
    array = zarr.create_array(str(tmp_path / "k"), shape=dense.shape, chunks=(SIDE, SIDE), dtype="float32")
    array[...] = dense
    K = pickle.loads(pickle.dumps(SymmetricArray(array, is_upper=False, token="3f2a")))
    assert_same(K[:], dense)


def test_an_error_of_the_store_names_the_tile_that_is_stored():
    def damaged(_region):
        raise ValueError("checksum")

    K = KINDS["upper"][0]
    array = SimpleNamespace(
        attrs=K._array.attrs, shape=K.shape, dtype=K.dtype, chunks=(SIDE, SIDE), path="ntk_float32", store="memory"
    )
    broken = type("Broken", (SimpleNamespace,), {"__getitem__": lambda _self, region: damaged(region)})(**vars(array))
    with pytest.raises(OSError, match=r"^Tile \(0, 2\) of ntk_float32 in memory is damaged \(checksum\)"):
        SymmetricArray(broken, is_upper=True, token="")[9, 1]
    with pytest.raises(OSError, match=r"^Tile \(2, 0\) of"):
        SymmetricArray(broken, is_upper=False, token="")[9, 1]
