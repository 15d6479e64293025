"""What a run has logged of each epoch: training, validation, and the epoch that was chosen."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Epochs:
    """The epochs of a run, in their order.

    Attributes:
        lines: What is logged at the end of each epoch: ``iteration``, ``task``, ``epoch``, ``loss``, ``accuracy``,
            ``window_loss``, ``window_accuracy``, and with ``select`` best ``validation_loss``, ``validation_accuracy``.
        selected: What is logged when the best epoch of a task is restored: ``task``, its ``epoch``, and ``accuracy``
            and ``loss`` of the last epoch on every task.
    """

    lines: list[dict[str, Any]]
    selected: list[dict[str, Any]]

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Epochs":
        """Read the lines of a log."""
        found = [json.loads(line) for line in lines]
        chosen = ([line for line in found if line["event"] == event] for event in ("epoch", "epoch selected"))
        return cls(*chosen)

    def values(self, name: str) -> FloatArray:  # (epochs,)
        """Return one number of each epoch; NaN where it was not measured.

        >>> Epochs([{"loss": 2.0}, {"loss": 1.0, "validation_loss": 3.0}], []).values("validation_loss").tolist()
        [nan, 3.0]
        """
        return np.array([line.get(name, np.nan) for line in self.lines], np.float64)

    def windows(self, name: str) -> FloatArray:  # (windows of all epochs,)
        """Return the means over the windows of all epochs; `name` is ``loss`` or ``accuracy``."""
        return np.array([value for line in self.lines for value in line[f"window_{name}"]], np.float64)
