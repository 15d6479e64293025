"""Finetuning: each task is learned as if there were no others."""

from ntkgen.continual.methods.method import Method
from ntkgen.continual.streams.tasks import IntArray, Task


class Finetune(Method):
    """Trains on the samples of the task alone: the lower baseline of the field."""

    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the samples of the task in random order."""
        return self.shuffled(task.train, task, epoch)
