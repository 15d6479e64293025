"""Tables of runs that learn a stream: scores with means and standard errors over seeds, as text, Markdown and CSV."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkgen.continual.metrics.streaming import SCORES, Scores, scores
from ntkgen.continual.streaming.labels import labels_of

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
}
FORMS = ("text", "markdown", "csv")


@dataclass(frozen=True)
class Row:
    """The scores of one learner with one combination of options.

    Attributes:
        name: Name of the learner, and what tells the combination from others; see `labels`.
        scores: The scores, one number per seed each.
    """

    name: str
    scores: Scores

    def mean(self, score: str) -> float:
        """Mean over the seeds; NaN if a network has diverged."""
        return float(np.mean(getattr(self.scores, score)))

    def standard_error(self, score: str) -> float:
        """Standard error of the mean, σ̂ / √seeds; NaN with one seed."""
        values = getattr(self.scores, score)
        return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with None for NaN."""
        numbers = {
            score: {
                "mean": _plain(self.mean(score)),
                "standard_error": _plain(self.standard_error(score)),
                "values": [_plain(value) for value in getattr(self.scores, score).tolist()],
            }
            for score in SCORES
        }
        return {"name": self.name, **numbers}


def rows_of(found: "xarray.Dataset") -> list[Row]:
    """Compute the scores of every combination of a run; see `read_stream` and `read_streams`."""
    return [
        Row(
            name,
            scores(
                *(
                    np.asarray(found[each].isel(combination=index).transpose("bin", "seed").values)
                    for each in ("loss", "accuracy", "plasticity")
                )
            ),
        )
        for index, name in enumerate(labels_of(found))
    ]


def best_row(rows: Sequence[Row], score: str = "average_accuracy") -> Row:
    """Choose the row with the largest mean score, or with the smallest Lipschitz number. NaN loses.

    A network that has diverged has NaN, so a combination with one is never the best unless all are.
    """
    sign = -1 if score in {"lipschitz", "forgetting", "largest_drop", "plasticity_change"} else 1
    return max(rows, key=lambda row: (not math.isnan(row.mean(score)), sign * np.nan_to_num(row.mean(score))))


def table(rows: Sequence[Row], form: str = "text") -> list[str]:
    """Write scores as lines: mean ± standard error over the seeds."""
    if form == "csv":
        return _csv(rows)
    cells = [["", *(TITLES[score] for score in SCORES)]]
    cells += [[row.name, *(_cell(row, score) for score in SCORES)] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    padded = [
        [text.ljust(width) if not column else text.rjust(width) for column, (text, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    if form == "markdown":
        rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
        return [f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])]
    return ["  " + "  ".join(line) for line in padded]


def _csv(rows: Sequence[Row]) -> list[str]:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", *(f"{score}{end}" for score in SCORES for end in ("", "_standard_error"))])
    for row in rows:
        pairs = ((row.mean(score), row.standard_error(score)) for score in SCORES)
        writer.writerow([row.name, *(number for pair in pairs for number in pair)])
    return file.getvalue().splitlines()


def _cell(row: Row, score: str) -> str:
    mean, error = row.mean(score), row.standard_error(score)
    if math.isnan(mean):
        return "diverged" if score == "average_accuracy" else "–"
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
