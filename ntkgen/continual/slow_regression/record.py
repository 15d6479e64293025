"""The bins of a run of slowly changing regression on disk.

    RUN/
      config.json     all settings, defaults included, with the version
      checkpoint.pt   the newest complete state
      run.zarr        what was measured in each bin: an ordinary Zarr group

Bins are written before the checkpoint. A resumed run drops the bins that are later than its checkpoint, so it ends with
the same bytes as an undisturbed one on a CPU. Reading never imports torch.
"""

from typing import TYPE_CHECKING

import numpy as np
import xarray

from ntkgen.continual.record import is_begun, read_config_of, write_config
from ntkgen.continual.series import ROOT, FixedArray, GrowingArray, Series, read_arrays
from ntkgen.continual.slow_regression.settings import RegressionSettings
from ntkgen.errors import StoreError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import os

WHAT = "learn slowly changing regression"
BIN, ARRAYS = "bin", "run.zarr"
# A unit is dead in a bin if the derivative of its activation is smaller than this at each of its samples.
DEAD_SLOPE = 1e-3
# What is measured in each bin, for every algorithm and seed: dtype and meaning.
MEASURES = {
    "error": ("float64", "mean of the squared errors over the samples of the bin, each before its step"),
    "dead_units": ("int64", f"hidden units whose derivative is below {DEAD_SLOPE:g} at each sample of the bin"),
    "weight_magnitude": ("float64", "mean magnitude of all parameters, biases included, at the end of the bin"),
    "replaced_units": ("int64", "hidden units that were replaced in the bin"),
}


def open_bins(folder: Folder, settings: RegressionSettings) -> Series:
    """Continue the run that is there, or begin one.

    Raises:
        FingerprintError: If there is a run with other settings.
        StoreError: If its files are damaged.
    """
    read_config_of(folder, RegressionSettings, WHAT)  # refuses a run of another kind
    if not is_begun(folder, settings, {}):
        write_config(folder, settings, {})
    arrays = folder / ARRAYS
    if arrays.has(ROOT):
        return Series.open(arrays)
    shape = (len(settings.algorithms), len(settings.seeds))
    growing = [
        GrowingArray(name, dtype, shape, (BIN, "algorithm", "seed"), {"long_name": meaning, "units": "1"})
        for name, (dtype, meaning) in MEASURES.items()
    ]
    growing.append(GrowingArray("samples", "int64", (), (BIN,), {"long_name": "samples up to the end of the bin"}))
    seeds = FixedArray("seed", np.array(settings.seeds), ("seed",), {"long_name": "seed"})
    return Series.create(arrays, growing, [seeds], {"ntkgen_slow_regression": {"format_version": 1}})


def read_bins(place: "str | os.PathLike[str] | Folder") -> xarray.Dataset:
    """Read what a run has measured: `MEASURES` with the dimensions bin, algorithm and seed, and the settings.

    Raises:
        StoreError: If there is no run, or it is damaged.
    """
    folder = folder_of(place)
    config = read_config_of(folder, RegressionSettings, WHAT)
    if config is None or not (folder / ARRAYS).has(ROOT):
        raise StoreError(
            f"There is no run of slowly changing regression at {folder}: expected a folder with {ARRAYS}, found "
            f"{'none' if config is None else 'a run without it'}. Is it another path? Check it."
        )
    settings = RegressionSettings.from_json(config["settings"])
    found = read_arrays(folder / ARRAYS)
    return found.set_coords("samples").assign_coords(algorithm=list(settings.algorithms)).assign_attrs(config)
