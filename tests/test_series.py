"""Arrays that grow along time: what is read after any kill, and what other programs read."""

import json

import numpy as np
import pytest
import xarray
import zarr

from ntkgen.continual.series import ROOT, TIMES_PER_CHUNK, FixedArray, GrowingArray, Series
from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import LocalFolder

SIDE = 9  # more numbers per time than share a chunk


def arrays():
    return [
        GrowingArray("kernel", "float64", (SIDE, SIDE), ("time", "row", "col"), {"coordinates": "iteration"}),
        GrowingArray("iteration", "int64", (), ("time",)),
        GrowingArray("accuracy", "float32", (2,), ("evaluation", "task")),
    ]


def kernel(time):
    return np.random.default_rng(time).standard_normal((SIDE, SIDE))


@pytest.fixture
def folder(tmp_path):
    return LocalFolder(tmp_path / "run.zarr", fsync=False)


def filled(folder, count, first=0):
    series = (
        Series.open(folder)
        if first
        else Series.create(folder, arrays(), [FixedArray("row", np.arange(SIDE), ("row",))], {"made": "here"})
    )
    for time in range(first, count):
        series.append("time", {"kernel": kernel(time), "iteration": 10 * time})
    return series


def test_what_was_appended_is_read_by_zarr_and_xarray(folder):
    with filled(folder, 3) as series:
        series.append("evaluation", {"accuracy": [0.5, 1.0]})
    data = xarray.open_zarr(folder.path)
    assert data.sizes == {"time": 3, "row": SIDE, "col": SIDE, "evaluation": 1, "task": 2}
    assert np.array_equal(data.kernel.values, np.stack([kernel(time) for time in range(3)]))
    assert data.kernel.iteration.values.tolist() == [0, 10, 20]
    assert data.attrs == {"made": "here"}
    group = zarr.open_group(folder.path, mode="r", use_consolidated=False)
    assert group["accuracy"][:].tolist() == [[0.5, 1.0]]
    assert group["row"][:].tolist() == list(range(SIDE))
    root = json.loads(folder.read(ROOT))
    for name, node in root["consolidated_metadata"]["metadata"].items():
        assert json.loads(folder.read(f"{name}/{ROOT}")) == node


def test_many_times_share_a_chunk(folder):
    series = Series.create(folder, [GrowingArray("iteration", "int64", (), ("time",))], [], {})
    for time in range(TIMES_PER_CHUNK + 3):
        series.append("time", {"iteration": time})
    assert sorted(folder.sizes("iteration")) == ["iteration/c.0", "iteration/c.1", "iteration/zarr.json"]
    assert zarr.open_group(folder.path, mode="r")["iteration"][:].tolist() == list(range(TIMES_PER_CHUNK + 3))
    reopened = Series.open(folder)
    reopened.append("time", {"iteration": -5})
    assert reopened.read("iteration", TIMES_PER_CHUNK + 3) == -5
    assert reopened.read("iteration", 7) == 7


def test_a_reopened_series_continues(folder):
    filled(folder, 2).sync()
    series = filled(folder, 4, first=2)
    assert series.length("time") == 4
    assert [int(series.read("iteration", time)) for time in range(4)] == [0, 10, 20, 30]
    assert np.array_equal(series.read("kernel", 1), kernel(1))


class Killed(BaseException):
    """The process ends here."""


def append_until_killed(series, done):
    """Append times; return how many are there when the process ends."""
    try:
        while True:
            series.append("time", {"kernel": kernel(done), "iteration": 10 * done})
            done += 1
    except Killed:
        return done


@pytest.mark.parametrize("at", range(1, 8))  # three writes for each time
def test_a_kill_at_any_write_leaves_the_finished_times(folder, monkeypatch, at):
    series, writes = filled(folder, 2), iter(range(1, 100))

    def write(self, key, data, plain=LocalFolder.write):
        if next(writes) == at:
            raise Killed
        plain(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write", write)
        done = append_until_killed(series, 2)
    assert done == 2 + (at - 1) // 3
    data = xarray.open_zarr(folder.path)
    assert np.array_equal(data.kernel.values, np.stack([kernel(time) for time in range(done)]))
    resumed = filled(folder, done + 1, first=done)
    assert resumed.length("time") == done + 1
    assert np.array_equal(resumed.read("kernel", done), kernel(done))


@pytest.mark.parametrize("length", [0, 1, 3])
def test_truncating_leaves_what_a_shorter_run_leaves(folder, tmp_path, length):
    with filled(folder, 3) as series:
        series.truncate("time", length)
        for time in range(length, 4):
            series.append("time", {"kernel": kernel(time), "iteration": 10 * time})
    other = LocalFolder(tmp_path / "other.zarr", fsync=False)
    filled(other, 4).sync()
    assert folder.sizes() == other.sizes()
    assert all(folder.read(key) == other.read(key) for key in folder.sizes())


def test_a_damaged_time_is_never_read(folder):
    series = filled(folder, 2)
    data = bytearray(folder.read("kernel/c.1.0.0"))
    data[3] ^= 1
    folder.write("kernel/c.1.0.0", bytes(data))
    with pytest.raises(StoreError, match="Time 1 of kernel"):
        series.read("kernel", 1)
    folder.remove("kernel/c.0.0.0")
    with pytest.raises(StoreError, match=r"is missing: expected .* found none"):
        series.read("kernel", 0)


def test_nothing_is_overwritten(folder):
    filled(folder, 1)
    with pytest.raises(InputError, match="There is a Zarr group"):
        filled(folder, 1)
    (folder.path.parent / "notes").mkdir()
    (folder.path.parent / "notes" / "mine.txt").write_text("kept")
    Series.create(LocalFolder(folder.path.parent / "notes"), arrays(), [], {})
    assert (folder.path.parent / "notes" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("content", [None, b"{}", b"no json", json.dumps({"attributes": {}}).encode()])
def test_what_is_no_series_is_refused(folder, content):
    if content is not None:
        folder.write(ROOT, content)
    with pytest.raises(StoreError, match="no series of arrays" if content is None else "cannot be read"):
        Series.open(folder)


def test_values_that_stay_the_same_are_written_once(folder, monkeypatch):
    series = Series.create(folder, [GrowingArray("task", "int64", (), ("time",))], [], {})
    tasks, written, write = [0, 0, 0, 1, 1], [], type(folder).write
    monkeypatch.setattr(type(folder), "write", lambda self, key, data: (written.append(key), write(self, key, data)))
    for length, task in enumerate(tasks, 1):
        series.append("time", {"task": task})
        assert zarr.open_group(folder.path, mode="r")["task"][:].tolist() == tasks[:length]
    assert [key for key in written if key.startswith("task/")] == ["task/c.0", "task/c.0"]


def test_values_are_written_again_after_a_write_that_failed(folder, monkeypatch):
    series = Series.create(folder, [GrowingArray("task", "int64", (), ("time",))], [], {})
    series.append("time", {"task": 0})

    def fails(*_):
        raise OSError("no space left on the device")

    with monkeypatch.context() as broken:
        broken.setattr(type(folder), "write", fails)
        with pytest.raises(OSError, match="no space"):
            series.append("time", {"task": 1})
    series.append("time", {"task": 1})
    assert zarr.open_group(folder.path, mode="r")["task"][:].tolist() == [0, 1]


def test_a_group_whose_chunks_lie_in_folders_is_continued(folder):
    array = GrowingArray("kernel", "float32", (9, 9), ("time", "row", "col"), separator="/")
    series = Series.create(folder, [array], [], {})
    series.append("time", {"kernel": np.full((9, 9), 1.0)})
    Series.open(folder).append("time", {"kernel": np.full((9, 9), 2.0)})
    assert folder.has("kernel/c/1/0/0")
    assert zarr.open_group(folder.path, mode="r")["kernel"][:, 0, 0].tolist() == [1, 2]
