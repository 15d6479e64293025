"""Kill computations with kill -9 at random moments, resume them, and compare their files with an uninterrupted run.

    uv run python scripts/torture/torture.py --rounds 60 --cluster-rounds 40

A round computes a small kernel of many tiles. Its process is killed one to three times. Each kill happens when a random
number of files is on disk: during training, the creation of the store, the diagonal or a tile, between a tile and its
mirror image, or before or after the certificate (measured error bound of the kernel). The same command then continues.
At the end, every file must have the bytes of an uninterrupted run, without additional files. In a round with a cluster,
one of its two workers is killed, and the run must continue. In every second round the coordinator is killed too. The
moments depend on the seed and on the files on disk, not on the clock. A kill after the end of a run does not count.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from processes import RoundError
from siege import Baseline, Options, Outcome, Round, make_baseline, play

# Maximum number of kills in a round without a cluster.
MAX_KILLS = 3
WORKERS = 2

# Kernels for one process have 12 × 12 tiles. Those for two workers have more, since workers start late and are fast.
LOCAL = (
    Options(120, "full"),
    Options(120, "upper"),
    Options(120, "full", dtypes=("float32",), epochs=2),
)
CLUSTER = (Options(200, "upper"), Options(150, "full"))


def draw_rounds(local: int, cluster: int, seed: int) -> list[Round]:
    """Draw the kills of all rounds. A round with a cluster kills workers, and every second one the coordinator too."""
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
    """Play rounds. The folders of good rounds are removed, unless ``keep`` is set."""
    baselines: dict[Options, Baseline] = {}
    for played in rounds:
        if played.options not in baselines:
            baselines[played.options] = make_baseline(played.options, folder / f"uninterrupted-{len(baselines)}")
        out = folder / str(played) / "out"
        outcome = play(played, baselines[played.options], out, seed)
        if outcome.is_good and not keep:
            shutil.rmtree(out.parent)
        yield outcome


def describe(outcome: Outcome) -> str:
    """Describe the result of a round in one line."""
    kills = ", ".join(f"{kill.target} killed in {kill.phase}" for kill in outcome.kills)
    totals = total([outcome])
    bad = f"{totals['tiles_lost']} tiles lost, {totals['bytes_differing']} bytes differ"
    return "; ".join(filter(None, [kills or "no kill in time", "" if outcome.is_good else bad, *outcome.failures]))


def total(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Add up the results of all rounds."""
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
    """Settings of all rounds."""

    seed: int
    keep: bool
    quiet: bool

    def say(self, line: str) -> None:
        """Print a line about the progress on stderr, unless ``quiet`` is set."""
        if not self.quiet:
            click.echo(line, err=True)


def play_all(rounds: Sequence[Round], settings: Settings) -> list[Outcome]:
    """Play rounds in a temporary folder. The folder is kept if a round is not good."""
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
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(min=0), help="Rounds with one process.")
@click.option(
    "--cluster-rounds", default=40, show_default=True, type=click.IntRange(min=0), help="Rounds with two workers."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Seed of all random numbers.")
@click.option("--keep", is_flag=True, help="Keep the stores of all rounds, about 15 MB each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="Print no line per round.")
def main(*, rounds: int, cluster_rounds: int, as_json: bool, **options: Any) -> None:
    """Kill computations at random moments, resume them, and compare them with uninterrupted ones.

    The exit code is 1 if a file differs or a run fails.
    """
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all processes, as Ctrl-C does
    main()
