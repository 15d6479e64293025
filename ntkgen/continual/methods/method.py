"""The interface of a method of continual learning."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgen.continual.chance import generator_of
from ntkgen.continual.configuration import MethodOptions
from ntkgen.continual.streams.tasks import IntArray, Stream, Task


@dataclass(frozen=True, eq=False)
class Situation:
    """What a method knows of its run.

    Attributes:
        stream: The tasks.
        labels: Labels of the data set, (train samples,).
        seed: Seed of the run.
        options: Options of the methods.
        model: The network, for a method that is restored.
        inputs: Gives the inputs of some training samples.
        num_outputs: Outputs of the network at the beginning; None for those of all classes.
    """

    stream: Stream
    labels: IntArray
    seed: int
    options: MethodOptions = field(default_factory=MethodOptions)
    model: nn.Module = field(default_factory=nn.Module)
    inputs: Callable[[Tensor], Tensor] | None = None
    num_outputs: int | None = None


class Method(ABC):
    """What is learned in each task.

    A run calls `begin`, then for each epoch `epoch_ids`, for each batch `loss`, and at last `end`. The state of a
    method is what `state_dict` returns: tensors, arrays and plain values.
    """

    def __init__(self, situation: Situation) -> None:
        self.situation = situation

    def begin(self, task: Task, model: nn.Module) -> None:  # noqa: B027 - many methods do nothing
        """Prepare a task."""

    @abstractmethod
    def epoch_ids(self, task: Task, epoch: int) -> IntArray:
        """List the training samples of an epoch, in the order in which they are seen."""

    def batch_ids(self, ids: IntArray, task: Task, step: int) -> IntArray:  # noqa: ARG002 - for other methods
        """List the samples of a batch, given those that `epoch_ids` has put there."""
        return ids

    def loss(
        self,
        outputs: Tensor,  # (samples, outputs)
        targets: Tensor,  # (samples,)
        x: Tensor,  # (samples, …)  # noqa: ARG002 - for distillation
    ) -> Tensor:
        """Compute the loss of a batch over all outputs: the cross-entropy, or the binary one of each output."""
        if self.situation.options.loss == "binary":
            return self.binary_loss(outputs, F.one_hot(targets, outputs.shape[1]).to(outputs.dtype))
        return F.cross_entropy(outputs, targets)

    def binary_loss(
        self,
        outputs: Tensor,  # (samples, outputs)
        wanted: Tensor,  # (samples, outputs), 0 to 1
    ) -> Tensor:
        """Compute the binary cross-entropy of each output, its sum or mean over outputs, and its mean over samples."""
        loss = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="sum") / len(outputs)
        return loss if self.situation.options.binary_reduction == "sum" else loss / outputs.shape[1]

    def end(self, task: Task, model: nn.Module) -> None:  # noqa: B027 - as above
        """Finish a task."""

    def before_evaluation(self, model: nn.Module) -> None:  # noqa: B027 - as above
        """Prepare predictions with the current parameters."""

    def predict(
        self,
        model: nn.Module,  # noqa: ARG002 - for other methods
        x: Tensor,  # (samples, …)  # noqa: ARG002 - as above
        outputs: Tensor,  # (samples, outputs), those of the network
    ) -> Tensor:  # (samples, outputs)
        """Compute scores. The class with the largest one is predicted."""
        return outputs

    def state_dict(self) -> dict[str, Any]:
        """Return all state that changes during a run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        assert not state

    def shuffled(self, ids: IntArray, task: Task, epoch: int) -> IntArray:
        """Order samples at random, by the seed of the run, the task and the epoch alone.

        A resumed run therefore sees the same batches, whatever was drawn before.
        """
        return np.asarray(generator_of(self.situation.seed, "batches", task.number, epoch).permutation(ids))
