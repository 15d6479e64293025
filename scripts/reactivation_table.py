"""Print the table of `scripts/reproduce_reactivation.sh`: numbers of its runs beside the published ones, in Markdown.

    python scripts/reactivation_table.py runs/reactivation [--json]

Several seeds are printed as mean ± standard deviation; each published number is of one run without a stated seed. The
kernels are those of the training probe of the first task, with the sum of the outputs, at the end of each epoch; see
`ntkgen.continual.metrics.switches.Switches`.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ntkgen.continual.comparison import compare
from ntkgen.continual.presets import PRESETS
from ntkgen.continual.reading import open_seed

TABLES = (
    {
        "average_accuracy": "average accuracy",
        "average_incremental_accuracy": "incremental",
        "backward_transfer": "BWT",
        "distance_ratio": "S at switch / within",
        "norm_ratio": "‖K‖ after / before",
    },
    {
        "norm_first": "‖K‖ epoch 1",
        "norm_before": "end of task 0",
        "norm_after": "one epoch later",
        "norm_last": "last epoch",
    },
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the runs, one folder per network")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = list(measured(options.folder))
    if options.json:
        print(json.dumps(rows))
        return
    for headings in TABLES:
        print(f"| run | {' | '.join(headings.values())} |")
        print("|---|" + "---:|" * len(headings))
        for row in rows:
            published = {name: [value] for name, value in row["published"].items()}
            for title, numbers in (
                (f"{row['run']}, n = {len(row['seeds'])}", row["numbers"]),
                ("published", published),
            ):
                print(f"| {title} | {' | '.join(cell(numbers.get(name, [])) for name in headings)} |")
        print()
    for row in rows:
        for difference in row["differences"]:
            print(f"Not comparable: {row['run']} has {difference}.")


def measured(folder: Path) -> Iterator[dict[str, Any]]:
    """Compare every network whose runs are finished with the published run."""
    for place in sorted(folder.iterdir()):
        runs = [open_seed(config.parent) for config in sorted(place.glob("seed*/config.json"))]
        found = [compare(PRESETS["eth-cifar10"], run) for run in runs if run.num_finished == run.num_tasks]
        compared = [each for each in found if each is not None]
        if compared:
            yield {
                "run": place.name.replace("-", " "),
                "seeds": [run.settings.seed for run in runs if run.num_finished == run.num_tasks],
                "numbers": {name: [each.numbers[name] for each in compared] for name in compared[0].numbers},
                "published": dict(compared[0].published.numbers),
                "differences": compared[0].differences,
            }


def cell(values: list[float]) -> str:
    """Write the mean over seeds, and the standard deviation if there are several.

    >>> cell([54321.0]), cell([1.0e5, 1.2e5]), cell([0.17, 0.18]), cell([])
    ('5.4e4', '(1.1 ± 0.1)e5', '0.175 ± 0.007', '')
    """
    if not values:
        return ""
    mean = float(np.mean(values))
    power = math.floor(math.log10(abs(mean))) if abs(mean) >= 1000 else 0
    digits = 3 if abs(mean) < 1 else 1
    numbers = [mean, *([float(np.std(values, ddof=1))] if len(values) > 1 else [])]
    text = " ± ".join(f"{number / 10**power:.{digits}f}" for number in numbers)
    return (f"({text})" if len(values) > 1 else text) + f"e{power}" if power else text


if __name__ == "__main__":
    main()
