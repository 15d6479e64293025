"""The record of a run as JSON files with the keys of the published ones, one per combination and seed.

    logs/{stream}_{dataset}/{learner}/{model}/{options}/{seed}.json

Names of learners are those of the registry, so two learners never share a file. This module does not import torch.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.continual.optim.names import NAMES
from ntkgen.continual.record import plain_values
from ntkgen.continual.streaming.record import BIN, COMBINATION, SEED, in_words, read_stream
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streams.permuted import SAMPLES_PER_TASK
from ntkgen.errors import DataError
from ntkgen.files.folder import Folder

if TYPE_CHECKING:
    import os

    import xarray

# The published keys, and what is measured under them.
KEYS = {
    "losses": "loss",
    "accuracies": "accuracy",
    "plasticity_per_task": "plasticity",
    "n_dead_units_per_task": "inactive_units",
    "weight_rank_per_task": "weight_rank",
    "weight_l2_per_task": "weight_l2",
    "weight_l1_per_task": "weight_l1",
    "grad_l2_per_task": "grad_l2",
    "grad_l1_per_task": "grad_l1",
    "grad_l0_per_task": "grad_l0",
}
UNKNOWN = -1
FACTS = ("task", "learner", "network", "optimizer_hps", "n_samples", "seed")


def write_logs(folder: Folder) -> None:
    """Write the JSON file of every network from what is recorded so far. Each file is whole at any time."""
    found = read_stream(folder)
    settings = StreamingSettings.from_json(found.attrs["settings"])
    digest = hashlib.sha256(json.dumps(settings.to_json(), sort_keys=True).encode()).hexdigest()
    for index, given in enumerate(settings.combinations):
        options = {**NAMES[settings.method].defaults, **given}
        own = found.isel(combination=index)
        for seed in settings.seeds:
            values: dict[str, Any] = {key: plain_values(own[name].sel(seed=seed)) for key, name in KEYS.items()}
            values |= {
                "task": f"{settings.stream}_{settings.dataset}".replace("-", "_"),
                "learner": settings.method,
                "network": settings.model,
                "optimizer_hps": options,
                "n_samples": int(found.samples[-1]) if found.sizes["bin"] else 0,
                "samples": found.samples.values.tolist(),
                "seed": seed,
                "config_hash": digest,
                "version": found.attrs["version"],
            }
            folder.write(log_name(settings, options, seed), json.dumps(values, indent=4).encode())


def log_name(settings: StreamingSettings, options: dict[str, Any], seed: int) -> str:
    """Name the JSON file of a network within the folder of its run."""
    parts = [f"{settings.stream}_{settings.dataset}", settings.method, settings.model]
    parts.append("_".join(f"{name}_{value}" for name, value in options.items()))
    safe = ["".join(sign if sign.isalnum() or sign in "-_.+" else "-" for sign in part) for part in parts]
    return f"logs/{'/'.join(safe)}/{seed}.json"


def read_published_log(path: "str | os.PathLike[str]") -> "xarray.Dataset":
    """Read a JSON file of the published programs, or one of ours, with the dimensions and coordinates of `read_stream`.

    There is one combination and one seed. What a file does not say is −1: the seed, and ``samples``, the samples up to
    the end of each bin, of a stream whose name is not a published one.

    Raises:
        DataError: If it is not such a file.
    """
    import xarray

    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        # a file of another loss than cross-entropy has the key `plasticity`
        values.setdefault("plasticity_per_task", values.get("plasticity"))
        arrays = {name: np.array(values[key], np.float64) for key, name in KEYS.items() if values.get(key) is not None}
        facts = {name: values[name] for name in FACTS if name in values}
        coords = {
            "samples": (BIN, np.array(_ends(values, len(values.get("losses") or ())), np.int64)),
            COMBINATION: [in_words(values.get("optimizer_hps") or {})],
            SEED: [int(values.get("seed", UNKNOWN))],
        }
        data = {name: ((BIN, COMBINATION, SEED), array[:, None, None]) for name, array in arrays.items()}
        found = xarray.Dataset(data, coords, attrs=facts)
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DataError(_unreadable(path, type(error).__name__)) from error
    if missing := [key for key in ("losses", "accuracies", "plasticity_per_task") if KEYS[key] not in arrays]:
        raise DataError(_unreadable(path, f"no {missing[0]}"))
    return found


def _ends(values: dict[str, Any], num_bins: int) -> list[int]:
    """List the samples up to the end of each bin: those that our files have, or those of a published stream."""
    if "samples" in values:
        return list(values["samples"])
    for stream, period in SAMPLES_PER_TASK.items():
        if str(values.get("task", "")).startswith(stream.replace("-", "_")):
            return [1 + period * number for number in range(num_bins)]
    return [UNKNOWN] * num_bins


def _unreadable(path: object, found: str) -> str:
    return (
        f"The record {path} cannot be read: expected a JSON file with the keys losses, accuracies and "
        f"plasticity_per_task, found another one ({found}). Is it another file? Check the path."
    )
