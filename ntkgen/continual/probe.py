"""Probe samples: a few of every class of every task, the same at every moment of a run."""

from dataclasses import dataclass

import numpy as np

from ntkgen.continual.chance import generator_of
from ntkgen.continual.streams.tasks import IntArray, Stream
from ntkgen.errors import InputError


@dataclass(frozen=True, eq=False)
class Probe:
    """Probe samples, task by task and class by class.

    Attributes:
        ids: Positions in the split ``train`` of the data set, (samples,).
        tasks: Task of each sample, (samples,).
    """

    ids: IntArray
    tasks: IntArray


def choose_probe(stream: Stream, labels: IntArray, per_class: int, seed: int) -> Probe:
    """Draw as many training samples of every class of every task.

    A class that occurs in several tasks has the same probe samples in each of them.

    Raises:
        InputError: If a class of a task has fewer samples.
    """
    ids, tasks = [], []
    for task in stream.tasks:
        for label in task.classes:
            members = task.train[labels[task.train] == label]
            if len(members) < per_class:
                raise InputError(
                    f"The probe does not fit task {task.number}: expected {per_class} training samples of class "
                    f"{label}, found {len(members)}. Is it meant for a larger data set? Lower `probe_per_class`."
                )
            order = generator_of(seed, "probe", label).permutation(np.flatnonzero(labels == label))
            chosen = order[np.isin(order, members)][:per_class]
            ids.append(np.sort(chosen))
            tasks.append(np.full(per_class, task.number))
    return Probe(np.concatenate(ids), np.concatenate(tasks))
