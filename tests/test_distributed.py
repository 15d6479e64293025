"""Tiles that workers compute have the same bytes, even if workers are killed, stall or raise errors."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CPU, chosen, files_of, make_job, small_network
from distributed import Client, LocalCluster

import ntkgen
from ntkgen.engine import scheduler, worker
from ntkgen.engine.computation import Computation, Execution
from ntkgen.engine.compute import make
from ntkgen.engine.coordinator import WorkerPool, open_pool
from ntkgen.engine.jobs import Assignment, InlineLoader, Job
from ntkgen.engine.machine import describe_machine, memory_budget
from ntkgen.errors import FingerprintError, InputError, WorkerError
from ntkgen.files.folder import LocalFolder
from ntkgen.files.lock import tile_lock, without_tile_writers, write_lock
from ntkgen.inputs import Inputs
from ntkgen.plan.order import Band
from ntkgen.plan.spec import KernelSpec
from ntkgen.plan.tiles import Tile
from ntkgen.store.opening import has_store

SPEC = KernelSpec(tile_side=9, dtypes=("float16", "float32"), layout="upper", memory_bytes=1 << 30)
SHARED = KernelSpec(tile_side=9, dtypes=("float16", "float32"), layout="upper", memory_bytes=2 << 30)  # by two


@pytest.fixture(scope="module", autouse=True)
def threads_of_a_worker(one_thread):
    """Use one thread in this process, as each worker does: their number is part of what a store says of itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool():
    """Two workers, started once."""
    with open_pool(2, None, "cpu") as pool:
        yield pool


@pytest.fixture(scope="module")
def kernel():
    """A kernel of 11 samples and 3 outputs in 4 × 4 tiles."""
    made = make_job()
    inputs = Inputs(made.x, made.samples)
    return Computation(small_network(), inputs, made.x, SPEC, CPU)


@pytest.fixture(scope="module")
def expected(kernel, tmp_path_factory):
    """The bytes that one process writes."""
    path = tmp_path_factory.mktemp("alone") / "k.zarr"
    make(LocalFolder(path), kernel, InlineLoader(kernel.model, kernel.inputs))
    return files_of(path)


def shared_out(kernel: Computation, pool: WorkerPool) -> Computation:
    return Computation(kernel.model, kernel.inputs, kernel.probe, SHARED, CPU, execution=Execution(pool))


# what is done ---------------------------------------------------------------------------------------------------------


def test_workers_write_the_bytes_of_one_process(kernel, expected, pool, tmp_path):
    seen = []
    place = LocalFolder(tmp_path / "k.zarr")
    store = make(
        place, shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs), lambda *what: seen.append(what[:3])
    )  # fmt: skip
    assert store.is_complete
    assert files_of(tmp_path / "k.zarr") == expected
    assert [what for what in seen if what[0] == "diagonal"][-1] == ("diagonal", 4, 4)
    assert [what[1] for what in seen if what[0] == "tiles"] == list(range(11))
    assert [file.name for file in tmp_path.iterdir()] == ["k.zarr"]  # no lock is left


def test_only_what_is_missing_is_computed(kernel, expected, pool, tmp_path):
    path = tmp_path / "k.zarr"
    make(LocalFolder(path), shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
    chunks = [path / "ntk_float32/c/1/3", path / "ntk_float16/c/0/0"]
    for chunk in chunks:
        chunk.unlink()
    before = {file: file.stat().st_mtime_ns for file in path.glob("ntk_*/c/*/*")}
    make(LocalFolder(path), shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
    assert files_of(path) == expected
    changed = {file for file in before if file.stat().st_mtime_ns != before[file]}
    assert changed <= {path / f"ntk_{dtype}/c/{place}" for dtype in ("float16", "float32") for place in ("1/3", "0/0")}


def test_a_client_and_a_number_of_workers_are_taken_from_python(kernel, expected, pool, tmp_path):
    x = kernel.inputs.x
    alone = ntkgen.compute(kernel.model, x, store=tmp_path / "1.zarr", tile_side=9, memory_bytes=1 << 30)
    ntkgen.compute(
        kernel.model, x, store=tmp_path / "2.zarr", tile_side=9, memory_bytes=1 << 30, client=pool.client
    )  # fmt: skip
    assert files_of(tmp_path / "2.zarr") == files_of(alone.path)
    with pytest.raises(InputError, match="expected one of them"):
        ntkgen.compute(kernel.model, x, store=tmp_path / "3.zarr", workers=2, client=pool.client)
    assert not (tmp_path / "3.zarr").exists()


def test_a_store_in_this_process_alone_is_refused(kernel, pool):
    import zarr

    with pytest.raises(InputError, match="in the memory of this process"):
        ntkgen.compute(kernel.model, kernel.inputs.x, store=zarr.storage.MemoryStore(), tile_side=9, client=pool.client)


def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("ntkgen.engine.cluster.CONNECT_SECONDS", 1)
    with (
        pytest.raises(InputError, match=r"No cluster answers at tcp://127\.0\.0\.1:9"),
        open_pool(None, "tcp://127.0.0.1:9", "cpu"),
    ):
        pass


def test_a_cluster_without_workers_is_refused(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr("ntkgen.engine.cluster.WORKER_SECONDS", 1)
    with (
        LocalCluster(n_workers=0, processes=True, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
        pytest.raises(InputError, match="has no workers"),
    ):
        ntkgen.compute(kernel.model, kernel.inputs.x, store=tmp_path / "k.zarr", client=client)


# what goes wrong ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sabotaged:
    """Loads network and samples, but for the first ``times``, when something happens instead."""

    load: InlineLoader
    folder: Path  # where it is counted how often
    kind: str
    times: int = 1

    def __call__(self):
        for number in range(self.times):
            try:
                (self.folder / f"{self.kind}{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            getattr(self, self.kind)()
        return self.load()

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def litter(self):
        place = self.folder / "k.zarr" / "diagonal" / "c"
        place.mkdir(parents=True, exist_ok=True)
        (place / "1.0a.partial").write_bytes(b"what it was writing")
        self.kill()

    def hang(self):
        time.sleep(1000)

    def stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def fail(self):
        raise RuntimeError("cosmic rays")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", chosen(["kill", "litter", "fail", "hang", "stop"], ["litter"]))
def test_a_job_whose_worker_is_lost_is_done_by_another(kernel, expected, pool, kind, tmp_path):
    patient = pool if kind in {"kill", "litter", "fail"} else dataclasses.replace(pool, tile_seconds=6.0)
    load = Sabotaged(InlineLoader(kernel.model, kernel.inputs), tmp_path, kind)
    make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, patient), load)
    assert (tmp_path / f"{kind}0").exists()
    assert files_of(tmp_path / "k.zarr") == expected


def test_an_error_that_comes_again_and_again_ends_the_run_and_keeps_what_is_done(kernel, expected, pool, tmp_path):
    load = Sabotaged(InlineLoader(kernel.model, kernel.inputs), tmp_path, "fail", times=1000)
    with pytest.raises(WorkerError, match="RuntimeError: cosmic rays"):
        make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), load)
    make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
    assert files_of(tmp_path / "k.zarr") == expected


@pytest.mark.slow
def test_a_worker_that_dies_each_time_ends_the_run(kernel, pool, monkeypatch, tmp_path):
    monkeypatch.setattr(scheduler, "MAX_ATTEMPTS", 2)
    load = Sabotaged(InlineLoader(kernel.model, kernel.inputs), tmp_path, "kill", times=1000)
    with pytest.raises(WorkerError, match="lost or stalled 2 times"):
        make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), load)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_at_once(kernel, pool, tmp_path):
    load = Sabotaged(InlineLoader(kernel.model, kernel.inputs), tmp_path, "full", times=1000)
    with pytest.raises(OSError, match="No space left") as raised:
        make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), load)
    assert raised.value.errno == errno.ENOSPC
    assert Counter(file.name[:4] for file in tmp_path.iterdir())["full"] <= 2  # each worker has met it once at most


def test_a_worker_that_finds_other_samples_refuses_them(kernel, pool, tmp_path):
    other = Inputs(kernel.inputs.x + 1, kernel.inputs.samples)
    with pytest.raises(FingerprintError, match="other samples than the store"):
        make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), InlineLoader(kernel.model, other))
    assert not has_store(LocalFolder(tmp_path / "k.zarr"))  # no tile was written, so nothing is left


def test_nothing_of_a_run_stays_with_the_workers(kernel, pool, tmp_path):
    make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
    plugins = pool.client.run(_plugins)
    assert [name for names in plugins.values() for name in names if name.startswith("ntkgen")] == []
    assert [file.name for file in tmp_path.iterdir()] == ["k.zarr"]


def _plugins(dask_worker):
    return list(dask_worker.plugins)


def killing_before(monkeypatch, method: str, number: int) -> list[int]:
    """Kill a worker just before dask's client calls a method for the so-and-so-many-th time."""
    calls, called = [], getattr(Client, method)

    def wrapped(self, *args, **options):
        calls.append(len(calls))
        if len(calls) == number:
            nanny = next(iter(self.cluster.workers.values()))
            os.kill(nanny.pid, signal.SIGKILL)
        return called(self, *args, **options)

    monkeypatch.setattr(Client, method, wrapped)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number"),
    [("register_plugin", 1), ("run", 1), ("run", 2), ("run", 3), ("unregister_worker_plugin", 1)],
)
def test_a_worker_that_dies_while_all_are_told_something_does_not_end_the_run(
    kernel, expected, pool, method, number, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        calls = killing_before(patch, method, number)
        make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
    assert len(calls) >= number
    assert files_of(tmp_path / "k.zarr") == expected


@pytest.mark.slow
def test_a_worker_that_dies_with_what_it_has_to_say_does_not_end_the_run(kernel, expected, pool, monkeypatch, tmp_path):
    """A job that has ended, as far as the scheduler knows, but whose outcome is lost before it is fetched."""
    ended, killed = WorkerPool._ended, []

    def ending(self, futures):
        found = ended(self, futures)
        if found and not killed:
            future = futures[found[0]]
            (worker,) = self.client.who_has([future])[future.key]
            killed.append(worker)
            (nanny,) = (nanny for nanny in self.nannies if nanny.worker_address == worker)
            os.kill(nanny.pid, signal.SIGKILL)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "_ended", ending)
        make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
    assert killed
    assert files_of(tmp_path / "k.zarr") == expected


def test_workers_that_do_not_start_are_one_error(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Nanny failed to start.")

    monkeypatch.setattr("distributed.LocalCluster", refuse)
    with pytest.raises(WorkerError, match=r"2 workers did not start \(Nanny failed"), open_pool(2, None, "cpu"):
        pass


@pytest.mark.slow
def test_workers_of_ours_that_never_come_back_end_the_run(kernel, monkeypatch, tmp_path):
    monkeypatch.setattr(scheduler, "NO_WORKER_SECONDS", 2)
    monkeypatch.setattr(WorkerPool, "workers", lambda pool: set())
    with open_pool(1, None, "cpu") as alone, monkeypatch.context() as patch:
        patch.setattr(WorkerPool, "_call", lambda _, asked, *args, **__: {"w": asked(*args, None) if args else "host"})
        patch.setattr("ntkgen.engine.worker.budget", lambda limits, _: memory_budget(CPU, limits.memory_bytes))
        with pytest.raises(WorkerError, match="None of the 1 workers is left"):
            make(LocalFolder(tmp_path / "k.zarr"), shared_out(kernel, alone), InlineLoader(kernel.model, kernel.inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")  # two threads set and reset what is ignored
def test_two_runs_of_one_kernel_share_a_cluster_and_not_their_places(kernel, expected, pool, tmp_path):
    shared = shared_out(kernel, pool)
    plain = dataclasses.replace(shared, spec=dataclasses.replace(SHARED, certify=False))
    with ThreadPoolExecutor(2) as threads:
        places = [LocalFolder(tmp_path / name) for name in ("1.zarr", "2.zarr")]
        runs = [threads.submit(make, place, plain, InlineLoader(kernel.model, kernel.inputs)) for place in places]
        for run in runs:
            run.result()
    for place in places:
        make(place, shared, InlineLoader(kernel.model, kernel.inputs))  # with its certificate
        assert files_of(place.path) == expected


class Lingering:
    """A tile computer whose run ends while it writes."""

    def __init__(self, during):
        self.during, self.store = during, self
        self.written = 0

    def has_tile(self, tile):
        return False

    def commit_diagonal(self, indices, step):
        pass

    def commit_tiles(self, bands, step):
        for band in bands:
            for _ in band.tiles:
                self.written += 1
                self.during()
                step()


def test_a_worker_that_is_told_to_let_go_ends_with_its_tile_and_keeps_others_out_until_then(tmp_path):
    place, alone = LocalFolder(tmp_path / "k.zarr"), []
    plugin = worker.TilePlugin(Assignment(place, lambda: None, "cpu", is_local=True, cached_blocks=1))
    plugin.setup(SimpleNamespace(name=0))

    def during():
        plugin.release()
        with without_tile_writers(place) as is_alone:
            alone.append(is_alone)

    plugin.computer = Lingering(during)
    plugin.held.enter_context(tile_lock(place))
    computer = plugin.computer
    outcome = plugin.do(Job(band=Band((), (Tile(0, 0), Tile(0, 1), Tile(0, 2)))))
    assert isinstance(outcome.error, WorkerError)
    assert (computer.written, alone) == (1, [False])
    assert plugin.computer is None
    with without_tile_writers(place) as is_alone:
        assert is_alone


@pytest.mark.slow
def test_workers_that_dask_has_given_up_are_started_anew(pool):
    pool.machine("float32", None)
    cluster = pool.client.cluster
    nanny = next(iter(cluster.workers.values()))
    cluster.sync(nanny.close)
    until = time.monotonic() + 60
    while nanny.worker_address in pool.workers() and time.monotonic() < until:
        time.sleep(0.1)
    while len(pool.workers()) < 2 and time.monotonic() < until:
        pool._start_missing_workers()
        time.sleep(1)
    assert len(pool.workers()) == 2


def test_a_scheduler_that_has_gone_is_one_error(pool, monkeypatch):
    def refuse(*_):
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(Client, "nthreads", refuse)
    with pytest.raises(WorkerError, match="scheduler of the cluster does not answer"):
        pool.workers()


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too_and_is_one_line(tmp_path):
    command = [
        sys.executable, "-m", "ntkgen", "compute", "--models", "logistic", "--epochs", "0", "--subsample", "200",
        "--tile", "50", "--workers", "2", "-q", "--out", str(tmp_path),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None and not any(tmp_path.glob("*.zarr/ntk_float32/c/0/0")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if line] == [
        "Interrupted. What was finished before is kept. The same command continues from there."
    ]


# several processes and one store --------------------------------------------------------------------------------------


def test_a_machine_is_shared_in_equal_parts():
    whole, half = memory_budget(CPU, None), memory_budget(CPU, None, sharers=2)
    assert abs(half.planned_bytes - whole.planned_bytes / 2) <= 1
    assert memory_budget(CPU, None, sharers=2, limit=1000).available_bytes == 800
    assert memory_budget(CPU, 500, sharers=2).available_bytes == 500
    before = torch.get_num_threads()
    assert describe_machine(CPU, "float32", None, threads=2).environment.threads == 2
    assert torch.get_num_threads() == before


def test_workers_of_ours_share_the_memory_that_is_asked_for_and_those_of_others_have_it_each(pool):
    assert pool.machine("float32", 1000).budget.available_bytes == 500
    assert dataclasses.replace(pool, num_own=0).machine("float32", 1000).budget.available_bytes == 1000
    assert pool.machine("float32", None).environment.threads == 1


def test_workers_keep_a_whole_run_of_another_process_out(kernel, pool, tmp_path, monkeypatch):
    from ntkgen.errors import StoreLockedError
    from ntkgen.files import lock

    monkeypatch.setattr(lock, "ORPHAN_SECONDS", 0.3)
    place = LocalFolder(tmp_path / "k.zarr")
    with tile_lock(place), pytest.raises(StoreLockedError, match="writing tiles"):
        make(place, kernel, InlineLoader(kernel.model, kernel.inputs))
    with write_lock(place), pytest.raises(StoreLockedError):
        make(place, shared_out(kernel, pool), InlineLoader(kernel.model, kernel.inputs))
