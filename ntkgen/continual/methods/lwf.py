"""Learning without forgetting: the network before a task teaches the old outputs during the task."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgen.continual.methods.finetune import Finetune
from ntkgen.continual.methods.method import Situation
from ntkgen.continual.streams.tasks import Task


class Distillation(Finetune):
    """Keeps a frozen copy of the network of the last task: the teacher of the outputs seen before."""

    def __init__(self, situation: Situation) -> None:
        super().__init__(situation)
        self.teacher: nn.Module | None = None
        self.num_old = 0  # outputs that the teacher has learned

    def begin(self, task: Task, model: nn.Module) -> None:
        """Freeze a copy of the network, unless it has learned nothing yet."""
        if task.number:
            self.teacher = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
            self.num_old = self.situation.stream.num_seen(task.number - 1)

    def taught(
        self,
        x: Tensor,  # (samples, …)
    ) -> Tensor | None:  # (samples, old outputs)
        """Compute the teacher's outputs; None in the first task."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            outputs: Tensor = self.teacher(x)[:, : self.num_old]
        return outputs

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher."""
        state = None if self.teacher is None else self.teacher.state_dict()
        return {"teacher": state, "num_old": self.num_old}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the teacher."""
        self.num_old = int(state["num_old"])
        if state["teacher"] is not None:
            self.teacher = copy.deepcopy(self.situation.model).eval().requires_grad_(requires_grad=False)
            self.teacher.load_state_dict(state["teacher"])


class LwF(Distillation):
    """Cross-entropy plus λ times a distillation loss on the old outputs (Li, Hoiem 2017, arXiv:1606.09282).

    The distillation loss is T² KL(softmax(teacher / T) ‖ softmax(outputs / T)), with the temperature T.
    """

    def loss(self, outputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """Compute the loss of a batch."""
        loss, taught = F.cross_entropy(outputs, targets), self.taught(x)
        options = self.situation.options
        if taught is None or options.distillation == 0:
            return loss
        student = F.log_softmax(outputs[:, : self.num_old] / options.temperature, dim=1)
        teacher = F.log_softmax(taught / options.temperature, dim=1)
        distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return loss + options.distillation * options.temperature**2 * distance


class LwFMC(Distillation):
    """Binary cross-entropy of every output, with the teacher's probabilities as targets of the old ones.

    References:
        Rebuffi, Kolesnikov, Sperl, Lampert (2017), arXiv:1611.07725, §4.1 (LwF.MC).
    """

    def loss(self, outputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """Compute the loss of a batch; see `binary_loss`."""
        wanted = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        taught = self.taught(x)
        if taught is not None:
            wanted[:, : self.num_old] = torch.sigmoid(taught)
        return self.binary_loss(outputs, wanted)
