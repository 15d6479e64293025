"""Print the table of `scripts/reproduce_upgd.sh`, in Markdown.

    python scripts/upgd_table.py runs/upgd [--json]

Scores are means over seeds with their standard errors. The published numbers are those of one run of 400 tasks each,
computed from the published records (code ``yumikim381/upgd-dl-project``). A difference from the baseline is paired by
seed: both learners see one stream, from the same parameters. Its interval is the 95 % one of Student's distribution.
A published difference survives if the interval has its sign and excludes 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ntkgen.continual.metrics.spread import Spread
from ntkgen.continual.streaming.record import read_stream
from ntkgen.continual.streaming.summary import Row, rows_of

ROUNDS = ("equal", "published")
BASELINE = "baseline"
SCORES = ("average_accuracy", "average_plasticity", "lipschitz")
# Average accuracy, average plasticity and Lipschitz number of one published run on CIFAR-10 each.
PUBLISHED = {
    "baseline": (0.5529, 0.4542, 0.473),
    "weight_norm": (0.5462, 0.4554, 0.199),
    "grad_norm": (0.5427, 0.4439, 0.201),
    "ratio_norm": (0.5530, 0.4548, 0.252),
    "usgd": (0.5538, 0.4594, 0.282),
    "entire_kernel": (0.1529, 0.0859, 0.270),
    "column_kernel": (0.1614, 0.0995, 0.272),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {round_: rows_of_round(options.folder / round_) for round_ in ROUNDS}
    result = {round_: [measured(row, rows) for row in rows.values()] for round_, rows in found.items() if rows}
    print(json.dumps(result) if options.json else "\n".join(page(options.folder, result)))


def rows_of_round(folder: Path) -> dict[str, Row]:
    """Read the scores of every learner of a round."""
    return {name: rows_of(read_stream(folder / name))[0] for name in PUBLISHED if (folder / name / "run.zarr").exists()}


def measured(row: Row, rows: dict[str, Row]) -> dict[str, Any]:
    """List the scores of a learner, and its differences from the baseline."""
    result: dict[str, Any] = {"learner": row.name}
    for index, score in enumerate(SCORES):
        values = getattr(row.scores, score)
        published = PUBLISHED[row.name][index]
        result[score] = {"mean": row.mean(score), "standard_error": row.standard_error(score), "published": published}
        if row.name != BASELINE and BASELINE in rows:
            difference = Spread.of(values - getattr(rows[BASELINE].scores, score))
            wanted = published - PUBLISHED[BASELINE][index]
            result[score] |= {
                "difference": None if difference is None else difference.to_json(),
                "published_difference": wanted,
                "verdict": verdict(difference, wanted),
            }
    return result


def verdict(difference: Spread | None, published: float) -> str:
    """Say what becomes of a published difference.

    >>> verdict(Spread.of([0.1, 0.11, 0.09]), 0.2), verdict(Spread.of([0.1, 0.11, 0.09]), -0.2)
    ('survives', 'reversed')
    >>> verdict(Spread.of([0.1, -0.11, 0.09]), 0.2)
    'not resolved'
    """
    if difference is None or difference.interval is None:
        return "not resolved"
    low, high = difference.interval
    if low <= 0 <= high:
        return "not resolved"
    return "survives" if (low > 0) == (published > 0) else "reversed"


def page(folder: Path, result: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Write the tables."""
    lines = []
    for round_, rows in result.items():
        found = read_stream(folder / round_ / rows[0]["learner"])
        lines += [
            f"{round_}: {found.sizes['bin']} tasks, {found.sizes['seed']} seeds, mean ± standard error (published)",
            "",
            "| learner | accuracy | plasticity | Lipschitz number |",
            "| --- | ---: | ---: | ---: |",
        ]
        lines += [f"| {row['learner']} | {' | '.join(cell(row[score]) for score in SCORES)} |" for row in rows]
        lines += [
            "",
            "| difference from the baseline | accuracy | published | verdict | plasticity | published | verdict |",
            "| --- | ---: | ---: | --- | ---: | ---: | --- |",
        ]
        for row in rows:
            if row["learner"] != BASELINE and "verdict" in row["average_accuracy"]:
                cells = [part for score in SCORES[:2] for part in difference_cells(row[score])]
                lines.append(f"| {row['learner']} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def cell(found: dict[str, Any]) -> str:
    """Write a score with its standard error, and the published one."""
    return f"{found['mean']:.4f} ± {found['standard_error']:.4f} ({found['published']:g})"


def difference_cells(found: dict[str, Any]) -> list[str]:
    """Write a difference with its interval, the published one, and the verdict."""
    difference = found["difference"]
    interval = None if difference is None else difference["interval_95"]
    shown = "–" if interval is None else f"{difference['mean']:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
    return [shown, f"{found['published_difference']:+.4f}", found["verdict"]]


if __name__ == "__main__":
    main()
