"""Loss and accuracy of the batches of an epoch, while it is trained, and the time that it takes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

# One mean is kept for as many iterations, as in the published logs of Dohare et al. (2024, Nature 632).
WINDOW = 25


class Stopwatch:
    """The seconds that each epoch and each evaluation took. They are no part of what a resumed run reproduces."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in ("epoch", "evaluation", "validation")}
        self._began = time.monotonic()

    def begin_epoch(self) -> None:
        """Begin to measure an epoch, or what is left of it."""
        self._began = time.monotonic()

    def end_epoch(self) -> None:
        """End the measurement of an epoch."""
        self.seconds["epoch"].append(round(time.monotonic() - self._began, 6))

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measure a block."""
        began = time.monotonic()
        yield
        self.seconds[name].append(round(time.monotonic() - began, 6))

    def state_dict(self) -> dict[str, Any]:
        """Return all seconds so far."""
        return {name: list(values) for name, values in self.seconds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self.seconds = {name: list(values) for name, values in state.items()}


class TrainingLog:
    """The loss and the accuracy of every batch of the epoch in training, before its step.

    They are those of the network in training mode: augmented samples, batch norm with the statistics of the batch.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.replaced = 0

    def add(self, loss: float, accuracy: float, replaced: int = 0) -> None:
        """Add a batch, and the number of units that were replaced after its step."""
        self.losses.append(loss)
        self.accuracies.append(accuracy)
        self.replaced += replaced

    @property
    def last_window(self) -> float | None:
        """The mean accuracy over the window that has just ended; None if none has."""
        return None if len(self.accuracies) % WINDOW else _mean(self.accuracies[-WINDOW:])

    def finish(self) -> dict[str, Any]:
        """Return the means over the epoch and over each `WINDOW` of its iterations, and begin the next one.

        >>> log = TrainingLog()
        >>> for loss in (1.0, 3.0):
        ...     log.add(loss, 0.5)
        >>> log.finish()
        {'loss': 2.0, 'accuracy': 0.5, 'replaced': 0, 'window_loss': [2.0], 'window_accuracy': [0.5]}
        """
        found = {"loss": _mean(self.losses), "accuracy": _mean(self.accuracies), "replaced": self.replaced}
        windows = {"window_loss": _windows(self.losses), "window_accuracy": _windows(self.accuracies)}
        self.losses, self.accuracies, self.replaced = [], [], 0
        return found | windows

    def state_dict(self) -> dict[str, Any]:
        """Return the batches of the epoch so far."""
        return {"losses": list(self.losses), "accuracies": list(self.accuracies), "replaced": self.replaced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self.losses, self.accuracies = list(state["losses"]), list(state["accuracies"])
        self.replaced = int(state["replaced"])


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _windows(values: list[float]) -> list[float]:
    """Compute the mean of each `WINDOW` of values; the last one may be shorter."""
    return [_mean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]
