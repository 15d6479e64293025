"""A command at work and its workers: how it proceeds, and that nothing of it is left in the end."""

import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from disk import progress

POLL_SECONDS = 0.001
# A run that takes longer hangs.
RUN_SECONDS = 300.0


class RoundError(Exception):
    """A run that hangs, or ends in another way than it should."""


@dataclass(frozen=True, eq=False)
class Run:
    """A command at work, and the steps that it makes on disk."""

    process: "subprocess.Popen[bytes]"
    steps: Iterator[int]
    deadline: float

    def reaches(self, step: int) -> bool:
        """Wait until it has made a step; False where it has ended before.

        Raises:
            RoundError: If it hangs.
        """
        while self.process.poll() is None:
            if next(self.steps) >= step:
                return True
            self._wait()
        return False

    def finds(self, target: str, rng: np.random.Generator) -> psutil.Process | None:
        """Find the process to be killed: this one, or a worker, once there is one; None where this one has ended.

        Raises:
            RoundError: If it hangs.
        """
        while self.process.poll() is None:
            found = workers_of(self.process.pid) if target == "worker" else [psutil.Process(self.process.pid)]
            if found:
                return found[rng.integers(len(found))]
            self._wait()
        return None

    def count_steps(self) -> int:
        """Count all steps that it makes.

        Raises:
            RoundError: If it hangs.
        """
        most = 0
        while self.process.poll() is None:
            most = max(most, next(self.steps))
            self._wait()
        return most

    def finish(self) -> int:
        """Wait for its end, and return its exit code.

        Raises:
            RoundError: If it hangs.
        """
        try:
            return self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RoundError(f"a run did not end within {RUN_SECONDS:.0f} s") from None

    def _wait(self) -> None:
        if time.monotonic() > self.deadline:
            raise RoundError(f"a run did not end within {RUN_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


@contextmanager
def running(command: Sequence[str], out: Path) -> Iterator[Run]:
    """Start a command; whatever happens, it and its workers are gone in the end, and its stderr lies beside ``out``."""
    # without byte code on disk every start compiles three thousand modules
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"OMP_NUM_THREADS": "1", "NTKGEN_RATES": "default"}
    with out.with_suffix(".err").open("ab") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=env)
    try:
        yield Run(process, progress(out), time.monotonic() + RUN_SECONDS)
    finally:
        helpers = workers_of(process.pid)
        process.kill()
        process.wait()
        end_all(helpers)


def workers_of(pid: int) -> list[psutil.Process]:
    """Find the workers of a run: dask spawns one process for each, whose nanny is a thread of the run."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if is_alive(child) and _is_spawned(child)]


def _is_spawned(process: psutil.Process) -> bool:
    """Tell a worker from what Python starts beside it to keep track of semaphores."""
    try:
        return "--multiprocessing-fork" in process.cmdline()
    except psutil.Error:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Say whether a process is there, and more than an entry in a table."""
    try:
        return bool(process.is_running() and process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
    except psutil.NoSuchProcess:
        return False


def end_all(processes: Iterable[psutil.Process]) -> None:
    """Kill processes that should be gone."""
    for process in processes:
        if is_alive(process):
            process.kill()
