"""A run before it begins: its data, its tasks, its probe, and what it will do."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkgen.continual.batches import cut
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.methods import make_method
from ntkgen.continual.methods.method import Method, Situation
from ntkgen.continual.probe import Probe, choose_probe
from ntkgen.continual.streams.incremental import make_stream
from ntkgen.continual.streams.tasks import IntArray, Stream
from ntkgen.data import dataset
from ntkgen.data.catalog import dataset_info
from ntkgen.data.dataset import Dataset
from ntkgen.units import counted

# Mean and standard deviation that map [0, 1] to [−1, 1], for every number of channels.
HALF = (0.5,)


@dataclass(frozen=True, eq=False)
class Data:
    """The samples of a run.

    Attributes:
        train: The split ``train``.
        test: The split ``test``; None if the data set has none, and validation samples are evaluated.
    """

    train: Dataset
    test: Dataset | None = None

    @property
    def labels(self) -> IntArray:
        """Labels of the split ``train``."""
        found: IntArray = self.train.labels.cpu().numpy()
        return found

    @property
    def test_labels(self) -> IntArray:
        """Labels of the split ``test``, if there is one."""
        if self.test is None:
            return np.zeros(0, np.int64)
        found: IntArray = self.test.labels.cpu().numpy()
        return found

    @property
    def held_out(self) -> Dataset:
        """The split with the samples on which tasks are evaluated."""
        return self.test or self.train

    def to(self, device: torch.device) -> "Data":
        """Move the samples to a device."""
        return Data(self.train.to(device), None if self.test is None else self.test.to(device))


def load_data(settings: RunSettings, data_dir: Path | None = None) -> Data:
    """Load the splits of a run's data set.

    Raises:
        UnknownNameError: If there is no such data set.
        DataError: If its files are missing.
    """
    name = settings.dataset
    info = None if name.endswith(".npz") else dataset_info(name)
    splits = [dataset.load(name, data_dir=data_dir)]
    if info and info.num_test_samples and settings.evaluate_on == "test":
        splits.append(dataset.load(name, data_dir=data_dir, split="test"))
    return Data(*normalised(splits, settings.normalise))


def normalised(splits: list[Dataset], how: str) -> list[Dataset]:
    """Change how the inputs of a data set are normalised; see `RunSettings`. The first split is that of training."""
    if how == "dataset":
        return splits
    if how == "pixel-mean":  # padding of a random crop is 0 after the subtraction, as in the code of iCaRL's authors
        mean = splits[0].raw().mean(0)
        splits = [dataclasses.replace(split, images=split.raw() - mean) for split in splits]
    center = HALF if how == "symmetric" else None
    return [dataclasses.replace(split, mean=center, std=center) for split in splits]


@dataclass(frozen=True, eq=False)
class Plan:
    """A run before it begins: what it will do, and on which samples."""

    settings: RunSettings
    data: Data
    stream: Stream
    probe: Probe

    @classmethod
    def of(cls, settings: RunSettings, data: Data) -> "Plan":
        """Divide the data into tasks, and choose the probe.

        Raises:
            InputError: If the settings do not fit the data.
        """
        stream = make_stream(
            settings.stream_settings, data.labels, data.test_labels, data.train.num_classes, settings.seed
        )
        return cls(settings, data, stream, choose_probe(stream, data.labels, settings))

    def method(self, model: nn.Module | None = None, inputs: Callable[[Tensor], Tensor] | None = None) -> Method:
        """Make the method; without a network, one that only lists samples."""
        settings = self.settings
        situation = Situation(self.stream, self.data.labels, settings.seed, settings.method_options)
        if model is not None:
            situation = dataclasses.replace(situation, model=model, inputs=inputs, num_outputs=self.num_outputs(0))
        return make_method(settings.method, situation)

    def num_outputs(self, task: int) -> int:
        """Count the outputs of the network during a task."""
        return self.stream.num_seen(task) if self.settings.head == "growing" else self.stream.num_targets

    def num_used(self, task: int) -> int:
        """Count the outputs that the loss and the predictions use during a task."""
        return self.stream.num_targets if self.settings.head == "fixed" else self.stream.num_seen(task)

    @property
    def held_out(self) -> list[IntArray]:
        """The samples on which each task is evaluated: those of the test split, else the validation samples."""
        return [task.validation if self.data.test is None else task.test for task in self.stream.tasks]

    @property
    def facts(self) -> dict[str, Any]:
        """What the run depends on beside its settings."""
        return {"data": self.data.train.fingerprint()}


def steps_per_epoch(plan: Plan) -> list[int]:
    """List the number of iterations per epoch of each task."""
    method = plan.method()
    return [len(cut(method.epoch_ids(task, 0), plan.settings)) for task in plan.stream.tasks]


def remarks(plan: Plan) -> list[str]:
    """List settings that never take effect, because the tasks are too short."""
    settings, steps = plan.settings, max(steps_per_epoch(plan))
    found, num_steps = [], settings.epochs * steps
    length = f"{counted(num_steps, 'iteration')} in {counted(settings.epochs, 'epoch')}"
    for name, schedule in (("kernels", settings.kernel_schedule), ("evaluations", settings.evaluation_schedule)):
        if max(schedule.iterations or 0, (schedule.epochs or 0) * steps) > num_steps:
            found.append(
                f"The interval of `{name}` {schedule} never ends within a task: the longest task has {length}. Only "
                "the ends of tasks are left of it. Was a shorter one meant?"
            )
    if late := [str(epoch) for epoch in settings.lr_milestones if epoch >= settings.epochs]:
        found.append(
            f"The learning rate never changes at `lr_milestones` {', '.join(late)}: a task has "
            f"{counted(settings.epochs, 'epoch')}, counted from 0."
        )
    return found


def describe(plan: Plan) -> dict[str, Any]:
    """List what a run will do, as plain values: tasks, iterations, evaluations, kernels and their bytes."""
    settings, stream = plan.settings, plan.stream
    steps = steps_per_epoch(plan)
    numbered = list(enumerate(steps))
    kernels = sum(settings.kernel_schedule.count(each, settings.epochs, is_first=not task) for task, each in numbered)
    looks = sum(settings.evaluation_schedule.count(each, settings.epochs, is_first=not task) for task, each in numbered)
    return {
        "settings": settings.to_json(),
        "tasks": stream.describe(),
        "iterations": settings.epochs * sum(steps),
        "evaluations": looks,
        "evaluated_on": settings.evaluated_on(has_test_split=plan.data.test is not None),
        "kernels": kernels,
        "probe_samples": len(plan.probe.ids),
    }
