"""A run of slowly changing regression: learn block after block, measure bin after bin, and commit."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray

from ntkgen.continual.checkpoint import read_checkpoint, saved
from ntkgen.continual.record import CHECKPOINT
from ntkgen.continual.slow_regression.record import BIN, DEAD_SLOPE, open_bins, read_bins
from ntkgen.continual.slow_regression.settings import RegressionSettings
from ntkgen.continual.slow_regression.stack import Stack, Trace
from ntkgen.continual.streams.regression import BLOCK
from ntkgen.errors import DivergedError
from ntkgen.files.folder import Folder
from ntkgen.files.lock import write_lock
from ntkgen.jacobian.precision import flushed_denormals
from ntkgen.progress import Report, ignore_report

# Seconds after which a checkpoint is written.
COMMIT_SECONDS = 5.0


class RegressionRun:
    """A run at work: its networks, its record, where it is, and what it has measured of the bin so far."""

    def __init__(self, settings: RegressionSettings, folder: Folder) -> None:
        self.settings = settings
        self.folder = folder
        self.stack = Stack(settings)
        self.bins = open_bins(folder, settings)
        self.sample = 0
        rows = self.stack.network.hidden.shape[1]
        self._measured: dict[str, npt.NDArray[Any]] = {
            "squares": np.zeros(rows),  # sum of squared errors
            "slopes": np.zeros((settings.units, rows), np.float32),  # largest derivatives
            "replaced": np.zeros(rows, np.int64),  # units that were replaced before this bin
        }
        self._committed = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint was written some time ago."""
        return time.monotonic() - self._committed > COMMIT_SECONDS

    @property
    def note(self) -> str:
        """Where the run is, for the progress."""
        return f"bin {self.sample // self.settings.bin_size}/{self.settings.num_bins}"

    def resume(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Continue from the newest checkpoint, and drop later bins; without one begin anew."""
        if checkpoint is not None:
            self.sample = checkpoint["position"]["sample"]
            self.stack.load_state({part: _arrays(checkpoint[part]) for part in self.stack.state()})
            self._measured.update(_arrays(checkpoint["measured"]))
        self.bins.truncate(BIN, self.sample // self.settings.bin_size)

    def commit(self) -> None:
        """Write the newest state."""
        state: dict[str, Any] = {part: _tensors(arrays) for part, arrays in self.stack.state().items()}
        state["measured"] = _tensors(self._measured)
        self.folder.write(CHECKPOINT, saved({"position": {"sample": self.sample}, **state}))
        self._committed = time.monotonic()

    def learn_block(self) -> None:
        """Learn up to the end of the block or of the bin, and measure.

        Raises:
            DivergedError: If an error is not finite.
        """
        size = self.settings.bin_size
        stop = min(self.sample + BLOCK - self.sample % BLOCK, self.sample + size - self.sample % size)
        trace = self.stack.learn(self.sample, stop)
        self._require_finite(trace)
        self.sample = stop
        self._measured["squares"] += sums(np.square(trace.errors, dtype=np.float64))
        np.maximum(self._measured["slopes"], np.abs(trace.slopes).max(0), out=self._measured["slopes"])
        if stop % size == 0:
            self._end_bin()

    def _end_bin(self) -> None:
        measured, settings, parameters = self._measured, self.settings, self.stack.network.parameters
        replaced = np.zeros_like(measured["replaced"])
        if self.stack.replacement is not None:
            replaced[self.stack.replacement.rows] = self.stack.replacement.replaced
        values = {
            "error": measured["squares"] / settings.bin_size,
            "dead_units": (measured["slopes"] < DEAD_SLOPE).sum(0),
            "weight_magnitude": sums(np.abs(parameters)) / len(parameters),
            "replaced_units": replaced - measured["replaced"],
        }
        shape = (len(settings.algorithms), len(settings.seeds))
        found = {name: value.reshape(shape) for name, value in values.items()}
        self.bins.append(BIN, {**found, "samples": self.sample})
        measured["squares"][...], measured["slopes"][...], measured["replaced"][...] = 0, 0, replaced

    def _require_finite(self, trace: Trace) -> None:
        """Refuse errors that are not finite.

        Raises:
            DivergedError: If there are any.
        """
        wrong = np.argwhere(~np.isfinite(trace.errors))
        if not len(wrong):
            return
        sample, row = wrong[0]
        algorithm, seed = divmod(int(row), len(self.settings.seeds))
        raise DivergedError(
            f"The training diverged at sample {self.sample + sample}: expected finite errors, found "
            f"{trace.errors[sample, row]} with {self.settings.algorithms[algorithm]} and seed "
            f"{self.settings.seeds[seed]}. Is the learning rate of {self.settings.learning_rate:g} too high? Run it "
            "with a lower `learning_rate` and another `out`. What is recorded so far is kept."
        )


def run_regression(settings: RegressionSettings, folder: Folder, report: Report = ignore_report) -> xarray.Dataset:
    """Learn the stream of every seed with every algorithm, from the beginning or from the newest checkpoint.

    Everything is recorded below the folder. A run that was killed ends with the same bytes on a CPU.

    Returns:
        What was measured; see `read_bins`.

    Raises:
        FingerprintError: If there is a run with other settings.
        StoreLockedError: If another process writes the run.
        DivergedError: If an error is not finite.
    """
    folder.require_writable()
    with write_lock(folder), flushed_denormals():
        data = folder.read(CHECKPOINT)
        run = RegressionRun(settings, folder)
        run.resume(None if data is None else read_checkpoint(data, str(folder)))
        while run.sample < settings.num_samples:
            run.learn_block()
            if run.is_due or run.sample == settings.num_samples:
                run.commit()
            report("training", run.sample, settings.num_samples, run.note)
        run.bins.sync()
    return read_bins(folder)


def sums(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:  # (…, rows) -> (rows,)
    """Add up each row in float64, in an order that does not depend on the number of rows."""
    return np.asarray(np.ascontiguousarray(values.T, np.float64).sum(-1), np.float64)


def _tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: values.numpy() for name, values in tensors.items()}
