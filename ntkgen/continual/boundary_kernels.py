"""Kernels of a recorded run at its boundaries, on samples of the next task and of the previous tasks.

    RUN/next_task_kernels.zarr        one kernel for each boundary that a task follows
    RUN/previous_tasks_kernels.zarr   one kernel for each boundary that a task precedes

They are computed from stored parameters, in evaluation mode. The groups are as those of `Snapshots`, but the rows of
each time are other samples, so that ``row_label`` and the other coordinates of rows have a time axis too. They grow
boundary by boundary, and a finished kernel is never computed again.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ntkgen
from ntkgen.continual.axes import ATTRIBUTE, FORMAT_VERSION, NOTES, TIME
from ntkgen.continual.boundaries import network_at, plan_of
from ntkgen.continual.metrics.kernels import centred_distance, distance
from ntkgen.continual.plan import Data, Plan
from ntkgen.continual.reader import RunReader, kernels_of_view
from ntkgen.continual.series import ROOT, GrowingArray, Series
from ntkgen.continual.snapshot_layout import SEEN, Layout, Notes
from ntkgen.continual.streams.views import NEXT, PREVIOUS, VIEWS, samples_of
from ntkgen.errors import FingerprintError, InputError
from ntkgen.files.lock import write_lock
from ntkgen.jacobian.kernel_function import KernelFunction
from ntkgen.progress import Report, ignore_report

# How far the kernel of the samples of a boundary has moved since the boundary before.
MEASURES = {
    "previous_distance": "distance from the kernel of the same samples at the boundary before",
    "previous_centred_distance": "1 − CKA with the kernel of the same samples at the boundary before",
}


@dataclass(frozen=True)
class BoundaryKernelSettings:
    """How kernels at boundaries are computed.

    Attributes:
        num_samples: Maximum number of samples of a view.
        output: The output map, as for `Snapshots`; None for that of the run. ``seen`` means the outputs of the classes
            of the view and of all tasks before it.
        precision: The precision of the computation; None for that of the run.
    """

    num_samples: int = 100
    output: str | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: If there are no samples.
        """
        if self.num_samples < 1:
            raise InputError(
                "Kernels at boundaries need samples: expected a positive `num_samples`, found "
                f"{self.num_samples}. Was a fraction meant? Give the number of samples."
            )


def record_boundary_kernels(
    run: RunReader,
    data: Data,
    settings: BoundaryKernelSettings = BoundaryKernelSettings(),
    device: torch.device | str = "cpu",
    report: Report = ignore_report,
) -> None:
    """Compute the kernels of both views at every boundary that has none yet.

    Args:
        run: The run.
        data: Its data.
        settings: How the kernels are computed.
        device: Where they are computed.
        report: Gets the progress.

    Raises:
        FingerprintError: If the run was made from other data, or its kernels with other settings.
        StoreError: If stored parameters are missing or damaged.
        StoreLockedError: If another process computes the same kernels.
    """
    plan = plan_of(run, data)
    total, done = sum(len(boundaries_of(view, run)) for view in VIEWS), 0
    for view in VIEWS:
        samples = ViewSamples.of(view, plan, settings)
        with write_lock(run.folder / kernels_of_view(view)), _opened(run, samples) as series:
            for place, boundary in enumerate(boundaries_of(view, run)):
                if place >= series.length(TIME):
                    series.append(TIME, _measured(run, samples, boundary, device))
                done += 1
                report("kernels at boundaries", done, total)


def boundaries_of(view: str, run: RunReader) -> range:
    """List the boundaries of a run at which a view has samples."""
    if view == PREVIOUS:
        return range(1, run.num_finished + 1)
    return range(min(run.num_finished + 1, run.num_tasks))


@dataclass(frozen=True, eq=False)
class ViewSamples:
    """The samples of a view at each boundary, and how their kernels are stored.

    Attributes:
        view: The view.
        plan: The plan of the run.
        layout: How the kernel of the largest number of samples is placed in the arrays.
        precision: The precision of the computation.
        limit: Maximum number of samples.
    """

    view: str
    plan: Plan
    layout: Layout
    precision: str
    limit: int

    @classmethod
    def of(cls, view: str, plan: Plan, settings: BoundaryKernelSettings) -> "ViewSamples":
        """Count the samples of a view, and lay out their kernels."""
        labels, stream = plan.data.labels, plan.stream
        counts = [
            len(samples_of(view, stream, labels, boundary, settings.num_samples, plan.settings.seed))
            for boundary in range(len(stream) + 1)
        ]
        output = settings.output or plan.settings.output
        layout = Layout.of(output, max(counts), stream.num_targets)
        return cls(view, plan, layout, settings.precision or plan.settings.precision, settings.num_samples)

    def ids(self, boundary: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Draw the samples of a boundary."""
        plan = self.plan
        return samples_of(self.view, plan.stream, plan.data.labels, boundary, self.limit, plan.settings.seed)

    def num_seen(self, boundary: int) -> int:
        """Count the classes of the view and of all tasks before it."""
        return self.plan.stream.num_seen(boundary if self.view == NEXT else boundary - 1)

    def identity(self) -> dict[str, Any]:
        """Say what the kernels depend on beside the run."""
        return {
            "format_version": FORMAT_VERSION,
            "view": self.view,
            "output": self.layout.output,
            "precision": self.precision,
            "num_outputs": self.layout.num_outputs,
            "num_samples": self.limit,
        }

    def arrays(self) -> list[GrowingArray]:
        """List the arrays that grow: those of `Snapshots`, the boundary, and the coordinates of rows and columns."""
        notes = [
            GrowingArray(f"{axis}_{name}", "int64", (self.layout.num_rows,), (TIME, axis), {"long_name": meaning})
            for axis in ("row", "col")
            for name, meaning in NOTES.items()
        ]
        boundary = GrowingArray("boundary", "int64", (), (TIME,), {"long_name": "finished tasks"})
        return [*self.layout.growing(self.precision, [], MEASURES), boundary, *notes]

    def notes(self, ids: "np.ndarray[Any, np.dtype[np.int64]]", boundary: int) -> dict[str, Any]:
        """Say what each row is; −1 for rows without a sample."""
        stream = self.plan.stream
        labels = self.plan.data.labels[ids]
        first = {label: task.number for task in reversed(stream.tasks) for label in task.classes}
        tasks = [boundary if self.view == NEXT else first[int(label)] for label in labels]
        layout = Layout.of(self.layout.output, len(ids), self.layout.num_outputs)
        rows = Notes.of(len(ids), stream.targets(labels), np.array(tasks, np.int64), ids).rows(layout)
        num_missing = self.layout.num_rows - layout.num_rows
        return {each.name: np.pad(each.values, (0, num_missing), constant_values=-1) for each in rows}


def _opened(run: RunReader, samples: ViewSamples) -> Series:
    """Continue the kernels that are there, or begin.

    Raises:
        FingerprintError: If they were computed with other settings.
    """
    folder, identity = run.folder / kernels_of_view(samples.view), samples.identity()
    if not folder.has(ROOT):
        folder.clear()  # its creation may have been interrupted
        return Series.create(folder, samples.arrays(), [], {ATTRIBUTE: {**identity, "version": ntkgen.__version__}})
    series = Series.open(folder)
    theirs = series.attributes.get(ATTRIBUTE, {})
    if differing := [name for name, value in identity.items() if theirs.get(name) != value]:
        raise FingerprintError(
            f"The kernels at {folder} were computed with other settings: {differing[0]} differs, expected "
            f"{theirs.get(differing[0])}, found {identity[differing[0]]}. Kernels of two kinds would be mixed. Use the "
            "original settings, or remove this folder."
        )
    return series


def _measured(run: RunReader, samples: ViewSamples, boundary: int, device: torch.device | str) -> dict[str, Any]:
    """Compute the kernel of a boundary, and how far it has moved since the one before."""
    plan, ids = samples.plan, samples.ids(boundary)
    model = network_at(run, plan, boundary).to(device)
    x = plan.data.train.to(torch.device(device)).inputs(torch.from_numpy(ids))
    output = "full" if samples.layout.output == SEEN else samples.layout.output
    function = KernelFunction(model, x, output=output, precision=samples.precision)
    num_seen = min(samples.num_seen(boundary), function.num_logits)
    own = Layout.of(samples.layout.output, len(ids), samples.layout.num_outputs)
    kernel = own.placed(_kernel(function, model), function.num_logits, num_seen)
    logits = own.placed_logits(function.logits)
    moved = dict.fromkeys(MEASURES, float("nan"))
    if boundary:
        before = network_at(run, plan, boundary - 1).to(device)
        if _shapes(before) == _shapes(model):  # otherwise the head has grown
            moved = _moved(own.placed(_kernel(function, before), function.num_logits, num_seen), kernel, own)
    return {
        "kernel": _padded(kernel, samples.layout.shape),
        "logits": _padded(logits, (samples.layout.num_samples, samples.layout.num_outputs)),
        "iteration": run.boundary_iterations[boundary],
        "epoch": boundary * run.settings.epochs,
        "task": max(boundary - 1, 0),
        "step_size": float("nan"),
        "num_outputs": function.num_logits,
        "boundary": boundary,
        **moved,
        **samples.notes(ids, boundary),
    }


def _kernel(function: KernelFunction, model: nn.Module) -> Tensor:
    found = function(model)
    assert isinstance(found, Tensor)
    return found


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _moved(before: Tensor, now: Tensor, layout: Layout) -> dict[str, float]:
    """Measure the distance of two kernels of the same samples; that of their sums for ``diagonal``."""
    K, L = (each.double().cpu().numpy() for each in (before, now))
    if layout.output == "diagonal":
        K, L = (np.nansum(each, 0) for each in (K, L))
    return {
        "previous_distance": distance(K, L),
        "previous_centred_distance": centred_distance(K, L, layout.rows_per_sample),
    }


def _padded(values: Tensor, shape: tuple[int, ...]) -> "np.ndarray[Any, Any]":
    """Add NaN after the last rows."""
    found = values.cpu().numpy()
    padding = [(0, length - own) for length, own in zip(shape, found.shape, strict=True)]
    return np.pad(found, padding, constant_values=np.nan)
