"""`ntkgen cl-plot`: pictures of recorded runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.cl_algorithms import pictures_of_algorithms, stem_of
from ntkgen.cli.cl_collection import file_stem
from ntkgen.cli.cl_regression import is_slow_regression
from ntkgen.cli.cl_stream_results import pictures_of_streams, streams_in
from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, ManyOption, WholeNumber, format_option, json_option, out_option
from ntkgen.cli.plot import write_pictures
from ntkgen.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ntkgen.analysis.plots.style import Picture


@click.command("cl-plot", cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--algorithms",
    metavar="NAME,NAME,...",
    help="Compare algorithms: each RUN is a folder of results with one folder per algorithm, which has the runs of "
    "several seeds, or published metric directories [all, if --metric or --baseline is given].",
)
@click.option(
    "--metric",
    "metrics",
    cls=ManyOption,
    metavar="NAME...",
    help="Metrics of the comparison, such as relative_accuracy_per_epoch [all].",
)
@click.option(
    "--baseline",
    metavar="NAME",
    help="Algorithm that relative accuracies are relative to, paired by seed [retrained_network].",
)
@click.option("--last", type=WholeNumber(min=1), help="Also draw this number of tasks at the end of permuted streams.")
@format_option
@out_option("-o", default="plots", show_default=True, metavar="FOLDER", help="Folder of the pictures.")
@json_option("run")
def cl_plot(
    runs: tuple[str, ...], *, last: int | None, formats: tuple[str, ...], out: str, as_json: bool, **compared: Any
) -> None:
    """Draw the accuracy and the kernels of the runs at RUN...

    Each RUN is the folder of one seed, such as runs/cl/seed0. The pictures show the accuracy, the loss and the kernels
    over time, the accuracy matrix, and the interference of each pair of tasks. If RUN is the folder of several seeds
    and widths, such as runs/cl, fewer pictures show means over seeds with bands: the accuracy on each task for each
    width, and with all widths in one picture the average accuracy, and the norm, distance and velocity of the kernel.
    Runs that learn permuted streams, or a folder of them such as that of a grid, are drawn together, so that learners
    can be compared.
    With --algorithms they compare algorithms over the tasks: accuracy, dormant units, ranks, weights and kernels.
    """
    from ntkgen.files.folder import LocalFolder

    folder = LocalFolder(Path(out))
    folder.require_writable()
    drawn: Iterator[tuple[str, str, tuple[list[Picture], dict[str, str]]]] = _of_runs(runs)  # none is drawn yet
    streams = streams_in(runs)
    _require_applicable(last, compared, are_streams=bool(streams))
    if streams:
        drawn = pictures_of_streams(runs, streams, last)
    elif any(compared.values()):
        drawn = ((place, stem_of(place), pictures_of_algorithms(place, **compared)) for place in runs)
    for place, stem, (pictures, left_out) in drawn:
        files: list[dict[str, Any]] = write_pictures(folder, stem, pictures, formats)
        result = {"run": place, "pictures": files, "left_out": left_out}
        page = [f"  {made['file']}" for made in files] + [f"  no {kind}: {why}" for kind, why in left_out.items()]
        show(json.dumps(result) if as_json else "\n".join([place, *page]))


def _of_runs(runs: tuple[str, ...]) -> "Iterator[tuple[str, str, tuple[list[Picture], dict[str, str]]]]":
    """Draw each run, or the runs of several seeds and widths."""
    from ntkgen.continual.plots.draw import draw_run
    from ntkgen.continual.plots.overlay import draw_collection
    from ntkgen.continual.plots.slow_regression import draw_slow_regression
    from ntkgen.continual.reading import RunCollection, RunReader, open_run
    from ntkgen.continual.slow_regression.record import read_bins

    # wrong input is reported before anything is drawn
    opened = [read_bins(run) if is_slow_regression(run) else open_run(run) for run in runs]
    for place, run in zip(runs, opened, strict=True):
        if isinstance(run, RunReader):
            drawn = draw_run(run)
        elif isinstance(run, RunCollection):
            drawn = draw_collection(run), {}
        else:
            drawn = [draw_slow_regression(run)], {}
        yield place, file_stem(place), drawn


def _require_applicable(last: int | None, compared: dict[str, Any], *, are_streams: bool) -> None:
    """Refuse an option that has no effect on the runs.

    Raises:
        InputError: If there is one.
    """
    given = [name for name, value in compared.items() if value]
    if are_streams and given:
        raise InputError(
            f"`{given[0]}` does not apply to streams of single samples: expected runs of algorithms over tasks, found "
            "learners, which are drawn together. Is it another folder? Leave the option out."
        )
    if last is not None and not are_streams:
        raise InputError(
            "`last` applies to permuted streams alone: expected a run of one, found another run. Is it another "
            "folder? Leave the option out."
        )
