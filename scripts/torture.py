"""Kill computations with kill -9 at random moments, resume them, and compare what they leave with an undisturbed run.

    uv run python scripts/torture.py --rounds 60 --cluster-rounds 40

A round computes a small kernel of many tiles. Its process is killed one to three times, each time when a number of
files is on disk that was drawn at random: while the network is trained, the store created, the diagonal or a tile
written, between a tile and its mirror, before and after the certificate. The same command then goes on, and in the end
every file must have the bytes of an undisturbed run, with nothing beside them. In a round with a cluster one of its two
workers is killed, which the run must survive, and in every other round the coordinator too. The moments follow from the
seed and from what is on disk, not from the clock. A kill that comes too late is none.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import psutil

POLL_SECONDS = 0.001
# A run that takes longer hangs; so do workers that outlive their coordinator by as much.
RUN_SECONDS, ORPHAN_SECONDS = 300.0, 60.0
MAX_KILLS = 3  # of a round
WORKERS = 2
GIGABYTES = 1  # of each process
STDERR_BYTES = 2000  # of which a failure tells

# What a run writes, one after the other; what no pattern matches is the first.
PHASES = {"creation": "", "diagonal": r"\.zarr/(diagonal|logits)/c/", "tiles": r"\.zarr/(ntk|underflow)_"}
# What is left to do when all files are there: gathering the metadata, the certificate.
END = "end"
# How often a kill is drawn from each.
DRAWN = ("creation", "diagonal", "tiles", "tiles", "tiles", END)
# Files of one tile, on both sides of the diagonal.
TILE = re.compile(r"\.zarr/(?:ntk|underflow)_\w+/c/(\d+)/(\d+)")

Tile = tuple[int, int]


@dataclass(frozen=True)
class Options:
    """Which kernel is computed."""

    samples: int
    layout: str
    dtypes: tuple[str, ...] = ("float16", "float32")
    epochs: int = 0

    def command(self, out: Path, workers: int = 0) -> list[str]:
        """Write the command; all processes of a cluster have as much memory each as a single one."""
        shared = ["--workers", str(workers)] if workers else []
        return [
            sys.executable, "-m", "ntkgen", "compute", "--models", "logistic", "--dataset", "digits",
            "--epochs", str(self.epochs), "--allow-unconverged", "--subsample", str(self.samples), "--tile", "100",
            "--dtype", *self.dtypes, "--layout", self.layout, "--memory", f"{GIGABYTES * max(1, workers)}GB",
            "--quiet", "--out", str(out), *shared,
        ]  # fmt: skip


# 12 × 12 tiles for one process; for two, which begin late and are quick, more
LOCAL = (
    Options(120, "full"),
    Options(120, "upper"),
    Options(120, "full", dtypes=("float32",), epochs=2),
)
CLUSTER = (Options(200, "upper"), Options(150, "full"))


@dataclass(frozen=True)
class Round:
    """One computation and who is killed meanwhile: "run", the process that was started, or "worker"."""

    number: int
    options: Options
    targets: tuple[str, ...]
    workers: int = 0

    def __str__(self) -> str:
        kind = "cluster" if self.workers else "local"
        return f"{kind}-{self.number:03d}"


class Version(NamedTuple):
    """A file as it was at some moment."""

    written: tuple[int, int]  # inode and time, which are others when it is written again
    num_bytes: int
    digest: bytes


Snapshot = Mapping[str, Version]


@dataclass(frozen=True)
class Kill:
    """A process killed, and what was on disk then."""

    target: str
    phase: str
    snapshot: Snapshot


class RoundError(Exception):
    """A run that hangs, or ends in another way than it should."""


# what is on disk ------------------------------------------------------------------------------------------------------


def names_of(out: Path) -> list[str]:
    """Name all files below a folder."""
    found = []
    for folder, _, files in os.walk(out):
        found += [f"{folder[len(str(out)) + 1 :]}/{file}".lstrip("/") for file in files]
    return sorted(found)


def take_snapshot(out: Path) -> Snapshot:
    """Read every file that is not being written."""
    found = {}
    for name in names_of(out):
        try:
            data, status = (out / name).read_bytes(), (out / name).stat()
        except FileNotFoundError:  # a draft that was renamed meanwhile, or a lock that was let go
            continue
        if not name.endswith((".partial", ".lock")):
            found[name] = Version((status.st_ino, status.st_mtime_ns), len(data), hashlib.blake2b(data).digest())
    return found


def progress(out: Path) -> Iterator[int]:
    """Count, whenever asked, the files that are there or being written, and how often those of a folder were replaced.

    Replaced are the checkpoint, epoch by epoch, and the store's zarr.json when all files are there.
    """
    versions: dict[Path, set[tuple[int, int]]] = defaultdict(set)
    while True:
        for file in (*out.glob("*.pt"), *out.glob("*.zarr/zarr.json")):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            versions[file].add((status.st_ino, status.st_mtime_ns))
        yield num_files(out) + sum(len(seen) - 1 for seen in versions.values())


def num_files(out: Path) -> int:
    """Count the files below a folder, but for locks."""
    return sum(not name.endswith(".lock") for name in names_of(out))


def phase_of(name: str) -> str:
    """Say when a run writes a file.

    >>> phase_of("k.zarr/diagonal/zarr.json"), phase_of("k.zarr/diagonal/c/0"), phase_of("k.zarr/ntk_float32/c/0/1")
    ('creation', 'diagonal', 'tiles')
    """
    return next(
        (phase for phase, pattern in PHASES.items() if pattern and re.search(pattern, name)), next(iter(PHASES))
    )


def tiles_of(names: Iterable[str]) -> dict[Tile, set[str]]:
    """Gather the files of each tile.

    >>> sorted(tiles_of(["k.zarr/ntk_float32/c/0/2", "k.zarr/ntk_float32/c/2/0", "k.zarr/logits/c/0/0"])[0, 2])
    ['k.zarr/ntk_float32/c/0/2', 'k.zarr/ntk_float32/c/2/0']
    """
    found: dict[Tile, set[str]] = defaultdict(set)
    for name in names:
        if match := TILE.search(name):
            row, col = sorted(map(int, match.groups()))
            found[row, col].add(name)
    return found


# what is compared -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """How one folder differs from another."""

    differing: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    num_bytes: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Name all files that are not as they should be."""
        return self.differing + self.absent + self.extra


def compare(expected: Path, found: Path) -> Differences:
    """Compare names and bytes of all files of two folders, locks and drafts included."""
    wanted, there = set(names_of(expected)), set(names_of(found))
    both = {name: differing_bytes(expected / name, found / name) for name in sorted(wanted & there)}
    absent, extra = sorted(wanted - there), sorted(there - wanted)
    alone = [expected / name for name in absent] + [found / name for name in extra]
    num_bytes = sum(both.values()) + sum(file.stat().st_size for file in alone)
    return Differences(tuple(name for name, num in both.items() if num), tuple(absent), tuple(extra), num_bytes)


def differing_bytes(first: Path, second: Path) -> int:
    """Count the bytes that differ; those that only one file has do."""
    x, y = (np.frombuffer(file.read_bytes(), np.uint8) for file in (first, second))
    common = min(len(x), len(y))
    return int(np.count_nonzero(x[:common] != y[:common])) + abs(len(x) - len(y))


@dataclass(frozen=True)
class Fate:
    """What became of the tiles between two moments."""

    recomputed: int  # had a file that was written again
    whole_recomputed: int  # of these, had every file
    lost: int  # had every file, and one of them has gone or has other bytes


def follow(expected: Snapshot, before: Snapshot, after: Snapshot) -> Fate:
    """Follow the tiles of a finished store from one moment to a later one."""
    tiles = tiles_of(expected)
    again = {tile for tile, names in tiles.items() if any(_is_rewritten(name, before, after) for name in names)}
    whole = {tile for tile, names in tiles.items() if all(_is_whole(name, before, expected) for name in names)}
    lost = {tile for tile in whole if any(_is_lost(name, before, after) for name in tiles[tile])}
    return Fate(len(again), len(again & whole), len(lost))


def _is_rewritten(name: str, before: Snapshot, after: Snapshot) -> bool:
    return name in before and name in after and before[name].written != after[name].written


def _is_whole(name: str, found: Snapshot, expected: Snapshot) -> bool:
    return name in found and found[name].num_bytes == expected[name].num_bytes


def _is_lost(name: str, before: Snapshot, after: Snapshot) -> bool:
    return name not in after or after[name][1:] != before[name][1:]


# processes ------------------------------------------------------------------------------------------------------------


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


# a round --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """An undisturbed run: its results, and at which steps it was in which phase."""

    out: Path
    snapshot: Snapshot
    num_steps: int

    def missing_phase(self, found: Snapshot) -> str:
        """Say in which phase a run was that has left some files: the first that is not over."""
        missing = {phase_of(name) for name in self.snapshot.keys() - found.keys()}
        return next((phase for phase in PHASES if phase in missing), END)

    def draw_step(self, rng: np.random.Generator) -> int:
        """Draw a step to kill at: first its phase, then a moment in this."""
        low, high = self._steps(DRAWN[rng.integers(len(DRAWN))])
        return int(rng.integers(low + 1, high + 1))

    def _steps(self, phase: str) -> tuple[int, int]:
        """Count the steps that are made before a phase, and with it."""
        counts = Counter(map(phase_of, self.snapshot))
        before = list(PHASES).index(phase) if phase != END else len(PHASES)
        low = sum(counts[other] for other in list(PHASES)[:before])
        return low, low + counts[phase] if phase != END else self.num_steps


def make_baseline(options: Options, folder: Path) -> Baseline:
    """Run a command to its end, and count its steps.

    Raises:
        RoundError: If it fails.
    """
    out = folder / "out"
    folder.mkdir(parents=True)
    with running(options.command(out), out) as run:
        num_steps = run.count_steps()
        if exit_code := run.finish():
            raise RoundError(f"an undisturbed run ended with exit code {exit_code}{tail(out)}")
    return Baseline(out, take_snapshot(out), max(num_steps, num_files(out) + 1))


def tail(out: Path) -> str:
    """Quote the end of what the runs of a folder have said."""
    return ": " + out.with_suffix(".err").read_text(errors="replace")[-STDERR_BYTES:].strip()


@dataclass(frozen=True, eq=False)
class Siege:
    """A round being played."""

    round: Round
    baseline: Baseline
    out: Path
    rng: np.random.Generator
    kills: list[Kill] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    orphans: list[psutil.Process] = field(default_factory=list)  # workers of coordinators that were killed

    def play(self) -> None:
        """Start the command again and again until it ends by itself; once more, and undisturbed, after a failure."""
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
        """Run the command, and kill what is to be killed; say whether it was the command itself.

        Raises:
            RoundError: If it hangs or fails.
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
        """Kill a process with SIGKILL, and look at the disk; False where it has ended before."""
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
                raise RoundError(f"{len(alive)} workers of a coordinator that was killed live on")
            time.sleep(POLL_SECONDS)


def _was_there_to_kill(victim: psutil.Process) -> bool:
    """Kill a process; say whether it was there."""
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return False
    return True


@dataclass(frozen=True)
class Outcome:
    """What a round has shown."""

    kills: tuple[Kill, ...]
    fates: tuple[Fate, ...]
    differences: Differences
    failures: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Say whether the store is as if nothing had happened."""
        return not self.failures and not self.differences.names and not any(fate.lost for fate in self.fates)


def play(played: Round, baseline: Baseline, out: Path, seed: int) -> Outcome:
    """Play a round, and compare what it has left with the baseline."""
    siege = Siege(played, baseline, out, np.random.default_rng([seed, played.number, played.workers]))
    out.parent.mkdir(parents=True)
    siege.play()
    snapshots = [kill.snapshot for kill in siege.kills] + [take_snapshot(out)]
    fates = tuple(follow(baseline.snapshot, *pair) for pair in pairwise(snapshots))
    failures = tuple(f"round {played}, seed {seed}: {failure}" for failure in siege.failures)
    return Outcome(tuple(siege.kills), fates, compare(baseline.out, out), failures)


# all rounds -----------------------------------------------------------------------------------------------------------


def draw_rounds(local: int, cluster: int, seed: int) -> list[Round]:
    """Draw how often and who is killed: in every round of a cluster a worker, in every other the coordinator too."""
    rng, rounds = np.random.default_rng(seed), []
    for number in range(local):
        kills = int(rng.integers(1, MAX_KILLS + 1))
        rounds.append(Round(number, LOCAL[number % len(LOCAL)], ("run",) * kills))
    for number in range(cluster):
        targets = ["worker"] * int(rng.integers(1, MAX_KILLS)) + ["run"] * (number % 2)
        options = CLUSTER[number // 2 % len(CLUSTER)]
        rounds.append(Round(number, options, tuple(map(str, rng.permutation(targets))), WORKERS))
    return rounds


def torture(rounds: Iterable[Round], folder: Path, seed: int, *, keep: bool = False) -> Iterator[Outcome]:
    """Play rounds; the folders of the good ones are removed, unless they are to be kept."""
    baselines: dict[Options, Baseline] = {}
    for played in rounds:
        if played.options not in baselines:
            baselines[played.options] = make_baseline(played.options, folder / f"undisturbed-{len(baselines)}")
        out = folder / str(played) / "out"
        outcome = play(played, baselines[played.options], out, seed)
        if outcome.is_good and not keep:
            shutil.rmtree(out.parent)
        yield outcome


def describe(outcome: Outcome) -> str:
    """Write what happened in a round in one line."""
    kills = ", ".join(f"{kill.target} killed in {kill.phase}" for kill in outcome.kills)
    totals = total([outcome])
    bad = f"{totals['tiles_lost']} tiles lost, {totals['bytes_differing']} bytes differ"
    return "; ".join(filter(None, [kills or "no kill in time", "" if outcome.is_good else bad, *outcome.failures]))


def total(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Add all rounds up."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    fates = [fate for outcome in outcomes for fate in outcome.fates]
    return {
        "rounds": len(outcomes),
        "kills": len(kills),
        "kills_by_target": dict(Counter(kill.target for kill in kills)),
        "kills_by_phase": dict(Counter(kill.phase for kill in kills)),
        "tiles_recomputed": sum(fate.recomputed for fate in fates),
        "whole_tiles_recomputed": sum(fate.whole_recomputed for fate in fates),
        "tiles_lost": sum(fate.lost for fate in fates),
        "files_differing": sum(len(outcome.differences.names) for outcome in outcomes),
        "bytes_differing": sum(outcome.differences.num_bytes for outcome in outcomes),
        "failures": [failure for outcome in outcomes for failure in outcome.failures],
    }


@dataclass(frozen=True)
class Settings:
    """How all rounds are played."""

    seed: int
    keep: bool
    quiet: bool

    def say(self, line: str) -> None:
        """Report progress."""
        if not self.quiet:
            click.echo(line, err=True)


def play_all(rounds: Sequence[Round], settings: Settings) -> list[Outcome]:
    """Play rounds in a temporary folder, which is kept if one of them is not good."""
    folder, outcomes = Path(tempfile.mkdtemp(prefix="ntkgen-torture-")), list[Outcome]()
    try:
        for played, outcome in zip(rounds, torture(rounds, folder, settings.seed, keep=settings.keep), strict=True):
            outcomes.append(outcome)
            settings.say(f"round {len(outcomes)} of {len(rounds)}, {played}: {describe(outcome)}")
    finally:
        if not settings.keep and all(outcome.is_good for outcome in outcomes):
            shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        settings.say(f"The stores are kept in {folder}.")
    return outcomes


@click.command()
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(min=0), help="Of one process.")
@click.option("--cluster-rounds", default=40, show_default=True, type=click.IntRange(min=0), help="Of two workers.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Of all that is drawn.")
@click.option("--keep", is_flag=True, help="Keep the stores of all rounds, about 15 MB each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="No line per round.")
def main(*, rounds: int, cluster_rounds: int, as_json: bool, **options: Any) -> None:
    """Kill computations at random moments, resume them, and compare them with undisturbed ones: 1 if they differ."""
    started, settings = time.monotonic(), Settings(**options)
    try:
        outcomes = play_all(draw_rounds(rounds, cluster_rounds, settings.seed), settings)
    except RoundError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    totals = {**total(outcomes), "seed": settings.seed, "seconds": round(time.monotonic() - started, 1)}
    click.echo(json.dumps(totals) if as_json else "\n".join(f"{name:<24}{value}" for name, value in totals.items()))
    if not all(outcome.is_good for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing is left at work
    main()
