"""Tables of runs that learn a stream: scores with means and standard errors over seeds, as text, Markdown and CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.continual.metrics.streaming import SCORES, FloatArray, Scores, scores
from ntkgen.continual.streaming.bins import whole_bins
from ntkgen.continual.streaming.comparing import settings_of
from ntkgen.continual.streaming.labels import labels_of
from ntkgen.continual.streaming.record import BIN, COMBINATION, SEED, TASK

if TYPE_CHECKING:
    import xarray

TITLES = {
    "average_accuracy": "accuracy",
    "late_accuracy": "late accuracy",
    "average_plasticity": "plasticity",
    "lipschitz": "Lipschitz",
    "forgetting": "forgetting",
    "largest_drop": "largest drop",
    "plasticity_change": "plasticity change",
    "held_out_accuracy": "held-out accuracy",
}
HELD_OUT = "held_out_accuracy"


@dataclass(frozen=True)
class Row:
    """The scores of one learner with one combination of options.

    Attributes:
        name: Name of the learner, and what tells the combination from others; see `labels`.
        scores: The scores, one number per seed each.
        held_out: Mean over the tasks of the accuracy on test samples at the end of each, one number per seed; None if
            it was not measured.
    """

    name: str
    scores: Scores
    held_out: FloatArray | None = None

    def values(self, score: str) -> FloatArray:
        """A score of each seed; NaN if it was not measured."""
        if score != HELD_OUT:
            return np.asarray(getattr(self.scores, score))
        return np.full_like(self.scores.average_accuracy, np.nan) if self.held_out is None else self.held_out

    def mean(self, score: str) -> float:
        """Mean over the seeds; NaN if a network has diverged."""
        return float(np.mean(self.values(score)))

    def standard_error(self, score: str) -> float:
        """Standard error of the mean, σ̂ / √seeds; NaN with one seed, or if one is not finite."""
        values = self.values(score)
        if len(values) == 1 or not np.isfinite(values).all():
            return math.nan
        return float(np.std(values, ddof=1) / math.sqrt(len(values)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with None for numbers that are not finite."""
        numbers = {
            score: {
                "mean": _plain(self.mean(score)),
                "standard_error": _plain(self.standard_error(score)),
                "values": [_plain(value) for value in self.values(score).tolist()],
            }
            for score in _columns([self])
        }
        return {"name": self.name, **numbers}


def rows_of(*runs: "xarray.Dataset") -> list[Row]:
    """Compute the scores of every combination of some runs; see `read_stream` and `read_streams`.

    A run without a finished task has no rows.
    """
    return [_row(run, index, name) for run in runs for index, name in enumerate(labels_of(run)) if run.sizes[BIN]]


def held_out_of(run: "xarray.Dataset") -> "xarray.DataArray | None":
    """Return the accuracy on test samples at the end of each task, (task, combination, seed), NaN where one diverged.

    The coordinate ``samples`` has the number of samples up to the end of each task. None if it was not measured.
    """
    if HELD_OUT not in run:
        return None
    settings, found = settings_of(run), run[HELD_OUT].transpose(TASK, COMBINATION, SEED)
    ends = np.minimum(settings.permuted.period * np.arange(1, found.sizes[TASK] + 1), settings.num_samples)
    # the loss of the bins that begin before the end of the task
    last = np.searchsorted(run.samples.values, ends).clip(max=run.sizes[BIN] - 1) if run.sizes[BIN] else ends[:0]
    loss = run.loss.transpose(BIN, COMBINATION, SEED).values[last]
    return found.isel({TASK: slice(len(last))}).where(~np.isnan(loss)).assign_coords(samples=(TASK, ends[: len(last)]))


def best_row(rows: Sequence[Row], score: str = "average_accuracy") -> Row:
    """Choose the row with the largest mean score, or with the smallest Lipschitz number. NaN loses.

    A network that has diverged has NaN, so a combination with one is never the best unless all are.
    """
    sign = -1 if score in {"lipschitz", "forgetting", "largest_drop", "plasticity_change"} else 1
    return max(rows, key=lambda row: (not math.isnan(row.mean(score)), sign * np.nan_to_num(row.mean(score))))


def table(rows: Sequence[Row], form: str = "text") -> list[str]:
    """Write scores as lines, ``text``, ``markdown`` or ``csv``: mean ± standard error over the seeds."""
    if form == "csv":
        return _csv(rows)
    columns = _columns(rows)
    cells = [["", *(TITLES[score] for score in columns)]]
    cells += [[row.name, *(_cell(row, score) for score in columns)] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    padded = [
        [text.ljust(width) if not column else text.rjust(width) for column, (text, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    if form == "markdown":
        rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        return [f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])]
    return ["  " + "  ".join(line) for line in padded]


def _row(run: "xarray.Dataset", index: int, name: str) -> Row:
    """Compute the scores of a combination, from whole tasks alone; see `whole_bins`."""
    settings, held_out = settings_of(run), held_out_of(run)
    period = settings.permuted.period
    counted = whole_bins(settings.num_samples, period, settings.bins)[: run.sizes[BIN]]
    own = run.isel({COMBINATION: index, BIN: np.flatnonzero(counted)})
    measures = (own[each].transpose(BIN, SEED).values for each in ("loss", "accuracy", "plasticity"))
    found = scores(*(np.asarray(values) for values in measures))
    if held_out is None or not held_out.sizes[TASK]:
        return Row(name, found)
    whole_tasks = slice(max(1, settings.num_samples // period))
    return Row(name, found, np.asarray(held_out.isel({COMBINATION: index, TASK: whole_tasks}).values.mean(0)))


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """Name the scores of a table."""
    return (*SCORES, HELD_OUT) if any(row.held_out is not None for row in rows) else SCORES


def _csv(rows: Sequence[Row]) -> list[str]:
    file, columns = io.StringIO(), _columns(rows)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", *(f"{score}{end}" for score in columns for end in ("", "_standard_error"))])
    for row in rows:
        pairs = ((row.mean(score), row.standard_error(score)) for score in columns)
        writer.writerow([row.name, *(number for pair in pairs for number in pair)])
    return file.getvalue().splitlines()


def _cell(row: Row, score: str) -> str:
    mean, error = row.mean(score), row.standard_error(score)
    if math.isnan(mean):
        return "diverged" if score == "average_accuracy" else "–"
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
