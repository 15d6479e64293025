"""`ntkgen cl-analyze`: metrics of recorded runs, from what is stored."""

import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.cl_boundaries import Asked, boundary_options, boundary_page, require_effect
from ntkgen.cli.cl_collection import as_lists, file_stem, kernel_page, summary, summary_page
from ntkgen.cli.cl_regression import is_slow_regression, require_for_streams, show_outcomes
from ntkgen.cli.cl_stream_results import show_all_scores, streams_in
from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, FiniteRange, ManyOption, given_options, json_option
from ntkgen.errors import InputError, StoreError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import xarray

    from ntkgen.continual.metrics.ranks import Tolerance
    from ntkgen.continual.reading import RunCollection, RunReader

# Columns of the printed table of kernels, with their titles.
COLUMNS = {
    "frobenius_norm": "norm",
    "largest": "λ₁",
    "smallest": "λ_N",
    "condition_bound": "condition ≥",
    "effective_rank": "eff. rank",
    "distance": "distance",
    "centred_alignment": "centred alignment",
    "leave_one_out_accuracy": "regression",
}
# Those of the table of several runs.
OF_SEVERAL = ("frobenius_norm", "largest", "effective_rank", "distance", "centred_alignment")


@click.command("cl-analyze", cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--dt",
    type=click.IntRange(min=1),
    help="Iterations between the two kernels of a velocity [the number that the most pairs of kernels are apart].",
)
@click.option(
    "--rank-tolerance",
    cls=ManyOption,
    type=FiniteRange(0, 1),
    metavar="PART...",
    help="Part of the largest eigenvalue above which an eigenvalue counts in the numerical rank; several give several "
    "ranks [what the precision of the kernel resolves].",
)
@click.option("--csv", "tables", metavar="FOLDER", help="Also write every curve and matrix as a CSV file to FOLDER.")
@boundary_options
@json_option("run")
def cl_analyze(
    runs: tuple[str, ...],
    *,
    dt: int | None,
    rank_tolerance: tuple[float, ...],
    tables: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compute the accuracy and kernel metrics of the runs at RUN...

    Each RUN is the folder of one seed, such as runs/cl/seed0, or that of several seeds and widths, such as runs/cl. For
    several seeds, the command prints mean and spread. Runs that learn permuted streams, or a folder of them such as
    that of a grid, have one table. The command reads what `ntkgen cl-run` has stored. It does not train.
    Only --units and --boundary-kernels load torch: they compute from the stored parameters, and keep the results in the
    folder of the run.
    """
    from ntkgen.continual.slow_regression.record import read_bins
    from ntkgen.continual.tables import as_csv, csv_tables
    from ntkgen.files.folder import LocalFolder

    folder = None if tables is None else LocalFolder(Path(tables))
    if folder is not None:
        folder.require_writable()
    given = given_options()
    require_effect(given)
    if streams := streams_in(runs):
        require_for_streams(streams[0], given)
        show_all_scores(streams, folder, as_json=as_json)
        return
    asked = Asked(rank_tolerance=_tolerance(rank_tolerance), **options)
    for place, run in _opened(runs, asked, given):
        if run is None:
            bins = read_bins(place)
            show_outcomes(place, bins, as_json=as_json)
            found = {"bins": as_csv(bins)} if folder is not None else {}
        else:
            measured = run.kernel_metrics(dt, rank_tolerance=asked.rank_tolerance)
            looks = _show(place, run, measured, asked, as_json=as_json)
            found = csv_tables(run, measured, looks) if folder is not None else {}
        for name, table in found.items():
            assert folder is not None
            folder.write(f"{file_stem(place)}-{name}.csv", table)


def _tolerance(given: tuple[float, ...]) -> "Tolerance":
    """Return the tolerances, each once: none, one number, or several."""
    found = tuple(dict.fromkeys(given))
    return found if len(found) > 1 else next(iter(found), None)


def _opened(
    runs: tuple[str, ...], asked: Asked, given: "Collection[str]"
) -> "list[tuple[str, RunReader | RunCollection | None]]":
    """Open all runs; None for slowly changing regression. Wrong input is reported before anything is computed."""
    from ntkgen.continual.reading import open_run

    opened = [(run, None if is_slow_regression(run) else open_run(run)) for run in runs]
    for place, run in opened:
        if run is None:
            require_for_streams(place, given)
        else:
            asked.check(run.settings)
    return opened


def _show(
    place: str, run: "RunReader | RunCollection", measured: "xarray.Dataset", asked: Asked, *, as_json: bool
) -> "Mapping[str, xarray.Dataset]":
    """Print the metrics of a run, or of several. Return what is measured at the boundaries."""
    from ntkgen.continual.reading import RunCollection
    from ntkgen.continual.tables import of_several

    if isinstance(run, RunCollection):
        of_runs = asked.measure(run.complete, place)
        _show_collection(place, run, measured, of_runs, as_json=as_json)
        return of_several(of_runs)
    looks = asked.measure({place: run}, place)[place]
    result = _analysed(place, run, measured)
    if run.has_validation_probe:
        result["validation_kernels"] = _kernels(run.kernel_metrics(measured.dt, "validation", asked.rank_tolerance))
    result |= {name: _kernels(found) for name, found in looks.items()}
    show(json.dumps(result) if as_json else "\n".join([_page(result), *boundary_page([looks])]))
    return looks


def _show_collection(
    place: str,
    runs: "RunCollection",
    measured: "xarray.Dataset",
    looks: "Mapping[Any, Mapping[str, xarray.Dataset]]",
    *,
    as_json: bool,
) -> None:
    if as_json:
        each = [
            {
                "run": str(run.folder),
                **run.metrics(),
                **{name: _kernels(found) for name, found in looks[key].items()},
            }
            for key, run in runs.complete.items()
        ]
        result = {"run": place, **runs.config, "runs": each, "summary": summary(runs), "kernels": as_lists(measured)}
        show(json.dumps(result))
        return
    lines = [place, *summary_page(runs), *kernel_page(runs, measured, OF_SEVERAL)]
    for width in runs.widths:
        if of_width := [found for (of, _), found in looks.items() if of == width]:
            page = boundary_page(of_width)
            lines += [f"  width {width}"] * (len(runs.widths) > 1 and bool(page)) + page
    show("\n".join(lines))


def _analysed(place: str, run: "RunReader", kernels: "xarray.Dataset") -> dict[str, Any]:
    return {
        "run": place,
        "evaluated_on": run.evaluated_on,
        **run.metrics(),
        "kernels": _kernels(kernels),
        "predicted_forgetting": _predicted(run),
    }


def _kernels(kernels: "xarray.Dataset") -> dict[str, Any]:
    from ntkgen.continual.record import plain_values

    values = {str(name): plain_values(kernels[name].values) for name in (*kernels.coords, *kernels.data_vars)}
    return {**values, **kernels.attrs}


def _predicted(run: "RunReader") -> dict[str, Any]:
    """List the predictions task by task; without them, say why they are missing."""
    from ntkgen.continual.record import plain_values

    try:
        found = run.predicted_forgetting().drop_vars(["predicted_change", "true_change"])
    except (InputError, StoreError) as error:
        return {"missing": str(error)}
    return {**{str(name): plain_values(found[name].values) for name in found.variables}, **found.attrs}


def _page(result: dict[str, Any]) -> str:
    from ntkgen.continual.metrics.definitions import OF_ACCURACY, OF_COURSES

    kinds = [kind for kind in ("class_incremental", "task_incremental") if kind in result]  # imported runs have one
    lines = [result["run"], " " * 34 + "".join(f"{kind.replace('_', '-'):>18}" for kind in kinds)]
    scores = [result[kind] for kind in kinds]
    for name, definition in OF_ACCURACY.items():
        cells = "".join(f"{'–' if found[name] is None else format(found[name], '.3f'):>18}" for found in scores)
        lines.append(f"  {definition.title:<32}{cells}")
    for name in ("seen_accuracy", "new_task_accuracy"):
        values = " ".join(f"{value:.2f}" for value in scores[0][name])
        lines.append(f"  {OF_COURSES[name].title} after each task: {values}")
    if found := result.get("class_accuracy"):
        cells = " ".join("–" if value is None else f"{value:.2f}" for value in found)
        lines.append(f"  accuracy on each class at the end, in the order of arrival: {cells}")
    lines.append(f"  evaluated on {result['evaluated_on']}")
    if line := _prediction_line(result["predicted_forgetting"]):
        lines.append(line)
    if line := _lazy_line(result["kernels"]):
        lines.append(line)
    return "\n".join([*lines, *_kernel_lines(result["kernels"], len(scores[0]["seen_accuracy"]))])


def _prediction_line(found: dict[str, Any]) -> str | None:
    """Say how the predicted change of old outputs agrees with the true one; None without a prediction."""
    cosines = [f"{cosine:.2f}" for cosine in found.get("old_cosine", ()) if cosine is not None]
    return f"  cosine of predicted and true change of old outputs: {' '.join(cosines)}" if cosines else None


def _kernel_lines(kernels: dict[str, Any], num_finished: int) -> list[str]:
    """Write the metrics of the first kernel and of those at the ends of the finished tasks."""
    trained = kernels["trained_task"]
    ends = [max(time for time, task in enumerate(trained) if task == end) for end in range(num_finished)]
    widths = [max(11, len(title) + 2) for title in COLUMNS.values()]
    count, titles = len(trained), _cells(list(COLUMNS.values()), widths)
    lines = [f"  kernels: the first one, and at the end of each task; {count:,} are recorded, and --json prints all"]
    lines.append(f"  {'task':>4}{'iteration':>11}{titles}")
    for task, time in enumerate([0, *ends], -1):
        found = [kernels[name][time] for name in COLUMNS]
        cells = _cells(["–" if value is None else format(value, ".4g") for value in found], widths)
        lines.append(f"  {'–' if task < 0 else task:>4}{kernels['iteration'][time]:>11,}{cells}")
    return lines


def _cells(texts: list[str], widths: list[int]) -> str:
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _lazy_line(kernels: dict[str, Any]) -> str | None:
    """Say how lazy the training is; None if it was not recorded."""
    found = [value for value in kernels.get("lazy_error", ()) if value is not None]
    if not found:
        return None
    last = kernels["lazy_error_from_start"][-1]
    return f"  lazy error: median {median(found):.3g} between two kernels, {last:.3g} from the first kernel to the last"
