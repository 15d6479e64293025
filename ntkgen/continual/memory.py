"""A bounded memory of samples of earlier tasks: a reservoir, or the same number of every class."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkgen.continual.streams.tasks import IntArray
from ntkgen.errors import InputError, UnknownNameError


class Memory(ABC):
    """Positions of samples in their data set, at most ``capacity``."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InputError(
                f"A memory of {capacity} samples keeps nothing: expected at least one. Is another method meant? Raise "
                "`buffer`."
            )
        self.capacity = capacity
        self.ids: IntArray = np.zeros(0, np.int64)

    @abstractmethod
    def add(self, ids: IntArray, labels: IntArray, rng: np.random.Generator) -> None:
        """Offer samples, with their labels, in the order in which they come."""

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """Draw samples with replacement; none while the memory is empty."""
        return rng.choice(self.ids, size=count) if len(self.ids) else self.ids

    def state_dict(self) -> dict[str, Any]:
        """Return all state that changes, as plain values."""
        return {"ids": self.ids.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self.ids = np.array(state["ids"], np.int64)


class Reservoir(Memory):
    """Keeps a uniform random subset of all samples that were offered (Vitter 1985, algorithm R)."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.num_offered = 0

    def add(self, ids: IntArray, labels: IntArray, rng: np.random.Generator) -> None:  # noqa: ARG002 - as others
        """Offer samples; each takes the place of a random one with the probability capacity / offered."""
        kept = self.ids.tolist()
        for sample in ids.tolist():
            self.num_offered += 1
            if len(kept) < self.capacity:
                kept.append(sample)
            elif (place := int(rng.integers(self.num_offered))) < self.capacity:
                kept[place] = sample
        self.ids = np.array(kept, np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return all state that changes, as plain values."""
        return {**super().state_dict(), "num_offered": self.num_offered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        super().load_state_dict(state)
        self.num_offered = int(state["num_offered"])


class Balanced(Memory):
    """Keeps as many samples of every class as fit, capacity // classes, drawn at random within each class."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.by_class: dict[int, list[int]] = {}

    def add(self, ids: IntArray, labels: IntArray, rng: np.random.Generator) -> None:
        """Offer samples of new classes, and shorten the lists of the others.

        Raises:
            InputError: If there are more classes than places.
        """
        for label in np.unique(labels):
            members = rng.permutation(ids[labels == label]).tolist()
            self.by_class[int(label)] = [*self.by_class.get(int(label), []), *members]
        quota = self.capacity // len(self.by_class)
        if not quota:
            raise InputError(
                f"A memory of {self.capacity} samples is too small for {len(self.by_class)} classes: expected room for "
                "one of each. Is it the number per class? Raise `buffer`."
            )
        self.by_class = {label: members[:quota] for label, members in self.by_class.items()}
        self.ids = np.array([sample for members in self.by_class.values() for sample in members], np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return all state that changes, as plain values."""
        return {**super().state_dict(), "by_class": {str(label): list(ids) for label, ids in self.by_class.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        super().load_state_dict(state)
        self.by_class = {int(label): list(ids) for label, ids in state["by_class"].items()}


MEMORIES: dict[str, type[Memory]] = {"reservoir": Reservoir, "balanced": Balanced}


def make_memory(kind: str, capacity: int) -> Memory:
    """Make a memory by name.

    Raises:
        UnknownNameError: If there is no memory of that name.
    """
    if kind not in MEMORIES:
        raise UnknownNameError("memory", kind, MEMORIES)
    return MEMORIES[kind](capacity)
