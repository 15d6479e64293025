"""A grid of runs: several learners, each with several values of its options. This module does not import torch.

    {"stream": "label-permuted", "dataset": "cifar10", "num_samples": 25000, "seeds": [0, 1],
     "learners": {"sgd": {"learning_rate": [0.01, 0.001]}, "usgd": {"sigma": [0.001, 0.01], "largest": ["raw"]}}}

All combinations of numbers learn side by side in one run, as many networks as fit. Words have runs of their own.
"""

import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ntkgen.continual.optim.names import OPTIONS
from ntkgen.continual.settings import require_each_once
from ntkgen.continual.settings_file import read_settings
from ntkgen.continual.streaming.aliases import with_own_names, without_aliases
from ntkgen.continual.streaming.record import BIN, read_stream
from ntkgen.continual.streaming.settings import OPTION_NAMES, StreamingSettings
from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import Folder

# Networks of a run, if nothing else is asked for.
NETWORKS = 64
METHOD = "method"
CONFIGS, COMMANDS, ARRAY = "configs", "commands.txt", "array.sh"


def read_grid(file: Path, networks: int = NETWORKS) -> dict[str, StreamingSettings]:
    """Read the runs of a grid, by the names of their folders.

    Args:
        file: The file of the grid: settings of all runs, and ``learners``.
        networks: Largest number of networks of a run, if there are not more seeds.

    Raises:
        InputError: If the file is damaged or a setting has a wrong value.
        UnknownNameError: If there is no such learner, setting or option.
    """
    values = without_aliases(with_own_names(read_settings(file), str(file)))
    learners = values.pop("learners", None)
    if not isinstance(learners, dict) or not learners or not all(isinstance(each, dict) for each in learners.values()):
        raise InputError(
            f"{file} is no grid: expected `learners` with the options of each, such as "
            '{"sgd": {"learning_rate": [0.1, 0.01]}}, found '
            f"{'none' if learners is None else json.dumps(learners)[:60]}. Is it the configuration of one run? Use "
            "`ntkgen cl-run --config`."
        )
    own = {learner: with_own_names(options, f"{file}, {learner},") for learner, options in learners.items()}
    for learner, options in own.items():
        _require_one_place(file, values, learner, options)
    seeds = values.get("seeds", StreamingSettings.seeds)
    num_seeds = len(seeds) if isinstance(seeds, list | tuple) else 1  # what else it is, is refused below
    return {
        name: StreamingSettings.from_json({**values, **run})
        for learner, options in own.items()
        for name, run in _runs(learner, options, num_seeds, networks)
    }


def is_finished(folder: Folder, settings: StreamingSettings) -> bool:
    """Say whether a run is there and has learnt all its samples.

    Raises:
        StoreError: If there is a run of another kind, or it is damaged.
    """
    if not folder.has("config.json") or not folder.has("run.zarr/zarr.json"):
        return False
    found = read_stream(folder)
    if differing := StreamingSettings.from_json(found.attrs["settings"]).differences(settings):
        raise StoreError(
            f"The run at {folder} is another one: expected the settings of the grid, found others "
            f"({'; '.join(differing[:3])}). Was the grid changed? Use another `out`, or the original grid."
        )
    return found.sizes[BIN] == len(settings.ends) and folder.has(f"models/sample{settings.num_samples}.pt")


def write_commands(folder: Folder, runs: Mapping[str, StreamingSettings], others: Sequence[str] = ()) -> list[str]:
    """Write a command per run, and a script that runs them as an array of SLURM jobs.

    Args:
        folder: The folder of the grid.
        runs: The runs.
        others: Further arguments of each command.

    Returns:
        The commands.
    """
    commands = []
    for name, settings in runs.items():
        config = f"{CONFIGS}/{name.replace('/', '-')}.json"
        given = {key: value for key, value in settings.to_json().items() if value is not None}
        folder.write(config, json.dumps(given, indent=1).encode())
        place, out = str(folder / config), str(folder / name)
        commands.append(shlex.join(["ntkgen", "cl-run", "--config", place, "--out", out, *others]))
    folder.write(COMMANDS, "".join(f"{command}\n" for command in commands).encode())
    folder.write(ARRAY, _array_script(str(folder / COMMANDS), len(commands)).encode())
    return commands


def _require_one_place(file: Path, values: Mapping[str, Any], learner: str, options: Mapping[str, Any]) -> None:
    """Refuse a setting of all runs that a learner has too, and the name of another learner.

    Raises:
        InputError: If there is one.
    """
    if METHOD in values or METHOD in options:
        raise InputError(
            f"{file} has `{METHOD}` beside `learners`: expected the names of learners in `learners` alone, found "
            f"{json.dumps(values.get(METHOD, options.get(METHOD)))}. Was it copied from the settings of one run? "
            "Remove it."
        )
    if both := [name for name in options if name in values]:
        raise InputError(
            f"{file} has {both[0]} twice: expected it either for all runs or for a learner, found it for all runs and "
            f"for {learner}. Was it moved? Remove one of the two."
        )


def _runs(
    learner: str, options: Mapping[str, Any], num_seeds: int, networks: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Divide the combinations of a learner into runs, each with its name."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    for name, each in lists.items():
        written = [json.dumps(value, default=str) for value in each]
        require_each_once(f"{learner}: {name}", written, "Each combination has networks of its own.")
    apart = [name for name in lists if not _is_number(name)]
    together = sorted((name for name in lists if name not in apart), key=lambda name: len(lists[name]))
    while together and num_seeds * math.prod(len(lists[name]) for name in together) > networks:
        apart.append(together.pop())  # the longest list, one run per value
    for values in itertools.product(*(lists[name] for name in apart)):
        chosen = dict(zip(apart, values, strict=True))
        varied = {name: value for name, value in chosen.items() if len(lists[name]) > 1}
        name = "/".join([learner, *(f"{option}-{value}" for option, value in varied.items())])
        numbers = {name: lists[name][0] if len(lists[name]) == 1 else lists[name] for name in together}
        yield name, {METHOD: learner, **numbers, **chosen}


def _is_number(name: str) -> bool:
    option = OPTIONS.get(OPTION_NAMES.get(name, name))
    return option is not None and option.kind is float and not option.choices


def _array_script(commands: str, count: int) -> str:
    return (
        "#!/usr/bin/env bash\n"
        f"#SBATCH --job-name=ntkgen-grid\n#SBATCH --array=1-{count}\n#SBATCH --requeue\n"
        "# Each job computes a run of the grid. A preempted job continues when it starts again, and a finished\n"
        "# run ends at once.\n"
        "set -euo pipefail\n"
        f'command=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(commands)})\n'
        'eval "exec $command"\n'
    )
