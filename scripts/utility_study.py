"""Print how well utilities of weights or units agree with the true one, while small networks learn.

    uv run python scripts/utility_study.py [--seeds 30] [--steps 2000] [--of units] [--json]

The table has Spearman's rank correlation with the oracle, the change of the loss if one becomes 0: the mean over
the seeds and the comparisons, with the standard error over the seeds. See `ntkgen.continual.streaming.utility_study`.
"""

import argparse
import json
from typing import Any

from ntkgen.continual.metrics.spread import Spread
from ntkgen.continual.streaming.utility_study import KINDS, SCOPES, UTILITIES, StudySettings, study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=StudySettings.num_seeds)
    parser.add_argument("--steps", type=int, default=StudySettings.num_steps)
    parser.add_argument("--every", type=int, default=StudySettings.every)
    parser.add_argument("--of", choices=KINDS, default=StudySettings.of)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = study(StudySettings(options.seeds, options.steps, options.every, of=options.of)).correlation
    spreads: dict[str, dict[str, Any]] = {
        utility: {scope: Spread.of(found.sel(utility=utility, scope=scope).values) for scope in SCOPES}
        for utility in UTILITIES
    }
    if options.json:
        print(json.dumps({name: {scope: each.to_json() for scope, each in of.items()} for name, of in spreads.items()}))
        return
    print(f"| utility | {' | '.join(SCOPES)} |\n| --- |{' ---: |' * len(SCOPES)}")
    for name, of in spreads.items():
        cells = (f"{each.mean:.3f} ± {each.standard_error or 0:.3f}" for each in of.values())
        print(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
