"""Parts of a kernel, each by a process that knows nothing of the others; and what SIGTERM does."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import CPU, chosen, files_of, make_job, small_network

from ntkgen import cli
from ntkgen.engine import compute
from ntkgen.engine.computation import Computation, Execution
from ntkgen.engine.compute import make
from ntkgen.engine.jobs import InlineLoader
from ntkgen.errors import InputError, StoreLockedError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import tile_lock, without_tile_writers, write_lock
from ntkgen.inputs import Inputs
from ntkgen.plan.spec import KernelSpec
from ntkgen.plan.tiles import Part, Tile
from ntkgen.store.opening import open_store
from ntkgen.store.store import KernelStore

SPEC = KernelSpec(tile_side=9, layout="upper", memory_bytes=1 << 30)
COMMAND = [
    "compute", "--models", "logistic", "--dataset", "digits", "--epochs", "1", "--allow-unconverged",
    "--subsample", "100", "--tile", "100", "--memory", "1GB", "--dtype", "float32", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    """A kernel of 11 samples and 3 outputs in 4 × 4 tiles."""
    made = make_job()
    return Computation(small_network(), Inputs(made.x, made.samples), made.x, SPEC, CPU)


def part_of(kernel: Computation, text: str) -> Computation:
    execution = Execution(part=Part.parse(text))
    return Computation(kernel.model, kernel.inputs, kernel.probe, SPEC, CPU, execution=execution)


def run(kernel: Computation, path: Path, report=lambda *_: None) -> KernelStore:
    return make(LocalFolder(path), kernel, InlineLoader(kernel.model, kernel.inputs), report)


@pytest.fixture(scope="module")
def expected(kernel, tmp_path_factory):
    """The bytes that one process writes."""
    path = tmp_path_factory.mktemp("alone") / "k.zarr"
    run(kernel, path)
    return files_of(path)


@pytest.mark.parametrize("count", chosen([1, 2, 3, 20], [3]))
def test_the_last_part_finishes_the_kernel_whichever_it_is(kernel, expected, count, tmp_path):
    path = tmp_path / "k.zarr"
    order = [*range(2, count + 1), 1]
    for done, number in enumerate(order, start=1):
        store = run(part_of(kernel, f"{number}/{count}"), path)
        assert store.is_complete == (len(store.missing_tiles()) == 0)
        assert store.is_complete or done < count
    assert files_of(path) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["k.zarr"]


def test_a_part_computes_its_tiles_and_no_others(kernel, tmp_path):
    seen = []
    store = run(part_of(kernel, "2/3"), tmp_path / "k.zarr", lambda *what: seen.append(what[:3]))
    assert sum(stage == "tiles" for stage, *_ in seen) == 1 + 3
    assert not store.is_complete
    assert open_store(tmp_path / "k.zarr").manifest.certificate is None
    tiles = list(store.grid.tiles())
    assert store.missing_tiles() == [*tiles[:3], *tiles[6:]]


def test_the_same_command_without_part_finishes_what_parts_have_left(kernel, expected, tmp_path):
    run(part_of(kernel, "2/3"), tmp_path / "k.zarr")
    run(kernel, tmp_path / "k.zarr")
    assert files_of(tmp_path / "k.zarr") == expected


def test_a_finished_kernel_is_left_alone_by_its_parts(kernel, expected, tmp_path):
    path = tmp_path / "k.zarr"
    run(kernel, path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    run(part_of(kernel, "1/2"), path)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_part_beside_others_sweeps_nothing(kernel, tmp_path):
    path = tmp_path / "k.zarr"
    run(part_of(kernel, "1/3"), path)
    draft = path / "ntk_float32" / "c" / "4.partial"
    draft.write_bytes(b"another part is writing this")
    with tile_lock(LocalFolder(path)):
        run(part_of(kernel, "2/3"), path)
    assert draft.exists()
    run(part_of(kernel, "3/3"), path)
    assert not draft.exists()
    assert open_store(path).is_complete


def test_a_part_is_not_begun_beside_a_whole_run(kernel, tmp_path):
    with write_lock(LocalFolder(tmp_path / "k.zarr")), pytest.raises(StoreLockedError, match="Another process"):
        run(part_of(kernel, "1/2"), tmp_path / "k.zarr")


def test_the_diagonal_is_computed_by_the_first_part_alone(kernel, tmp_path, monkeypatch):
    blocks, commit_block = [], KernelStore.commit_block

    def counted(self, index, *values):
        blocks.append(index)
        commit_block(self, index, *values)

    monkeypatch.setattr(KernelStore, "commit_block", counted)
    for number in (1, 2):
        run(part_of(kernel, f"{number}/2"), tmp_path / "k.zarr")
    assert sorted(blocks) == [0, 1, 2, 3]


def test_a_certificate_is_made_by_the_last_part_alone(kernel, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(compute, "add_certificate", lambda store, *_, **__: made.append(store))
    for number in (1, 2, 3):
        run(part_of(kernel, f"{number}/3"), tmp_path / "k.zarr")
    assert len(made) == 1


@pytest.mark.slow
def test_parts_that_end_together_leave_it_to_the_last_of_them(kernel, expected, tmp_path, monkeypatch):
    """The first part ends while the second is at work. The second waits for the first, and is then the last."""
    path, looked, began = tmp_path / "k.zarr", [], threading.Event()

    @contextmanager
    def slowly(place, **options):
        with without_tile_writers(place, **options) as is_alone:
            if began.is_set():
                looked.append(is_alone)
                time.sleep(0.5)  # in which the other ends
            yield is_alone

    run(part_of(kernel, "1/3"), path)
    with tile_lock(LocalFolder(path)):  # a third part is at work
        run(part_of(kernel, "2/3"), path)
    began.set()
    monkeypatch.setattr(compute, "without_tile_writers", slowly)
    with ThreadPoolExecutor(2) as pool:
        writer = pool.submit(run, part_of(kernel, "3/3"), path)
        other = pool.submit(run, part_of(kernel, "1/3"), path)
        for each in (writer, other):
            each.result()
    assert looked
    assert files_of(path) == expected


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(InputError, match="expected k/K"):
        Part.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_the_parts_are_all_tiles_once(count):
    tiles = [Tile(row, col) for row in range(6) for col in range(row, 6)]
    parts = [Part(number, count).of(tiles) for number in range(1, count + 1)]
    assert [tile for part in parts for tile in part] == tiles
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# processes ------------------------------------------------------------------------------------------------------------


def start(out: Path, *options: str, **settings) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # equal bytes take as many threads
    command = [sys.executable, "-m", "ntkgen", *COMMAND, "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env, **settings)


def run_here(out: Path) -> int:
    """Run the command in this process, which has loaded everything."""
    return cli.run([*COMMAND, "--out", str(out)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_here(out) == 0
    return files_of(out)


@pytest.mark.slow
def test_two_parts_at_once_train_once_and_give_the_bytes_of_one_process(undisturbed, tmp_path):
    parts = [start(tmp_path, "--part", f"{number}/2") for number in (1, 2)]
    assert [part.wait() for part in parts] == [0, 0]
    assert files_of(tmp_path) == undisturbed


def num_chunks(out: Path) -> int:
    return sum(1 for file in out.glob("*.zarr/ntk_float32/c/*/*") if file.suffix != ".partial")


@pytest.mark.slow
def test_sigterm_ends_as_ctrl_c_does_and_the_same_command_goes_on(undisturbed, tmp_path):
    with start(tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and num_chunks(tmp_path) < 10:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 143
    assert err.startswith("Terminated. What was finished before is kept")
    assert err.count("\n") == 1
    assert 10 <= num_chunks(tmp_path) < 100
    assert run_here(tmp_path) == 0
    assert files_of(tmp_path) == undisturbed
