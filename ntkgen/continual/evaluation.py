"""Accuracy and loss of a network on every task of a stream."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgen.continual.methods.method import Method
from ntkgen.continual.metrics.confusion import count_confusions
from ntkgen.continual.streams.tasks import IntArray, Stream
from ntkgen.data.dataset import Dataset
from ntkgen.training.loop import EVALUATION_BATCH, evaluation_mode

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network achieves on the held-out samples of each task, (tasks,) each.

    A class that has no output yet, because the head grows or is masked, is never predicted: its samples count as
    errors. The task-incremental accuracy and the loss of its task are not defined, and are NaN.

    Attributes:
        accuracy: Fraction of samples whose class has the largest score of all outputs (class-incremental).
        task_accuracy: Fraction of samples whose class has the largest score of the classes of their task
            (task-incremental).
        head_accuracy: As ``accuracy``, by the outputs of the network, where the method predicts in another way.
        loss: Mean cross-entropy over all outputs.
        confusion: Number of samples of each target and each predicted target, (tasks, targets, targets).
    """

    accuracy: FloatArray
    task_accuracy: FloatArray
    head_accuracy: FloatArray
    loss: FloatArray
    confusion: IntArray


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Samples on which a network is evaluated.

    Attributes:
        data: Their data set.
        ids: The samples of each task.
        generator: Draws the augmentation of the samples; None if they are not augmented.
    """

    data: Dataset
    ids: list[IntArray]
    generator: torch.Generator | None = None

    def inputs(self, ids: Tensor) -> Tensor:
        """Compute the inputs of some samples."""
        return self.data.inputs(ids) if self.generator is None else self.data.batch(ids, self.generator)


def evaluate(model: nn.Module, method: Method, stream: Stream, held_out: HeldOut, num_used: int) -> Evaluation:
    """Evaluate a network in evaluation mode, and leave its mode as it was.

    Args:
        model: The network.
        method: Computes the scores.
        stream: The tasks.
        held_out: The held-out samples of each task.
        num_used: Number of outputs that predictions use, the first of the network; see `Evaluation` for the others.
    """
    with evaluation_mode(model):
        method.before_evaluation(model)
        with torch.no_grad():
            rows = [
                _evaluate_task(model, method, stream, task, (held_out, num_used)) for task in range(len(held_out.ids))
            ]
    return Evaluation(*(np.array(column) for column in zip(*rows, strict=True)))


def _evaluate_task(
    model: nn.Module, method: Method, stream: Stream, task: int, samples_and_outputs: tuple[HeldOut, int]
) -> tuple[float, float, float, float, IntArray]:
    held_out, num_used = samples_and_outputs
    labels_of, ids = held_out.data.labels, held_out.ids[task]
    own = torch.tensor(stream.task_targets(task))
    totals, confusion = np.zeros(4), np.zeros((stream.num_targets, stream.num_targets), np.int64)
    for part in torch.from_numpy(ids).split(EVALUATION_BATCH):
        labels = labels_of[part.to(labels_of.device)].cpu().numpy()
        targets, x = torch.from_numpy(stream.targets(labels)), held_out.inputs(part)
        on_device: Tensor = model(x)[:, :num_used]
        outputs, scores = on_device.cpu(), method.predict(model, x, on_device).cpu()
        predictions = scores.argmax(1)
        confusion += count_confusions(targets.numpy(), predictions.numpy(), stream.num_targets)
        has_outputs = int(own.max()) < outputs.shape[1]
        totals += [
            float((predictions == targets).sum()),
            float((own[scores[:, own].argmax(1)] == targets).sum()) if has_outputs else math.nan,
            float((outputs.argmax(1) == targets).sum()),
            float(F.cross_entropy(outputs, targets, reduction="sum")) if has_outputs else math.nan,
        ]
    accuracy, task_accuracy, head_accuracy, loss = (totals / len(ids)).tolist()
    return accuracy, task_accuracy, head_accuracy, loss, confusion
