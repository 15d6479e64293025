"""The plasticity of a recorded run on disk: a small Zarr group beside the other arrays of the run."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import xarray

import ntkgen
from ntkgen.continual.metrics.definitions import OF_PLASTICITY
from ntkgen.continual.metrics.series import TOLERANCE
from ntkgen.continual.plan import Data
from ntkgen.continual.plasticity import Plasticity, PlasticitySettings, measure_plasticity
from ntkgen.continual.reader import MEASURED, PLASTICITY, RunReader
from ntkgen.continual.series import ROOT, FixedArray, Series
from ntkgen.continual.streams.views import VIEWS
from ntkgen.files.lock import write_lock

FORMAT_VERSION = 1


def plasticity_of(
    run: RunReader,
    load: Callable[[], Data],
    settings: PlasticitySettings,
    device: torch.device | str = "cpu",
) -> xarray.Dataset:
    """Return the stored plasticity of a run. If there is none of these settings, measure and store it.

    It is measured again if the run has finished more tasks meanwhile. Nothing else of the run changes.

    Args:
        run: The run.
        load: Loads its data, if they are needed.
        settings: How the plasticity is measured.
        device: Where the networks run.

    Raises:
        StoreLockedError: If another process measures the same run.
    """
    asked = {"format_version": FORMAT_VERSION, "boundaries": run.num_finished + 1, **dataclasses.asdict(settings)}
    tolerance = settings.rank_tolerance
    if isinstance(tolerance, tuple):
        asked["rank_tolerance"] = list(tolerance)  # as JSON has it
    if run.has_plasticity:
        stored = run.plasticity
        if {name: stored.attrs[MEASURED].get(name) for name in asked} == asked:
            return stored
    folder = run.folder / PLASTICITY
    with write_lock(folder):
        measured = measure_plasticity(run, load(), settings, device)
        folder.remove(ROOT)  # first, because an incomplete group must not be read
        folder.clear()
        noted = {**asked, "num_features": measured.num_features, "version": ntkgen.__version__}
        arrays = _arrays(run, measured)
        if isinstance(tolerance, tuple):
            note = {"long_name": "tolerance of the numerical rank"}
            arrays.append(FixedArray(TOLERANCE, np.array(tolerance), (TOLERANCE,), note))
        Series.create(folder, [], arrays, {MEASURED: noted})
    return run.plasticity


def _arrays(run: RunReader, measured: Plasticity) -> list[FixedArray]:
    boundaries = np.arange(len(measured.weight_magnitude))
    classes = np.array([0, *run.num_seen_classes[: run.num_finished]])
    order = np.asarray(run.evaluations.class_order.values, np.int64)
    found = [
        FixedArray("boundary", boundaries, ("boundary",), {"long_name": "finished tasks"}),
        FixedArray("num_classes", classes, ("boundary",), {"long_name": "classes of the finished tasks"}),
        FixedArray("class_label", order, ("target",), {"long_name": "label of each class in the order of arrival"}),
    ]
    for name, values in measured.arrays().items():
        view = next((view for view in VIEWS if name.startswith(view)), "")
        definition = OF_PLASTICITY[name.removeprefix(f"{view}_")]
        meaning = f"{definition.title} on the {view.replace('_', ' ')}" if view else definition.title
        dims = ("target",) if name == "class_accuracy" else ("boundary", TOLERANCE)[: values.ndim]
        found.append(FixedArray(name, values, dims, {"long_name": meaning, "definition": definition.formula}))
    return found
