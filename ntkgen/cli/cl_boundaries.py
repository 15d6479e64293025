"""What `ntkgen cl-analyze` computes from the stored parameters of a run, beside what the run has recorded."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.messages import note
from ntkgen.cli.options import (
    FiniteRange,
    Function,
    data_dir_option,
    device_option,
    quiet_option,
    stacked,
)
from ntkgen.continual.streams.views import PREVIOUS, VIEWS
from ntkgen.errors import InputError

if TYPE_CHECKING:
    import xarray

    from ntkgen.continual.configuration import RunSettings
    from ntkgen.continual.metrics.ranks import Tolerance
    from ntkgen.continual.plan import Data
    from ntkgen.continual.reading import RunReader

# Columns of the printed tables, with their titles.
UNITS = {
    "dormant_units": "dormant",
    "effective_rank": "eff. rank",
    "rank_99": "rank 99 %",
    "rank_99_squared": "99 % of σ²",
    "stable_rank": "stable rank",
    "numerical_rank": "num. rank",
}
KERNELS = {
    "effective_rank": "eff. rank",
    "rank_99": "rank 99 %",
    "numerical_rank": "num. rank",
    "condition_bound": "condition ≥",
    "previous_distance": "moved",
    "mean_velocity": "velocity",
    "centred_alignment": "alignment",
}
WEIGHTED = {name: title for name, title in KERNELS.items() if "rank" in name or "condition" in name} | {
    "largest": "largest",
    "trace": "trace",
}

# Whose kernels may be loss-weighted.
OF_PROBE, OF_VIEWS = "the probe", "the views"

boundary_options: Callable[[Function], Function] = stacked(
    click.option(
        "--units",
        is_flag=True,
        help="Measure dormant units, ranks of activations and weights at each boundary between tasks, from stored "
        "parameters. Needs torch and the data.",
    ),
    click.option(
        "--threshold",
        type=FiniteRange(0, 1),
        default=0.01,
        show_default=True,
        help="For --units: a unit is dormant if it is not zero on a smaller part of samples and positions.",
    ),
    click.option(
        "--batch-norm",
        type=click.Choice(["running", "batch"]),
        default="running",
        show_default=True,
        help="For --units: statistics of batch norm, the running ones, or those of the samples as in published code.",
    ),
    click.option(
        "--boundary-kernels",
        is_flag=True,
        help="Compute the kernels of the next task and of the previous tasks at each boundary, from stored parameters. "
        "Needs torch and the data.",
    ),
    click.option(
        "--view-output",
        help="For --boundary-kernels: output map, as for cl-run; seen for the classes so far [that of RUN].",
    ),
    click.option(
        "--view-samples",
        type=click.IntRange(min=1),
        help="Maximum number of samples of a view [1000 for --units, 100 for --boundary-kernels].",
    ),
    click.option(
        "--loss-weighted",
        is_flag=True,
        help="Also measure the loss-weighted kernel, whose spectrum is that of the Gauss-Newton matrix.",
    ),
    data_dir_option,
    device_option("For --units and --boundary-kernels: auto, cpu, cuda, cuda:1, … or mps."),
    quiet_option,
)


# Options that have an effect only beside one of others.
NEEDED = {
    "threshold": ("units",),
    "batch_norm": ("units",),
    "view_output": ("boundary_kernels",),
    "view_samples": ("units", "boundary_kernels"),
}


def require_effect(given: Collection[str]) -> None:
    """Refuse options that have no effect.

    Args:
        given: The names of all options that are given.

    Raises:
        InputError: If one of them needs another one that is missing.
    """
    for name, others in NEEDED.items():
        if name in given and not any(other in given for other in others):
            needed = " or ".join(f"`{other}`" for other in others)
            raise InputError(
                f"`{name}` has no effect: expected {needed} beside it, found none. Was it forgotten? Add it, or leave "
                f"`{name}` out."
            )


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Attributes:
        units: Whether the plasticity is measured.
        threshold: Threshold of dormant units.
        batch_norm: Where the statistics of batch norm come from.
        boundary_kernels: Whether kernels at boundaries are computed.
        view_output: Their output map; None for that of the run.
        view_samples: Maximum number of samples of a view; None for the defaults.
        loss_weighted: Whether loss-weighted kernels are measured.
        rank_tolerance: Tolerance of numerical ranks, or several; None for what the precision resolves.
        data_dir: Folder of the data sets.
        device: Name of the device.
        quiet: Whether there is no progress.
    """

    units: bool
    threshold: float
    batch_norm: str
    boundary_kernels: bool
    view_output: str | None
    view_samples: int | None
    loss_weighted: bool
    rank_tolerance: "Tolerance"
    data_dir: Path | None
    device: str
    quiet: bool

    def check(self, settings: "RunSettings") -> None:
        """Check what is asked for before anything is computed, and say what is left out.

        Args:
            settings: The settings of a run.

        Raises:
            InputError: If no kernel has a loss-weighted form.
        """
        if not self.loss_weighted:
            return
        from ntkgen.continual.metrics.loss_weighted import OUTPUTS

        known, outputs, weighted = ", ".join(OUTPUTS), self._outputs(settings), self._weighted(settings)
        if not weighted:
            raise InputError(
                f"No kernel here has a loss-weighted form: expected one of the outputs {known}, found "
                f"{list(outputs.values())[-1]!r}. Is it a sum over outputs, which the loss mixes? Give "
                "`boundary_kernels` with `view_output` seen, or record the run with the output full."
            )
        for part in outputs.keys() - weighted:
            note(f"Note: no loss-weighted kernels of {part}: their output is {outputs[part]!r}, not one of {known}.")

    def _outputs(self, settings: "RunSettings") -> dict[str, str]:
        """Name the output maps of the kernels of the probe and, if they are computed, of the views."""
        views = {OF_VIEWS: self.view_output or settings.output} if self.boundary_kernels else {}
        return {OF_PROBE: settings.output, **views}

    def _weighted(self, settings: "RunSettings") -> list[str]:
        """List whose loss-weighted kernels are measured."""
        if not self.loss_weighted:
            return []
        from ntkgen.continual.metrics.loss_weighted import OUTPUTS

        return [part for part, output in self._outputs(settings).items() if output in OUTPUTS]

    def measure(self, runs: "Mapping[Any, RunReader]", name: str) -> "dict[Any, dict[str, xarray.Dataset]]":
        """Measure runs of the same data.

        Args:
            runs: The runs.
            name: Title of the progress.

        Returns:
            For each run the data sets that were asked for, by their names in the JSON output.
        """
        from ntkgen.cli.progress import progress_bars

        if not (self.units or self.boundary_kernels or self.loss_weighted):
            return {key: {} for key in runs}

        @cache
        def load() -> "Data":
            from ntkgen.continual.plan import load_data

            return load_data(next(iter(runs.values())).settings, self.data_dir)

        needs_bars = self.units or self.boundary_kernels
        with progress_bars(name, quiet=self.quiet) if needs_bars else nullcontext(None) as report:
            if report is not None:
                for number, run in enumerate(runs.values()):
                    report("runs", number, len(runs))
                    self._compute(run, load)
                report("runs", len(runs), len(runs))
        return {key: self._read(run) for key, run in runs.items()}

    def _compute(self, run: "RunReader", load: "Callable[[], Data]") -> None:
        """Compute what is not stored yet."""
        from ntkgen.engine.machine import choose_device

        device = choose_device(self.device)
        if self.units:
            from ntkgen.continual.plasticity import PlasticitySettings
            from ntkgen.continual.results_tree import index_of, write_analysis
            from ntkgen.continual.stored_plasticity import plasticity_of

            settings = PlasticitySettings(
                self.threshold, self.view_samples or 1000, self.batch_norm, self.rank_tolerance
            )
            found = plasticity_of(run, load, settings, device)
            if (tree := index_of(run)) is not None:
                write_analysis(*tree, found)
        if self.boundary_kernels:
            from ntkgen.continual.boundary_kernels import BoundaryKernelSettings, record_boundary_kernels

            chosen = BoundaryKernelSettings(self.view_samples or 100, self.view_output)
            record_boundary_kernels(run, load(), chosen, device)

    def _read(self, run: "RunReader") -> "dict[str, xarray.Dataset]":
        tolerance, found = self.rank_tolerance, dict[str, Any]()
        if self.units:
            found["plasticity"] = run.plasticity
        if self.boundary_kernels:
            found |= {f"{view}_kernels": run.boundary_kernel_metrics(view, tolerance) for view in VIEWS}
        weighted = self._weighted(run.settings)
        if OF_PROBE in weighted:
            ends = {"boundary_iterations": run.boundary_iterations.tolist()}
            found["loss_weighted_kernels"] = run.loss_weighted_metrics(tolerance).assign_attrs(ends)
        if OF_VIEWS in weighted:
            for view in VIEWS:
                found[f"loss_weighted_{view}_kernels"] = run.boundary_kernel_metrics(view, tolerance, weighted=True)
        return found


def boundary_page(measured: "Sequence[Mapping[str, xarray.Dataset]]") -> list[str]:
    """Write what was measured as tables with a row per boundary: numbers of one run, or means of several.

    Args:
        measured: What `Asked.measure` has returned for each run.
    """
    lines = []
    for name in measured[0]:
        data = [each[name] for each in measured]
        if name == "plasticity":
            lines += _unit_lines(data)
        elif name == "loss_weighted_kernels":
            ends = _ends(data[0])
            parts = [each.isel(time=list(_ends(each).values())) for each in data]
            lines += _table("loss-weighted kernels of the probe", parts, {"finished": list(ends)}, WEIGHTED)
        else:
            title = name.removesuffix("_kernels").replace("loss_weighted_", "").replace("_", " ")
            of = "loss-weighted kernels" if name.startswith("loss_weighted") else "kernels"
            columns = WEIGHTED if name.startswith("loss_weighted") else KERNELS
            lines += _table(f"{of} of the {title}", data, {"finished": data[0].boundary.values}, columns)
    return lines


def _unit_lines(data: "Sequence[xarray.Dataset]") -> list[str]:
    noted = data[0].attrs["ntkgen_plasticity"]
    rows = {"finished": data[0].boundary.values, "classes": data[0].num_classes.values}
    lines = _table("mean magnitude of the parameters", data, rows, {"weight_magnitude": "mean |p|"})
    for view in VIEWS:
        kept = slice(1, None) if view == PREVIOUS else slice(None, -1 if _is_finished(data) else None)
        title = (
            f"units on the {view.replace('_', ' ')}: dormant below {noted['threshold']:g}, ranks of "
            f"{noted['num_features']} features"
        )
        parts = [each.isel(boundary=kept) for each in data]
        columns = {f"{view}_{name}": head for name, head in UNITS.items()}
        lines += _table(title, parts, {name: values[kept] for name, values in rows.items()}, columns)
    return lines


def _is_finished(data: "Sequence[xarray.Dataset]") -> bool:
    """Whether the runs have a last boundary, which no task follows."""
    return bool(data[0].next_task_dormant_units.isnull()[-1])


def _table(
    title: str, data: "Sequence[xarray.Dataset]", rows: Mapping[str, Any], columns: Mapping[str, str]
) -> list[str]:
    """Write numbers of one run, or means and standard deviations of several."""
    from ntkgen.continual.metrics.spread import Spread

    data, columns = _by_tolerance(data, columns)
    width = 14 if len(data) == 1 else 20
    lines = [f"  {title}", "    " + "".join(f"{name:>9}" for name in rows)]
    lines[-1] += "".join(f"{head:>{width}}" for head in columns.values())
    for place, numbers in enumerate(zip(*rows.values(), strict=True)):
        found = [Spread.of([float(each[name].values[place]) for each in data]) for name in columns]
        cells = "".join(f"{'–' if spread is None else short(spread):>{width}}" for spread in found)
        lines.append("    " + "".join(f"{number:>9}" for number in numbers) + cells)
    return lines


def _by_tolerance(
    data: "Sequence[xarray.Dataset]", columns: Mapping[str, str]
) -> "tuple[Sequence[xarray.Dataset], dict[str, str]]":
    """Give the numerical rank a column for each of several tolerances."""
    found = {}
    for name, head in columns.items():
        if "rank_tolerance" not in data[0][name].dims:
            found[name] = head
            continue
        for place, tolerance in enumerate(data[0].rank_tolerance.values):
            own = f"{name} {place}"
            found[own] = f"rank > {tolerance:g}"
            data = [each.assign({own: each[name].isel(rank_tolerance=place, drop=True)}) for each in data]
    return data, found


def short(spread: Any) -> str:
    """Write the mean, and the standard deviation of several values."""
    return f"{spread.mean:.4g}" if spread.deviation is None else f"{spread.mean:.4g} ± {spread.deviation:.2g}"


def _ends(data: "xarray.Dataset") -> dict[int, int]:
    """Find the recorded time of each boundary that has one, by its number of finished tasks."""
    times = {iteration: time for time, iteration in enumerate(data.iteration.values.tolist())}
    iterations = data.attrs["boundary_iterations"]
    return {finished: times[each] for finished, each in enumerate(iterations) if each in times}
