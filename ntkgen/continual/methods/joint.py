"""Joint training: each task is learned together with all tasks before it."""

import numpy as np

from ntkgen.continual.methods.method import Method
from ntkgen.continual.streams.tasks import IntArray, Task


class Joint(Method):
    """Trains on the samples of all tasks so far: the upper baseline of the field."""

    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the samples of all tasks so far in random order."""
        seen = [earlier.train for earlier in self.situation.stream.tasks[: task.number + 1]]
        return self.shuffled(np.unique(np.concatenate(seen)), task, epoch)
