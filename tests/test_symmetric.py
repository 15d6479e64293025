"""A stored kernel as a NumPy-like matrix: the same rules as the dense array, mirrored and scaled."""

import pickle
import threading
import time
from collections import Counter
from types import SimpleNamespace

import dask
import dask.array as da
import numpy as np
import pytest
import scipy.sparse.linalg
import zarr
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, slices
from zarr.storage import LocalStore, MemoryStore

from ntkgen.errors import InputError, ShapeError, StoreError
from ntkgen.store.view import TILES_AHEAD, SymmetricArray

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


def without(tile, *, is_complete, layout="upper"):
    """A kernel with one missing tile, and its expected entries."""
    K, dense = stored(layout=layout)
    rows, cols = (slice(at * SIDE, (at + 1) * SIDE) for at in tile)
    K._array[rows, cols] = np.nan  # as an absent chunk: Zarr removes one that holds nothing else
    expected = dense.copy()
    expected[rows, cols] = np.nan
    if layout == "upper":
        expected[cols, rows] = np.nan
    return SymmetricArray(K._array, is_upper=layout == "upper", token="", is_complete=is_complete), expected


LAYOUTS = pytest.mark.parametrize("layout", ["upper", "full"])
TILES = pytest.mark.parametrize("tile", [(0, 0), (1, 2), (0, 3), (3, 3)])


@LAYOUTS
@TILES
def test_what_is_not_stored_yet_reads_as_nan(layout, tile):
    K, expected = without(tile, is_complete=False, layout=layout)
    np.testing.assert_array_equal(K[:], expected)
    np.testing.assert_array_equal(K.to_dask().compute(scheduler="synchronous"), expected)


@LAYOUTS
@TILES
def test_what_is_gone_from_a_finished_store_is_an_error_where_it_is_read(layout, tile):
    K, expected = without(tile, is_complete=True, layout=layout)
    for i, j in np.ndindex(4, 4):
        region = tuple(slice(at * SIDE, (at + 1) * SIDE) for at in (i, j))
        if np.isfinite(expected[region]).all():
            assert_same(K[region], expected[region])
        else:
            with pytest.raises(StoreError, match=rf"^Tile \({tile[0]}, {tile[1]}\) of .* is missing"):
                K[region]
    with pytest.raises(StoreError, match=f"its chunk file .*c/{tile[0]}/{tile[1]}, .*Run `ntkgen verify memory://"):
        K[:]
    with pytest.raises(StoreError, match="is missing"):
        K.to_dask().sum().compute(scheduler="synchronous")


def test_the_file_of_a_plane_is_named():
    array = zarr.create_array({}, shape=(3, 6, 6), chunks=(1, 4, 4), dtype="float32", fill_value=np.nan)
    K = SymmetricArray(array, is_upper=True, token="", place=(2,), is_complete=True)
    for read in (lambda: K[5, 1], lambda: K @ np.ones(6)):
        with pytest.raises(StoreError, match=r"its chunk file /c/2/0/[01],"):
            read()


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


@every_kind
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 9])
def test_dask_takes_several_tiles_to_a_chunk(kind, tiles):
    K, dense = KINDS[kind]
    array = K.to_dask(tiles_per_chunk=tiles)
    assert array.chunks[0][0] == min(tiles * SIDE, ROWS)
    assert len(dict(array.__dask_graph__())) == (-(-4 // tiles)) ** 2
    assert_same(array.compute(scheduler="synchronous"), dense)


@pytest.mark.parametrize("tiles", [0, -1])
def test_dask_needs_a_tile_to_a_chunk(tiles):
    with pytest.raises(InputError, match=f"tiles_per_chunk is {tiles}"):
        KINDS["upper"][0].to_dask(tiles_per_chunk=tiles)


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_slice_of_dask_reads_the_tiles_it_needs(tiles):
    K, dense = KINDS["upper"]
    counting = Counting(K._array)
    array = SymmetricArray(counting, is_upper=True, token="").to_dask(tiles_per_chunk=tiles)
    assert_same(array[:, :6].compute(scheduler="synchronous"), dense[:, :6])
    found = [(rows[0], cols[0]) for rows, cols in counting.read]
    assert sorted(found) == [(0, 0), (0, 1), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


def test_dask_is_quick_with_many_tiles():
    """In a second on a new machine; what grows with the square of the tiles would take minutes on any."""
    array = zarr.create_array(MemoryStore(), shape=(1198, 1198), chunks=(4, 4), dtype="float32", fill_value=np.nan)
    counting = Counting(array)
    K = SymmetricArray(counting, is_upper=True, token="3f2a")
    started = time.process_time()
    kernel = K.to_dask()
    assert time.process_time() - started < 20
    assert kernel.numblocks == (300, 300)
    started = time.process_time()
    (part,) = dask.optimize(kernel[:, :50])
    assert time.process_time() - started < 20
    assert len(dict(part.__dask_graph__())) <= 300 * 13 * 2  # a read and its alias
    assert K.to_dask(tiles_per_chunk=30).numblocks == (10, 10)
    assert counting.read == []


def test_dask_names_the_contents():
    K = KINDS["upper"][0]
    other = SymmetricArray(K._array, is_upper=True, token="91bc")
    assert K.to_dask().name == K.to_dask().name != other.to_dask().name
    assert K.to_dask().name != K.to_dask(tiles_per_chunk=2).name
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


def test_a_damaged_file_is_named_with_what_to_do(tmp_path):
    K = on_disk(tmp_path)
    file = tmp_path / "k.zarr/ntk_float32/c/1/2"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    for read in (lambda: K[9, 5], lambda: K @ np.ones(ROWS)):
        with pytest.raises(StoreError, match=r"^Tile \(1, 2\) of ntk_float32 in .* is damaged") as caught:
            read()
        assert "its chunk file ntk_float32/c/1/2 " in str(caught.value)
        assert f"Run `ntkgen verify --repair {tmp_path}/k.zarr` and" in str(caught.value)
        assert "emove" not in str(caught.value)


def on_disk(path, make_store=LocalStore, layout="upper"):
    """A kernel in files as those of a kernel store."""
    K, _ = stored(layout=layout)
    crc = zarr.codecs.Crc32cCodec()
    settings = {"shape": K.shape, "chunks": (SIDE, SIDE), "dtype": "float32", "fill_value": np.nan, "compressors": crc}
    array = zarr.create_array(make_store(path / "k.zarr"), name="ntk_float32", **settings)
    for i in range(0, ROWS, SIDE):
        for j in range(i if layout == "upper" else 0, ROWS, SIDE):
            array[i : i + SIDE, j : j + SIDE] = K._array[i : i + SIDE, j : j + SIDE]
    return SymmetricArray(array, is_upper=layout == "upper", token="")


# products -------------------------------------------------------------------------------------------------------------


def integers(shape, limit, seed=0):
    """Whole numbers, whose sums and products float64 has exactly: equal in any order."""
    return np.random.default_rng([seed, *shape]).integers(-limit, limit + 1, shape).astype(np.float64)


def kernel_of(dense, side, dtype="float64", scale=1.0, layout="full"):
    """Store a matrix."""
    array = zarr.create_array({}, shape=dense.shape, chunks=(side, side), dtype=dtype, fill_value=np.nan)
    array.attrs.update({} if scale == 1 else {"scale_factor": scale})
    for i in range(0, dense.shape[0], side):
        for j in range(i if layout == "upper" else 0, dense.shape[1], side):
            array[i : i + side, j : j + side] = dense[i : i + side, j : j + side]
    return SymmetricArray(array, is_upper=layout == "upper", token="", is_complete=True)


widths = st.none() | st.integers(0, 3)  # none: a vector
sides, lengths = st.integers(1, 6), st.integers(1, 14)
stored_as = st.sampled_from([("float16", 2.0**-7), ("float16", 1.0), ("float32", 1.0), ("float64", 1.0)])


def vectors(length, width):
    return integers((length,) if width is None else (length, width), 100, seed=1)


@given(lengths, sides, widths, stored_as, st.sampled_from(["upper", "full"]), st.booleans())
def test_a_product_is_that_of_the_dense_matrix(length, side, width, kind, layout, transposed):
    J = integers((length, 2), 3)
    K, V = kernel_of(J @ J.T, side, *kind, layout=layout), vectors(length, width)
    assert_same(K.matmat(V, transposed=transposed), (J @ J.T) @ V * kind[1])
    assert_same(K @ V, (J @ J.T) @ V * kind[1])
    assert_same(K @ V, np.asarray(K, np.float64) @ V)


@given(lengths, lengths, sides, widths, stored_as)
def test_a_rectangular_kernel_has_a_product_on_either_side(rows, cols, side, width, kind):
    dense = integers((rows, cols), 9)
    K = kernel_of(dense, side, *kind)
    assert_same(np.asarray(K, np.float64), dense * kind[1])
    assert_same(K @ vectors(cols, width), dense @ vectors(cols, width) * kind[1])
    transposed = K.matmat(vectors(rows, width), transposed=True)
    assert_same(transposed, dense.T @ vectors(rows, width) * kind[1])


def test_a_product_is_made_in_float64():
    dense = np.array([[1.0, 2.0**-20], [2.0**-20, 1.0]])
    for V in (np.ones(2, np.float32), [1, 1], np.array([True, True])):
        assert_same(kernel_of(dense, 1, "float32") @ V, np.full(2, 1 + 2.0**-20))


@pytest.mark.parametrize("layout", ["upper", "full"])
def test_a_product_reads_each_file_once(layout, tmp_path):
    read = Counter()

    class CountingStore(LocalStore):
        async def get(self, key, *args, **kwargs):
            read[key] += 1
            return await super().get(key, *args, **kwargs)

    K = on_disk(tmp_path, CountingStore, layout)
    read.clear()
    K @ np.ones((ROWS, 3))
    assert sorted(read) == sorted(
        f"ntk_float32/c/{i}/{j}" for i in range(4) for j in range(i if layout == "upper" else 0, 4)
    )
    assert set(read.values()) == {1}


class Watched(Counting):
    """A Zarr array that calls a function before each read."""

    def __init__(self, array, before):
        super().__init__(array)
        self._before = before

    def __getitem__(self, region):
        self._before(region)
        return super().__getitem__(region)


def test_the_next_tiles_are_read_while_one_is_multiplied_and_no_more():
    started, done, ahead = [], [], []
    is_read = threading.Condition()

    def before(_region):
        with is_read:
            started.append(1)
            ahead.append(len(started) - len(done))
            is_read.notify()

    def step():  # as long as a product that takes longer than reading what may be read
        with is_read:
            assert is_read.wait_for(lambda: len(started) == min(10, len(done) + 1 + TILES_AHEAD), timeout=30)
            done.append(1)

    K = SymmetricArray(Watched(KINDS["upper"][0]._array, before), is_upper=True, token="")
    K.matmat(np.ones(ROWS), step=step)
    assert len(started) == len(done) == 10
    assert max(ahead) == TILES_AHEAD + 1


def test_a_product_has_the_same_bits_whichever_tile_is_read_first():
    V = np.random.default_rng(1).normal(size=(ROWS, 3))

    def late(region):
        time.sleep(0.02 * (region[1].start == region[0].start))

    array = KINDS["upper"][0]._array
    products = [SymmetricArray(a, is_upper=True, token="") @ V for a in (array, Watched(array, late))]
    assert_same(*products)
    np.testing.assert_allclose(products[0], KINDS["upper"][1].astype(np.float64) @ V, rtol=1e-12, atol=1e-12)


@LAYOUTS
@TILES
@pytest.mark.parametrize("is_complete", [True, False])
def test_a_product_needs_every_tile(layout, tile, is_complete):
    K, _ = without(tile, is_complete=is_complete, layout=layout)
    threads, steps = threading.active_count(), []
    advice = "Run `ntkgen verify " if is_complete else "Is the store unfinished"
    with pytest.raises(StoreError, match=rf"^Tile \({tile[0]}, {tile[1]}\) of .* is missing: .*{advice}"):
        K.matmat(np.zeros(ROWS), step=lambda: steps.append(1))
    places = [(i, j) for i in range(4) for j in range(i if layout == "upper" else 0, 4)]
    assert len(steps) == places.index(tile)
    assert threading.active_count() == threads


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_product_with_what_is_not_finite_names_the_tile(value):
    K, _ = stored()
    K._array[5, 9] = value
    for V in (np.ones(ROWS), np.ones((ROWS, 2))):
        with pytest.raises(StoreError, match=r"^Tile \(1, 2\) of .* not finite: .* 1 of 16 entries .*verify --repair"):
            K @ V


def test_vectors_that_are_not_finite_are_not_the_store_s_fault():
    V = np.ones(ROWS)
    V[3] = np.nan
    assert np.isnan(KINDS["upper"][0] @ V).all()


RECTANGLE = kernel_of(integers((5, 3), 9), 2)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (3, 1, 1), (4,)])
def test_vectors_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError, match=r"the kernel of 5 × 3: expected \(3,\) or \(3, vectors\), found \("):
        RECTANGLE @ np.ones(shape)
    if shape[:1] != (5,):
        with pytest.raises(ShapeError, match=r"expected \(5,\) or \(5, vectors\)"):
            RECTANGLE.matmat(np.ones(shape), transposed=True)


@pytest.mark.parametrize("wrong", [np.ones(3) * 1j, np.array(["a", "b", "c"]), scipy.sparse.eye(3)])
def test_what_is_not_of_real_numbers_is_refused(wrong):
    with pytest.raises(InputError, match="real numbers"):
        RECTANGLE @ wrong


@every_kind
def test_scipy_takes_it_as_an_operator(kind):
    K, dense = KINDS[kind]
    operator, exact = K.to_scipy(), dense.astype(np.float64)
    assert (operator.shape, operator.dtype) == ((ROWS, ROWS), np.float64)
    identity = np.eye(ROWS)
    for product in (operator @ identity, operator.T @ identity, operator.H @ identity):
        np.testing.assert_allclose(product, exact)
    for product in (operator.matmat(identity[:, :1]), operator.rmatmat(identity[:, :1])):
        assert_same(product, exact[:, :1])
    found = scipy.sparse.linalg.eigsh(operator, k=3, v0=np.ones(ROWS), return_eigenvectors=False)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(exact)[-3:], rtol=1e-10)


def test_scipy_takes_a_rectangular_kernel():
    dense, operator = RECTANGLE[:], RECTANGLE.to_scipy()
    assert_same(operator @ np.eye(3), dense)
    assert_same(operator.T @ np.eye(5), dense.T)
    found = scipy.sparse.linalg.svds(operator, k=2, v0=np.ones(3), return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(found), np.linalg.svd(dense, compute_uv=False)[1::-1], rtol=1e-10)


# the first rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["upper", "full"])
def test_the_first_rows_are_a_kernel_by_themselves(kind):
    K, dense = KINDS[kind]
    part = K.leading(9)
    assert part.shape == (9, 9)
    assert_same(part[:, :], dense[:9, :9])
    V = np.random.default_rng(5).normal(size=(9, 2))
    assert np.allclose(part @ V, dense[:9, :9].astype(np.float64) @ V, rtol=1e-12)
    assert part.tiles() == [(i, j) for i in range(3) for j in range(i, 3)]  # one triangle, also where both are stored
    assert dask.base.tokenize(part) != dask.base.tokenize(K)
    assert K.shape == (ROWS, ROWS)


@pytest.mark.parametrize("rows", [0, ROWS + 1])
def test_what_is_no_leading_part_is_refused(rows):
    with pytest.raises(ShapeError, match=f"{ROWS} × {ROWS} has no leading part of {rows} rows"):
        KINDS["upper"][0].leading(rows)
