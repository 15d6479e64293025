"""The batches of a task: positions of samples, from where a run is, and the inputs that the network gets for them."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ntkgen.continual.chance import generator_of, seed_of
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.methods.method import Method
from ntkgen.continual.streams.tasks import IntArray, Stream, Task
from ntkgen.data.augment import Augmentation
from ntkgen.data.dataset import Dataset
from ntkgen.training.loop import batches

# The augmentations by name. That of the data set is the usual one for small photographs if the data set states none.
AUGMENTATIONS = {
    "dataset": Augmentation(crop_padding=4, flip=True),
    # of incremental CIFAR-100 (Dohare et al. 2024, Nature 632)
    "crop-flip-rotation": Augmentation(
        crop_padding=4, flip=True, rotation_degrees=15, reflect=True, one_direction=True
    ),
}


def cut(ids: IntArray, settings: RunSettings) -> list[IntArray]:
    """Cut the samples of an epoch into batches.

    With ``drop_last`` a last batch that is not full is left out, unless it is the only one.
    """
    parts = [part.numpy() for part in batches(torch.from_numpy(ids), settings.batch_size)]
    if not settings.drop_last:
        return parts
    full = [part[: settings.batch_size] for part in parts if len(part) >= settings.batch_size]
    return full or parts


def remaining_batches(method: Method, task: Task, settings: RunSettings, done: int) -> Iterator[IntArray]:
    """List the batches of a task after those that are done."""
    steps_per_epoch = len(cut(method.epoch_ids(task, 0), settings))
    for epoch in range(done // steps_per_epoch, settings.epochs):
        ids = method.epoch_ids(task, epoch)
        skipped = done % steps_per_epoch if epoch == done // steps_per_epoch else 0
        yield from cut(ids, settings)[skipped:]


def blended(ids: IntArray, stream: Stream, task: Task, step: int, seed: int) -> IntArray:
    """Replace a part of a batch by samples of the task before, while a gradual switch lasts."""
    count = round(stream.old_fraction(step) * len(ids)) if task.number else 0
    if not count:
        return ids
    old = generator_of(seed, "shift", task.number, step).choice(stream.tasks[task.number - 1].train, size=count)
    return np.concatenate([old, ids[count:]])


def training_inputs(
    data: Dataset, ids: IntArray, settings: RunSettings, task: int, step: int
) -> Tensor:  # (samples, …)
    """Compute the inputs of a batch, augmented if the settings say so.

    Random numbers depend only on the seed, the task and the iteration. A resumed run therefore draws the same ones.

    Args:
        data: The data set.
        ids: The samples.
        settings: The settings.
        task: The task in training.
        step: Iterations of this task so far.
    """
    chosen = torch.from_numpy(ids)
    if not settings.augment:
        return data.inputs(chosen)
    return augmented(data, settings).batch(
        chosen, torch.Generator("cpu").manual_seed(seed_of(settings.seed, "augment", task, step))
    )


def augmented(data: Dataset, settings: RunSettings) -> Dataset:
    """Give a data set the augmentation of the settings: its own if they say so and it has one."""
    if settings.augmentation == "dataset" and data.augmentation != Augmentation():
        return data
    return dataclasses.replace(data, augmentation=AUGMENTATIONS[settings.augmentation])
