"""A run that learns a stream: learn block after block, measure bin after bin, and commit."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray
from torch import Tensor

from ntkgen.continual.chance import generator_of, seed_of
from ntkgen.continual.checkpoint import read_checkpoint, saved
from ntkgen.continual.optim import UPGD
from ntkgen.continual.record import CHECKPOINT
from ntkgen.continual.streaming.architecture import require_same_networks
from ntkgen.continual.streaming.bins import Sums, measured_samples
from ntkgen.continual.streaming.build import Members, make_learner, make_members
from ntkgen.continual.streaming.kernels import StreamKernels, require_possible_kernels
from ntkgen.continual.streaming.logs import write_logs
from ntkgen.continual.streaming.measures import EACH_STEP, THINNED
from ntkgen.continual.streaming.record import (
    BIN,
    TASK,
    open_bins,
    read_stream,
    require_parameters,
    require_recorded,
)
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streaming.stopping import held_back_signals
from ntkgen.continual.streaming.utilities import write_utilities
from ntkgen.continual.streams.permuted import PermutedStream
from ntkgen.continual.streams.tasks import IntArray
from ntkgen.data.dataset import Dataset
from ntkgen.errors import InputError
from ntkgen.files.folder import Folder
from ntkgen.files.lock import write_lock
from ntkgen.progress import Report, ignore_report
from ntkgen.training.loop import training_mode

# Seconds after which a checkpoint is written.
COMMIT_SECONDS = 10.0
# Samples of all seeds that are fetched at once.
FETCHED = 4096


@dataclass(frozen=True, eq=False)
class StreamData:
    """The data of a run: the split that is learnt, and the test split if tasks are evaluated on it."""

    train: Dataset
    test: Dataset | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What the run depends on beside its settings."""
        return {"data": self.train.fingerprint()}

    def require_held_out(self, count: int) -> None:
        """Require as many test samples as each task is evaluated on.

        Raises:
            InputError: If there are fewer.
        """
        found = 0 if self.test is None else self.test.num_samples
        if count > found:
            raise InputError(
                f"`held_out` is {count:,}: expected at most as many as {self.train.name} has test samples, found "
                f"{found:,} of them. Was the number meant for another data set? Give a smaller one."
            )


class StreamingRun:
    """A run at work: its networks, its record, where it is, and what it has measured of the bin so far."""

    def __init__(self, settings: StreamingSettings, data: StreamData, folder: Folder, device: torch.device) -> None:
        data.require_held_out(settings.held_out)
        require_possible_kernels(settings, data.train.num_classes)
        self.settings = settings
        self.data = data
        self.ends = settings.ends
        self.folder = folder
        self.device = device
        labels = data.train.labels.numpy()
        num_pixels = math.prod(data.train.inputs(torch.tensor([0])).shape[1:])
        self.streams = [PermutedStream(settings.permuted, labels, num_pixels, seed) for seed in settings.seeds]
        self.members: Members = make_members(settings, data.train, device)
        self.learner = make_learner(settings, self.members)
        self.bins = open_bins(folder, settings, data.facts)
        self.sums = Sums([*EACH_STEP, *THINNED], settings.num_members)
        self.sample = 0
        self.kernels = StreamKernels(settings, data.train, self.members.network, folder, device)
        self._committed = time.monotonic()

    # where it is -----------------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint was written some time ago."""
        return time.monotonic() - self._committed > COMMIT_SECONDS

    @property
    def task(self) -> int:
        """The task of the next sample."""
        return self.sample // self.settings.permuted.period

    @property
    def note(self) -> str:
        """Where the run is, for the progress."""
        return f"task {min(self.task + 1, self.settings.num_tasks)}/{self.settings.num_tasks}"

    def resume(self, checkpoint: Mapping[str, Any] | None) -> None:
        """Continue from the newest checkpoint, and drop what is later; without one begin anew.

        Raises:
            FingerprintError: If the checkpoint is of other networks.
            StoreError: If something is missing.
        """
        if checkpoint is not None:
            require_same_networks(self.folder, checkpoint, self.learner.network)
            self.sample = checkpoint["position"]["sample"]
            self.learner.network.load(checkpoint["model"])
            self.learner.optimizer.load_state_dict(checkpoint["optimizer"])
            for generator, state in zip(self.members.generators, checkpoint["generators"], strict=True):
                generator.set_state(state)
            for name in self.sums.sums:
                self.sums.sums[name] = checkpoint["sums"][name].numpy()
            self.sums.counts = dict(checkpoint["counts"])
        num_bins = sum(end <= self.sample for end in self.ends)
        if checkpoint is not None:
            self._require_recorded(num_bins)
        self.bins.truncate(BIN, num_bins)
        if self.settings.held_out:
            self.bins.truncate(TASK, self._finished_tasks())
        self.kernels.truncate(self.sample if checkpoint is not None else -1)

    def _require_recorded(self, num_bins: int) -> None:
        """Require that what was recorded before the checkpoint is there, before anything is changed.

        Raises:
            StoreError: If something is missing or damaged.
        """
        require_parameters(self.folder, self.settings, self.sample)
        require_recorded(self.folder, self.bins, BIN, num_bins)
        if self.settings.held_out:
            require_recorded(self.folder, self.bins, TASK, self._finished_tasks())
        self.kernels.require(self._finished_tasks())

    def commit(self) -> None:
        """Write the newest state."""
        state = {
            "position": {"sample": self.sample},
            "model": {name: values.detach() for name, values in self.learner.network.parameters.items()},
            "architecture": self.learner.network.architecture,
            "optimizer": self.learner.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.members.generators],
            "sums": {name: torch.from_numpy(values) for name, values in self.sums.sums.items()},
            "counts": self.sums.counts,
            "threads": torch.get_num_threads(),
        }
        self.folder.write(CHECKPOINT, saved(state))
        self._committed = time.monotonic()

    # what it does ----------------------------------------------------------------------------------------------------

    def learn_block(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Learn up to the end of a block, of the bin or of the task, and measure what ends there.

        Args:
            is_stopped: Says after each sample whether the block is to end there.
        """
        if self.sample == 0:
            self.kernels.record(self.learner.network, 0, -1)
        self.learn_up_to(self._next_stop(), is_stopped)
        settings = self.settings
        task = (self.sample - 1) // settings.permuted.period
        if self.sample in self.ends:
            self._end_bin()
        if self.sample % settings.permuted.period == 0 or self.sample == settings.num_samples:
            self._end_task(task)
        # the parameters at the end are written after the last checkpoint, which is missed if it is removed
        if settings.save_every and self.sample % settings.save_every == 0 and self.sample < settings.num_samples:
            self.write_parameters()

    def learn_up_to(self, stop: int, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Learn the next samples, all of one bin, and add up what is measured."""
        start = self.sample
        x, targets = self._samples(start, stop)
        measured = [each - start for each in measured_samples(start, stop, self.settings.stats_every, self.ends)]
        found = self.learner.learn(x, targets, measured, is_stopped)
        for name, values in found.items():
            self.sums.add(name, values)
        self.sample = start + len(found["loss"])

    def write_results(self) -> None:
        """Write what is known at the end of a run, from its newest state."""
        for series in (self.bins, self.kernels):
            series.sync()
        self._write_utilities()
        self.write_parameters()

    def write_parameters(self) -> None:
        """Write the parameters of all networks, after the record of what was measured."""
        write_logs(self.folder)
        parameters = {name: values.detach() for name, values in self.learner.network.parameters.items()}
        self.folder.write(f"models/sample{self.sample}.pt", saved(parameters))

    def _write_utilities(self) -> None:
        """Write the scaled utilities of a learner that has them."""
        optimizer, names = self.learner.optimizer, list(self.learner.network.trainable)
        if isinstance(optimizer, UPGD):
            found = optimizer.scaled_utilities()
            write_utilities(self.folder, {names[position]: each.cpu().numpy() for position, each in found.items()})

    def _next_stop(self) -> int:
        """Where the next block ends."""
        settings, sample = self.settings, self.sample
        length = max(1, FETCHED // len(settings.seeds))
        stops = [sample + length - sample % length, settings.num_samples]
        stops += [every - sample % every + sample for every in (settings.permuted.period, settings.save_every) if every]
        index = bisect_right(self.ends, sample)
        return min(*stops, *self.ends[index : index + 1])

    def _samples(self, start: int, stop: int) -> tuple[Tensor, Tensor]:  # (steps, seeds, …), (steps, seeds)
        """Fetch samples of all seeds, all of one task."""
        inputs, targets = [], []
        for stream in self.streams:
            (segment,) = stream.segments(start, stop)
            inputs.append(self._permuted(stream, segment.task, self.data.train, segment.ids))
            targets.append(torch.from_numpy(stream.targets(segment.ids, segment.task)))
        return torch.stack(inputs, 1).to(self.device), torch.stack(targets, 1).to(self.device)

    def _permuted(self, stream: PermutedStream, task: int, data: Dataset, ids: IntArray) -> Tensor:
        """Compute the inputs that a stream shows in a task."""
        x = data.inputs(torch.from_numpy(ids))
        pixels = stream.pixel_map(task)
        return x if pixels is None else x.flatten(1)[:, torch.from_numpy(pixels)].reshape(x.shape)

    def _end_bin(self) -> None:
        shape = (len(self.settings.combinations), len(self.settings.seeds))
        found = {name: values.reshape(shape) for name, values in self.sums.means().items()}
        self.bins.append(BIN, {**found, "samples": self.sample})

    def _end_task(self, task: int) -> None:
        """Evaluate, compute kernels, and begin the next task with new networks, as the settings say."""
        if self.settings.held_out:
            shape = (len(self.settings.combinations), len(self.settings.seeds))
            self.bins.append(TASK, {"held_out_accuracy": self._held_out_accuracy(task).reshape(shape)})
        self.kernels.record(self.learner.network, self.sample, task)
        if self.settings.restarts and self.sample < self.settings.num_samples:
            self.learner.network.load(self.members.drawn(task + 1).parameters)
            self.learner.optimizer.state.clear()

    def _held_out_accuracy(self, task: int) -> npt.NDArray[np.float64]:  # (members,)
        assert self.data.test is not None
        labels = self.data.test.labels.numpy()
        found = np.empty(self.settings.num_members)
        for first, stream in enumerate(self.streams):
            rng = generator_of(stream.seed, "probe", task)
            ids = rng.choice(len(labels), self.settings.held_out, replace=False)
            x = self._permuted(stream, task, self.data.test, ids).to(self.device)
            label_map = stream.label_map(task)
            wanted = labels[ids] if label_map is None else label_map[labels[ids]]
            for member in range(first, len(found), len(self.streams)):  # the combinations of a seed share the samples
                outputs = self.learner.network.outputs(member, x)
                is_right = outputs.argmax(1).cpu().numpy() == wanted
                found[member] = is_right.mean() if outputs.isfinite().all() else np.nan
        return found

    def _finished_tasks(self) -> int:
        is_over = self.sample == self.settings.num_samples
        return self.settings.num_tasks if is_over else self.sample // self.settings.permuted.period


def run_stream(
    settings: StreamingSettings,
    data: StreamData,
    folder: Folder,
    device: torch.device,
    report: Report = ignore_report,
) -> xarray.Dataset:
    """Learn the stream of every seed with every combination of hyper-parameters, or continue where a run has ended.

    Everything is recorded below the folder. A run that was killed ends with the same bytes on a CPU. Ctrl-C and SIGTERM
    act after the sample in progress, and what was learnt is kept. A network that diverges has NaN from then on, and the
    others go on.

    Returns:
        What was measured; see `read_stream`.

    Raises:
        FingerprintError: If there is a run with other settings, other data or another network.
        StoreError: If files of the run are missing or damaged. None of them is changed.
        StoreLockedError: If another process writes the run.
        InputError: If there are too few test samples, or the output map of the kernels is not possible.
        ModelError: If the network does not learn from single samples, or has no curvature for the learner.
    """
    folder.require_writable()
    with write_lock(folder):
        stored = folder.read(CHECKPOINT)
        checkpoint = None if stored is None else read_checkpoint(stored, str(folder))
        threads = torch.get_num_threads() if checkpoint is None else int(checkpoint["threads"])
        with training_mode(device, seed_of(settings.seeds[0], "noise"), threads):
            run = StreamingRun(settings, data, folder, device)
            run.resume(checkpoint)
            del stored, checkpoint
            with held_back_signals() as is_stopped:
                while run.sample < settings.num_samples and not is_stopped():
                    run.learn_block(is_stopped)
                    if run.is_due or is_stopped() or run.sample == settings.num_samples:
                        run.commit()
                    report("training", run.sample, settings.num_samples, run.note)
            run.write_results()
    return read_stream(folder)
