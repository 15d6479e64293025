"""Recorded runs as arrays, without torch: `ntkgen.open_run`."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ntkgen.continual.collection import RunCollection
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.reader import BINARY_METHODS, MOMENT, PARTS, SCORES, RunReader
from ntkgen.continual.record import CONFIG, read_config
from ntkgen.errors import FingerprintError, InputError, StoreError
from ntkgen.files.folder import Folder
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import os

    from ntkgen.continual.joining import Key

__all__ = [
    "BINARY_METHODS",
    "MOMENT",
    "PARTS",
    "SCORES",
    "RunCollection",
    "RunReader",
    "is_run",
    "kind_of",
    "open_collection",
    "open_run",
    "open_seed",
    "require_no_runs_within",
    "run_names",
]

# The folder of a run in that of several.
_MEMBER = re.compile(r"((?:width\d+/)?seed\d+)/config\.json")


def open_run(place: "str | os.PathLike[str] | Folder") -> RunReader | RunCollection:
    """Open the folder of one seed of a run, or the folder of several seeds and widths.

    Raises:
        FingerprintError: If the runs in the folder differ in more than their seeds and widths.
        StoreError: If there is no run.
    """
    folder = folder_of(place)
    return _opened(folder) or open_collection(folder)


def is_run(place: "str | os.PathLike[str] | Folder") -> bool:
    """Say whether there is a run, or a folder of runs; a kernel store is none."""
    folder = folder_of(place)
    if folder.has("zarr.json"):
        return False
    return folder.has(CONFIG) or bool(run_names(folder))


def run_names(folder: Folder) -> list[str]:
    """List the folders of the runs in a folder of several seeds and widths, such as ``width8/seed0``."""
    return [found[1] for key in folder.sizes() if (found := _MEMBER.fullmatch(key))]


def kind_of(config: Mapping[str, Any]) -> str:
    """Say what kind of run has some settings.

    >>> kind_of({"settings": {"seeds": [0], "stream": "label-permuted"}}), kind_of({"settings": {"seed": 0}})
    ('a run of a permuted stream', 'a run that trains on tasks for epochs')
    """
    settings = config["settings"]
    if "seeds" not in settings:
        return "a run that trains on tasks for epochs"
    return "a run of slowly changing regression" if "algorithms" in settings else "a run of a permuted stream"


def require_no_runs_within(folder: Folder, new: str) -> None:
    """Require that a folder is not that of the seeds of other runs, before a run begins that keeps all seeds in one.

    Args:
        folder: The folder.
        new: What begins there, for the error.

    Raises:
        InputError: If it has other runs.
    """
    if names := run_names(folder):
        kind = kind_of(read_config(folder / names[0]) or {"settings": {}})
        raise InputError(
            f"There are other runs at {folder}: expected a folder without runs for {new}, found {kind} at {names[0]}. "
            "Was `out` left at its default? Choose another `out`."
        )


def open_seed(place: "str | os.PathLike[str] | Folder") -> RunReader:
    """Open the folder of one seed of a run.

    Raises:
        StoreError: If there is no run, or it is the folder of several.
    """
    folder = folder_of(place)
    run = _opened(folder)
    if run is None:
        raise StoreError(
            f"There is no run at {folder}: expected a folder with config.json, as RUN/seed0, found none. Is it the "
            "folder of several seeds? Name one of them."
        )
    return run


def open_collection(place: "str | os.PathLike[str] | Folder") -> RunCollection:
    """Open the runs of several seeds and widths. The folder of one seed is a collection of one run.

    Raises:
        FingerprintError: If the runs differ in more than their seeds and widths.
        StoreError: If there is no run.
    """
    folder = folder_of(place)
    alone = _opened(folder)
    readers = [alone] if alone else [run for name in run_names(folder) if (run := _opened(folder / name))]
    if not readers:
        raise StoreError(
            f"There is no run at {folder}: expected a folder with config.json, or a folder of seeds as `ntkgen cl-run` "
            "makes it, found neither. Is it another path? Check it."
        )
    readers.sort(key=lambda run: (run.settings.width or 0, run.settings.seed))
    runs: dict[Key, RunReader] = {}
    for run in readers:
        _require_comparable(readers[0], run)
        key = run.settings.width, run.settings.seed
        if key in runs:
            raise FingerprintError(
                f"Two runs at {folder} have the same width and seed: expected one, found {runs[key].folder} and "
                f"{run.folder}. Was the command repeated with more widths? Move one of the two to another folder."
            )
        runs[key] = run
    return RunCollection(folder, runs)


def _opened(folder: Folder) -> RunReader | None:
    config = read_config(folder)
    if config is None:
        return None
    if "seeds" in config["settings"]:  # all seeds in one run: a stream of single samples
        raise StoreError(
            f"The run at {folder} learns a stream of single samples: expected one that trains on tasks for epochs. Is "
            "it another folder? Read it with `ntkgen cl-analyze`, or with `read_stream` or `read_bins`; see `ntkgen "
            "manual streams`."
        )
    return RunReader(folder, RunSettings.from_json(config["settings"]))


def _require_comparable(first: RunReader, other: RunReader) -> None:
    differing = first.settings.differences_beside_seed(other.settings)
    if first.config["facts"].get("data") != other.config["facts"].get("data"):
        differing.append("other data")
    if differing:
        raise FingerprintError(
            f"The runs {first.folder} and {other.folder} cannot be read together: expected that they differ only in "
            f"seed and width, found other settings ({'; '.join(differing[:3])}). Did two commands of "
            "`ntkgen cl-run` have the same folder? Name the folder of one run."
        )
