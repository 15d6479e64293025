"""Everything that runs of streams have measured: found in folders, read, and as CSV.

This module does not import torch.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xarray

from ntkgen.continual.record import CONFIG, read_config
from ntkgen.continual.series import ROOT, read_arrays, require_whole
from ntkgen.continual.streaming.comparing import PLACE, settings_of
from ntkgen.continual.streaming.labels import LABEL, labels_of, read_streams
from ntkgen.continual.streaming.record import ARRAYS, BIN, COMBINATION, KERNELS, SEED, member_folder
from ntkgen.continual.streaming.summary import held_out_of
from ntkgen.continual.streams.permuted import STREAMS
from ntkgen.continual.tables import as_csv
from ntkgen.errors import InputError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    from ntkgen.continual.streaming.settings import StreamingSettings

TIME = "time"


def is_stream(folder: Folder) -> bool:
    """Say whether there is a run that learns a permuted stream."""
    config = read_config(folder)
    return config is not None and config["settings"].get("stream") in STREAMS


def places_of_streams(place: str) -> list[str]:
    """List the runs of permuted streams in a folder, such as that of a grid; a folder that is a run is the only one."""
    folder = folder_of(place)
    if folder.has(CONFIG):
        return [place] * is_stream(folder)
    keys, end = folder.sizes(), f"/{CONFIG}"
    names = [key.removesuffix(end) for key in keys if key.endswith(end)]
    found = sorted(name for name in names if f"{name}/{ARRAYS}/{ROOT}" in keys and is_stream(folder / name))
    return [f"{place.rstrip('/')}/{name}" for name in found]


def read_measured(places: Sequence[str]) -> list[xarray.Dataset]:
    """Read what some runs have measured, each with its place; see `read_streams`.

    Raises:
        InputError: If none has finished a task.
        StoreError: If there is no run, or it is damaged.
    """
    found = [run.assign_attrs({PLACE: place}) for run, place in zip(read_streams(places), places, strict=True)]
    if not any(run.sizes[BIN] for run in found):
        raise InputError(
            f"There is nothing to show at {places[0]}: expected a run with a finished task, found none. Is it still "
            "in its first task, or was it stopped there? Continue it with the command that began it."
        )
    return found


def kernels_of(place: str, settings: "StreamingSettings") -> list[list[xarray.Dataset]]:
    """Measure the recorded kernels of every combination and seed, at the times that all have.

    Raises:
        StoreError: If some of them are missing or damaged.
    """
    from ntkgen.continual.metrics.series import kernel_metrics

    if not settings.kernels_every or missing_kernels(place, settings):
        return []
    folders = [[folder_of(place) / name for name in row] for row in _names_of_kernels(settings)]
    found = [[read_arrays(folder) for folder in row] for row in folders]
    for folder in (folder for row in folders for folder in row):
        require_whole(folder)
    times = min(each.sizes[TIME] for row in found for each in row)
    return [[kernel_metrics(each.isel({TIME: slice(times)})) for each in row] for row in found] if times else []


def missing_kernels(place: str, settings: "StreamingSettings") -> list[str]:
    """Name the files of kernels that a run should have and does not have."""
    if not settings.kernels_every:
        return []
    names = [name for row in _names_of_kernels(settings) for name in row]
    return [name for name in names if not (folder_of(place) / name).has(ROOT)]


def _names_of_kernels(settings: "StreamingSettings") -> list[list[str]]:
    return [
        [f"{member_folder(settings, index, seed)}/{KERNELS}" for seed in settings.seeds]
        for index in range(len(settings.combinations))
    ]


def stream_tables(run: xarray.Dataset) -> dict[str, bytes]:
    """Write what a run has measured as CSV, by name: in each bin, at the end of each task, and of each kernel."""
    run = run.assign_coords({COMBINATION: labels_of(run)}).drop_vars(LABEL, errors="ignore")
    bins = run[[name for name, values in run.data_vars.items() if BIN in values.dims]]
    found = {"bins": as_csv(bins)}
    if (held_out := held_out_of(run)) is not None:
        found["held-out"] = as_csv(held_out.to_dataset())
    if kernels := kernels_of(run.attrs[PLACE], settings_of(run)):
        names = [name for name, values in kernels[0][0].data_vars.items() if values.dims == (TIME,)]
        rows = [xarray.concat([each[names] for each in row], run[SEED]) for row in kernels]
        found["kernels"] = as_csv(xarray.concat(rows, run[COMBINATION]))
    return found


def unique_stems(places: Sequence[str], parts: int = 2) -> list[str]:
    """Name files about runs after the last folders of each, at least two, as many as tell them apart.

    >>> unique_stems(["g/sgd", "g/usgd/largest-raw", "g/upgd/largest-raw/"])
    ['g-sgd', 'usgd-largest-raw', 'upgd-largest-raw']
    >>> unique_stems(["g/sgd", "g/usgd"], parts=1)
    ['sgd', 'usgd']
    """
    split = [os.path.abspath(place).strip("/").split("/") for place in places]

    def stem(index: int) -> str:
        own = split[index]
        for count in range(parts, len(own)):
            if sum(other[-count:] == own[-count:] for other in split) == 1:
                return "-".join(own[-count:])
        return "-".join(own)

    return [stem(index) for index in range(len(split))]
