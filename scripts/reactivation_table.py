"""Print the table of `scripts/reproduce_reactivation.sh`: numbers of its runs beside the published ones, in Markdown.

    python scripts/reactivation_table.py runs/reactivation [--json]

Several seeds are printed as mean ± standard deviation; each published number is of one run without a stated seed. The
kernels are those of the training probe of the first task, with the sum of the outputs, at the end of each epoch; see
`ntkgen.continual.metrics.switches.Switches`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import ntkgen
from ntkgen.continual.comparison import compare
from ntkgen.continual.presets import PRESETS
from ntkgen.continual.published import QUANTITIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the runs, one folder per network")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = list(measured(options.folder))
    if options.json:
        print(json.dumps(rows))
        return
    print(f"| run | {' | '.join(QUANTITIES.values())} |")
    print("|---|" + "---:|" * len(QUANTITIES))
    for row in rows:
        print(f"| {row['run']}, {len(row['seeds'])} seeds | {' | '.join(shown(row, name) for name in QUANTITIES)} |")
        print(f"| published | {' | '.join(plain(row['published'].get(name)) for name in QUANTITIES)} |")
        for difference in row["differences"]:
            print(f"Not comparable: {row['run']} has {difference}.")


def measured(folder: Path) -> Iterator[dict[str, Any]]:
    """Compare every network whose runs are finished with the published run."""
    for place in sorted(folder.iterdir()):
        runs = [ntkgen.open_run(config.parent) for config in sorted(place.glob("seed*/config.json"))]
        found = [compare(PRESETS["eth-cifar10"], run) for run in runs if run.num_finished == run.num_tasks]
        compared = [each for each in found if each is not None]
        if compared:
            yield {
                "run": place.name,
                "seeds": [run.settings.seed for run in runs if run.num_finished == run.num_tasks],
                "numbers": {name: [each.numbers[name] for each in compared] for name in compared[0].numbers},
                "published": dict(compared[0].published.numbers),
                "differences": compared[0].differences,
            }


def shown(row: dict[str, Any], name: str) -> str:
    """Write the mean over seeds, and the standard deviation if there are several."""
    values = row["numbers"][name]
    spread = f" ± {plain(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return plain(np.mean(values)) + spread


def plain(value: Any) -> str:
    """Write a number with three digits.

    >>> plain(54321.0), plain(0.1234), plain(None)
    ('5.4e+04', '0.123', '')
    """
    if value is None:
        return ""
    return f"{value:.1e}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
