"""`ntkgen cl-analyze`: metrics of recorded runs, from what is stored."""

import json
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.cl_collection import as_lists, kernel_page, summary, summary_page
from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, FiniteRange, json_option
from ntkgen.errors import InputError, StoreError

if TYPE_CHECKING:
    import xarray

    from ntkgen.continual.reading import RunCollection, RunReader

# Columns of the printed table of kernels.
COLUMNS = ("frobenius_norm", "largest", "smallest", "effective_rank", "distance", "centred_alignment")


@click.command("cl-analyze", cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--dt",
    type=click.IntRange(min=1),
    help="Iterations between the two kernels of a velocity [the number that the most pairs of kernels are apart].",
)
@click.option(
    "--rank-tolerance",
    type=FiniteRange(0, 1),
    help="Part of the largest eigenvalue above which an eigenvalue counts in the numerical rank [what the precision of "
    "the kernel resolves].",
)
@json_option("run")
def cl_analyze(runs: tuple[str, ...], *, dt: int | None, rank_tolerance: float | None, as_json: bool) -> None:
    """Compute the accuracy and kernel metrics of the runs at RUN...

    Each RUN is the folder of one seed, such as runs/cl/seed0, or that of several seeds and widths, such as runs/cl. For
    several seeds, the command prints mean and spread. It reads what `ntkgen cl-run` has stored. It neither trains nor
    loads torch.
    """
    from ntkgen.continual.reading import RunReader, open_run

    opened = [open_run(run) for run in runs]  # wrong input is reported before anything is computed
    for place, run in zip(runs, opened, strict=True):
        if isinstance(run, RunReader):
            result = _analysed(place, run, dt, rank_tolerance)
            show(json.dumps(result) if as_json else _page(result))
        else:
            measured = run.kernel_metrics(dt, rank_tolerance=rank_tolerance)
            _show_collection(place, run, measured, as_json=as_json)


def _show_collection(place: str, runs: "RunCollection", measured: "xarray.Dataset", *, as_json: bool) -> None:
    if as_json:
        each = [{"run": str(run.folder), **run.metrics()} for run in runs.complete.values()]
        result = {"run": place, **runs.config, "runs": each, "summary": summary(runs), "kernels": as_lists(measured)}
        show(json.dumps(result))
    else:
        show("\n".join([place, *summary_page(runs), *kernel_page(runs, measured, COLUMNS)]))


def _analysed(place: str, run: "RunReader", dt: int | None, rank_tolerance: float | None) -> dict[str, Any]:
    kernels = run.kernel_metrics(dt, rank_tolerance=rank_tolerance)
    measured = {str(name): kernels[name].values.tolist() for name in kernels.data_vars}
    where = {str(name): kernels[name].values.tolist() for name in kernels.coords}
    measured |= {**where, **kernels.attrs}
    return {"run": place, **run.metrics(), "kernels": measured, "predicted_forgetting": _predicted(run)}


def _predicted(run: "RunReader") -> dict[str, Any]:
    """List the predictions task by task; without them, say why they are missing."""
    try:
        found = run.predicted_forgetting().drop_vars(["predicted_change", "true_change"])
    except (InputError, StoreError) as error:
        return {"missing": str(error)}
    return {**{str(name): found[name].values.tolist() for name in found.variables}, **found.attrs}


def _page(result: dict[str, Any]) -> str:
    lines = [result["run"]]
    for kind in ("class_incremental", "task_incremental"):
        if (found := result.get(kind)) is None:  # not recorded by an imported run
            continue
        parts = [f"average accuracy {found['average_accuracy']:.3f}"]
        parts += [
            f"{name.replace('_', ' ')} {found[name]:.3f}"
            for name in ("average_incremental_accuracy", "backward_transfer", "forward_transfer", "forgetting")
            if found[name] is not None
        ]
        lines.append(f"  {kind.replace('_', '-')}: {', '.join(parts)}")
    if line := _prediction_line(result["predicted_forgetting"]):
        lines.append(line)
    kernels = result["kernels"]
    lines.append("  " + "".join(f"{name.replace('_', ' '):>19}" for name in ("iteration", "task", *COLUMNS)))
    for time, iteration in enumerate(kernels["iteration"]):
        values = [f"{kernels[name][time]:>19.4g}" for name in COLUMNS]
        lines.append("  " + f"{iteration:>19,}{kernels['trained_task'][time]:>19}" + "".join(values))
    return "\n".join(lines)


def _prediction_line(found: dict[str, Any]) -> str | None:
    """Say how the predicted change of old outputs agrees with the true one; None without a prediction."""
    numbers = zip(found.get("new_task", ()), found.get("old_cosine", ()), found.get("old_num_modes", ()), strict=True)
    parts = [f"{cosine:.3f} (task {task}, {modes:.0f} modes)" for task, cosine, modes in numbers if isfinite(cosine)]
    return f"  cosine of predicted and true change of old outputs: {', '.join(parts)}" if parts else None
