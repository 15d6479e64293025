"""The kernel on disk: resumable at every write, readable by everybody, and never silently wrong."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from cases import TOLERANCES, Call, Job, chosen, files_of, in_turn, make_job, relative_error
from torch import nn

import ntkgen
from ntkgen.errors import DivergedError, FingerprintError, StoreError, StoreLockedError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.plan.tiles import Tile
from ntkgen.store.manifest import Manifest, check_identity
from ntkgen.store.opening import has_store, open_store
from ntkgen.store.provenance import Provenance

LAYOUTS = ("full", "upper")
DTYPES = {"half and single": ("float16", "float32"), "double": ("float64",)}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A store that was computed without interruption, and its bytes."""

    job: Job
    path: Path
    files: dict[str, bytes]

    def copy_to(self, path: Path) -> Path:
        return Path(shutil.copytree(self.path, path))


@pytest.fixture(scope="session")
def finished(job, tmp_path_factory):
    """Finished stores by layout."""
    stores = {}
    for layout in LAYOUTS:
        path = tmp_path_factory.mktemp(layout) / "k.zarr"
        job.run(job.create(path, layout=layout))
        stores[layout] = Finished(job, path, files_of(path))
    return stores


@pytest.fixture
def copied(finished, tmp_path):
    """A finished store of the layout `upper` to be damaged."""
    return finished["upper"].copy_to(tmp_path / "k.zarr")


def chunks_of(files):
    return [name for name in files if "/c/" in name and name.startswith(("ntk_", "diagonal", "logits"))]


# what is there in the end ---------------------------------------------------------------------------------------------


@in_turn("what layout", DTYPES, LAYOUTS)
def test_the_finished_kernel_is_the_reference(layout, what, tmp_path):
    dtypes = DTYPES[what]
    job = make_job(precision="float64" if what == "double" else "float32")
    store = job.run(job.create(tmp_path / "k.zarr", dtypes, layout))
    assert store.is_complete
    for dtype in dtypes:
        assert relative_error(store.kernel(dtype)[:], job.reference) < TOLERANCES[dtype]
    assert relative_error(store.array[:], job.reference) < TOLERANCES[dtypes[-1]]
    assert store.array.dtype == dtypes[-1]


@every_layout
def test_a_store_has_a_file_per_tile_of_a_known_size(finished, layout):
    store = open_store(finished[layout].path)
    for dtype, itemsize in (("float16", 2), ("float32", 4)):
        chunks = {name: len(data) for name, data in finished[layout].files.items() if f"ntk_{dtype}/c/" in name}
        pairs = [(i, j) for i in range(4) for j in range(4) if layout == "full" or i <= j]
        assert set(chunks) == {f"ntk_{dtype}/c/{i}/{j}" for i, j in pairs}
        assert set(chunks.values()) == {9 * 9 * itemsize + 4}
    assert store.stored_bytes == sum(map(len, finished[layout].files.values()))


def test_both_layouts_hold_the_same_tiles(finished):
    full, upper = (open_store(finished[layout].path) for layout in LAYOUTS)
    for dtype in ("float16", "float32"):
        assert np.array_equal(full.kernel(dtype)[:], upper.kernel(dtype)[:])
    assert all(finished["full"].files[name] == data for name, data in finished["upper"].files.items() if "/c/" in name)


def test_the_kernel_is_exactly_symmetric(finished):
    for layout in LAYOUTS:
        K = open_store(finished[layout].path).array[:]
        assert np.array_equal(K, K.T)


def test_two_runs_give_equal_bytes(job, finished, tmp_path):
    job.run(job.create(tmp_path / "k.zarr"))
    assert files_of(tmp_path / "k.zarr") == finished["upper"].files


def test_a_finished_store_is_run_again_without_effect(job, finished, copied):
    job.resume(copied)
    assert files_of(copied) == finished["upper"].files


def test_coordinates_say_what_a_row_is(job, finished):
    store = open_store(finished["upper"].path)
    samples, outputs = np.divmod(np.arange(11 * 3), 3)
    for axis in ("row", "col"):
        assert np.array_equal(store.read(f"{axis}_sample"), samples)
        assert np.array_equal(store.read(f"{axis}_output"), outputs)
        assert np.array_equal(store.read(f"{axis}_label"), samples % 5)
    assert np.array_equal(store.read("sample_index"), np.arange(11) * 2)


def test_the_manifest_survives_the_disk(finished):
    path, job = finished["upper"].path, finished["upper"].job
    manifest = open_store(path).manifest
    assert manifest.plan == job.plan
    assert (manifest.dtypes, manifest.layout, manifest.is_complete) == (("float16", "float32"), "upper", True)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    on_disk = json.loads((path / "zarr.json").read_text())["attributes"]["ntkgen"]
    assert on_disk == json.loads(json.dumps(manifest.to_json()))
    assert "ntkgen" not in open_store(path).attributes


def test_the_fingerprint_is_of_the_identity_alone(finished):
    manifest = open_store(finished["upper"].path).manifest
    assert dataclasses.replace(manifest, provenance=Provenance(), replanned=3).fingerprint == manifest.fingerprint
    other = {**manifest.identity, "network": "0000"}
    assert dataclasses.replace(manifest, identity=other).fingerprint != manifest.fingerprint
    reordered = dict(reversed(manifest.identity.items()))
    assert dataclasses.replace(manifest, identity=reordered).fingerprint == manifest.fingerprint


# resume ---------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an `Exception`, so that nothing cleans up, as after SIGKILL."""


def dying_after(monkeypatch, count, error=Killed):
    """Kill the process at a rename, after a given number of written files. Return the number of files left."""
    left, rename = [count], os.replace

    def replace(source, target, **options):
        left[0] -= 1
        if left[0] < 0:
            raise error
        rename(source, target, **options)

    monkeypatch.setattr(os, "replace", replace)
    return left


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", chosen(LAYOUTS, ["full"]))
def test_stopped_at_any_write_and_resumed_gives_equal_bytes(layout, step, tmp_path, monkeypatch):
    """At writes of a tile and its mirror, of a block of the diagonal, of metadata, of the last manifest."""
    job = make_job(num_samples=5)  # 2 × 2 tiles, the last ones ragged
    job.run(job.create(tmp_path / "k.zarr", layout=layout))
    expected = files_of(tmp_path / "k.zarr")
    for count in range(0, 1000, step):
        path = tmp_path / f"{count}.zarr"
        store = job.create(path, layout=layout)
        with monkeypatch.context() as patch:
            left = dying_after(patch, count)
            try:
                job.run(store)
            except Killed:
                assert list(path.rglob("*.partial"))
        if left[0] >= 0:
            break
        job.resume(path)
        assert files_of(path) == expected, count
    assert files_of(path) == expected
    assert count > len(chunks_of(expected))


@pytest.mark.slow
@in_turn("stage layout", ["diagonal", "tiles"], LAYOUTS)
def test_stopped_after_any_number_of_tiles_and_resumed_gives_equal_bytes(job, finished, layout, stage, tmp_path):
    total = {"diagonal": 4, "tiles": 10}[stage]
    # the last: after the diagonal and before the kernels are created, or after all tiles
    for stop in (0, 1, total // 2, total):

        def report(what, done, _total, stop=stop):
            if (what, done) == (stage, stop):
                raise InterruptedError

        path = tmp_path / f"{stop}.zarr"
        store = job.create(path, layout=layout)
        with pytest.raises(InterruptedError):
            job.run(store, report=report)
        reopened = open_store(path)
        assert not reopened.is_complete
        assert len(reopened.missing_blocks()) == (4 - stop if stage == "diagonal" else 0)
        assert len(reopened.missing_tiles()) == (10 if stage == "diagonal" else 10 - stop)
        job.resume(path)
        assert files_of(path) == finished[layout].files


@pytest.mark.slow
def test_stopped_again_and_again_gives_equal_bytes(job, finished, tmp_path, monkeypatch):
    path = tmp_path / "k.zarr"
    job.create(path)
    for _ in range(100):
        with monkeypatch.context() as patch:
            dying_after(patch, 3)
            try:
                job.resume(path)
                break
            except Killed:
                pass
    assert files_of(path) == finished["upper"].files


# One process that imports everything and forks a child for each kill: only the imports take long.
KILLED_PROCESS = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import cases

def run(path, layout, count):
    job, rename = cases.make_job(), os.replace
    store = job.create(path, layout=layout)

    def replace(source, target, **options):
        chunks = [file for file in path.rglob("c/**/*") if file.is_file() and file.suffix != ".partial"]
        if len(chunks) >= count:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **options)

    os.replace = replace
    job.run(store)

cases.torch.set_num_threads(1)
for argument in sys.argv[2:]:
    path, layout, count = argument.split(":")
    if os.fork() == 0:
        run(Path(path), layout, int(count))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
COORDINATE_CHUNKS = 7
# in the diagonal, before the first tile, among the tiles, and once all are there
KILL_AT = {"upper": (3, 25), "full": (30,)}


def test_killed_processes_are_resumed_to_equal_bytes(job, finished, tmp_path):
    places = {
        (layout, count): tmp_path / f"{layout}{count}.zarr" for layout, counts in KILL_AT.items() for count in counts
    }
    arguments = [f"{path}:{layout}:{COORDINATE_CHUNKS + count}" for (layout, count), path in places.items()]
    command = [sys.executable, "-c", KILLED_PROCESS, str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(places)
    for (layout, count), path in places.items():
        left = files_of(path)
        assert any(name.endswith(".partial") for name in left)
        assert sum("/c/" in name and not name.endswith(".partial") for name in left) == COORDINATE_CHUNKS + count
        job.resume(path)
        assert files_of(path) == finished[layout].files


def test_a_full_disk_ends_the_run_and_is_resumed_to_equal_bytes(job, finished, tmp_path, monkeypatch):
    path = tmp_path / "k.zarr"
    store = job.create(path)
    with monkeypatch.context() as patch:
        dying_after(patch, 20, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            job.run(store)
    assert not list(path.rglob("*.partial"))
    job.resume(path)
    assert files_of(path) == finished["upper"].files


def test_a_kernel_of_zeros_is_done_like_any_other(tmp_path):
    """Without biases and with inputs of zero every Jacobian is zero, and so is every tile."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    job = make_job(module=module, scale=0)
    store = job.create(tmp_path / "k.zarr")
    job.run(store)
    assert store.is_complete
    assert store.missing_tiles() == []
    assert np.array_equal(store.kernel("float16")[:], np.zeros((33, 33)))
    assert len([name for name in files_of(store.path) if name.startswith("ntk_float16/c/")]) == 10


# damage ---------------------------------------------------------------------------------------------------------------


def damage_chunk(file, damage):
    data = file.read_bytes()
    if damage == "removed":
        file.unlink()
        return
    damaged = {"empty": b"", "one byte short": data[:-1], "one byte long": data + b"0", "half": data[: len(data) // 2]}
    file.write_bytes(damaged[damage])


DAMAGES = ["removed", "one byte short", "one byte long", "empty", "half"]


@in_turn("damage layout", chosen(DAMAGES, DAMAGES[:3]), LAYOUTS)
def test_a_chunk_that_is_not_whole_is_missing_and_made_anew(job, finished, layout, damage, tmp_path):
    path, files = finished[layout].copy_to(tmp_path / "k.zarr"), finished[layout].files
    for name in chunks_of(files):
        damage_chunk(path / name, damage)
        store = open_store(path)
        assert not store.is_complete
        if name.startswith("ntk_"):
            i, j = sorted(map(int, name.split("/")[2:]))
            assert (store.missing_tiles(), store.missing_blocks()) == ([Tile(i, j)], [])
        else:
            assert (store.missing_tiles(), store.missing_blocks()) == ([], [int(name.split("/")[2])])
        (path / name).write_bytes(files[name])
    for name in chunks_of(files):
        damage_chunk(path / name, damage)
    job.resume(path)
    assert files_of(path) == files


BAD = ["a byte within", "checksum", "half", "first byte", "zeros", "empty"]


@in_turn("damage dtype", chosen(BAD, BAD[:3]), ["float16", "float32"])
def test_a_damaged_tile_is_named_and_never_read(finished, copied, dtype, damage):
    for name in [name for name in finished["upper"].files if name.startswith(f"ntk_{dtype}/c/")]:
        whole = (copied / name).read_bytes()
        bad = bytearray(whole)
        if damage in {"first byte", "a byte within", "checksum"}:
            bad[{"first byte": 0, "a byte within": len(bad) // 2, "checksum": -1}[damage]] ^= 1
        bad = {"zeros": bytes(len(bad)), "half": bad[: len(bad) // 2], "empty": b""}.get(damage, bytes(bad))
        (copied / name).write_bytes(bad)
        K = open_store(copied).kernel(dtype)
        i, j = map(int, name.split("/")[2:])
        for key in ((9 * i, 9 * j), (9 * j, 9 * i), (slice(None), slice(None)), (slice(9 * i, 9 * i + 2), slice(None))):
            with pytest.raises(StoreError, match=rf"^Tile \({i}, {j}\) of ntk_{dtype} .*damaged") as raised:
                K[key]
            assert "\n" not in str(raised.value)
        with pytest.raises(StoreError, match="damaged"):
            K.to_dask().compute(scheduler="synchronous")
        (copied / name).write_bytes(whole)
    assert not np.isnan(open_store(copied).kernel(dtype)[:]).any()


@pytest.mark.parametrize("name", ["diagonal", "logits", "row_label", "sample_index"])
def test_a_damaged_small_array_is_named(copied, name):
    chunk = next(file for file in (copied / name / "c").rglob("*") if file.is_file())
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(StoreError, match=rf"{name}.*damaged"):
        open_store(copied).read(name)


# identity, format, lock -----------------------------------------------------------------------------------------------


def test_a_store_of_something_else_is_refused_and_what_differs_is_named(finished):
    path, manifest = finished["upper"].path, open_store(finished["upper"].path).manifest
    check_identity(path, manifest, {"samples": "91bc", "network": "3f2a"})
    with pytest.raises(FingerprintError, match=r"k\.zarr .*\(network 3f2a, now 91bc\).*another path") as raised:
        check_identity(path, manifest, {"network": "91bc", "samples": "91bc"})
    assert "\n" not in str(raised.value)
    with pytest.raises(FingerprintError, match="samples 91bc, now None"):
        check_identity(path, manifest, {"network": "3f2a"})
    with pytest.raises(FingerprintError, match="outputs None, now centered"):
        check_identity(path, manifest, {"network": "3f2a", "samples": "91bc", "outputs": "centered"})


def rewrite(path, **changes):
    """Change the manifest on disk."""
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["ntkgen"].update(changes)
    (path / "zarr.json").write_text(json.dumps(metadata))


def test_another_format_version_is_refused(copied):
    rewrite(copied, format_version=99, version="9.9")
    with pytest.raises(StoreError, match=r"format version 99.*reads version 3.*ntkgen 9\.9") as raised:
        ntkgen.open(copied)
    assert "\n" not in str(raised.value)


def foreign_group(path):
    zarr.create_group(path, attributes={"title": "temperatures"})


def foreign_group_with_our_attribute(path):
    zarr.create_group(path, attributes={"ntkgen": {"made": "by hand"}})


def foreign_array(path):
    zarr.create_array(path, shape=(3,), dtype="float32")


NOT_A_STORE = {
    "nothing": (lambda path: None, "found nothing"),
    "an empty folder": (Path.mkdir, "found an empty folder"),
    "a folder of something else": (lambda path: (path.mkdir(), (path / "notes.txt").touch()), "found other files"),
    "a file": (Path.touch, "found a file"),
    "another program's group": (foreign_group, "title"),
    "another program's group with our attribute": (foreign_group_with_our_attribute, "kernel store|format version"),
    "another program's array": (foreign_array, "array"),
    "null": (lambda path: (path.mkdir(), (path / "zarr.json").write_text("null")), "damaged|kernel store"),
    "damaged metadata": (lambda path: (path.mkdir(), (path / "zarr.json").write_text("{")), "damaged|JSON"),
    "empty metadata": (lambda path: (path.mkdir(), (path / "zarr.json").touch()), "damaged|JSON"),
}


@pytest.mark.parametrize("what", NOT_A_STORE)
def test_what_is_not_a_store_is_refused_and_left_alone(what, tmp_path):
    make, message = NOT_A_STORE[what]
    path = tmp_path / "k.zarr"
    make(path)
    before = files_of(tmp_path)
    with pytest.raises(StoreError, match=message) as raised:
        ntkgen.open(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert files_of(tmp_path) == before


def test_one_array_of_a_store_is_not_a_store(finished):
    with pytest.raises(StoreError, match="array"):
        ntkgen.open(finished["upper"].path / "ntk_float32")


def test_a_store_is_opened_by_text_and_by_address(finished):
    path = finished["upper"].path
    assert ntkgen.open(str(path)).manifest == ntkgen.open(f"file://{path}").manifest == ntkgen.open(path).manifest


def test_a_store_that_is_opened_for_reading_cannot_be_written(job, copied):
    before = files_of(copied)
    with pytest.raises(ValueError, match="read-only"):
        open_store(copied).commit(Tile(0, 0), np.zeros((9, 9), np.float32))
    assert files_of(copied) == before


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "runs" / "k.zarr"
    with write_lock(path), pytest.raises(StoreLockedError, match=r"Another process is writing .*k\.zarr"):  # noqa: PT012
        with write_lock(tmp_path / "runs" / "other.zarr"):
            pass
        with write_lock(path):
            pass
    with write_lock(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_the_lock_is_released_after_an_error_and_by_a_death(tmp_path):
    path = tmp_path / "k.zarr"
    with pytest.raises(KeyError), write_lock(path):
        raise KeyError
    (tmp_path / "k.zarr.lock").touch()  # what a killed process leaves
    with write_lock(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_taken_while_the_former_holder_leaves_excludes_the_next(tmp_path, monkeypatch):
    """The former holder removes the lock file between our opening and our locking of it."""
    import fcntl

    path, flock = tmp_path / "k.zarr", fcntl.flock

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "k.zarr.lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with write_lock(path), pytest.raises(StoreLockedError), write_lock(path):
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"dtypes": ["float99"]}, {"dtypes": ["float16"]}, {"dtypes": []}, {"layout": "lower"}, {"certificate": [1]},
        {"provenance": [1]}, {"identity": {"network": "0000"}}, {"fingerprint": "0" * 64}, {"plan": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_contradicts_itself_is_refused(copied, change):
    metadata = json.loads((copied / "zarr.json").read_text())
    metadata["attributes"]["ntkgen"]["identity"]["dtypes"] = ["float16", "float32"]
    fingerprint = hashlib.sha256(json.dumps(metadata["attributes"]["ntkgen"]["identity"], sort_keys=True).encode())
    metadata["attributes"]["ntkgen"]["fingerprint"] = fingerprint.hexdigest()
    (copied / "zarr.json").write_text(json.dumps(metadata))
    assert ntkgen.open(copied).manifest.dtypes == ("float16", "float32")
    rewrite(copied, **change)
    with pytest.raises(StoreError, match="is not a kernel store") as raised:
        ntkgen.open(copied)
    assert "\n" not in str(raised.value)


def test_damaged_metadata_of_a_kernel_are_called_that(copied):
    (copied / "ntk_float32/zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"metadata of .*ntk_float32 is damaged"):
        _ = ntkgen.open(copied).array


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "k.zarr").touch()
    with pytest.raises(StoreError, match="found a file"):
        has_store(LocalFolder(tmp_path / "k.zarr"))


# creation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_creation_is_no_store_and_is_begun_again(step, job, finished, tmp_path, monkeypatch):
    for count in range(0, 1000, step):
        path = tmp_path / str(count) / "k.zarr"
        with monkeypatch.context() as patch:
            left = dying_after(patch, count)
            try:
                job.create(path)
                break
            except Killed:
                assert not has_store(LocalFolder(path))
                with pytest.raises(StoreError, match="There is no kernel store"):
                    open_store(path)
        job.create(path)
        if count % 4 == 0:
            job.resume(path)
            assert files_of(path) == finished["upper"].files
    assert left[0] >= 0
    assert count > 10
    assert [file.name for file in path.parent.iterdir()] == ["k.zarr"]


def test_a_store_is_never_created_over_another(job, copied):
    before = files_of(copied)
    with pytest.raises(StoreError, match=r"found \d+ other files"):
        job.create(copied)
    assert files_of(copied) == before


def test_a_store_is_never_created_among_the_files_of_others(job, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"1 other files, such as notes\.txt"):
        job.create(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_tiles_without_the_manifest_that_says_what_they_are_of_are_refused(copied):
    (copied / "zarr.json").unlink()
    before = files_of(copied)
    with pytest.raises(StoreError, match=r"lost its zarr\.json.*remove the folder"):
        has_store(LocalFolder(copied))
    assert files_of(copied) == before


def test_before_the_diagonal_there_is_no_kernel_to_view(job, tmp_path):
    store = job.create(tmp_path / "k.zarr")
    assert (len(store.missing_tiles()), store.missing_blocks()) == (10, [0, 1, 2, 3])
    with pytest.raises(StoreError, match="has no float32 kernel"):
        _ = store.array
    with pytest.raises(StoreError, match=r"has no float64 kernel: .* planned dtypes, float16, float32"):
        store.kernel("float64")


def test_the_kernels_are_named_once_they_exist_and_their_scales_are_known(job, tmp_path):
    store = job.create(tmp_path / "k.zarr")
    assert store.array_names == []
    job.run(store)
    assert sorted(store.array_names) == ["ntk_float16", "ntk_float32"]
    largest = np.diag(job.reference).max()
    assert 2.0**14 < largest / store.scale_factor("ntk_float16") <= 2.0**15
    assert store.scale_factor("ntk_float32") == 1.0


def test_a_store_is_not_finished_while_tiles_are_missing(copied):
    (copied / "ntk_float16/c/0/1").unlink()
    before = files_of(copied)
    with pytest.raises(StoreError, match="1 of 10 tiles are missing"):
        open_store(copied, mode="r+").finalize()
    assert files_of(copied) == before


def test_nothing_is_written_of_a_tile_that_overflows_one_dtype(job, tmp_path):
    """float32, whose turn is first, holds it and float16 does not: neither is written."""
    store = job.run(job.create(tmp_path / "k.zarr", ("float32", "float16")))
    before = files_of(store.path)
    with pytest.raises(DivergedError, match="float16"):
        store.commit(Tile(0, 1), np.full((9, 9), 1e30, np.float32))
    assert files_of(store.path) == before


def test_a_tile_of_the_wrong_shape_is_our_mistake(copied):
    before = files_of(copied)
    with pytest.raises(AssertionError):
        open_store(copied, mode="r+").commit(Tile(0, 1), np.zeros((1, 9), np.float32))
    assert files_of(copied) == before


def test_an_unfinished_kernel_reads_as_nan_where_it_is_missing(job, tmp_path):
    def report(what, done, _total):
        if (what, done) == ("tiles", 7):
            raise InterruptedError

    store = job.create(tmp_path / "k.zarr")
    with pytest.raises(InterruptedError):
        job.run(store, report=report)
    K = open_store(store.path).array[:]
    present = np.zeros((33, 33), bool)
    for tile in list(job.plan.grid.tiles())[:7]:
        for i, j in ((tile.row, tile.col), (tile.col, tile.row)):
            present[9 * i : 9 * i + 9, 9 * j : 9 * j + 9] = True
    assert np.array_equal(np.isnan(K), ~present)
    assert relative_error(K[present], job.reference[present]) < TOLERANCES["float32"]
    assert "in_progress" in (store.path / "zarr.json").read_text()


# other readers, with warnings as errors -------------------------------------------------------------------------------


def test_the_raw_upper_layout_is_nan_below_the_diagonal_tiles(job, finished):
    raw = zarr.open_array(finished["upper"].path / "ntk_float32", mode="r")[:]
    blocks = np.arange(33) // 9
    below = blocks[:, None] > blocks[None, :]
    assert np.isnan(raw[below]).all()
    assert np.array_equal(raw[~below], open_store(finished["upper"].path).array[:][~below])
    modes = {layout: zarr.open_group(finished[layout].path)["ntk_float16"].attrs["storage_mode"] for layout in LAYOUTS}
    assert modes == {"full": "square", "upper": "symmetric-upper"}


@in_turn("what layout", DTYPES, LAYOUTS)
def test_others_read_true_values_without_us(layout, what, tmp_path):
    dtypes = DTYPES[what]
    job = make_job(precision="float64" if what == "double" else "float32", scale=300)  # far beyond float16
    path = tmp_path / "k.zarr"
    ours = job.run(job.create(path, dtypes, layout))
    stored_blocks = np.arange(33) // 9
    there = np.ones((33, 33), bool) if layout == "full" else stored_blocks[:, None] <= stored_blocks[None, :]
    with xr.open_zarr(path) as dataset:
        for dtype in dtypes:
            name, truth = f"ntk_{dtype}", ours.kernel(dtype)[:]
            assert np.array_equal(dataset[name].values[there], truth[there])
            assert dataset[name].dtype == dtype or dtype == "float16"  # which xarray widens
            assert dataset[name].dims == ("row", "col")
            raw = zarr.open_group(path, mode="r")[name]
            scale = raw.attrs.get("scale_factor", 1.0)
            assert (scale != 1.0) == (dtype == "float16")
            lazy = [da.from_zarr(raw), da.from_zarr(str(path), component=name)]
            for found in (raw[:], *(array.compute(scheduler="synchronous") for array in lazy)):
                assert found.dtype == dtype
                assert np.array_equal(found[there].astype(truth.dtype) * truth.dtype.type(scale), truth[there])
        assert set(dataset.coords) == {
            f"{axis}_{what}" for axis in ("row", "col") for what in ("sample", "output", "label")
        }
        assert np.array_equal(dataset.diagonal.values, ours.read("diagonal"))


def test_our_xarray_is_the_full_matrix_with_its_coordinates(job, finished):
    store = open_store(finished["upper"].path)
    K = store.xarray
    assert np.array_equal(K.values, store.array[:])
    assert np.array_equal(store.dask.compute(scheduler="synchronous"), store.array[:])
    chosen = K[(K.row_output == 1).values, (K.col_output == 2).values]
    assert np.array_equal(chosen.values, store.array[1::3, 2::3])
    assert K.attrs["Conventions"].startswith("CF-")
    assert "11 samples × 3 outputs" in K.attrs["title"]


@pytest.mark.slow
def test_reading_imports_no_torch(finished):
    script = (
        "import sys, ntkgen\n"
        f"store = ntkgen.open({str(finished['upper'].path)!r})\n"
        "store.array[:2], store.dask[3:5].compute(scheduler='synchronous'), store.read('diagonal'), store.is_complete\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", script], check=False).returncode == 0


def test_a_tile_is_stored_where_the_grid_says(job, tmp_path):
    """Every entry of the stored kernel is its row and column, in both layouts and with the ragged last block."""
    one = Call(lambda self, x: self.fc(x.flatten(1)), fc=nn.Linear(16, 3))
    for layout in LAYOUTS:
        job = make_job(module=one)
        store = job.create(tmp_path / f"{layout}.zarr", ("float32",), layout)
        for index in range(4):
            block = job.plan.grid.block(index)
            store.commit_block(index, np.ones(3 * len(block)), np.ones((len(block), 3)))
        store.create_kernels()
        expected = np.add.outer(np.arange(33.0), np.arange(33.0)) * 100 + np.abs(
            np.subtract.outer(range(33), range(33))
        )
        for tile in job.plan.grid.tiles():
            rows, cols = (job.plan.grid.block(i).rows(3) for i in (tile.row, tile.col))
            store.commit(tile, expected[rows, cols].astype(np.float32))
        store.finalize()
        assert np.array_equal(ntkgen.open(store.path).array[:], expected)
