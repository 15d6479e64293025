"""Kernels of the predecessor become stores of ours, bit by bit, or are refused with what is wrong with them."""

import json
import os
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from cases import files_of, in_turn

import ntkgen
from ntkgen import cli
from ntkgen.errors import DiskSpaceError, FingerprintError, InputError, StoreError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.place import folder_of
from ntkgen.store.describe import describe
from ntkgen.store.foreign import SourceDescription
from ntkgen.store.importing import import_kernel
from ntkgen.store.manifest import Manifest
from ntkgen.store.mirror import mirror
from ntkgen.store.opening import open_store

N, M, P = 14, 3, 400
DTYPES = ("float16", "float32", "float64")
STRIP = 15  # rows of the predecessor's chunks, which were 5000
FACTS = SourceDescription(N, M, P, tile_side=9)


def kernel_of(dtype):
    """What the predecessor computed: J Jᵀ / √P, rounded."""
    J = np.random.default_rng(0).standard_normal((N * M, P))
    return (J @ J.T / P**0.5).astype(dtype)


def write_array(path, K, zarr_format=3, strips=None):
    """Write strips of rows from their diagonal on, and leave zeros below."""
    rows = len(K)
    array = zarr.create_array(path, shape=K.shape, chunks=(STRIP, STRIP), dtype=K.dtype, zarr_format=zarr_format)
    for start in range(0, rows, STRIP)[:strips]:
        array[start : start + STRIP, start:] = K[start : start + STRIP, start:]
    return path


def write_raw(path, K):
    path.write_bytes(K.tobytes())
    return path


WRITERS = {
    "zarr 2": lambda folder, K: write_array(folder / f"ntk_{K.dtype}.zarr", K, 2),
    "zarr 3": lambda folder, K: write_array(folder / f"ntk_{K.dtype}.zarr", K, 3),
    "raw": lambda folder, K: write_raw(folder / f"ntk_{K.dtype}.bin", K),
}
every_format = pytest.mark.parametrize("kind", WRITERS)


@pytest.fixture
def source(tmp_path):
    return WRITERS["zarr 3"](tmp_path, kernel_of("float32"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "k.zarr"


def upper_of(K, side):
    """The stored part of our layout: NaN below the tiles on the diagonal."""
    blocks = np.arange(len(K)) // side
    return np.where(blocks[:, None] <= blocks[None, :], K, np.nan).astype(K.dtype)


@in_turn("kind dtype side", WRITERS, DTYPES, [9, None], always=[("float32", None)])
def test_every_stored_bit_is_kept_and_the_scale_makes_it_the_kernel(kind, dtype, side, tmp_path, target):
    K = kernel_of(dtype)
    source = WRITERS[kind](tmp_path, K)
    before = files_of(tmp_path)
    store = import_kernel(source, target, SourceDescription(N, M, P, tile_side=side))
    stored = zarr.open(target, mode="r")[f"ntk_{dtype}"]
    assert stored.dtype == dtype
    assert stored[:].tobytes() == upper_of(K, store.grid.side).tobytes()
    assert stored.attrs["scale_factor"] == P**0.5
    true = K.astype(np.float64) * P**0.5
    np.testing.assert_allclose(store.array[:], true, rtol=1e-6 if dtype != "float64" else 1e-15)
    np.testing.assert_allclose(store.array @ np.eye(N * M), true, rtol=1e-14)
    assert np.array_equal(store.read("diagonal"), np.diag(true))
    assert {name: data for name, data in files_of(tmp_path).items() if not name.startswith("k.zarr/")} == before


def test_the_kernel_is_symmetric_even_where_the_lower_triangle_was_other(tmp_path, target):
    """In a raw file both triangles were computed, in a chunk of zeros neither: the upper one counts."""
    K = kernel_of("float32")
    noisy = K + np.tril(np.full_like(K, 0.5), -1)
    store = import_kernel(write_raw(tmp_path / "ntk_float32.bin", noisy), target, FACTS)
    assert np.array_equal(store.array[:], store.array[:].T)
    assert np.array_equal(zarr.open(target, mode="r")["ntk_float32"][:9, :9], K[:9, :9])


def test_negative_zeros_are_kept(tmp_path, target):
    K = kernel_of("float32")
    K[0, 5] = K[5, 0] = K[0, 30] = K[30, 0] = -0.0
    import_kernel(WRITERS["zarr 3"](tmp_path, K), target, FACTS)
    stored = zarr.open(target, mode="r")["ntk_float32"]
    assert np.signbit([stored[0, 5], stored[5, 0], stored[0, 30]]).all()


def test_without_the_number_of_parameters_the_scale_stays_and_is_told(source, target):
    store = import_kernel(source, target, SourceDescription(N, M, tile_side=9))
    K = kernel_of("float32")
    assert np.array_equal(store.array[:], K)
    assert "scale_factor" not in zarr.open(target, mode="r")["ntk_float32"].attrs
    assert "normalised by 1/√P" in store.attributes["title"]
    described = describe(store)
    assert "normalised by 1/√P" in described.quantity
    assert (described.num_params, described.predecessor_factor, described.scale_factors) == (0, 1.0, {})


def test_an_imported_store_is_read_like_any_other(source, target):
    store = ntkgen.open(import_kernel(source, target, FACTS).path)
    true = kernel_of("float32") * np.float32(P**0.5)
    assert store.is_complete
    assert np.array_equal(store.array[:], true)
    assert np.array_equal(store.dask.compute(scheduler="synchronous"), true)
    assert np.array_equal(store.xarray.values, true)
    assert np.array_equal(store.read("row_sample"), np.repeat(np.arange(N), M))
    assert set(store.read("row_label")) == {-1}
    assert "42 × 42, float32, upper" in repr(store)
    with xr.open_zarr(target) as dataset:
        assert not {"logits", "underflow_float16"} & set(dataset)
        there = ~np.isnan(upper_of(true, 9))
        np.testing.assert_allclose(dataset.ntk_float32.values[there], true[there], rtol=1e-6)
    manifest = store.manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_arrays_are_those_that_are_there(dtype, tmp_path, target):
    store = import_kernel(WRITERS["raw"](tmp_path, kernel_of(dtype)), target, FACTS)
    assert sorted(array.name for array in store.arrays()) == sorted(zarr.open(target, mode="r").array_keys())
    assert store.float16_underflow is None
    described = describe(store)
    assert described.status == "complete"
    assert described.predecessor_factor == P**-0.5
    assert described.scale_factors == {f"ntk_{dtype}": P**0.5}


def test_errors_name_the_command_that_imports_what_is_missing(source, target):
    store = import_kernel(source, target, FACTS)
    (store.path / "ntk_float32/c/0/1").unlink()
    with pytest.raises(StoreError, match="then the same `ntkgen import` again"):
        _ = store.array[:]
    with pytest.raises(StoreError, match="Finish it with the same `ntkgen import`, then mirror it"):
        mirror(store)


def test_an_imported_store_is_mirrored(source, target):
    store = import_kernel(source, target, FACTS)
    mirror(store)
    K = kernel_of("float32")
    assert zarr.open(target, mode="r")["ntk_float32"][:].tobytes() == K.tobytes()
    before = files_of(target)
    import_kernel(source, target, FACTS)
    assert files_of(target) == before


def test_a_source_that_is_not_on_a_disk(target):
    memory = zarr.storage.MemoryStore()
    write_array(memory, kernel_of("float32"))
    store = import_kernel(folder_of(memory), folder_of(zarr.storage.MemoryStore()), FACTS)
    assert np.array_equal(store.array[:], kernel_of("float32") * np.float32(P**0.5))


# interrupted ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`, so that nothing cleans up, as after SIGKILL."""


@pytest.mark.slow
def test_stopped_at_any_write_it_goes_on_to_equal_bytes(source, tmp_path, monkeypatch):
    import_kernel(source, tmp_path / "k.zarr", FACTS)
    expected, rename = files_of(tmp_path / "k.zarr"), os.replace
    for count in range(0, 1000, 3):
        path, left = tmp_path / f"{count}.zarr", [count]

        def replace(origin, destination, left=left, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            rename(origin, destination, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                import_kernel(source, path, FACTS)
                break
            except Killed:
                pass
        if count % 3 == 0:
            import_kernel(source, path, FACTS)
            assert files_of(path) == expected, count
    assert files_of(path) == expected
    assert count > 15  # tiles


def test_a_damaged_store_is_mended_and_what_is_done_is_not_done_again(source, target):
    import_kernel(source, target, FACTS)
    before = files_of(target)
    for name in ("ntk_float32/c/0/3", "diagonal/c/2", "ntk_float32/zarr.json", "row_sample/zarr.json"):
        (target / name).unlink()
    seen = []
    import_kernel(source, target, FACTS, lambda *report: seen.append(report))
    assert seen == [("imported", 14, 15), ("imported", 15, 15)]
    assert files_of(target) == before


@pytest.mark.parametrize(
    "change", [{"num_params": 401}, {"num_params": None}, {"num_samples": 21, "num_outputs": 2}, {"tile_side": 12}]
)
def test_an_import_of_something_else_is_refused(source, target, change):
    import_kernel(source, target, FACTS)
    before = files_of(target)
    facts = SourceDescription(**{**vars(FACTS), **({"tile_side": 10} if "num_samples" in change else {}), **change})
    with pytest.raises(FingerprintError, match=next(iter(change))):
        import_kernel(source, target, facts)
    assert files_of(target) == before


def test_another_kernel_of_the_same_name_is_refused(source, target):
    import_kernel(source, target, FACTS)
    shutil.rmtree(source)
    write_array(source, kernel_of("float32") * 2)
    with pytest.raises(FingerprintError, match="diagonal"):
        import_kernel(source, target, FACTS)


def test_a_computed_store_is_not_imported_into(job, source, target):
    job.run(job.create(target))
    with pytest.raises(FingerprintError, match="imported_from"):
        import_kernel(source, target, FACTS)


# refused --------------------------------------------------------------------------------------------------------------


def refused(source, target, facts, error, match):
    with pytest.raises(error, match=match) as raised:
        import_kernel(source, target, facts)
    assert "\n" not in str(raised.value)
    assert not target.exists()


@pytest.mark.parametrize("strips", [0, 1, 2])
def test_a_conversion_that_was_interrupted_is_refused(tmp_path, target, strips):
    source = write_array(tmp_path / "ntk_float32.zarr", kernel_of("float32"), strips=strips)
    refused(source, target, FACTS, StoreError, r"not finished.*of 6 chunks missing, the first c/")


@pytest.mark.parametrize("key", ["c/0/2", "c/1/1"])
def test_a_chunk_that_was_not_copied_is_named(source, target, key):
    (source / key).unlink()
    refused(source, target, FACTS, StoreError, rf"1 of 6 chunks missing, the first {key}")


@every_format
def test_a_computation_that_was_interrupted_is_refused_with_the_row(kind, tmp_path, target):
    K = kernel_of("float32")
    K[20:, 20:] = 0
    refused(WRITERS[kind](tmp_path, K), target, FACTS, StoreError, r"not finished|found 0 in row 20, the first of 22")


def test_a_tile_of_zeros_is_refused_by_its_rows(tmp_path, target):
    K = kernel_of("float32")
    K[9:18, 27:36] = K[27:36, 9:18] = 0
    with pytest.raises(StoreError, match=r"only zeros in row 0 of rows 9–17, columns 27–35"):
        import_kernel(WRITERS["raw"](tmp_path, K), target, FACTS)
    assert not target.exists()  # nothing of it is left


def test_a_hole_smaller_than_a_tile_is_refused(tmp_path, target):
    K = kernel_of("float32")
    K[9:12, 27:36] = K[27:36, 9:12] = 0
    with pytest.raises(StoreError, match=r"only zeros in row 0 of rows 9–17, columns 27–35"):
        import_kernel(WRITERS["raw"](tmp_path, K), target, FACTS)


def test_a_store_is_not_written_into_its_source(source):
    with pytest.raises(InputError, match="expected another place"):
        import_kernel(source, source / "inside.zarr", FACTS)


@every_format
def test_overflow_on_the_diagonal_is_refused_before_anything_is_written(kind, tmp_path, target):
    K = kernel_of("float16")
    K[7, 7] = np.inf
    source = WRITERS[kind](tmp_path, K)
    refused(source, target, FACTS, StoreError, r"not finite on its diagonal.*inf in row 7.*float32 kernel")


def test_overflow_elsewhere_is_refused_by_its_rows(tmp_path, target):
    K = kernel_of("float16")
    K[3, 40] = np.nan
    with pytest.raises(StoreError, match=r"rows 0–8, columns 36–41.*1 of 54 entries infinite or NaN"):
        import_kernel(WRITERS["zarr 3"](tmp_path, K), target, FACTS)


def test_a_chunk_that_cannot_be_unpacked_is_located(source, target):
    (source / "c/0/2").write_bytes(b"no frame")
    with pytest.raises(StoreError, match=r"cannot be read at rows 0–8, columns 27–35"):
        import_kernel(source, target, FACTS)


@every_format
@pytest.mark.parametrize("facts", [SourceDescription(N + 1, M), SourceDescription(N, M - 1)])
def test_another_size_is_refused_with_both(kind, facts, tmp_path, target):
    source = WRITERS[kind](tmp_path, kernel_of("float32"))
    rows = facts.num_rows
    found = rf"{rows}² entries, {rows**2 * 4} bytes, found 7056 bytes, about 42²"
    refused(source, target, facts, InputError, found if kind == "raw" else rf"\({rows}, {rows}\), found \(42, 42\)")


def test_numbers_that_cannot_be_meant_are_refused(source, target):
    refused(source, target, SourceDescription(0, M), InputError, "samples.*at least 1, found 0")
    refused(source, target, SourceDescription(N, M, 0), InputError, "params.*at least 1, found 0")
    refused(source, target, SourceDescription(N, M, tile_side=10), InputError, "multiple of the 3 outputs")


def test_the_dtype_of_a_raw_file(tmp_path, target):
    source = write_raw(tmp_path / "kernel.bin", kernel_of("float32"))
    refused(source, target, FACTS, InputError, "The dtype of .* is unknown.*`dtype`")
    refused(source, target, SourceDescription(N, M, dtype="float16"), InputError, "does not hold a float16 kernel")
    store = import_kernel(source, target, SourceDescription(N, M, dtype="float32"))
    assert np.array_equal(store.array[:], kernel_of("float32"))


def test_a_dtype_that_an_array_says_itself_is_refused(source, target):
    refused(source, target, SourceDescription(N, M, dtype="float16"), InputError, "expected float16, found float32")


NOT_AN_ARRAY = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a group": zarr.create_group,
    "a vector": lambda path: zarr.create_array(path, shape=(3,), dtype="float32"),
    "integers": lambda path: zarr.create_array(path, shape=(42, 42), dtype="int32"),
    "damaged metadata": lambda path: (path.mkdir(), (path / "zarr.json").write_text("{")),
}


@pytest.mark.parametrize("what", NOT_AN_ARRAY)
def test_what_is_no_kernel_is_refused(what, tmp_path, target):
    source = tmp_path / "ntk_float32.zarr"
    NOT_AN_ARRAY[what](source)
    refused(source, target, FACTS, StoreError, r"ntk_float32\.zarr is")


def test_a_store_of_ours_needs_no_import(source, target, tmp_path):
    import_kernel(source, target, FACTS)
    refused(target, tmp_path / "again.zarr", FACTS, StoreError, "a store of this program")


def test_the_source_is_never_written_to(source):
    before = files_of(source)
    for target in (source, source.parent / "." / source.name):
        with pytest.raises(InputError, match="cannot be imported into its own folder"):
            import_kernel(source, target, FACTS)
    assert files_of(source) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(source, target, monkeypatch):
    monkeypatch.setattr(LocalFolder, "free_bytes", property(lambda self: 15 * 81 * 4 - 1))
    refused(source, target, FACTS, DiskSpaceError, r"4\.9 kB are needed and 4\.9 kB are free")


# the command ----------------------------------------------------------------------------------------------------------


def run(capsys, *args):
    code = cli.run([*map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_beside_the_source_and_is_shown_by_info(source, capsys):
    options = ("--samples", N, "--outputs", M, "--params", P, "--tile", 9)
    code, out, _ = run(capsys, "import", source, *options, "--json", "-q")
    target = source.with_name("ntk_float32.imported.zarr")
    assert (code, json.loads(out)) == (0, json.loads(json.dumps(describe(open_store(target)).to_json())))
    assert json.loads(out)["provenance"] == {"imported_from": "ntk_float32.zarr", "quantity": "J Jᵀ"}
    assert "scale_factor 20" in run(capsys, "import", source, *options)[1]
    code, out, _ = run(capsys, "info", target)
    assert code == 0
    assert "42 × 42" in out


def test_the_command_takes_a_raw_file_and_another_place(tmp_path, capsys):
    source = write_raw(tmp_path / "raw.bin", kernel_of("float64"))
    options = ("--samples", N, "--outputs", M, "--dtype", "float64", "--out", tmp_path / "deep" / "k.zarr")
    code, out, _ = run(capsys, "import", source, *options)
    assert code == 0
    assert "J Jᵀ/√P (normalised by 1/√P), 42 × 42" in out
    assert np.array_equal(ntkgen.open(tmp_path / "deep" / "k.zarr").array[:], kernel_of("float64"))
    assert run(capsys, "info", tmp_path / "deep" / "k.zarr")[0] == 0


def test_the_command_refuses_in_one_line(source, tmp_path, capsys):
    for path, samples in ((source, N + 1), (tmp_path, N), (tmp_path / "nothing.zarr", N)):
        code, out, err = run(capsys, "import", path, "--samples", samples, "--outputs", M)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert run(capsys, "import", source, "--samples", 0, "--outputs", M)[0] == 2
