"""The batches of a task: positions of samples, from where a run is."""

from collections.abc import Iterator

import numpy as np
import torch

from ntkgen.continual.chance import generator_of
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.methods.method import Method
from ntkgen.continual.streams.tasks import IntArray, Stream, Task
from ntkgen.training.loop import batches


def cut(ids: IntArray, batch_size: int) -> list[IntArray]:
    """Cut the samples of an epoch into batches."""
    return [part.numpy() for part in batches(torch.from_numpy(ids), batch_size)]


def remaining_batches(method: Method, task: Task, settings: RunSettings, done: int) -> Iterator[IntArray]:
    """List the batches of a task after those that are done."""
    steps_per_epoch = len(cut(method.epoch_ids(task, 0), settings.batch_size))
    for epoch in range(done // steps_per_epoch, settings.epochs):
        ids = method.epoch_ids(task, epoch)
        skipped = done % steps_per_epoch if epoch == done // steps_per_epoch else 0
        yield from cut(ids, settings.batch_size)[skipped:]


def blended(ids: IntArray, stream: Stream, task: Task, step: int, seed: int) -> IntArray:
    """Replace a part of a batch by samples of the task before, while a gradual switch lasts."""
    count = round(stream.old_fraction(step) * len(ids)) if task.number else 0
    if not count:
        return ids
    old = generator_of(seed, "shift", task.number, step).choice(stream.tasks[task.number - 1].train, size=count)
    return np.concatenate([old, ids[count:]])
