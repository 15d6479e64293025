"""Names of learners in tables and pictures: the method, and everything in which the combinations of the runs differ.

This module does not import torch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ntkgen.continual.optim.names import OPTIONS
from ntkgen.continual.streaming.record import COMBINATION, read_stream
from ntkgen.continual.streaming.settings import LEARNER_SETTINGS, StreamingSettings

if TYPE_CHECKING:
    import xarray

LABEL = "label"
METHOD = "method"
# Settings that do not change what is learnt, but only what is measured or kept beside it.
BESIDE = {"held_out", "stats_every", "kernels_every", "probe_per_class", "output", "precision", "save_every"}


def read_streams(places: Sequence[str]) -> "list[xarray.Dataset]":
    """Read several runs, with the name of each combination among all of them in the coordinate ``label``.

    Raises:
        StoreError: If there is no run, or it is damaged.
    """
    found = [read_stream(place) for place in places]
    names = labels([StreamingSettings.from_json(run.attrs["settings"]) for run in found], places)
    return [run.assign_coords({LABEL: (COMBINATION, own)}) for run, own in zip(found, names, strict=True)]


def labels_of(run: "xarray.Dataset") -> list[str]:
    """Return the names of the combinations of a run: those of `read_streams`, or else its names by itself."""
    if LABEL in run.coords:
        return [str(name) for name in run[LABEL].values]
    return labels([StreamingSettings.from_json(run.attrs["settings"])], [""])[0]


def labels(runs: Sequence[StreamingSettings], places: Sequence[str]) -> list[list[str]]:
    """Name every combination of every run, after everything that has several values among them.

    What does not change learning is in no name. Runs whose names would be alike are also named after their folders.

    Args:
        runs: The settings of the runs.
        places: Their folders.

    >>> runs = [StreamingSettings(method="pgd", sigma=(0.1, 0.2)), StreamingSettings(method="pgd", sigma=0.1)]
    >>> labels(runs[:1], ["a"])
    [['pgd, sigma 0.1', 'pgd, sigma 0.2']]
    >>> labels(runs, ["grid/a", "grid/b"])
    [['pgd, sigma 0.1, in a', 'pgd, sigma 0.2, in a'], ['pgd, sigma 0.1, in b']]
    """
    facts = [[_facts(settings, options) for options in settings.combinations] for settings in runs]
    differing = _differing([each for own in facts for each in own])
    names = [[_in_words(each, differing) for each in own] for own in facts]
    counts = Counter(name for own in names for name in own)
    ends = _ends_of(places)
    return [
        [f"{name}, in {end}" for name in own] if any(counts[name] > 1 for name in own) else own
        for own, end in zip(names, ends, strict=True)
    ]


def _facts(settings: StreamingSettings, options: Mapping[str, Any]) -> dict[str, Any]:
    """List what describes a combination: the method, the options of the learner that it has, and others of learning."""
    left_out = {METHOD, *LEARNER_SETTINGS, *BESIDE}
    others = {name: value for name, value in settings.to_json().items() if name not in left_out}
    own = {name: options[name] for name in OPTIONS if name in options}
    return {METHOD: settings.method, **own, **{name: _hashable(value) for name, value in others.items()}}


def _differing(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Find the names that have several values among the rows that have them."""
    values: dict[str, set[Any]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


def _in_words(facts: Mapping[str, Any], differing: set[str]) -> str:
    others = [f"{name} {_written(value)}" for name, value in facts.items() if name in differing and name != METHOD]
    return ", ".join([facts[METHOD], *others])


def _written(value: Any) -> str:
    """Write a value of a setting so that two values never look alike.

    >>> [_written(value) for value in (0.01, 1e30, 0.12345678, True, None, (0, 1, 2), (3, 5), 25000)]
    ['0.01', '1e+30', '0.12345678', 'yes', 'default', '0-2', '3 5', '25000']
    """
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        is_range = len(value) > 1 and value == tuple(range(value[0], value[-1] + 1))
        return f"{value[0]}-{value[-1]}" if is_range else " ".join(map(_written, value))
    return str(value)


def _ends_of(places: Sequence[str]) -> list[str]:
    """Leave out the folders that all paths begin with.

    >>> _ends_of(["runs/a/usgd/", "runs/b/usgd"]), _ends_of(["runs/a", "runs/a"])
    (['a/usgd', 'b/usgd'], ['runs/a', 'runs/a'])
    """
    parts = [place.rstrip("/").split("/") for place in places]
    shared = 0
    while all(len(each) > shared and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return ["/".join(each[shared:]) or place for each, place in zip(parts, places, strict=True)]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
