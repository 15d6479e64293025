"""A run that learns a stream, on disk.

    RUN/
      config.json     all settings, defaults included, with the version
      checkpoint.pt   the newest complete state
      run.zarr        what was measured in each bin: an ordinary Zarr group
      seedS/          kernels.zarr of a seed, if kernels are computed; combinationC/seedS if there are several
      models/         parameters after some numbers of samples
      logs/           a JSON file for each combination and seed, with the keys of the published ones

Bins are written before the checkpoint. A resumed run drops what is later than its checkpoint, so it ends with the same
bytes as an undisturbed one on a CPU. Reading never imports torch.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray

from ntkgen.continual.reading import require_no_runs_within
from ntkgen.continual.record import CHECKPOINT, CONFIG, is_begun, read_config_of, write_config
from ntkgen.continual.series import ROOT, FixedArray, GrowingArray, Series, read_arrays, require_whole
from ntkgen.continual.streaming.bins import whole_bins
from ntkgen.continual.streaming.measures import EACH_STEP, HELD_OUT, THINNED
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.errors import StoreError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import os

WHAT = "learn a permuted stream"
BIN, TASK, ARRAYS, KERNELS = "bin", "task", "run.zarr", "kernels.zarr"
COMBINATION, SEED = "combination", "seed"
# The coordinate of bins that are whole tasks.
COUNTED = "counted"


def open_bins(folder: Folder, settings: StreamingSettings, facts: Mapping[str, Any]) -> Series:
    """Continue the run that is there, or begin one.

    Raises:
        FingerprintError: If there is a run with other settings or other data.
        InputError: If the folder is that of the seeds of other runs.
        StoreError: If its files are damaged, or some are missing.
    """
    read_config_of(folder, StreamingSettings, WHAT)  # refuses a run of another kind
    arrays = folder / ARRAYS
    if not is_begun(folder, settings, facts):
        if folder.has(CHECKPOINT) or arrays.has(ROOT):
            raise StoreError(incomplete(folder, CONFIG, "none"))
        require_no_runs_within(folder, "a permuted stream")
        write_config(folder, settings, facts)
    if folder.has(CHECKPOINT):
        _require_whole_arrays(folder, settings)
    elif folder.has(last := final_parameters(settings)):  # they are written after the last checkpoint
        raise StoreError(incomplete(folder, f"{CHECKPOINT} beside {last}", "none"))
    if arrays.has(ROOT):
        return Series.open(arrays)
    shape = (len(settings.combinations), len(settings.seeds))
    growing = [
        GrowingArray(name, "float64", shape, (BIN, COMBINATION, SEED), {"long_name": meaning, "units": unit})
        for name, (unit, meaning) in (EACH_STEP | THINNED).items()
    ]
    growing.append(GrowingArray("samples", "int64", (), (BIN,), {"long_name": "samples up to the end of the bin"}))
    if settings.held_out:
        unit, meaning = HELD_OUT
        attributes = {"long_name": meaning, "units": unit}
        growing.append(GrowingArray("held_out_accuracy", "float64", shape, (TASK, COMBINATION, SEED), attributes))
    fixed = [FixedArray(SEED, np.array(settings.seeds), (SEED,), {"long_name": "seed"})]
    return Series.create(arrays, growing, fixed, {"ntkgen_streaming": {"format_version": 1}})


def _require_whole_arrays(folder: Folder, settings: StreamingSettings) -> None:
    """Require all arrays of a run that has a checkpoint, and what they have recorded, before anything is changed.

    Raises:
        StoreError: If something is missing or damaged.
    """
    for name in (ARRAYS, *kernel_folders(settings)):
        if not (folder / name).has(ROOT):
            raise StoreError(incomplete(folder, f"{name}/{ROOT}", "none"))
        require_whole(folder / name)


def kernel_folders(settings: StreamingSettings) -> list[str]:
    """Name the groups of the kernels of all networks, combination by combination; none if there are no kernels."""
    combinations = range(len(settings.combinations)) if settings.kernels_every else ()
    return [f"{member_folder(settings, index, seed)}/{KERNELS}" for index in combinations for seed in settings.seeds]


def final_parameters(settings: StreamingSettings) -> str:
    """Name the file of the parameters at the end of a run."""
    return f"models/sample{settings.num_samples}.pt"


def require_recorded(folder: Folder, series: Series, dim: str, length: int) -> None:
    """Require that an axis has all that was recorded before a checkpoint.

    Raises:
        StoreError: If something is missing.
    """
    if (found := series.length(dim)) < length:
        raise StoreError(incomplete(folder, f"{length:,} {dim}s in {series.folder.name}", f"{found:,}"))


def require_parameters(folder: Folder, settings: StreamingSettings, sample: int) -> None:
    """Require the files of parameters up to a checkpoint, but for that of the end, which is written anew.

    Raises:
        StoreError: If one is missing or cut off.
    """
    stop = min(sample, settings.num_samples - 1) + 1
    for end in range(settings.save_every, stop, settings.save_every) if settings.save_every else ():
        data = folder.read(name := f"models/sample{end}.pt")
        if data is None or not zipfile.is_zipfile(io.BytesIO(data)):
            found = "none" if data is None else f"{len(data):,} bytes that are no such file"
            raise StoreError(incomplete(folder, name, found))


def incomplete(folder: Folder, expected: str, found: str) -> str:
    """Say that files of a run are missing."""
    return (
        f"The run at {folder} is incomplete: expected {expected}, found {found}. Were files removed, or was the run "
        "copied in part? Put them back; or run the same command with another `out`, to learn it anew. Nothing was "
        "changed."
    )


def read_stream(place: "str | os.PathLike[str] | Folder") -> xarray.Dataset:
    """Read what a run has measured, with the dimensions bin, combination and seed, and the settings.

    Each combination of hyper-parameters has its values as text in the coordinate ``combination``. The coordinate
    ``counted`` says of each bin whether scores count it; see `whole_bins`.

    Raises:
        StoreError: If there is no run, or it is damaged.
    """
    folder = folder_of(place)
    config = read_config_of(folder, StreamingSettings, WHAT)
    if config is None or not (folder / ARRAYS).has(ROOT):
        raise StoreError(
            f"There is no run of a stream at {folder}: expected a folder with {ARRAYS}, found "
            f"{'none' if config is None else 'a run without it'}. Is it another path? Check it."
        )
    settings = StreamingSettings.from_json(config["settings"])
    found = read_arrays(folder / ARRAYS)
    require_whole(folder / ARRAYS)
    names = [in_words(options) for options in settings.combinations]
    counted = whole_bins(settings.num_samples, settings.permuted.period, settings.bins)[: found.sizes[BIN]]
    coords = {COMBINATION: names, COUNTED: (BIN, counted, {"long_name": "whether scores count the bin"})}
    return found.set_coords("samples").assign_coords(coords).assign_attrs(config)


def in_words(options: Mapping[str, Any]) -> str:
    """Name a combination of hyper-parameters.

    >>> in_words({"lr": 0.01, "sigma": 1e-3}), in_words({})
    ('lr 0.01, sigma 0.001', 'defaults')
    """
    numbers = (float, int)
    return (
        ", ".join(
            f"{name} {value:g}" if isinstance(value, numbers) else f"{name} {value}" for name, value in options.items()
        )
        or "defaults"
    )


def member_folder(settings: StreamingSettings, combination: int, seed: int) -> str:
    """Name the folder of one network within that of the run."""
    return (f"combination{combination}/" if len(settings.combinations) > 1 else "") + f"seed{seed}"
