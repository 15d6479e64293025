"""Tables and pictures of runs that learn a permuted stream, for several commands."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntkgen.cli.cl_regression import is_slow_regression
from ntkgen.cli.messages import show
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streams.permuted import STREAMS
from ntkgen.errors import InputError
from ntkgen.files.place import folder_of
from ntkgen.units import counted

if TYPE_CHECKING:
    import xarray

    from ntkgen.analysis.plots.style import Picture
    from ntkgen.files.folder import Folder

ERRORS = "mean ± standard error over seeds"


def show_scores(place: str, found: "xarray.Dataset", *, as_json: bool, seconds: float | None = None) -> None:
    """Print the table of a run, or its numbers as JSON."""
    from ntkgen.continual.streaming.summary import rows_of, table

    rows = rows_of(found)
    if as_json:
        values = {"run": place, "seconds": seconds, "settings": found.attrs["settings"]}
        show(json.dumps(values | {"learners": [row.to_json() for row in rows]}))
        return
    took = "" if seconds is None else f" ({seconds:.1f} s)"
    seeds, bins = found.sizes["seed"], found.sizes["bin"]
    size = f"{int(found.samples[-1]):,} samples in {counted(bins, 'bin')}, {counted(seeds, 'seed')}"
    show("\n".join([f"{place}: {size}{took}", *[f"  {ERRORS}"] * (seeds > 1), *table(rows)]))


def show_all_scores(runs: Sequence[str], folder: "Folder | None", *, as_json: bool) -> None:
    """Print one table of several runs, or their numbers as JSON, and write it as CSV and Markdown to a folder."""
    from ntkgen.continual.streaming.labels import read_streams
    from ntkgen.continual.streaming.summary import best_row, rows_of, table

    found = dict(zip(runs, read_streams(runs), strict=True))
    rows = [row for each in found.values() for row in rows_of(each)]
    if as_json:
        for place, each in found.items():
            show_scores(place, each, as_json=True)
    else:
        best = [f"  best by accuracy: {best_row(rows).name}"] * (len(rows) > 1)
        show("\n".join([f"{', '.join(runs)}: {ERRORS}", *table(rows), *best]))
    if folder is not None:
        for form, end in (("csv", "csv"), ("markdown", "md")):
            folder.write(f"stream-scores.{end}", "\n".join([*table(rows, form), ""]).encode())


def pictures_of_streams(runs: Sequence[str], last: int | None) -> "list[Picture]":
    """Draw the runs together, the last tasks again if that is asked for, and the kernels of each run that has them."""
    from ntkgen.continual.metrics.series import kernel_metrics
    from ntkgen.continual.plots.streaming import draw_kernels, draw_streams
    from ntkgen.continual.plots.utilities import draw_utilities
    from ntkgen.continual.series import read_arrays
    from ntkgen.continual.streaming.labels import read_streams
    from ntkgen.continual.streaming.record import member_folder
    from ntkgen.continual.streaming.utilities import read_utilities

    found = read_streams(runs)
    pictures = [draw_streams(found)] + ([draw_streams(found, last)] if last else [])
    for number, (place, each) in enumerate(zip(runs, found, strict=True), 1):
        own: list[Picture] = []
        settings = StreamingSettings.from_json(each.attrs["settings"])
        if (utilities := read_utilities(folder_of(place))) is not None:
            own += draw_utilities(utilities, settings.method)
        if settings.kernels_every:
            folders = [folder_of(place) / member_folder(settings, 0, seed) for seed in settings.seeds]
            kernels = [kernel_metrics(read_arrays(folder / "kernels.zarr")) for folder in folders]
            own.append(draw_kernels(each, kernels))
        end = "" if len(runs) == 1 else f"-{number}"
        pictures += [dataclasses.replace(picture, kind=f"{picture.kind}{end}") for picture in own]
    return pictures


def some_are_streaming(runs: Sequence[str]) -> bool:
    """Say whether the runs learn permuted streams.

    Raises:
        InputError: If only some of them do.
        StoreError: If there is no run at one of the others.
    """
    from ntkgen.continual.reading import open_run

    kinds = [is_streaming(run) for run in runs]
    if any(kinds) and not all(kinds):
        other = runs[kinds.index(False)]
        if not is_slow_regression(other):
            open_run(other)  # says that it is missing
        raise InputError(
            f"The runs are of two kinds: expected permuted streams alone, as {runs[kinds.index(True)]} is, found "
            f"{other}. Were two folders mixed? Give the runs of each kind in a command of its own."
        )
    return any(kinds)


def is_streaming(place: str | Path) -> bool:
    """Say whether there is a run that learns a permuted stream."""
    from ntkgen.continual.record import read_config

    config = read_config(folder_of(place))
    return config is not None and config["settings"].get("stream") in STREAMS
