"""Several runs of streams together: notes on what is not finished and on what cannot be compared.

This module does not import torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntkgen.continual.record import CHECKPOINT
from ntkgen.continual.streaming.bins import notes_on_bins
from ntkgen.continual.streaming.position import position_of
from ntkgen.continual.streaming.record import BIN
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    import xarray

# The attribute of a data set with the folder of its run.
PLACE = "place"
# What must be equal for scores to be of the same problem.
PROBLEM: Mapping[str, Callable[[StreamingSettings], Any]] = {
    "stream": lambda settings: settings.stream,
    "dataset": lambda settings: settings.dataset,
    "model": lambda settings: settings.model,
    "width": lambda settings: settings.width or "default",
    "num_samples": lambda settings: settings.num_samples,
    "samples_per_task": lambda settings: settings.permuted.period,
    "compounding": lambda settings: settings.permuted.is_compounding,
    "normalise": lambda settings: settings.normalise,
    "bins": lambda settings: settings.bins,
    "seeds": lambda settings: " ".join(map(str, settings.seeds)),
}
UNPAIRED = "seeds"


@dataclass(frozen=True)
class Notes:
    """What is to be known of several runs before they are compared.

    Attributes:
        hindering: Why the best one cannot be named.
        others: Further notes.
    """

    hindering: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """All of them."""
        return [*self.hindering, *self.others]


def settings_of(run: "xarray.Dataset") -> StreamingSettings:
    """Read the settings of a run; see `read_stream`."""
    return StreamingSettings.from_json(run.attrs["settings"])


def notes_on(runs: Sequence["xarray.Dataset"]) -> Notes:
    """Say which runs are not finished, which samples scores leave out, and what differs beside the learners."""
    settings = [settings_of(run) for run in runs]
    hindering: list[str] = []
    others: list[str] = []
    for run, each in zip(runs, settings, strict=True):
        if run.sizes[BIN] < len(each.ends):
            done = int(run.samples[-1]) if run.sizes[BIN] else 0
            place = run.attrs.get(PLACE, each.method)
            hindering.append(f"{place} is not finished: {_progress(run.attrs.get(PLACE), done, each.num_samples)}")
    own = [tuple(notes_on_bins(each.num_samples, each.permuted.period, each.bins)) for each in settings]
    for run, each, notes in zip(runs, settings, own, strict=True):
        named = "" if len(set(own)) == 1 else f"{run.attrs.get(PLACE, each.method)}: "
        others += [f"{named}{note}" for note in notes]
    others = list(dict.fromkeys(others))
    for name, value in PROBLEM.items():
        values = [str(found) for found in dict.fromkeys(value(each) for each in settings)]
        if len(values) > 1:
            (others if name == UNPAIRED else hindering).append(f"the runs differ in {name}: {'; '.join(values)}")
    return Notes(tuple(hindering), tuple(others))


def _progress(place: str | None, done: int, total: int) -> str:
    """Say how far a run is: its checkpoint may be later than the last bin, which scores end with."""
    if place is None or not (folder := folder_of(place)).has(CHECKPOINT):
        return f"{done:,} of {total:,} samples are learnt"
    position = position_of(folder)
    if position is None:
        return f"scores are of {done:,} of {total:,} samples; the run itself may be further"
    scored = "" if position == done else f", and scores are of the first {done:,}"
    return f"{position:,} of {total:,} samples are learnt{scored}"
