"""Kill computations with kill -9 at random moments, resume them, and compare what they leave with an undisturbed run.

    uv run python scripts/torture/torture.py --rounds 60 --cluster-rounds 40

A round computes a small kernel of many tiles. Its process is killed one to three times, each time when a number of
files is on disk that was drawn at random: while the network is trained, the store created, the diagonal or a tile
written, between a tile and its mirror, before and after the certificate. The same command then goes on, and in the end
every file must have the bytes of an undisturbed run, with nothing beside them. In a round with a cluster one of its two
workers is killed, which the run must survive, and in every other round the coordinator too. The moments follow from the
seed and from what is on disk, not from the clock. A kill that comes too late is none.
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

MAX_KILLS = 3  # of a round
WORKERS = 2

# 12 × 12 tiles for one process; for two, which begin late and are quick, more
LOCAL = (
    Options(120, "full"),
    Options(120, "upper"),
    Options(120, "full", dtypes=("float32",), epochs=2),
)
CLUSTER = (Options(200, "upper"), Options(150, "full"))


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
