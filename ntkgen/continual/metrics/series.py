"""Metrics of every recorded kernel of a run, as one data set."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.analysis.targets import Readout
from ntkgen.continual.metrics import kernels as measure
from ntkgen.continual.metrics.kernels import BoolArray, FloatArray, IntArray, Spectrum
from ntkgen.continual.metrics.loss_weighted import weighted_contrasts
from ntkgen.continual.metrics.ranks import Tolerance
from ntkgen.continual.metrics.regression import MAPS, Regression, classify
from ntkgen.errors import StoreError

if TYPE_CHECKING:
    import xarray

# The dimension of several tolerances of the numerical rank.
TOLERANCE = "rank_tolerance"
# The spectrum of a block without any rows that have values.
_MISSING = Spectrum(**{field.name: float("nan") for field in dataclasses.fields(Spectrum)})  # type: ignore[arg-type]
# Numbers of the spectrum that are also given for the block of each task.
OF_TASKS = ("frobenius_norm", "largest", "smallest", "trace")


@dataclass(frozen=True, eq=False)
class _Probe:
    """What is known of the rows of the recorded kernels, and the kernels themselves."""

    kernels: "xarray.Dataset"

    @cached_property
    def tasks(self) -> IntArray:  # (rows,)
        return np.asarray(self.kernels.row_task.values, np.int64)

    @cached_property
    def rows_per_sample(self) -> int:
        return int(self.kernels.row_output.values.max()) + 1

    @property
    def labels(self) -> IntArray:  # (samples,)
        return np.asarray(self.kernels.row_label.values[:: self.rows_per_sample], np.int64)

    @property
    def output(self) -> str:
        """The output map. Kernels of ``diagonal`` are measured by their sum, the trace kernel."""
        name = str(self.kernels.attrs.get("ntkgen_snapshots", {}).get("output", "trace"))
        return "trace" if name == "diagonal" else name

    @property
    def rounding(self) -> float:
        """Relative rounding of the kernels."""
        precision = self.kernels.attrs.get("ntkgen_snapshots", {}).get("precision", str(self.kernels.kernel.dtype))
        return measure.ROUNDING[precision]

    @cached_property
    def stored(self) -> FloatArray:  # (times, rows, rows), or (times, outputs, samples, samples)
        """All kernels in the type of the store. They are read once, because each is needed several times."""
        return np.asarray(self.kernels.kernel.values)

    def kernel(self, time: int) -> FloatArray:
        """Return one kernel. Rows of outputs that do not exist yet are NaN, and all rows of a diverged network."""
        K = np.asarray(self.stored[time], np.float64)
        return np.where(np.isnan(K).all(0), np.nan, np.nansum(K, axis=0)) if K.ndim == 3 else K

    def distance(self, time: int, other: int, *, centred: bool = False) -> float:
        """Kernel distance of two times, on the outputs that both have; 1 − CKA if centred.

        Kernels of ``trace`` and ``sum`` add the outputs that exist, so those of different numbers of outputs cannot be
        compared: their distance is NaN.
        """
        K, L = (np.asarray(self.stored[each], np.float64) for each in (time, other))
        if K.ndim == 3:
            common = ~(np.isnan(K[:, 0, 0]) | np.isnan(L[:, 0, 0]))
            K, L = K[common].sum(0), L[common].sum(0)
        elif self.output in {"trace", "sum"} and self._num_outputs(time) != self._num_outputs(other):
            return float("nan")
        return measure.centred_distance(K, L, len(K) // len(self.labels)) if centred else measure.distance(K, L)

    def _num_outputs(self, time: int) -> int | None:
        numbers = self.kernels.get("num_outputs")
        return None if numbers is None else int(numbers[time])

    def spectrum(self, K: FloatArray, task: int | None = None, tolerance: Tolerance = None) -> Spectrum:
        """Measure a kernel, or its block of a task, without rows that have no values; NaN if others are missing."""
        kept = ~np.isnan(np.diagonal(K))
        if task is not None:
            kept &= self.tasks == task
        block = K[np.ix_(kept, kept)]
        is_known = kept.any() and not np.isnan(block).any()
        return Spectrum.of(block, self.rounding, tolerance) if is_known else _MISSING

    def readout(self, K: FloatArray, labels: IntArray) -> Readout | None:
        """Say what the rows with values mean for labels; None if these labels give no targets."""
        num_kept = int((~np.isnan(np.diagonal(K)[: self.rows_per_sample])).sum())
        name = "full" if self.output == "seen" else self.output
        if name not in MAPS:
            return None
        outputs = {"full": num_kept, "centered": num_kept + 1, "trace": int(self.labels.max()) + 1}[name]
        is_known = labels.min() >= 0 and labels.max() < outputs
        return Readout(name, outputs, None, "the run") if is_known else None

    def alignment(self, K: FloatArray, *, centred: bool) -> float:
        """Align with the labels, on the outputs that exist and the samples of their classes.

        It is NaN where another entry or a label is missing.
        """
        kept, labels = ~np.isnan(np.diagonal(K)), self.labels
        num_kept = int(kept[: self.rows_per_sample].sum())
        if self.rows_per_sample > 1:
            has_output = labels < num_kept + (self.output == "centered")
            kept &= np.repeat(has_output, self.rows_per_sample)
            labels = labels[has_output]
        block = K[np.ix_(kept, kept)]
        is_whole = 0 < len(block) == len(labels) * num_kept and not np.isnan(block).any()
        if not is_whole or labels.min() < 0:
            return float("nan")
        found = self.readout(K, labels)
        if found is None and self.rows_per_sample > 1:
            return float("nan")
        Y = (labels[:, None] == np.unique(labels)).astype(np.float64) if found is None else found.targets(labels)
        return measure.label_alignment(block, Y, num_kept, centred=centred)

    def regression(self, time: int, is_training: BoolArray) -> Regression | None:
        """Classify the samples of the tasks so far; None if their labels give no targets or it has no values."""
        K, sample_tasks = self.kernel(time), self.tasks[:: self.rows_per_sample]
        so_far = sample_tasks <= max(int(self.kernels.task.values[time]), int(sample_tasks.min()))
        labels = self.labels[so_far]
        if (readout := self.readout(K, labels)) is None:
            return None
        rows = np.repeat(so_far, self.rows_per_sample) & ~np.isnan(np.diagonal(K))
        if not rows.any():
            return None
        return classify(K[np.ix_(rows, rows)], labels, is_training[so_far], readout)


def kernel_metrics(
    kernels: "xarray.Dataset", dt: int | None = None, rank_tolerance: Tolerance = None
) -> "xarray.Dataset":
    """Measure every kernel of a run.

    Args:
        kernels: The recorded kernels, as `RunReader.kernels_of` gives them.
        dt: Iterations between the two kernels of a velocity; None for the number that the most pairs are apart.
        rank_tolerance: Tolerance τ of the numerical rank, or several; None for N ε, what the precision resolves.

    Returns:
        Numbers of `Spectrum` for each time, for the whole probe and, with the prefix ``task_``, for the block of each
        task; ``distance`` and ``centred_distance`` from the first kernel; ``previous_distance``,
        ``previous_centred_distance`` and ``mean_velocity`` from the kernel before; ``alignment`` and
        ``centred_alignment`` with the labels, on the outputs that exist and the samples of their classes; the
        ``interference`` of each two tasks; ``velocity`` and ``angular_velocity`` at the iterations where a pair begins;
        ``leave_one_out_accuracy`` of kernel regression on the samples of the tasks so far; and ``lazy_error``,
        ``lazy_error_from_start`` and ``buffer_drift``, if they are recorded.
    """
    import xarray

    probe, iterations = _Probe(kernels), np.asarray(kernels.iteration.values, np.int64)
    values, numbers = [probe.kernel(time) for time in range(len(iterations))], np.unique(probe.tasks)
    data: dict[str, Any] = _columns([probe.spectrum(K, tolerance=rank_tolerance) for K in values], rank_tolerance)
    blocks = [[probe.spectrum(K, int(task)) for task in numbers] for K in values]
    data |= {
        f"task_{name}": (("time", "task"), [[getattr(each, name) for each in row] for row in blocks])
        for name in OF_TASKS
    }
    data |= _distances(probe, iterations)
    data["alignment"] = ("time",), [probe.alignment(K, centred=False) for K in values]
    data["centred_alignment"] = ("time",), [probe.alignment(K, centred=True) for K in values]
    data["interference"] = ("time", "task", "other_task"), [measure.interference(K, probe.tasks) for K in values]
    everything = np.ones(len(probe.labels), np.bool_)
    fits = [probe.regression(time, everything) for time in range(len(values))]
    data["leave_one_out_accuracy"] = ("time",), [np.nan if fit is None else fit.left_out.mean() for fit in fits]
    for name in ("lazy_error", "lazy_error_from_start", "buffer_drift"):
        if name in kernels:
            data[name] = ("time",), kernels[name].values
    step = dt or measure.usual_step(iterations)
    starts, speed, angular = measure.velocity(probe.distance, iterations, step)
    data |= {"velocity": (("start",), speed), "angular_velocity": (("start",), angular)}
    coordinates = {
        "iteration": ("time", iterations),
        "epoch": ("time", kernels.epoch.values),
        "trained_task": ("time", kernels.task.values),
        "task": numbers,
        "start": starts,
        "start_epoch": ("start", kernels.epoch.values[np.isin(iterations, starts)]),
    }
    return xarray.Dataset(data, coordinates, {"dt": step, "rank_tolerance": rank_tolerance, "rounding": probe.rounding})


def held_out_accuracy(kernels: "xarray.Dataset", is_validation: BoolArray) -> FloatArray:  # (times,)
    """Accuracy on the validation samples of kernel regression on the training samples, both of the tasks so far.

    Args:
        kernels: The recorded kernels of all probe samples.
        is_validation: Which of the probe samples are validation samples, (samples,).
    """
    probe = _Probe(kernels)
    fits = [probe.regression(time, ~is_validation) for time in range(len(kernels.iteration))]
    return np.array([np.nan if fit is None else fit.held_out.mean() for fit in fits])


def loss_weighted_metrics(
    kernels: "xarray.Dataset", num_outputs: IntArray | None = None, rank_tolerance: Tolerance = None
) -> "xarray.Dataset":
    """Measure the spectrum of the loss-weighted kernel of every time; see `weighted_kernel`.

    It is measured on contrasts of the outputs. These leave out the zeros that H has for a common shift of the outputs.

    Args:
        kernels: The recorded kernels of all outputs, as `RunReader.kernels_of` gives them.
        num_outputs: Number of outputs that the loss is over at each time, (times,); None for all that have values.
        rank_tolerance: Tolerance τ of the numerical rank, or several; None for N ε, what the precision resolves.

    Returns:
        The numbers of `Spectrum` for each time; NaN where there are fewer than two outputs. ε is the rounding of the
        kernel before it is weighted: if a common shift of the outputs dominates the kernel, less than that is resolved.

    Raises:
        InputError: If the kernels are sums over outputs.
        StoreError: If the logits are not recorded.
    """
    import xarray

    if "logits" not in kernels:
        raise StoreError(
            "The outputs on the probe are not recorded: expected the array logits beside the kernels, found none. Was "
            "the run made by an earlier version? Run it again."
        )
    probe = _Probe(kernels)
    output = str(kernels.attrs.get("ntkgen_snapshots", {}).get("output", "trace"))
    logits, spectra = np.asarray(kernels.logits.values, np.float64), []
    if num_outputs is not None:
        logits = np.where(np.arange(logits.shape[2]) < num_outputs[:, None, None], logits, np.nan)
    for time, shown in enumerate(logits):
        block = weighted_contrasts(probe.kernel(time), shown, output)
        spectra.append(Spectrum.of(block, probe.rounding, rank_tolerance) if len(block) else _MISSING)
    coordinates = {
        "iteration": ("time", kernels.iteration.values),
        "epoch": ("time", kernels.epoch.values),
        "trained_task": ("time", kernels.task.values),
    }
    noted = {"rank_tolerance": rank_tolerance, "rounding": probe.rounding}
    return xarray.Dataset(_columns(spectra, rank_tolerance), coordinates, noted)


def boundary_metrics(
    kernels: "xarray.Dataset", rank_tolerance: Tolerance = None, num_outputs: IntArray | None = None
) -> "xarray.Dataset":
    """Measure the kernels of a view at each boundary between tasks; the samples differ from boundary to boundary.

    Args:
        kernels: The kernels, as `RunReader.boundary_kernels` gives them.
        rank_tolerance: Tolerance τ of the numerical rank, or several; None for N ε, what the precision resolves.
        num_outputs: For the loss-weighted kernels, the number of outputs that the loss is over at each time, (times,).
            None for the kernels themselves.

    Returns:
        Numbers of `Spectrum`. Of the kernels themselves also ``alignment`` and ``centred_alignment``, and
        ``previous_distance`` and ``previous_centred_distance`` from the kernel of the same samples for the network at
        the boundary before, with ``mean_velocity``, the distance per iteration.
    """
    import xarray

    data: dict[str, Any]
    parts = [_of_one_time(kernels, time) for time in range(kernels.sizes["time"])]
    if num_outputs is not None:
        counts = num_outputs[:, None]
        found = [loss_weighted_metrics(*each, rank_tolerance) for each in zip(parts, counts, strict=True)]
        data = {str(name): values for name, values in xarray.concat(found, "time").data_vars.items()}
    else:
        probes = [_Probe(part) for part in parts]
        data = _columns([probe.spectrum(probe.kernel(0), tolerance=rank_tolerance) for probe in probes], rank_tolerance)
        data["alignment"] = ("time",), [probe.alignment(probe.kernel(0), centred=False) for probe in probes]
        data["centred_alignment"] = ("time",), [probe.alignment(probe.kernel(0), centred=True) for probe in probes]
        for name in ("previous_distance", "previous_centred_distance"):
            data[name] = ("time",), np.asarray(kernels[name].values)
        steps = np.diff(kernels.iteration.values, prepend=0)  # the boundary before the first one is the beginning
        data["mean_velocity"] = ("time",), kernels.previous_distance.values / np.where(steps, steps, np.nan)
    coordinates = {name: ("time", kernels[name].values) for name in ("iteration", "epoch", "boundary")}
    return xarray.Dataset(data, coordinates, {"rank_tolerance": rank_tolerance, "rounding": _Probe(kernels).rounding})


def _of_one_time(kernels: "xarray.Dataset", time: int) -> "xarray.Dataset":
    """Take the kernel of one time, whose rows have coordinates of their own, without rows that have no sample."""
    part = kernels.isel(time=[time])
    own = [str(name) for name, values in part.coords.items() if set(values.dims) - {"time"} and "time" in values.dims]
    part = part.assign_coords({name: part[name].isel(time=0, drop=True).variable for name in own})
    rows = np.flatnonzero(part.row_sample_id.values >= 0)
    return part.isel(row=rows, col=rows, sample=np.unique(part.row_sample.values[rows]))


def _distances(probe: _Probe, iterations: IntArray) -> dict[str, Any]:
    """Measure how far each kernel is from the first one, and from the one before."""
    times = range(len(iterations))
    found = {
        "distance": [probe.distance(0, time) for time in times],
        "centred_distance": [probe.distance(0, time, centred=True) for time in times],
        "previous_distance": [np.nan, *(probe.distance(time - 1, time) for time in times[1:])],
        "previous_centred_distance": [np.nan, *(probe.distance(time - 1, time, centred=True) for time in times[1:])],
    }
    found["mean_velocity"] = [np.nan, *(np.array(found["previous_distance"][1:]) / np.diff(iterations))]
    return {name: (("time",), values) for name, values in found.items()}


def _columns(spectra: list[Spectrum], tolerance: Tolerance) -> dict[str, Any]:
    """Make a variable of each number, (times,); the numerical rank at several tolerances is (times, tolerances)."""
    names = [field.name for field in dataclasses.fields(Spectrum)]
    found: dict[str, Any] = {name: (("time",), [getattr(each, name) for each in spectra]) for name in names}
    if isinstance(tolerance, tuple):
        ranks = [np.broadcast_to(each.numerical_rank, len(tolerance)) for each in spectra]  # of a missing one too
        found["numerical_rank"] = ("time", TOLERANCE), np.reshape(ranks, (len(spectra), len(tolerance)))
        found[TOLERANCE] = (TOLERANCE,), list(tolerance)
    return found
