"""A running command and its workers: its progress on disk, and the end of all its processes."""

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
# Maximum duration of a run. A longer run counts as hanging.
RUN_SECONDS = 300.0


class RoundError(Exception):
    """A run that hangs or fails."""


@dataclass(frozen=True, eq=False)
class Run:
    """A running command, and the steps that it makes on disk."""

    process: "subprocess.Popen[bytes]"
    steps: Iterator[int]
    deadline: float

    def reaches(self, step: int) -> bool:
        """Wait until the run has made a step. Return False if it ends before.

        Raises:
            RoundError: If the run hangs.
        """
        while self.process.poll() is None:
            if next(self.steps) >= step:
                return True
            self._wait()
        return False

    def finds(self, target: str, rng: np.random.Generator) -> psutil.Process | None:
        """Wait for the process to kill: the run, or one of its workers. Return None if the run ends before.

        Raises:
            RoundError: If the run hangs.
        """
        while self.process.poll() is None:
            found = workers_of(self.process.pid) if target == "worker" else [psutil.Process(self.process.pid)]
            if found:
                return found[rng.integers(len(found))]
            self._wait()
        return None

    def count_steps(self) -> int:
        """Count the steps of the run until it ends.

        Raises:
            RoundError: If the run hangs.
        """
        most = 0
        while self.process.poll() is None:
            most = max(most, next(self.steps))
            self._wait()
        return most

    def finish(self) -> int:
        """Wait for the end of the run and return its exit code.

        Raises:
            RoundError: If the run hangs.
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
    """Start a command, and end it and its workers at the end of the context. Its stderr is written beside ``out``."""
    # Without bytecode files, every start would compile three thousand modules.
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
    """Find the workers of a run. Each is a child process that dask has spawned."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if is_alive(child) and _is_spawned(child)]


def _is_spawned(process: psutil.Process) -> bool:
    """Return whether a process is a spawned worker, and not Python's resource tracker."""
    try:
        return "--multiprocessing-fork" in process.cmdline()
    except psutil.Error:
        return False


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD})
    except psutil.NoSuchProcess:
        return False


def end_all(processes: Iterable[psutil.Process]) -> None:
    """Kill those of the processes that are still alive."""
    for process in processes:
        if is_alive(process):
            process.kill()
