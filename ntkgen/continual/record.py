"""A run on disk: its settings, its log, its newest state, and its arrays.

    RUN/
      config.json     all settings, defaults included, with versions; the run is repeated from this file alone
      log.jsonl       one line per evaluation and per event
      checkpoint.pt   the newest complete state
      models/         parameters at the end of each task
      run.zarr        evaluations, class order, splits and probe: an ordinary Zarr group
      kernels.zarr    kernels of the probe over time; see `Snapshots`

The arrays are written first, then the log, then the checkpoint. A resumed run drops from arrays and log what is later
than its checkpoint, so it ends with the same bytes as an undisturbed one. Reading never imports torch.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import ntkgen
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.probe import Probe
from ntkgen.continual.series import ROOT, FixedArray, GrowingArray, Series
from ntkgen.continual.settings import Settings
from ntkgen.continual.streams.tasks import Stream
from ntkgen.errors import FingerprintError, StoreError
from ntkgen.files.folder import Folder

CONFIG, LOG, CHECKPOINT = "config.json", "log.jsonl", "checkpoint.pt"
EVALUATION, TASK_END = "evaluation", "task_end"
CONFUSION = "confusion"
# What is measured at each evaluation, for every task.
MEASURES = {
    "accuracy": "accuracy on the held-out samples, over all outputs",
    "task_accuracy": "accuracy on the held-out samples, over the outputs of the task; NaN while it has none",
    "head_accuracy": "accuracy on the held-out samples by the outputs of the network",
    "loss": "mean cross-entropy on the held-out samples, over all outputs, in nats; NaN as above",
}


class Record:
    """The files of a run, open for writing."""

    def __init__(self, folder: Folder, series: Series) -> None:
        self.folder = folder
        self.series = series
        self._lines: list[str] = (folder.read(LOG) or b"").decode().splitlines()

    @classmethod
    def open(
        cls, folder: Folder, settings: RunSettings, stream: Stream, probe: Probe, facts: Mapping[str, Any]
    ) -> "Record":
        """Continue the run that is there, or begin one.

        Args:
            folder: The folder of the run.
            settings: The settings.
            stream: The tasks.
            probe: The probe samples.
            facts: What the run depends on beside its settings, such as the fingerprint of the data.

        Raises:
            FingerprintError: If there is a run with other settings or other data.
            StoreError: If its files are damaged.
        """
        if not is_begun(folder, settings, facts):
            write_config(folder, settings, facts)
        arrays = folder / "run.zarr"
        if arrays.has(ROOT):
            return cls(folder, Series.open(arrays))
        growing = evaluation_arrays(len(stream))
        growing += _confusions(stream.num_targets)
        return cls(folder, Series.create(arrays, growing, _fixed(stream, probe), {"ntkgen_run": {"format_version": 1}}))

    def evaluated(self, values: Mapping[str, Any]) -> None:
        """Append one evaluation to the arrays and to the log."""
        self.series.append(EVALUATION, values)
        self.log("evaluation", {name: plain_values(value) for name, value in values.items()})

    def ended_task(self, iteration: int, confusion: npt.NDArray[np.int64]) -> None:
        """Append the confusion matrix at the end of a task. A run that was begun without these arrays has none."""
        if self.series.names(TASK_END):
            self.series.append(TASK_END, {"end_iteration": iteration, CONFUSION: confusion})

    def log(self, event: str, values: Mapping[str, Any]) -> None:
        """Append a line to the log; it must have an ``iteration``."""
        self._lines.append(json.dumps({"event": event, **values}))

    def commit(self, checkpoint: bytes) -> None:
        """Write the log, then the checkpoint: what is recorded so far is kept by a resumed run."""
        self.folder.write(LOG, "".join(f"{line}\n" for line in self._lines).encode())
        self.folder.write(CHECKPOINT, checkpoint)

    def rewind(self, iteration: int) -> None:
        """Drop evaluations and lines of the log that are later than an iteration.

        Lines with the ``step`` 0 of a task are later than the checkpoint at the end of the task before.
        """
        series = self.series
        times = range(series.length(EVALUATION))
        series.truncate(EVALUATION, sum(int(series.read("iteration", time)) <= iteration for time in times))
        if series.names(TASK_END):
            ends = range(series.length(TASK_END))
            series.truncate(TASK_END, sum(int(series.read("end_iteration", time)) <= iteration for time in ends))
        lines = [(line, json.loads(line)) for line in self._lines]
        self._lines = [line for line, found in lines if found["iteration"] + (found.get("step") == 0) <= iteration]

    def finish(self) -> None:
        """Complete the metadata of the arrays."""
        self.series.sync()


def plain_values(values: Any) -> Any:
    """Return numbers as plain values, with None for NaN and infinity, which JSON does not have.

    >>> plain_values([1.5, float("nan"), float("inf")])
    [1.5, None, None]
    """
    array = np.asarray(values)
    return np.where(np.isfinite(array), array, None).tolist() if array.dtype.kind == "f" else array.tolist()  # type: ignore[call-overload]


def evaluation_arrays(num_tasks: int) -> list[GrowingArray]:
    """Describe the arrays of evaluations."""
    measures = [
        GrowingArray(
            name,
            "float64",
            (num_tasks,),
            (EVALUATION, "task"),
            {"long_name": meaning, "units": "nat" if name == "loss" else "1"},
        )
        for name, meaning in MEASURES.items()
    ]
    times = {
        "iteration": ("int64", "iterations of training so far"),
        "trained_task": ("int64", "task in training"),
        "epoch": ("float64", "epochs of training so far"),
    }
    return measures + [
        GrowingArray(name, dtype, (), (EVALUATION,), {"long_name": meaning}) for name, (dtype, meaning) in times.items()
    ]


def write_config(folder: Folder, settings: Settings, facts: Mapping[str, Any]) -> None:
    """Write the settings of a run, and what it depends on beside them."""
    config = {"settings": settings.to_json(), "facts": dict(facts), "version": ntkgen.__version__}
    folder.write(CONFIG, json.dumps(config, indent=1).encode())


def read_config(folder: Folder) -> dict[str, Any] | None:
    """Read the settings of a run; None if there is no run.

    Raises:
        StoreError: If the file is damaged.
    """
    data = folder.read(CONFIG)
    if data is None:
        return None
    try:
        found: dict[str, Any] = json.loads(data)
        _ = found["settings"], found["facts"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"The settings of the run at {folder} cannot be read: expected {CONFIG} as ntkgen writes it, found "
            "something else. Was it edited? Begin a run in another folder."
        ) from error
    return found


def read_config_of(folder: Folder, kind: type[Settings], what: str) -> dict[str, Any] | None:
    """Read the settings of a run of one kind; None if there is no run.

    Args:
        folder: The folder of the run.
        kind: The class of its settings.
        what: What such a run does, for the error.

    Raises:
        StoreError: If it is a run of another kind, or damaged.
    """
    found = read_config(folder)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # settings are dataclasses
    if found is not None and (others := found["settings"].keys() - known):
        raise StoreError(
            f"The run at {folder} does not {what}: found the setting {min(others)}, expected those of {kind.__name__}. "
            "Is it another run, or one of a newer version? Use another path."
        )
    return found


def is_begun(folder: Folder, settings: Settings, facts: Mapping[str, Any]) -> bool:
    """Say whether there is a run already, and require that it has the same settings and the same facts.

    Raises:
        FingerprintError: If one of them differs. The message names the differences.
        StoreError: If its settings cannot be read.
    """
    found = read_config(folder)
    if found is None:
        return False
    differing = type(settings).from_json(found["settings"]).differences(settings)
    differing += [
        f"{name} {str(found['facts'].get(name))[:16]}, now {str(value)[:16]}"
        for name, value in facts.items()
        if found["facts"].get(name) != value
    ]
    if differing:
        raise FingerprintError(
            f"The run at {folder} was begun with other settings ({'; '.join(differing[:3])}). Two runs would be mixed. "
            "Use another `out`, or the original settings."
        )
    return True


def _confusions(num_targets: int) -> list[GrowingArray]:
    """List what is recorded at the end of each task."""
    counts = {"long_name": "held-out samples of the tasks so far, by target and predicted target", "units": "1"}
    return [
        GrowingArray("end_iteration", "int64", (), (TASK_END,), {"long_name": "iterations at the end of the task"}),
        GrowingArray(CONFUSION, "int64", (num_targets, num_targets), (TASK_END, "target", "predicted"), counts),
    ]


def _fixed(stream: Stream, probe: Probe) -> list[FixedArray]:
    """List what does not change during a run: class order, splits and probe."""
    num_seen = np.array([stream.num_seen(task) for task in range(len(stream))])
    arrays = [
        FixedArray("class_order", np.array(stream.order), ("target",), {"long_name": "label of each target"}),
        FixedArray("num_seen", num_seen, ("task",), {"long_name": "classes of the task and all tasks before it"}),
        FixedArray("probe_id", probe.ids, ("probe",), {"long_name": "position of the probe sample in its data set"}),
        FixedArray("probe_task", probe.tasks, ("probe",), {"long_name": "task of the probe sample"}),
        FixedArray(
            "probe_is_validation", probe.is_validation, ("probe",), {"long_name": "whether it is a validation sample"}
        ),
    ]
    for task in stream.tasks:
        for part, ids in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            if len(ids):
                note = {"long_name": f"positions of the {part} samples of task {task.number}"}
                arrays.append(FixedArray(f"{part}_{task.number}", ids, (f"{part}_of_{task.number}",), note))
    return arrays
