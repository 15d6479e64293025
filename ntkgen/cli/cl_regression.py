"""`ntkgen cl-run --stream slow-regression`: many seeds and algorithms as one computation."""

import dataclasses
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkgen.cli.messages import show
from ntkgen.continual.settings_file import read_settings
from ntkgen.continual.slow_regression.settings import ALGORITHMS, RegressionSettings
from ntkgen.errors import InputError, UnknownNameError
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import xarray

STREAM = "slow-regression"
# Options whose setting has another name.
RENAMED = {"method": "algorithms", "width": "units"}
SAMPLES = "num_samples"
# Parameters of `ntkgen cl-run` that are no settings of a run.
OF_COMMAND = ("stream", "config", "out", "as_json", "quiet", "dry_run")
# Parameters of `ntkgen cl-analyze` that a run of this stream may have.
APPLICABLE = ("runs", "tables", "as_json", "data_dir", "device", "quiet")


def slow_regression_settings(options: Mapping[str, Any], given: Collection[str]) -> RegressionSettings | None:
    """Combine a file of settings and options, if one of them asks for slowly changing regression; else None.

    Args:
        options: The settings, and the file.
        given: The names of all options that are given.

    Raises:
        InputError: If an option does not apply to the stream, or has a wrong value.
        UnknownNameError: If there is no such algorithm.
    """
    config = options["config"]
    values = {} if config is None else read_settings(config)
    values |= {name: value for name, value in options.items() if value not in {None, ()} and name != "config"}
    is_chosen = values.pop("stream", None) == STREAM
    _require_applicable(given, is_chosen=is_chosen)
    if not is_chosen:
        return None
    named = {RENAMED.get(name, name): value for name, value in values.items()}
    method, units = named.get("algorithms"), named.get("units")
    if isinstance(method, str):
        if method not in ALGORITHMS:
            raise UnknownNameError("algorithm of slowly changing regression", method, ALGORITHMS)
        named["algorithms"] = (method,)
    if isinstance(units, tuple):
        named["units"] = one_width(units, "Slowly changing regression")
    return RegressionSettings.from_json(named)


def one_width(widths: Sequence[int], stream: str) -> int:
    """Return the only width.

    Raises:
        InputError: If there are several.
    """
    if len(widths) > 1:
        raise InputError(
            f"{stream} has networks of one width: expected one number, found {len(widths)}. Is it a sweep of another "
            "stream? Give one `width`."
        )
    return widths[0]


def _require_applicable(given: Collection[str], *, is_chosen: bool) -> None:
    """Refuse options of another stream.

    Raises:
        InputError: If there is one.
    """
    if not is_chosen:
        if SAMPLES in given:
            raise InputError(
                f"`{SAMPLES}` applies to streams of single samples alone, such as {STREAM}: expected epochs of a data "
                f"set, found a number of samples. Was `stream` forgotten? Give it, or leave `{SAMPLES}` out."
            )
        return
    settings = [field.name for field in dataclasses.fields(RegressionSettings)]
    if others := [name for name in given if RENAMED.get(name, name) not in settings and name not in OF_COMMAND]:
        raise InputError(
            f"`{others[0]}` does not apply to `stream` {STREAM}: expected its settings, found one of the streams with "
            f"tasks. Was it copied from another command? Leave it out. Settings of this stream: {', '.join(settings)}."
        )


def run_slow_regression(settings: RegressionSettings, out: str, *, as_json: bool, quiet: bool) -> int:
    """Run it, and print what became of each algorithm."""
    from ntkgen.cli.progress import progress_bars
    from ntkgen.continual.slow_regression.run import run_regression

    began = time.monotonic()
    with progress_bars("", quiet=quiet) as report:
        bins = run_regression(settings, folder_of(out, fsync=False), report)
    show_outcomes(out, bins, as_json=as_json, seconds=round(time.monotonic() - began, 3))
    return 0


def show_slow_regression_plan(settings: RegressionSettings, *, as_json: bool) -> int:
    """Print what a run would do."""
    networks = len(settings.algorithms) * len(settings.seeds)
    if as_json:
        show(json.dumps({"settings": settings.to_json(), "networks": networks, "bins": settings.num_bins}))
        return 0
    show(
        f"{networks} networks ({', '.join(settings.algorithms)}; {len(settings.seeds)} seeds), "
        f"{settings.num_samples:,} samples each, in {settings.num_bins} bins"
    )
    show("settings: " + ", ".join(f"{name} {value}" for name, value in settings.to_json().items()))
    return 0


def show_outcomes(place: str, bins: "xarray.Dataset", *, as_json: bool, seconds: float | None = None) -> None:
    """Print the table of a run, or its numbers as JSON."""
    from ntkgen.continual.slow_regression.summary import outcomes, page

    if as_json:
        found = {"run": place, "seconds": seconds, "settings": bins.attrs["settings"]}
        show(json.dumps(found | {"algorithms": [each.to_json() for each in outcomes(bins)]}))
        return
    title, *lines = page(bins)
    took = "" if seconds is None else f" ({seconds:.1f} s)"
    show("\n".join([f"{place}: {title}{took}", *lines]))


def require_for_streams(place: str, given: Collection[str]) -> None:
    """Refuse options of `ntkgen cl-analyze` that do not apply to a run that learns a stream of single samples.

    Args:
        place: The folder of the run.
        given: The names of all options that are given.

    Raises:
        InputError: If there is one.
    """
    if others := [name for name in given if name not in APPLICABLE]:
        raise InputError(
            f"`{others[0]}` does not apply to {place}: expected a run that trains on the samples of each task for "
            "epochs, found one that learns a stream of single samples. Is it another folder? Leave the option out, or "
            "name another run."
        )


def is_slow_regression(place: str | Path) -> bool:
    """Say whether there is a run of slowly changing regression."""
    from ntkgen.continual.record import read_config

    config = read_config(folder_of(place))
    return config is not None and "algorithms" in config["settings"]
