"""Probe samples: a few of every task, the same at every moment of a run."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.continual.chance import generator_of
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.streams.tasks import IntArray, Stream, Task
from ntkgen.errors import InputError
from ntkgen.units import counted


@dataclass(frozen=True, eq=False)
class Probe:
    """Probe samples, task by task; within a task the training samples stand before the validation samples.

    Attributes:
        ids: Positions in the split ``train`` of the data set, (samples,).
        tasks: Task of each sample, (samples,).
        is_validation: Whether a sample is held out from the training, (samples,).
    """

    ids: IntArray
    tasks: IntArray
    is_validation: npt.NDArray[np.bool_]


def choose_probe(stream: Stream, labels: IntArray, settings: RunSettings) -> Probe:
    """Choose the probe samples of every task by the rule of the settings.

    Raises:
        InputError: If a task has fewer samples.
    """
    chosen = []
    for task in stream.tasks:
        parts = {"training": task.train}
        if settings.probe_parts == "both":
            parts["validation"] = task.validation
        for name, ids in parts.items():
            is_first = settings.probe_rule == "first"
            found = _first(task, ids, name, settings) if is_first else _balanced(task, (ids, labels), name, settings)
            chosen.append((found, task.number, name == "validation"))
    counts = [len(ids) for ids, _, _ in chosen]
    return Probe(
        np.concatenate([ids for ids, _, _ in chosen]),
        np.repeat([task for _, task, _ in chosen], counts),
        np.repeat([is_validation for _, _, is_validation in chosen], counts),
    )


def _first(task: Task, ids: IntArray, part: str, settings: RunSettings) -> IntArray:
    """Take the first samples of a task, whatever their classes are.

    Raises:
        InputError: If there are fewer.
    """
    count = settings.probe_per_class * len(task.classes)
    if len(ids) < count:
        raise InputError(_too_few(task, counted(count, f"{part} sample"), len(ids)))
    return ids[:count]


def _balanced(task: Task, ids_and_labels: tuple[IntArray, IntArray], part: str, settings: RunSettings) -> IntArray:
    """Draw as many samples of every class; a class has the same ones in every task that has it.

    Raises:
        InputError: If a class has fewer.
    """
    ids, labels = ids_and_labels
    chosen = []
    for label in task.classes:
        members = ids[labels[ids] == label]
        if len(members) < settings.probe_per_class:
            raise InputError(
                _too_few(task, f"{counted(settings.probe_per_class, f'{part} sample')} of class {label}", len(members))
            )
        order = generator_of(settings.seed, "probe", label).permutation(np.flatnonzero(labels == label))
        chosen.append(np.sort(order[np.isin(order, members)][: settings.probe_per_class]))
    return np.concatenate(chosen)


def _too_few(task: Task, expected: str, found: int) -> str:
    return (
        f"The probe does not fit task {task.number}: expected {expected}, found {found}. Is it meant for a larger data "
        "set? Lower `probe_per_class`."
    )
