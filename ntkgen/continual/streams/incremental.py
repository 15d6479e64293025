"""Streams in which new classes arrive: disjoint, overlapping or cumulative, or the same in changing proportions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ntkgen.continual.chance import generator_of
from ntkgen.continual.streams.order import class_order
from ntkgen.continual.streams.tasks import IntArray, Stream, Task
from ntkgen.errors import InputError

# What a task trains on: the samples of its own classes, or those of all classes so far.
STREAMS = ("disjoint", "cumulative")
# Part of the training samples of a class that is held out for validation.
VALIDATION = 0.1
# The seed with which continuum 1.2 shuffles each task before it splits it.
CONTINUUM_SEED = 1
# Part of the samples that the favoured half of the classes has in a stream with a frequency shift.
FAVOURED = 0.8


@dataclass(frozen=True)
class Split:
    """How many classes the first task has, and each later one; the last task has what is left.

    >>> Split.parse("50/10").sizes(100)
    (50, 10, 10, 10, 10, 10)
    >>> Split.parse("2/4").sizes(9)
    (2, 4, 3)
    """

    initial: int
    increment: int

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Read ``initial/increment``.

        Raises:
            InputError: If it is not two positive numbers.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        split = cls(*map(int, found.groups())) if found else None
        if split is None or not split.initial or not split.increment:
            raise InputError(
                f"{text!r} is no split of classes: expected INITIAL/INCREMENT, two positive numbers, as 2/2 or 50/10. "
                "Write the classes of the first task, a slash, and those of each later task."
            )
        return split

    def __str__(self) -> str:
        """Write as `parse` reads."""
        return f"{self.initial}/{self.increment}"

    def sizes(self, num_classes: int) -> tuple[int, ...]:
        """List the number of classes of each task.

        Raises:
            InputError: If the first task alone has more classes than there are.
        """
        if self.initial > num_classes or (self.initial < num_classes and self.increment > num_classes - self.initial):
            raise InputError(
                f"The split {self} does not fit {num_classes} classes: expected a first task of at most {num_classes} "
                f"classes, and later tasks of at most the {max(0, num_classes - self.initial)} that are left. Is it "
                "meant for another data set? Choose smaller tasks."
            )
        starts = range(self.initial, num_classes, self.increment)
        return (self.initial, *(min(self.increment, num_classes - start) for start in starts))


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream of tasks. The stream also depends on the labels and the seed.

    Attributes:
        split: Number of classes per task.
        stream: ``disjoint``: a task trains on the samples of its own classes; ``cumulative``: on those of all classes
            so far. In both, its validation and test samples are those of its own classes, so that the accuracy matrix
            has one column for each group of classes.
        order: Order of the classes; see `class_order`.
        overlap: Fraction of the classes of each later task that are classes of the first task, from 0 to 1.
        frequency_shift: A number α from 0 to 1, or None. If it is given, every task has all classes, in different
            proportions. The proportions are D₀ in the first task and (1 − α) D₀ + α D₁ in all later tasks. D₀ favours
            the first half of the classes, and D₁ favours the second half.
        blend_steps: Number of iterations over which samples of the previous task fade out; see `Stream`.
        num_tasks: Number of tasks; None for as many as the split gives.
        compatible_split: Whether to hold out the same validation samples as the package continuum 1.2. It shuffles the
            samples of each task with ``RandomState(1)`` and holds out the first tenth.
        validation_per_class: Number of validation samples of each class; None for a tenth of the class.
        validation_rule: Which samples of a class are held out: ``random`` ones, or the ``first`` of the data set.
    """

    split: Split
    order: str | tuple[int, ...] = "natural"
    stream: str = "disjoint"
    overlap: float = 0.0
    frequency_shift: float | None = None
    blend_steps: int = 0
    num_tasks: int | None = None
    compatible_split: bool = False
    validation_per_class: int | None = None
    validation_rule: str = "random"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            InputError: If a fraction is outside of 0 to 1, a number is negative, or two kinds of shift or of validation
                samples are combined.
        """
        for name in ("overlap", "frequency_shift"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                question = "Is a percentage given? Divide it by 100." if value > 1 else "Is the sign wrong? Correct it."
                raise InputError(f"`{name}` is {value:g}: expected a fraction from 0 to 1. {question}")
        if self.blend_steps < 0:
            raise InputError(
                f"`blend_steps` is {self.blend_steps}: expected 0 or more iterations. Is the sign wrong? Give 0, or "
                "leave it out, for switches at once."
            )
        if self.num_tasks is not None and self.num_tasks < 1:
            raise InputError(
                f"`num_tasks` is {self.num_tasks}: expected 1 or more. Are all tasks of the split meant? Leave it out."
            )
        if self.validation_per_class is not None and self.validation_per_class < 1:
            raise InputError(
                f"`validation_per_class` is {self.validation_per_class}: expected 1 or more. Is a tenth of each class "
                "meant? Leave it out."
            )
        if self.overlap and self.frequency_shift is not None:
            raise InputError(
                "A stream has overlapping classes or a frequency shift, and both were asked for: with a frequency "
                "shift every task has all classes. Leave out `overlap` or `frequency_shift`."
            )
        shifts = {"overlap": self.overlap, "blend_steps": self.blend_steps, "frequency_shift": self.frequency_shift}
        shifted = [name for name, value in shifts.items() if value not in {0, None}]
        if self.stream == "cumulative" and shifted:
            raise InputError(
                f"A cumulative stream has no `{shifted[0]}`: expected new classes that join all earlier ones, found "
                f"`{shifted[0]}` {shifts[shifted[0]]:g}. Is it meant for disjoint tasks? Leave one of the two out."
            )
        if self.compatible_split and (self.validation_per_class is not None or self.validation_rule != "random"):
            raise InputError(
                "`compatible_split` says which samples are held out: expected no `validation_per_class` and no "
                "`validation_rule` beside it, found one. Was another preset meant? Leave one of the two out."
            )


def make_stream(
    settings: StreamSettings,
    labels: IntArray,  # (train samples,)
    test_labels: IntArray,  # (test samples,)
    num_classes: int,
    seed: int,
) -> Stream:
    """Divide a data set into tasks.

    Raises:
        InputError: If the split or the order does not fit the classes, or a class has no samples.
    """
    order = class_order(settings.order, num_classes, seed)
    groups = _groups(settings, order)
    tasks: list[Task] = []
    for number, classes in enumerate(groups):
        members = _members(settings, classes, labels, (number, seed))
        train, validation = _split(members, labels, settings, seed)
        if settings.stream == "cumulative" and tasks:
            train = np.union1d(tasks[-1].train, train)
        tasks.append(Task(number, classes, train, validation, np.flatnonzero(np.isin(test_labels, classes))))
    seen = dict.fromkeys(label for classes in groups for label in classes)
    return Stream(tuple(tasks), tuple(seen), settings.blend_steps)


def _groups(settings: StreamSettings, order: Sequence[int]) -> list[tuple[int, ...]]:
    """List the classes of each task.

    Raises:
        InputError: If there are not as many tasks.
    """
    if settings.frequency_shift is not None:
        return [tuple(order)] * (settings.num_tasks or 2)
    sizes = _sizes(settings, len(order))
    first = tuple(order[: sizes[0]])
    groups, fresh = [first], len(first)
    for size in sizes[1:]:
        shared = _num_shared(settings, size)
        groups.append((*first[:shared], *order[fresh : fresh + size - shared]))
        fresh += size - shared
    return groups


def _num_shared(settings: StreamSettings, size: int) -> int:
    """Count the classes that a later task of some size has in common with the first."""
    return min(round(settings.overlap * size), settings.split.initial)


def _sizes(settings: StreamSettings, num_classes: int) -> list[int]:
    """List the number of classes of each task.

    Raises:
        InputError: If the classes do not suffice for as many tasks as were asked for.
    """
    disjoint = list(settings.split.sizes(num_classes))
    new = settings.split.increment - _num_shared(settings, settings.split.increment)
    if not settings.overlap:
        sizes = disjoint
    elif new:
        later = (num_classes - settings.split.initial) // new
        sizes = [settings.split.initial] + [settings.split.increment] * later
    else:  # no task needs a class of its own
        sizes = [settings.split.initial] + [settings.split.increment] * max(1, (settings.num_tasks or 2) - 1)
    if settings.num_tasks is not None and settings.num_tasks > len(sizes):
        raise InputError(
            f"{settings.num_tasks} tasks were asked for, and the split {settings.split} of {num_classes} classes gives "
            f"{len(sizes)}. Is it meant for a data set of more classes? Ask for fewer tasks, or smaller ones."
        )
    return sizes[: settings.num_tasks]


def _members(
    settings: StreamSettings, classes: Sequence[int], labels: IntArray, number_and_seed: tuple[int, int]
) -> IntArray:
    """List the samples of a task in the order of the data set.

    Raises:
        InputError: If a class has none, or a frequency shift has one class alone.
    """
    empty = [label for label in classes if not (labels == label).any()]
    if empty:
        raise InputError(
            f"The data set has no training samples of class {empty[0]}: expected some of every class of a task. Are "
            "its labels counted from 1, or is it a part of a data set? Give each class samples, or fewer classes."
        )
    if settings.frequency_shift is None:
        return np.flatnonzero(np.isin(labels, classes))
    if len(classes) < 2:
        raise InputError(
            "A frequency shift changes the proportions of classes: expected a data set of at least two classes, found "
            "one. Is it another data set that was meant? Leave out `frequency_shift`."
        )
    number, seed = number_and_seed
    shares = _shares(len(classes), 0.0 if number == 0 else settings.frequency_shift)
    counts = np.array([(labels == label).sum() for label in classes])
    total = float((counts / FAVOURED * (len(classes) // 2)).min())  # as many as every task can draw
    rng = generator_of(seed, "shift", number)
    chosen = [
        rng.choice(np.flatnonzero(labels == label), size=max(1, int(share * total)), replace=False)
        for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def _shares(num_classes: int, shift: float) -> "np.typing.NDArray[np.float64]":
    """Proportions of the classes, (1 − α) D₀ + α D₁, where D₀ favours the first half and D₁ the second.

    >>> _shares(4, 0.0).tolist(), _shares(4, 0.5).tolist()
    ([0.4, 0.4, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25])
    """
    half = num_classes // 2
    first = np.array([FAVOURED / half] * half + [(1 - FAVOURED) / (num_classes - half)] * (num_classes - half))
    return np.round((1 - shift) * first + shift * first[::-1], 12)


def _split(members: IntArray, labels: IntArray, settings: StreamSettings, seed: int) -> tuple[IntArray, IntArray]:
    """Divide the samples of a task into training and validation.

    By default a part of each class is held out: the same samples in every task that has the class, so that no task
    trains on what another one validates on. Both parts keep the order of the data set.
    """
    if settings.compatible_split:
        shuffled = np.arange(len(members))
        np.random.RandomState(CONTINUUM_SEED).shuffle(shuffled)
        held = int(VALIDATION * len(members))
        return members[shuffled[held:]], members[shuffled[:held]]
    held_out = np.concatenate([_held_out(labels, int(label), settings, seed) for label in np.unique(labels[members])])
    is_held_out = np.isin(members, held_out)
    return members[~is_held_out], members[is_held_out]


def _held_out(labels: IntArray, label: int, settings: StreamSettings, seed: int) -> IntArray:
    """Choose the validation samples of a class.

    Raises:
        InputError: If no sample is left for training.
    """
    members, count = np.flatnonzero(labels == label), settings.validation_per_class
    if count is not None and count >= len(members):
        raise InputError(
            f"The validation samples do not fit class {label}: expected fewer than its {len(members)} samples, found "
            f"{count}. Is it meant for a larger data set? Lower `validation_per_class`."
        )
    if settings.validation_rule == "random":
        members = generator_of(seed, "split", label).permutation(members)
    return members[: int(VALIDATION * len(members)) if count is None else count]
