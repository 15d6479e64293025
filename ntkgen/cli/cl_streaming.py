"""`ntkgen cl-run --stream label-permuted` or `input-permuted`: learners of single samples, many networks at once."""

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkgen.cli.cl_regression import SAMPLES, one_width
from ntkgen.cli.cl_stream_results import show_scores
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.optim.names import OPTIONS
from ntkgen.continual.settings_file import read_settings
from ntkgen.continual.streaming.aliases import STREAM_ALIASES, own_name, with_own_names, without_aliases
from ntkgen.continual.streaming.settings import LEARNER_SETTINGS, OPTION_NAMES, StreamingSettings, without_defaults
from ntkgen.continual.streams.permuted import STREAMS
from ntkgen.errors import InputError, UnknownNameError
from ntkgen.files.place import folder_of
from ntkgen.progress import Report, ignore_report

if TYPE_CHECKING:
    import xarray

    from ntkgen.continual.streaming.run import StreamData

# Parameters of `ntkgen cl-run` that are no settings of a run.
OF_COMMAND = ("compat", "grid", "config", "data_dir", "out", "device", "as_json", "quiet", "dry_run")
# Settings that have defaults of their own for others.
OWNERS_OF_DEFAULTS = {"method", "stream", "compat"}


def streaming_settings(options: Mapping[str, Any], given: Collection[str]) -> StreamingSettings | None:
    """Combine a file of settings and options, if one of them asks for a permuted stream; else None.

    Args:
        options: The settings, and the file.
        given: The names of all options that are given.

    Raises:
        InputError: If an option belongs to other streams, or has a wrong value.
        UnknownNameError: If there is no such learner, data set or option.
    """
    config = options["config"]
    values = {} if config is None else with_own_names(read_settings(config), str(config))
    empty: tuple[Any, ...] = (None, ())
    chosen = {name: value for name, value in options.items() if value not in empty and name != "config"}
    if OWNERS_OF_DEFAULTS & chosen.keys():
        values = without_defaults(values)
    values |= chosen
    if values.get("stream") not in {*STREAMS, *STREAM_ALIASES}:
        return None
    values = without_aliases(values)
    _require_applicable(values, given)
    grid = grid_of(values.pop("grid", ()))
    _require_one_place(grid, chosen)
    values |= grid
    width = values.get("width")
    if isinstance(width, list | tuple):
        values["width"] = one_width(width, "A permuted stream")
    return StreamingSettings.from_json(values)


def grid_of(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read values of options, such as ``sigma=0.001,0.01``.

    >>> grid_of(["lr=0.01,0.1", "sigma=1"])
    {'learning_rate': (0.01, 0.1), 'sigma': (1.0,)}

    Raises:
        InputError: If a text is not of this form.
        UnknownNameError: If there is no such option.
    """
    options = {name: OPTIONS[OPTION_NAMES.get(name, name)] for name in LEARNER_SETTINGS}
    numbers = [name for name, option in options.items() if option.kind is float and not option.choices]
    found: dict[str, tuple[float, ...]] = {}
    for text in texts:
        written, _, values = text.partition("=")
        name = own_name(written)
        if name in options and name not in numbers:
            raise InputError(
                f"`grid` has {text!r}: expected an option that is a number, found {written}, whose values are words or "
                "yes and no. Are they to be compared? Write them to a file for `ntkgen cl-grid FILE`, where words may "
                "be lists too."
            )
        if name not in numbers:
            raise UnknownNameError("option of a grid", written, [*OPTION_NAMES.values(), *numbers])
        if name in found:
            raise InputError(
                f"`grid` has {written} twice: expected all its values together, found {text!r} beside others. Was it "
                "copied? Write NAME=VALUE,VALUE once."
            )
        try:
            found[name] = tuple(float(value) for value in values.split(","))
        except ValueError as error:
            raise InputError(
                f"`grid` has {text!r}: expected NAME=VALUE,VALUE with numbers, such as sigma=0.001,0.01. Is a comma or "
                "an equals sign missing? Correct it."
            ) from error
    return found


def run_streaming(
    settings: StreamingSettings, data_dir: Path | None, out: str, device: str, *, as_json: bool, quiet: bool
) -> int:
    """Run it, and print the scores."""
    from ntkgen.cli.progress import progress_bars

    began = time.monotonic()
    with progress_bars("", quiet=quiet) as report:
        found = learn_stream(settings, data_dir, out, device, report)
    show_scores(out, found, as_json=as_json, seconds=round(time.monotonic() - began, 3))
    return 0


def learn_stream(
    settings: StreamingSettings, data_dir: Path | None, out: str, device: str, report: Report = ignore_report
) -> "xarray.Dataset":
    """Load the data, and learn or continue; see `run_stream`."""
    from ntkgen.continual.streaming.run import run_stream
    from ntkgen.engine.machine import choose_device

    data = load_stream_data(settings, data_dir)
    return run_stream(settings, data, folder_of(out, fsync=False), choose_device(device), report)


def load_stream_data(settings: StreamingSettings, data_dir: Path | None) -> "StreamData":
    """Load the data of a run. Images keep their own size for networks of the zoo that fit it.

    Raises:
        UnknownNameError: If there is no such data set.
        DataError: If its files are missing.
        InputError: If tasks are to be evaluated on test samples, and there are too few or none.
    """
    from ntkgen.continual.plan import normalised
    from ntkgen.continual.streaming.run import StreamData
    from ntkgen.data import dataset
    from ntkgen.training import zoo

    if settings.held_out and not dataset.has_test_split(settings.dataset):
        raise InputError(
            f"`held_out` needs test samples: expected a data set with a split of them, found {settings.dataset}, which "
            "has none. Was another data set meant? Leave `held_out` out, or use a data set such as mnist or cifar10."
        )
    splits = [dataset.load(settings.dataset, data_dir=data_dir)]
    if settings.held_out:
        splits.append(dataset.load(settings.dataset, data_dir=data_dir, split="test"))
    if zoo.image_options(settings.model, tuple(splits[0].images.shape[1:])):
        splits = [dataclasses.replace(split, zoo_sized=False) for split in splits]
    data = StreamData(*normalised(splits, settings.normalise))
    data.require_held_out(settings.held_out)
    return data


def require_no_stream_options(given: Collection[str]) -> None:
    """Refuse options that only streams of single samples have, for another stream.

    Raises:
        InputError: If there is one.
    """
    own = {field.name for field in dataclasses.fields(StreamingSettings)} | {"grid"}
    others = {field.name for field in dataclasses.fields(RunSettings)} | {SAMPLES, "seeds", "compat"}
    if wrong := [name for name in given if name in own - others]:
        raise InputError(
            f"`{wrong[0]}` applies to streams of single samples alone: expected `stream` {' or '.join(STREAMS)}, found "
            "another one. Was `stream` forgotten? Give it, or leave the option out."
        )


def _require_applicable(values: Collection[str], given: Collection[str]) -> None:
    """Refuse settings and options that belong to other streams. Unknown names in a file are refused later.

    Raises:
        InputError: If there is one.
    """
    own = [field.name for field in dataclasses.fields(StreamingSettings)]
    of_others = {field.name for field in dataclasses.fields(RunSettings)} | set(given)
    if wrong := [name for name in (*given, *values) if name in of_others and name not in {*own, *OF_COMMAND}]:
        raise InputError(
            f"`{wrong[0]}` has no effect on a stream of single samples: expected a setting of such a stream, found one "
            "of runs that train on each task for epochs. Was it copied from another command? Leave it out. A stream "
            f"has {', '.join(f'`{name}`' for name in own)}."
        )


def _require_one_place(grid: Collection[str], chosen: Collection[str]) -> None:
    """Refuse an option that is given beside a grid of its values.

    Raises:
        InputError: If there is one.
    """
    if both := [name for name in grid if name in chosen]:
        raise InputError(
            f"`{both[0]}` is given twice: expected one value, or several in `grid`, found both. Was the option "
            "replaced by the grid? Leave one of the two out."
        )
