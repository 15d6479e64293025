"""Results of runs of several seeds and widths: mean and spread, as tables and as plain values."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray

    from ntkgen.continual.metrics.spread import Spread
    from ntkgen.continual.reading import RunCollection

LEGEND = "Mean ± standard deviation over seeds [95 % interval of the mean]"
# Width of a column of the tables.
COLUMN = 32


def summary(runs: "RunCollection") -> list[dict[str, Any]]:
    """Compute mean and spread of every metric over the seeds of each width, as plain values."""
    from ntkgen.continual.metrics.spread import spreads_by_width

    return [
        {"width": width, "seeds": seeds}
        | {kind: {name: spread.to_json() for name, spread in found.items()} for kind, found in spreads.items()}
        for width, seeds, spreads in spreads_by_width(runs)
    ]


def summary_page(runs: "RunCollection") -> list[str]:
    """Write a table with a row per metric and a column per width."""
    from ntkgen.continual.metrics.definitions import OF_ACCURACY
    from ntkgen.continual.metrics.spread import spreads_by_width

    found = spreads_by_width(runs)
    heads = [f"{_named(width)}, {_counted(seeds)}" for width, seeds, _ in found]
    lines = [LEGEND, " " * 34 + "".join(f"{head:<{COLUMN}}" for head in heads)]
    for kind in found[0][2]:
        lines.append(f"  {kind.replace('_', '-')}")
        names = dict.fromkeys(name for _, _, spreads in found for name in spreads[kind])
        for name in names:
            cells = [_cell(spreads[kind].get(name)) for _, _, spreads in found]
            lines.append(f"    {OF_ACCURACY[name].title:<30}" + "".join(f"{cell:<{COLUMN}}" for cell in cells))
    lines.append(f"  evaluated on {next(iter(runs.runs.values())).evaluated_on}")
    return [line.rstrip() for line in lines + _left_out(runs)]


def kernel_page(runs: "RunCollection", measured: "xarray.Dataset", names: Sequence[str]) -> list[str]:
    """Write a table of kernel metrics at the end of each task, with a row per width and task."""
    from ntkgen.continual.metrics.definitions import OF_KERNELS
    from ntkgen.continual.metrics.spread import Spread, spreads_by_width

    lines = ["  kernels at the end of each task, mean ± standard deviation"]
    lines.append(f"    {'width':<10}{'task':<6}" + "".join(f"{OF_KERNELS[name].title:<22}" for name in names))
    for width, seeds, _ in spreads_by_width(runs):
        several = {"width": width} if "width" in measured.dims else {}
        members = [measured.sel({**several, "seed": seed}) for seed in seeds]
        for task in range(runs.complete[width, seeds[0]].num_finished):
            cells = [Spread.of([_at_end(member, task, name) for member in members]) for name in names]
            row = "".join(f"{'' if cell is None else _short(cell):<22}" for cell in cells)
            lines.append(f"    {'default' if width is None else width:<10}{task:<6}{row}".rstrip())
    return lines


def file_stem(place: str) -> str:
    """Name the files about a run after its last two folders.

    >>> file_stem("runs/cl/seed0/")
    'cl-seed0'
    """
    return "-".join(Path(place).absolute().parts[-2:])


def as_lists(data: "xarray.Dataset") -> dict[str, Any]:
    """Return every variable and coordinate with its dimensions, as plain values."""
    from ntkgen.continual.record import plain_values

    return {
        str(name): {"dims": list(values.dims), "values": plain_values(values.values)}
        for name, values in {**data.coords, **data.data_vars}.items()
    }


def _at_end(measured: "xarray.Dataset", task: int, name: str) -> float:
    """Take the last value of a task."""
    import numpy as np

    # Of an imported run the blocks of tasks alone are known.
    is_recorded = ~np.isnan(measured.task_frobenius_norm.transpose("time", "task").values).all(1)
    return float(measured[name].values[np.flatnonzero((measured.trained_task.values == task) & is_recorded)[-1]])


def _left_out(runs: "RunCollection") -> list[str]:
    names = [str(run.folder) for key, run in runs.runs.items() if key not in runs.complete]
    return [f"  left out, because fewer tasks are finished: {', '.join(names)}"] * bool(names)


def _cell(spread: "Spread | None") -> str:
    if spread is None:
        return ""
    limits = "" if spread.interval is None else f" [{spread.interval[0]:.3f}, {spread.interval[1]:.3f}]"
    return f"{spread}{limits}"


def _short(spread: "Spread") -> str:
    return f"{spread.mean:.4g}" if spread.deviation is None else f"{spread.mean:.4g} ± {spread.deviation:.2g}"


def _named(width: int | None) -> str:
    return "default width" if width is None else f"width {width}"


def _counted(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
