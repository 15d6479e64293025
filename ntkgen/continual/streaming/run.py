"""A run that learns a stream: learn block after block, measure bin after bin, and commit."""

import math
import time
from collections.abc import Mapping
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
from ntkgen.continual.snapshots import Snapshots
from ntkgen.continual.streaming.bins import Sums
from ntkgen.continual.streaming.build import Members, make_learner, make_members
from ntkgen.continual.streaming.logs import write_logs
from ntkgen.continual.streaming.measures import EACH_STEP, THINNED
from ntkgen.continual.streaming.record import BIN, TASK, member_folder, open_bins, read_stream
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streaming.utilities import write_utilities
from ntkgen.continual.streams.permuted import PermutedStream
from ntkgen.continual.streams.tasks import IntArray
from ntkgen.data.dataset import Dataset
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


class StreamingRun:
    """A run at work: its networks, its record, where it is, and what it has measured of the bin so far."""

    def __init__(self, settings: StreamingSettings, data: StreamData, folder: Folder, device: torch.device) -> None:
        self.settings = settings
        self.data = data
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
        self.snapshots = self._open_snapshots()
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
        """Continue from the newest checkpoint, and drop what is later; without one begin anew."""
        if checkpoint is not None:
            self.sample = checkpoint["position"]["sample"]
            self.learner.network.load(checkpoint["model"])
            self.learner.optimizer.load_state_dict(checkpoint["optimizer"])
            for generator, state in zip(self.members.generators, checkpoint["generators"], strict=True):
                generator.set_state(state)
            for name in self.sums.sums:
                self.sums.sums[name] = checkpoint["sums"][name].numpy()
            self.sums.counts = dict(checkpoint["counts"])
        self.bins.truncate(BIN, sum(end <= self.sample for end in self.settings.ends))
        if self.settings.held_out:
            self.bins.truncate(TASK, self._finished_tasks())
        for snapshots in self.snapshots:
            snapshots.truncate(self.sample if checkpoint is not None else -1)

    def commit(self) -> None:
        """Write the newest state."""
        state = {
            "position": {"sample": self.sample},
            "model": {name: values.detach() for name, values in self.learner.network.parameters.items()},
            "optimizer": self.learner.optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self.members.generators],
            "sums": {name: torch.from_numpy(values) for name, values in self.sums.sums.items()},
            "counts": self.sums.counts,
            "threads": torch.get_num_threads(),
        }
        self.folder.write(CHECKPOINT, saved(state))
        self._committed = time.monotonic()

    # what it does ----------------------------------------------------------------------------------------------------

    def learn_block(self) -> None:
        """Learn up to the end of a block, of the bin or of the task, and measure what ends there."""
        if self.sample == 0:
            self._take_snapshots(-1)
        self.learn_up_to(self._next_stop())
        task = (self.sample - 1) // self.settings.permuted.period
        if self.sample in self.settings.ends:
            self._end_bin()
        if self.sample % self.settings.permuted.period == 0 or self.sample == self.settings.num_samples:
            self._end_task(task)
        if self.sample == self.settings.num_samples:
            self._write_utilities()
        if self.settings.save_every and self.sample % self.settings.save_every == 0:
            self.write_parameters()

    def learn_up_to(self, stop: int) -> None:
        """Learn the next samples, all of one task, and add up what is measured."""
        x, targets = self._samples(self.sample, stop)
        for name, values in self.learner.learn(self.sample, x, targets).items():
            self.sums.add(name, values)
        self.sample = stop

    def write_parameters(self) -> None:
        """Write the parameters of all networks, after the record of what was measured."""
        write_logs(self.folder)
        parameters = {name: values.detach() for name, values in self.learner.network.parameters.items()}
        self.folder.write(f"models/sample{self.sample}.pt", saved(parameters))

    def _write_utilities(self) -> None:
        """Write the scaled utilities of a learner that has them."""
        optimizer, names = self.learner.optimizer, list(self.learner.network.parameters)
        if isinstance(optimizer, UPGD):
            found = optimizer.scaled_utilities()
            write_utilities(self.folder, {names[position]: each.cpu().numpy() for position, each in found.items()})

    def _next_stop(self) -> int:
        """Where the next block ends."""
        settings, sample = self.settings, self.sample
        length = max(1, FETCHED // len(settings.seeds))
        stops = [sample + length - sample % length, settings.num_samples]
        stops += [every - sample % every + sample for every in (settings.permuted.period, settings.save_every) if every]
        later_ends = (end for end in settings.ends if end > sample)
        return min(*stops, next(later_ends, settings.num_samples))

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
        self._take_snapshots(task)
        if self.settings.restarts and self.sample < self.settings.num_samples:
            self.learner.network.load(self.members.drawn(task + 1).parameters)
            self.learner.optimizer.state.clear()

    def _held_out_accuracy(self, task: int) -> npt.NDArray[np.float64]:  # (members,)
        assert self.data.test is not None
        labels = self.data.test.labels.numpy()
        found = np.empty(self.settings.num_members)
        for first, stream in enumerate(self.streams):
            ids = generator_of(stream.seed, "probe", task).choice(
                len(labels), min(self.settings.held_out, len(labels)), replace=False
            )
            x = self._permuted(stream, task, self.data.test, ids).to(self.device)
            label_map = stream.label_map(task)
            wanted = labels[ids] if label_map is None else label_map[labels[ids]]
            for member in range(first, len(found), len(self.streams)):  # the combinations of a seed share the samples
                outputs = self.learner.network.outputs(member, x)
                found[member] = (outputs.argmax(1).cpu().numpy() == wanted).mean()
        return found

    def _open_snapshots(self) -> list[Snapshots]:
        """Open the kernels of every network, all with the same probe samples."""
        settings = self.settings
        if not settings.kernels_every:
            return []
        labels = self.data.train.labels.numpy()
        ids = np.sort(
            np.concatenate(
                [
                    generator_of(settings.seeds[0], "probe", label).permutation(np.flatnonzero(labels == label))[
                        : settings.probe_per_class
                    ]
                    for label in np.unique(labels).tolist()
                ]
            )
        )
        probe = self.data.train.inputs(torch.from_numpy(ids)).to(self.device)
        return [
            Snapshots(
                self.folder / f"{member_folder(settings, *self._position(member))}/kernels.zarr",
                self.learner.network.module(member),
                probe,
                labels=labels[ids],
                sample_ids=ids,
                output=settings.output,
                precision=settings.precision,
            )
            for member in range(settings.num_members)
        ]

    def _position(self, member: int) -> tuple[int, int]:
        """The combination of a member, and its seed."""
        combination, seed = divmod(member, len(self.settings.seeds))
        return combination, self.settings.seeds[seed]

    def _take_snapshots(self, task: int) -> None:
        """Compute the kernels of all networks, after every few tasks. The task −1 is before the first one."""
        if not self.snapshots or (task + 1) % self.settings.kernels_every:
            return
        for member, snapshots in enumerate(self.snapshots):
            snapshots(self.learner.network.module(member), iteration=self.sample, task=task)

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

    Everything is recorded below the folder. A run that was killed ends with the same bytes on a CPU. A network that
    diverges has NaN from then on, and the others go on.

    Returns:
        What was measured; see `read_stream`.

    Raises:
        FingerprintError: If there is a run with other settings or other data.
        StoreLockedError: If another process writes the run.
        ModelError: If the network does not learn from single samples.
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
            while run.sample < settings.num_samples:
                run.learn_block()
                if run.is_due or run.sample == settings.num_samples:
                    run.commit()
                report("training", run.sample, settings.num_samples, run.note)
            for series in (run.bins, *(snapshots.series for snapshots in run.snapshots)):
                series.sync()
            run.write_parameters()
    return read_stream(folder)
