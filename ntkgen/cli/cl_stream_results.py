"""Tables and pictures of runs that learn a permuted stream, for several commands."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ntkgen.cli.cl_regression import is_slow_regression
from ntkgen.cli.messages import show
from ntkgen.errors import InputError
from ntkgen.units import counted

if TYPE_CHECKING:
    import xarray

    from ntkgen.analysis.plots.style import Picture
    from ntkgen.continual.streaming.comparing import Notes
    from ntkgen.files.folder import Folder

ERRORS = "mean ± standard error over seeds"
# Runs whose names are the name of a file, at most.
NAMED = 3


def show_scores(place: str, found: "xarray.Dataset", *, as_json: bool, seconds: float | None = None) -> None:
    """Print the table of a run, or its numbers as JSON."""
    from ntkgen.continual.streaming.comparing import PLACE, notes_on
    from ntkgen.continual.streaming.summary import rows_of, table

    found = found.assign_attrs({PLACE: place})
    rows, notes = rows_of(found), notes_on([found])
    if as_json:
        values = {"run": place, "seconds": seconds, "settings": found.attrs["settings"], "notes": notes.all}
        show(json.dumps(values | {"learners": [row.to_json() for row in rows]}))
        return
    took = "" if seconds is None else f" ({seconds:.1f} s)"
    seeds, bins = found.sizes["seed"], found.sizes["bin"]
    size = f"{int(found.samples[-1]):,} samples in {counted(bins, 'bin')}, {counted(seeds, 'seed')}"
    show("\n".join([f"{place}: {size}{took}", *[f"  {ERRORS}"] * (seeds > 1), *table(rows), *_lines(notes)]))


def show_all_scores(places: Sequence[str], folder: "Folder | None", *, as_json: bool) -> None:
    """Print one table of several runs, or their numbers as JSON, and write all tables to a folder."""
    from ntkgen.continual.streaming.comparing import notes_on
    from ntkgen.continual.streaming.summary import best_row, rows_of, table
    from ntkgen.continual.streaming.tables import read_measured, stream_tables, unique_stems

    found = read_measured(places)
    rows, notes = rows_of(*found), notes_on(found)
    tables = [] if folder is None else [stream_tables(each) for each in found]  # refuses damaged kernels
    if as_json:
        for place, each in zip(places, found, strict=True):
            learners = [row.to_json() for row in rows_of(each)]
            values = {"run": place, "seconds": None, "settings": each.attrs["settings"], "notes": notes.all}
            show(json.dumps(values | {"learners": learners}))
    else:
        best = [f"  best by accuracy: {best_row(rows).name}"] * (len(rows) > 1 and not notes.hindering)
        show("\n".join([f"{', '.join(places)}: {ERRORS}", *table(rows), *best, *_lines(notes)]))
    if folder is not None:
        for form, end in (("csv", "csv"), ("markdown", "md")):
            folder.write(f"stream-scores.{end}", "\n".join([*table(rows, form), ""]).encode())
        for stem, own in zip(unique_stems(places), tables, strict=True):
            for name, data in own.items():
                folder.write(f"{stem}-{name}.csv", data)


def pictures_of_streams(
    given: Sequence[str], places: Sequence[str], last: int | None
) -> "Iterator[tuple[str, str, tuple[list[Picture], dict[str, str]]]]":
    """Draw the runs together, the last tasks again if that is asked for, and what each run has by itself.

    Args:
        given: The folders that were named.
        places: The runs in them.
        last: Number of tasks at the end that are drawn again.

    Yields:
        What is drawn, the beginning of the names of its files, the pictures, and why others are missing.
    """
    from ntkgen.continual.plots.streaming import draw_kernels, draw_streams
    from ntkgen.continual.plots.utilities import draw_utilities
    from ntkgen.continual.streaming.comparing import settings_of
    from ntkgen.continual.streaming.tables import kernels_of, missing_kernels, read_measured, unique_stems
    from ntkgen.continual.streaming.utilities import read_utilities
    from ntkgen.files.place import folder_of

    found = read_measured(places)
    # what is damaged is refused before anything is drawn
    utilities = [read_utilities(folder_of(place)) for place in places]
    kernels = [kernels_of(place, settings_of(run)) for place, run in zip(places, found, strict=True)]
    stem = joined_name(given)
    yield ", ".join(given), stem, ([draw_streams(found)] + ([draw_streams(found, last)] if last else []), {})
    stems = [stem] if len(places) == 1 else unique_stems(places)
    for place, own_stem, run, own_utilities, own_kernels in zip(places, stems, found, utilities, kernels, strict=True):
        pictures = [] if own_utilities is None else draw_utilities(own_utilities, run)
        if own_kernels:
            pictures.append(draw_kernels(run, own_kernels))
        left_out = _without_kernels(missing_kernels(place, settings_of(run)))
        if pictures or left_out:
            yield place, own_stem, (pictures, left_out)


def _without_kernels(missing: Sequence[str]) -> dict[str, str]:
    """Say why the picture of kernels is missing, if files are.

    >>> _without_kernels([]), _without_kernels(["seed0/kernels.zarr", "seed1/kernels.zarr"])["stream-kernels"][:48]
    ({}, 'expected kernels of all seeds and combinations, ')
    """
    if not missing:
        return {}
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return {
        "stream-kernels": f"expected kernels of all seeds and combinations, found none at {missing[0]}{more}. Was the "
        "run copied in part? Put them back"
    }


def joined_name(places: Sequence[str]) -> str:
    """Name the pictures of several folders.

    >>> joined_name(["runs/sgd", "runs/usgd/"]), joined_name(["a", "b", "c", "d"])
    ('sgd-usgd', 'a-and-3-others')
    """
    from ntkgen.continual.streaming.tables import unique_stems

    names = unique_stems(places, parts=1)
    return "-".join(names) if len(names) <= NAMED else f"{names[0]}-and-{len(names) - 1}-others"


def streams_in(places: Sequence[str]) -> list[str]:
    """List the runs of permuted streams in some folders, each of them a run or a folder of runs; none if there is none.

    Raises:
        InputError: If only some of the folders have such runs.
        StoreError: If there is no run in one of the others.
    """
    from ntkgen.continual.reading import open_run
    from ntkgen.continual.streaming.tables import places_of_streams

    found = {place: places_of_streams(place) for place in places}
    others = [place for place, runs in found.items() if not runs]
    if others and len(others) < len(found):
        if not is_slow_regression(others[0]):
            open_run(others[0])  # says that it is missing
        stream = next(place for place, runs in found.items() if runs)
        raise InputError(
            f"The runs are of two kinds: expected permuted streams alone, as {stream} is, found {others[0]}. Were two "
            "folders mixed? Give the runs of each kind in a command of its own."
        )
    return list(dict.fromkeys(run for runs in found.values() for run in runs))


def _lines(notes: "Notes") -> list[str]:
    """Write the notes below a table."""
    return [f"  note: {note}" for note in notes.all]
