"""One triangle and then the other: the bytes of both at once, whatever interrupts it."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
import xarray as xr
import zarr
from cases import chosen, files_of, make_job
from zarr.storage import MemoryStore

import ntkgen
from ntkgen import cli
from ntkgen.errors import DiskSpaceError, InputError, StoreError, StoreLockedError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import tile_lock, write_lock
from ntkgen.files.place import folder_of
from ntkgen.plan.tiles import Tile
from ntkgen.store.mirror import mirror, mirror_tile
from ntkgen.store.opening import open_store
from ntkgen.store.tidy import tidy

SETTINGS = {
    "every dtype": {"dtypes": ("float16", "float32", "float64"), "tile_side": 9},
    "a matrix per output": {"output": "diagonal", "tile_side": 3},
    "one tile": {"tile_side": 33},
}


def compute(job, place, layout, **settings):
    return ntkgen.compute(job.module, job.x, store=place, layout=layout, certify=False, **settings)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The files of a small kernel in both layouts: 3 × 3 tiles, two dtypes."""
    job, files = make_job(num_samples=8), {}
    for layout in ("upper", "full"):
        path = tmp_path_factory.mktemp(layout) / "k.zarr"
        job.run(job.create(path, layout=layout))
        files[layout] = files_of(path)
    return files


@pytest.fixture
def upper(both, tmp_path):
    return open_store(write(both["upper"], tmp_path / "k.zarr"))


def write(files, path):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("what", chosen(SETTINGS, ["a matrix per output"]))
def test_a_mirrored_store_has_the_bytes_of_a_full_one(job, what, tmp_path):
    store = compute(job, tmp_path / "upper.zarr", "upper", **SETTINGS[what])
    before = store.kernel(output=0 if what == "a matrix per output" else None)[:]
    compute(job, tmp_path / "full.zarr", "full", **SETTINGS[what])
    reports = []
    mirror(store, lambda *report: reports.append(report))
    assert files_of(tmp_path / "upper.zarr") == files_of(tmp_path / "full.zarr")
    mirrored = open_store(store.folder)
    assert mirrored.is_complete
    assert np.array_equal(mirrored.kernel(output=0 if what == "a matrix per output" else None)[:], before)
    off_diagonal = store.grid.num_tiles - store.grid.num_blocks
    assert reports == [("mirrored", done, off_diagonal) for done in range(off_diagonal + 1)]


def test_others_read_the_whole_matrix_afterwards(upper):
    mirror(upper)
    K = upper.array[:]
    with xr.open_zarr(upper.path) as dataset:
        assert np.array_equal(dataset.ntk_float32.values, K)
        assert dataset.ntk_float32.attrs["storage_mode"] == "square"
    assert np.array_equal(zarr.open(upper.path, mode="r")["ntk_float32"][:], K)


def test_a_store_that_is_not_on_a_disk_is_mirrored_too(job):
    stores = {layout: MemoryStore() for layout in ("upper", "full")}
    for layout, store in stores.items():
        compute(job, store, layout, tile_side=9)
    mirror(open_store(stores["upper"], mode="r+"))
    folders = [folder_of(store) for store in stores.values()]
    contents = [{key: folder.read(key) for key in folder.sizes()} for folder in folders]
    assert contents[0] == contents[1]


def test_the_certificate_stays(job, tmp_path):
    store = ntkgen.compute(job.module, job.x, store=tmp_path / "k.zarr", layout="upper", tile_side=9)
    mirror(store)
    assert open_store(store.folder).manifest.certificate == store.manifest.certificate is not None


def test_a_full_store_is_left_alone(both, tmp_path):
    store = open_store(write(both["full"], tmp_path / "k.zarr"))
    assert mirror(store) == 0
    assert files_of(store.path) == both["full"]


# interrupted ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`, so that nothing cleans up, as after SIGKILL."""


def dying_after(monkeypatch, count, error=Killed):
    """Kill the process at a rename, after a given number of written files."""
    left, rename = [count], os.replace

    def replace(source, target, **options):
        left[0] -= 1
        if left[0] < 0:
            raise error
        rename(source, target, **options)

    monkeypatch.setattr(os, "replace", replace)
    return left


def test_stopped_at_any_write_it_is_readable_and_goes_on_to_equal_bytes(both, upper, tmp_path, monkeypatch):
    monkeypatch.setattr("ntkgen.store.writing.THREADS", 1)  # so that writes can be counted
    K = upper.array[:]
    for count in range(100):
        path = write(both["upper"], tmp_path / f"{count}.zarr")
        with monkeypatch.context() as patch:
            left = dying_after(patch, count)
            try:
                mirror(open_store(path))
                break
            except Killed:
                pass
        stopped = open_store(path)
        assert (stopped.manifest.layout, stopped.is_complete) == ("upper", True)
        assert np.array_equal(stopped.array[:], K)
        mirror(stopped)
        assert files_of(path) == both["full"], count
    assert left[0] == 0
    assert count == 2 * 3 + 2 + 1 + 1  # tiles in two dtypes, metadata of arrays, consolidated, manifest
    assert files_of(path) == both["full"]


def test_what_is_done_is_not_done_again(both, upper):
    done = {name: both["full"][name] for name in ("ntk_float16/c/1/0", "ntk_float32/c/1/0")}
    write(done | {"ntk_float32/c/2/0": both["full"]["ntk_float32/c/2/0"][:-1]}, upper.path)  # and one cut short
    seen = []
    assert mirror(upper, lambda *report: seen.append(report)) == 2
    assert seen[0] == ("mirrored", 1, 3)
    assert files_of(upper.path) == both["full"]


def test_transposes_of_tiles_that_are_made_anew_go(both, upper, monkeypatch):
    """Made on another machine a tile differs in its last bits, and an old transpose would not be its mirror."""
    with monkeypatch.context() as patch:
        dying_after(patch, 6)
        with pytest.raises(Killed):
            mirror(upper)
    assert (upper.path / "ntk_float32/c/1/0").exists()
    (upper.path / "ntk_float32/c/0/1").unlink()
    store, job = open_store(upper.path, mode="r+"), make_job(num_samples=8)
    tidy(store, job.samples)
    assert not (upper.path / "ntk_float32/c/1/0").exists()
    assert (upper.path / "ntk_float32/c/2/0").exists()
    job.resume(upper.path)
    mirror(upper)
    assert files_of(upper.path) == both["full"]


def test_a_full_disk_ends_it_and_it_goes_on(both, upper, monkeypatch):
    with monkeypatch.context() as patch:
        dying_after(patch, 3, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            mirror(upper)
    assert not list(upper.path.rglob("*.partial"))
    mirror(upper)
    assert files_of(upper.path) == both["full"]


# refused --------------------------------------------------------------------------------------------------------------


def test_an_unfinished_store_is_refused_and_the_missing_tiles_are_counted(both, upper):
    for name in ("ntk_float16/c/0/1", "ntk_float32/c/1/2"):
        (upper.path / name).unlink()
    before = files_of(upper.path)
    with pytest.raises(StoreError, match=r"expected 6 tiles.*2 tiles missing.*same `ntkgen compute`") as raised:
        mirror(upper)
    assert "\n" not in str(raised.value)
    assert files_of(upper.path) == before


def test_a_damaged_tile_is_named_and_not_mirrored(upper):
    data = bytearray((upper.path / "ntk_float32/c/0/2").read_bytes())
    data[7] ^= 1
    (upper.path / "ntk_float32/c/0/2").write_bytes(data)
    with pytest.raises(StoreError, match=r"^Tile \(0, 2\) of ntk_float32 in .*is damaged.*--repair") as raised:
        mirror(upper)
    assert "\n" not in str(raised.value)
    assert not (upper.path / "ntk_float32/c/2/0").exists()
    assert open_store(upper.path).manifest.layout == "upper"


def test_a_tile_that_vanishes_meanwhile_is_not_mirrored_as_nan(upper):
    (upper.path / "ntk_float32/c/0/2").unlink()
    with pytest.raises(StoreError, match=r"Tile \(0, 2\) of ntk_float32.*missing file"):
        mirror_tile(open_store(upper.path, mode="r+"), Tile(0, 2))
    assert not (upper.path / "ntk_float32/c/2/0").exists()


def test_a_rectangular_kernel_has_no_triangles(job, tmp_path):
    store = ntkgen.compute(job.module, job.x, job.x[:5], store=tmp_path / "k.zarr", certify=False)
    with pytest.raises(InputError, match=r"has no triangles.*33 × 15"):
        mirror(store)


def test_a_disk_without_room_is_refused_before_anything_is_written(both, upper, monkeypatch):
    monkeypatch.setattr(LocalFolder, "free_bytes", property(lambda self: 3 * (81 * 6 + 8) - 1))
    with pytest.raises(DiskSpaceError, match=r"1\.5 kB are needed and 1\.5 kB are free"):
        mirror(upper)
    assert files_of(upper.path) == both["upper"]
    monkeypatch.setattr(LocalFolder, "free_bytes", property(lambda self: 3 * (81 * 6 + 8)))
    mirror(upper)
    assert files_of(upper.path) == both["full"]


def test_it_writes_alone(both, upper, monkeypatch):
    monkeypatch.setattr("ntkgen.files.lock.ORPHAN_SECONDS", 0.0)
    with write_lock(upper.folder), pytest.raises(StoreLockedError):
        mirror(upper)
    with tile_lock(upper.folder), pytest.raises(StoreLockedError):
        mirror(upper)
    assert files_of(upper.path) == both["upper"]


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did_and_what_was_done_already(both, upper, capsys):
    assert cli.run(["mirror", str(upper.path), "-q", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["layout"], first["was_full"], first["tiles_mirrored"]) == ("full", False, 3)
    assert first["stored_bytes"] == sum(map(len, both["full"].values()))
    assert files_of(upper.path) == both["full"]
    assert cli.run(["mirror", str(upper.path), "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first | {"was_full": True, "tiles_mirrored": 0}
    assert cli.run(["mirror", str(upper.path)]) == 0
    assert "layout full, unchanged" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(upper, capsys):
    store = open_store(upper.path, mode="r+")
    store.set_manifest(dataclasses.replace(store.manifest, is_complete=False))
    assert cli.run(["mirror", str(upper.path)]) == 2
    assert cli.run(["mirror", str(upper.path.parent / "nothing.zarr")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
