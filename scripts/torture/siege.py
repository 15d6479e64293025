"""One round: a computation that is killed at random moments and resumed, and the check of its files."""

import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from disk import PHASES, Differences, Fate, Snapshot, compare, follow, num_files, phase_of, take_snapshot
from processes import POLL_SECONDS, RoundError, Run, end_all, is_alive, running, workers_of

# Maximum time between the end of a coordinator and the end of its workers.
ORPHAN_SECONDS = 60.0
# Memory limit of each process.
GIGABYTES = 1
# Number of bytes of stderr, from its end, that the message of a failure quotes.
STDERR_BYTES = 2000
# Phase after all files exist: consolidation of the metadata, and the certificate (measured error bound of the kernel).
END = "end"
# Phases from which the moment of a kill is drawn. A repeated phase has a larger probability.
DRAWN = ("creation", "diagonal", "tiles", "tiles", "tiles", END)


@dataclass(frozen=True)
class Options:
    """Options of the computed kernel."""

    samples: int
    layout: str
    dtypes: tuple[str, ...] = ("float16", "float32")
    epochs: int = 0

    def command(self, out: Path, workers: int = 0) -> list[str]:
        """Return the command. Each process of a cluster has the memory limit of a single process."""
        shared = ["--workers", str(workers)] if workers else []
        return [
            sys.executable, "-m", "ntkgen", "compute", "--models", "logistic", "--dataset", "digits",
            "--epochs", str(self.epochs), "--allow-unconverged", "--subsample", str(self.samples), "--tile", "100",
            "--dtype", *self.dtypes, "--layout", self.layout, "--memory", f"{GIGABYTES * max(1, workers)}GB",
            "--quiet", "--out", str(out), *shared,
        ]  # fmt: skip


@dataclass(frozen=True)
class Round:
    """One computation, and the processes that are killed: "run" is the started process, "worker" one of its workers."""

    number: int
    options: Options
    targets: tuple[str, ...]
    workers: int = 0

    def __str__(self) -> str:
        kind = "cluster" if self.workers else "local"
        return f"{kind}-{self.number:03d}"


@dataclass(frozen=True)
class Kill:
    """A killed process, its phase, and the files on disk at that moment."""

    target: str
    phase: str
    snapshot: Snapshot


@dataclass(frozen=True)
class Baseline:
    """An uninterrupted run: its files and its number of steps."""

    out: Path
    snapshot: Snapshot
    num_steps: int

    def missing_phase(self, found: Snapshot) -> str:
        """Return the phase of an interrupted run, which is the first phase with missing files."""
        missing = {phase_of(name) for name in self.snapshot.keys() - found.keys()}
        return next((phase for phase in PHASES if phase in missing), END)

    def draw_step(self, rng: np.random.Generator) -> int:
        """Draw the step of a kill: first its phase, then a step of this phase."""
        low, high = self._steps(DRAWN[rng.integers(len(DRAWN))])
        return int(rng.integers(low + 1, high + 1))

    def _steps(self, phase: str) -> tuple[int, int]:
        """Return the number of steps before a phase, and the number of steps until its end."""
        counts = Counter(map(phase_of, self.snapshot))
        before = list(PHASES).index(phase) if phase != END else len(PHASES)
        low = sum(counts[other] for other in list(PHASES)[:before])
        return low, low + counts[phase] if phase != END else self.num_steps


def make_baseline(options: Options, folder: Path) -> Baseline:
    """Run a command to its end and count its steps.

    Raises:
        RoundError: If the run fails.
    """
    out = folder / "out"
    folder.mkdir(parents=True)
    with running(options.command(out), out) as run:
        num_steps = run.count_steps()
        if exit_code := run.finish():
            raise RoundError(f"an uninterrupted run ended with exit code {exit_code}{tail(out)}")
    return Baseline(out, take_snapshot(out), max(num_steps, num_files(out) + 1))


def tail(out: Path) -> str:
    """Quote the end of the stderr of the runs of a folder."""
    return ": " + out.with_suffix(".err").read_text(errors="replace")[-STDERR_BYTES:].strip()


@dataclass(frozen=True, eq=False)
class Siege:
    """A running round."""

    round: Round
    baseline: Baseline
    out: Path
    rng: np.random.Generator
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    orphans: list[psutil.Process] = field(default_factory=list)  # workers of coordinators that were killed

    def play(self) -> None:
        """Start the command again until it ends without a kill. After a failure, run it once more without kills."""
        steps = sorted(self.baseline.draw_step(self.rng) for _ in self.round.targets)
        try:
            if not self._succeeds(deque(zip(steps, self.round.targets, strict=True))):
                self._succeeds(deque())
        finally:
            end_all(self.orphans)

    def _succeeds(self, plan: deque[tuple[int, str]]) -> bool:
        try:
            while self._is_killed(plan):
                pass
        except RoundError as error:
            self.failures.append(str(error))
        return not self.failures

    def _is_killed(self, plan: deque[tuple[int, str]]) -> bool:
        """Run the command and kill the planned processes. Return whether the command itself was killed.

        Raises:
            RoundError: If the command hangs or fails.
        """
        with running(self.round.options.command(self.out, self.round.workers), self.out) as run:
            self._await_orphans()
            own_step = num_files(self.out) + 1
            while plan and run.reaches(max(plan[0][0], own_step)):
                _, target = plan.popleft()
                if self._kill(run, target) and target == "run":
                    return True
            if exit_code := run.finish():
                raise RoundError(f"a run that was not killed ended with exit code {exit_code}{tail(self.out)}")
        return False

    def _kill(self, run: Run, target: str) -> bool:
        """Kill a process with SIGKILL and take a snapshot of the disk. Return False if it has ended before."""
        workers, victim = workers_of(run.process.pid), run.finds(target, self.rng)
        if victim is None or not _was_there_to_kill(victim):
            return False
        if target == "run" and run.finish() != -signal.SIGKILL:
            return False
        if target == "run":
            self.orphans.extend(workers)
        snapshot = take_snapshot(self.out)
        self.kills.append(Kill(target, self.baseline.missing_phase(snapshot), snapshot))
        return True

    def _await_orphans(self) -> None:
        until = time.monotonic() + ORPHAN_SECONDS
        while alive := [process for process in self.orphans if is_alive(process)]:
            if time.monotonic() > until:
                raise RoundError(f"{len(alive)} workers of a killed coordinator did not end")
            time.sleep(POLL_SECONDS)


def _was_there_to_kill(victim: psutil.Process) -> bool:
    """Kill a process. Return whether it existed."""
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@dataclass(frozen=True)
class Outcome:
    """The result of a round."""

    kills: tuple[Kill, ...]
    fates: tuple[Fate, ...]
    differences: Differences
    failures: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Return whether the files equal those of an uninterrupted run."""
        return not self.failures and not self.differences.names and not any(fate.lost for fate in self.fates)


def play(played: Round, baseline: Baseline, out: Path, seed: int) -> Outcome:
    """Play a round, and compare its files with those of the baseline."""
    siege = Siege(played, baseline, out, np.random.default_rng([seed, played.number, played.workers]))
    out.parent.mkdir(parents=True)
    siege.play()
    snapshots = [kill.snapshot for kill in siege.kills] + [take_snapshot(out)]
    fates = tuple(follow(baseline.snapshot, *pair) for pair in pairwise(snapshots))
    failures = tuple(f"round {played}, seed {seed}: {failure}" for failure in siege.failures)
    return Outcome(tuple(siege.kills), fates, compare(baseline.out, out), failures)
