"""The configuration files of incremental CIFAR-100 by Dohare et al. (2024, Nature 632), as their code reads them.

Five files are shipped under their published names. A file of this kind is translated to the settings of a run of the
preset `PRESET`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkgen.errors import InputError

PRESET = "incremental-cifar100"
FOLDER = Path(__file__).parent / "incremental_cifar"
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))
"""The names of the shipped files, without their ending."""

# The keys with their types; a whole number is no float, as in the published code.
_REQUIRED: dict[str, type] = {"stepsize": float, "weight_decay": float, "momentum": float}
_OPTIONAL: dict[str, tuple[type, Any]] = {
    "data_path": (str, ""),
    "results_dir": (str, ""),
    "experiment_name": (str, ""),
    "num_workers": (int, 1),
    "noise_std": (float, 0.0),
    "use_cbp": (bool, False),
    "replacement_rate": (float, 0.0),
    "utility_function": (str, "weight"),
    "maturity_threshold": (int, 0),
    "reset_head": (bool, False),
    "reset_network": (bool, False),
    "early_stopping": (bool, False),
}
_UTILITIES = ("weight", "contribution")


@dataclass(frozen=True)
class PublishedConfig:
    """A published configuration file, translated.

    Attributes:
        settings: Settings of a run that differ from those of the preset.
        name: Name of the experiment: that in the file, or the name of the file.
        data_path: Folder of the data set; None for the usual one.
        results: Folder of all experiments; None for the usual one.
        ignored: What the file asks for and this program does in another way.
    """

    settings: Mapping[str, Any]
    name: str
    data_path: Path | None
    results: Path | None
    ignored: tuple[str, ...]


def is_published(values: Mapping[str, Any]) -> bool:
    """Say whether the values of a file are a published configuration: every one has ``stepsize``."""
    return "stepsize" in values


def translated(values: Mapping[str, Any], name: str) -> PublishedConfig:
    """Translate a published configuration. Keys that begin or end with an underscore are comments.

    Args:
        values: The values of the file.
        name: Name of the file without its ending, the default name of the experiment.

    Raises:
        InputError: If a key is unknown or missing, or a value has the wrong kind.
    """
    given = {key: value for key, value in values.items() if not (key.startswith("_") or key.endswith("_"))}
    _require_keys(given)
    read = {key: given.get(key, default) for key, (_, default) in _OPTIONAL.items()} | {
        key: given[key] for key in _REQUIRED
    }
    settings: dict[str, Any] = {
        "learning_rate": read["stepsize"],
        "weight_decay": read["weight_decay"],
        "momentum": read["momentum"],
        "select": "best" if read["early_stopping"] else "last",
    }
    surgery = []
    if read["use_cbp"]:
        surgery.append("continual-backprop")
        settings |= _continual_backprop(read)
    if read["noise_std"]:
        surgery.append("perturb")
        settings["noise_std"] = read["noise_std"]
    ignored = ["num_workers: the data set is in memory"] * (read["num_workers"] > 1)
    if read["reset_network"]:
        surgery.append("reset-network")
        ignored += ["reset_head: reset_network resets the head too"] * read["reset_head"]
    elif read["reset_head"]:
        surgery.append("reset-head")
    settings["surgery"] = tuple(surgery)
    data, results = (Path(read[key]) if read[key] else None for key in ("data_path", "results_dir"))
    return PublishedConfig(settings, read["experiment_name"] or name, data, results, tuple(ignored))


def _continual_backprop(read: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the options of continual backpropagation.

    Raises:
        InputError: If one of them is missing.
    """
    for key in ("replacement_rate", "maturity_threshold"):
        if read[key] <= 0:
            raise InputError(
                f"`use_cbp` needs a `{key}`: expected a positive number, found {read[key]:g}. Was the key left out? "
                "Add it, for example as in continual_backpropagation.json."
            )
    if read["utility_function"] not in _UTILITIES:
        raise InputError(
            f"`utility_function` {read['utility_function']!r} is unknown: expected {' or '.join(_UTILITIES)}. Is it a "
            "utility of continual backpropagation for other networks? Use `unit_utility` in a file of this program."
        )
    return {
        "replacement_rate": read["replacement_rate"],
        "maturity": read["maturity_threshold"],
        "unit_utility": read["utility_function"],
    }


def _require_keys(given: Mapping[str, Any]) -> None:
    kinds = _REQUIRED | {key: kind for key, (kind, _) in _OPTIONAL.items()}
    for key in given:
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "Is it a key of another program?"
            raise InputError(
                f"The configuration has an unknown key {key!r}: expected keys of incremental CIFAR-100 "
                f"({', '.join(kinds)}), found another one. {hint} Correct it, or make it a comment: _{key}_."
            )
    for key in _REQUIRED:
        if key not in given:
            raise InputError(
                f"The configuration has no {key!r}: expected {', '.join(_REQUIRED)}, found {', '.join(given)}. Was it "
                "deleted? Add it."
            )
    for key, value in given.items():
        if type(value) is not kinds[key]:
            raise InputError(
                f"The key {key!r} has a value of the wrong kind: expected {kinds[key].__name__}, found {value!r}. Is "
                "it a whole number where a float is needed, or in quotes? Write for example 0.0 for a float."
            )


def shipped(name: str) -> Path | None:
    """Return the file of a published configuration by its name, with or without ``.json``; None if there is none."""
    stem = name.removesuffix(".json")
    return FOLDER / f"{stem}.json" if stem in NAMES else None


def seed_of_index(index: int) -> int:
    """Return the seed of an experiment index: the entry of a fixed permutation of 100,000 numbers.

    Raises:
        InputError: If there is no such index.
    """
    import torch  # the table is drawn by torch's generator

    count = 100_000
    if not 0 <= index < count:
        raise InputError(
            f"There is no experiment index {index}: expected 0 to {count - 1:,}. Is a seed meant? Use `seeds`."
        )
    return int(torch.randperm(count, generator=torch.Generator().manual_seed(42))[index])
