"""Several runs: one after another in this process, or side by side in processes of their own."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.learner import learn
from ntkgen.continual.network import require_fitting
from ntkgen.continual.plan import Data, Plan, load_data
from ntkgen.continual.reading import kind_of, open_seed, run_names
from ntkgen.continual.record import is_begun, read_config
from ntkgen.continual.results_tree import write_results_tree
from ntkgen.continual.run import Announce, say_nothing
from ntkgen.engine.machine import choose_device
from ntkgen.engine.spawning import require_main_guard, starting_processes, unguarded, without_missing_script
from ntkgen.errors import FingerprintError, InputError, NtkgenError, WorkerError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of
from ntkgen.progress import Report, ignore_report

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

# Seconds between two progress reports of a process.
REPORT_SECONDS = 0.2
# Seconds that a run gets to stop before its process is ended. A killed run can be resumed too.
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Job:
    """A run, as it travels to a process.

    Attributes:
        name: Name of its folder.
        settings: Its settings.
        out: The folder of all runs.
        data_dir: The folder of the data sets.
        device: Name of the device.
        index: Experiment index, if the results are also written as a tree; see `write_results_tree`.
    """

    name: str
    settings: RunSettings
    out: str
    data_dir: Path | None
    device: str
    index: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What has become of a run: its duration in seconds, or why it failed."""

    job: Job
    seconds: float = 0.0
    error: BaseException | None = None


def require_possible(jobs: Sequence[Job], data: Data) -> None:
    """Check all runs before one begins: the device, the networks, and the runs that are there already.

    Args:
        jobs: The runs.
        data: Their samples.

    Raises:
        FingerprintError: If a run was begun with other settings.
        InputError: If there is no such device, a network does not fit the tasks, or the folder has runs that could not
            be read together with these.
    """
    for out in {job.out for job in jobs}:
        _require_alike(jobs, folder_of(out, fsync=False))
    tried = set()
    for job in jobs:
        device = choose_device(job.device)
        folder = folder_of(job.out, fsync=False) / job.name
        if not is_begun(folder, job.settings, {}) and job.settings.width not in tried:
            tried.add(job.settings.width)  # the seeds of a width have the same network, task by task
            require_fitting(Plan.of(job.settings, data), device)


def _require_alike(jobs: Sequence[Job], out: Folder) -> None:
    """Require that the runs of a folder could be read together with those that are asked for.

    Raises:
        InputError: If their folders are named in another way, or the folder is that of one run.
        FingerprintError: If they have other settings.
    """
    if (config := read_config(out)) is not None:
        raise InputError(
            f"There is a run at {out} already: expected a folder of seeds, each with a run that trains on tasks for "
            f"epochs, found {kind_of(config)} in the folder itself. Was `out` left at its default, or is it the folder "
            "of one seed? Choose another `out`."
        )
    asked, names = {job.name for job in jobs}, run_names(out)
    have_widths = any("/" in name for name in asked)
    if other := [name for name in names if ("/" in name) != have_widths]:
        raise InputError(
            f"The run {jobs[0].name} does not fit the folder {out}: expected runs that are named alike, found "
            f"{other[0]}. Was the command repeated with one width instead of several, or the reverse? Give all "
            "widths in one command, or another `out`."
        )
    for name in names:
        found = read_config(out / name)
        if name in asked or found is None:
            continue
        settings, new = RunSettings.from_json(found["settings"]), jobs[0].settings
        differing = settings.differences_beside_seed(new)
        if not have_widths:  # the folder is of one width
            differing = settings.differences(dataclasses.replace(new, seed=settings.seed))
        if differing:
            raise FingerprintError(
                f"The run {jobs[0].name} does not fit the folder {out}: expected the settings of the runs that are "
                f"there, found others than those of {name} ({'; '.join(differing[:3])}). Runs of one folder differ in "
                "seed and width alone. Use another `out`, or the same settings."
            )


def train_in_turn(
    jobs: Sequence[Job], data: Data, report_of: Callable[[str], Any], announce: Announce = say_nothing
) -> Iterator[Outcome]:
    """Train one run after another in this process. A run that fails does not stop the others.

    Args:
        jobs: The runs.
        data: Their samples.
        report_of: Gives a context manager of the progress report of a run, by its name.
        announce: Gets lines about each run; see `learn`.
    """
    for job in jobs:
        with report_of(job.name) as report:
            outcome = _trained(job, data, report, announce)
        yield outcome


def train_side_by_side(jobs: Sequence[Job], workers: int, report: Report = ignore_report) -> Iterator[Outcome]:
    """Train runs in processes, each with its share of the threads. A run that fails does not stop the others.

    The runs are yielded as they end. If this generator is closed or interrupted, all runs stop, and what they have
    recorded is kept.

    Raises:
        InputError: If each started process makes this call too.
        WorkerError: If a process ends before its run.
    """
    require_main_guard()
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    messages, stop = context.SimpleQueue(), context.Event()
    before = set(multiprocessing.active_children())
    with ExitStack() as held:
        held.enter_context(without_missing_script())
        folder = Path(held.enter_context(TemporaryDirectory(prefix="ntkgen-runs-")))
        was_called_again = held.enter_context(starting_processes(folder))
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (threads, messages, stop))
        try:
            with _ignored_interrupts():  # the processes inherit this: Ctrl-C is for this process alone
                futures = {pool.submit(_train, job): job for job in jobs}
            yield from _outcomes(futures, messages, report)
        except BrokenProcessPool as error:
            if was_called_again():
                raise InputError(unguarded()) from None
            raise WorkerError(
                f"A process with a run ended ({error}): expected {len(jobs)} finished runs. Was it killed, or is there "
                "too little memory? What is recorded is kept. Run the same command again with fewer `workers`."
            ) from error
        finally:
            _stop(pool, stop, set(multiprocessing.active_children()) - before)


def _outcomes(
    futures: "dict[Future[Outcome], Job]", messages: "SimpleQueue[tuple[Any, ...]]", report: Report
) -> Iterator[Outcome]:
    """Yield the runs as they end.

    Raises:
        BrokenProcessPool: If a process has ended.
    """
    pending = set(futures)
    while pending:
        done, pending = wait(pending, REPORT_SECONDS, FIRST_COMPLETED)
        while not messages.empty():
            report(*messages.get())
        for future in done:
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            yield future.result() if error is None else Outcome(futures[future], error=error)


def _stop(pool: ProcessPoolExecutor, stop: Event, processes: set[Any]) -> None:
    """Stop all runs, and end the processes that do not stop in time. Finished runs have nothing to stop."""
    stop.set()
    pool.shutdown(wait=False, cancel_futures=True)
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.terminate()


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C in this block. Only the main thread can set this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# in the processes -----------------------------------------------------------------------------------------------------


class _Worker:
    """What a process keeps between its runs."""

    messages: "SimpleQueue[tuple[Any, ...]]"
    stop: Event
    data: Data | None = None


def _start(threads: int, messages: "SimpleQueue[tuple[Any, ...]]", stop: Event) -> None:
    """Prepare a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    _Worker.messages, _Worker.stop = messages, stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(job: Job) -> Outcome:
    if _Worker.data is None:
        _Worker.data = load_data(job.settings, job.data_dir)
    last = 0.0

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        if _Worker.stop.is_set():
            raise KeyboardInterrupt
        now = time.monotonic()
        if done == total or now - last > REPORT_SECONDS:
            last = now
            _Worker.messages.put((f"{job.name}: {stage}", done, total, note))

    return _trained(job, _Worker.data, report)


def _trained(job: Job, data: Data, report: Report, announce: Announce = say_nothing) -> Outcome:
    started = time.monotonic()
    try:
        out = folder_of(job.out, fsync=False)
        run = learn(Plan.of(job.settings, data), out / job.name, choose_device(job.device), report, announce)
        if job.index is not None:
            write_results_tree(out, open_seed(out / job.name), job.index, run.watch.seconds)
    except NtkgenError as error:
        return Outcome(job, error=error)
    return Outcome(job, round(time.monotonic() - started, 3))
