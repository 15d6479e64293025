"""Replay of samples of earlier tasks: from a bounded memory, or from all samples of earlier tasks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ntkgen.continual.chance import generator_of
from ntkgen.continual.memory import make_memory
from ntkgen.continual.methods.method import Method, Situation
from ntkgen.continual.streams.tasks import IntArray, Task


class Replay(Method):
    """Adds as many samples of a bounded memory to each batch as it has new ones (Chaudhry et al., arXiv:1902.10486).

    The memory takes the samples of a task at its end, in random order.
    """

    def __init__(self, situation: Situation) -> None:
        super().__init__(situation)
        self.memory = make_memory(situation.options.memory, situation.options.buffer)

    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the samples of the task in random order."""
        return self.shuffled(task.train, task, epoch)

    def batch_ids(self, ids: IntArray, task: Task, step: int) -> IntArray:
        """Add samples of the memory."""
        rng = generator_of(self.situation.seed, "memory", task.number, step + 1)
        return np.concatenate([ids, self.memory.draw(len(ids), rng)])

    def end(self, task: Task, model: nn.Module) -> None:  # noqa: ARG002 - as others
        """Offer the samples of the task to the memory."""
        rng = generator_of(self.situation.seed, "memory", task.number)
        ids = rng.permutation(task.train)
        self.memory.add(ids, self.situation.labels[ids], rng)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory."""
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory."""
        self.memory.load_state_dict(state)


class ReplayMixed(Method):
    """Mixes new random samples of every earlier task into each epoch; every earlier sample stays at hand."""

    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the samples of the task and of every earlier one in one random order."""
        return self.shuffled(np.concatenate([task.train, self.earlier(task, epoch)]), task, epoch)

    def earlier(self, task: Task, epoch: int) -> IntArray:
        """Draw samples of every earlier task, without replacement."""
        rng, count = generator_of(self.situation.seed, "memory", task.number, epoch), self.situation.options.replay
        tasks = self.situation.stream.tasks[: task.number]
        drawn = [rng.permutation(earlier.train)[:count] for earlier in tasks]
        return np.concatenate([np.zeros(0, np.int64), *drawn])


class ReplayTwoPass(ReplayMixed):
    """Sees the samples of the task, then in the same epoch new random samples of every earlier task."""

    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the samples of the task in random order, then those of the earlier ones in random order."""
        return np.concatenate([self.shuffled(task.train, task, epoch), self.earlier(task, epoch)])
