"""Elastic weight consolidation: parameters that were important for earlier tasks are held where they were."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkgen.continual.chance import generator_of
from ntkgen.continual.methods.finetune import Finetune
from ntkgen.continual.methods.method import Situation
from ntkgen.continual.streams.tasks import Task
from ntkgen.training.loop import evaluation_mode

# Samples of a task on which the Fisher information is estimated.
FISHER_SAMPLES = 200


class EWC(Finetune):
    """The loss of finetuning plus λ/2 Σ_tasks Σ_k F_k (θ_k − θ*_k)², with the diagonal of the Fisher information F.

    F is estimated at the end of each task on `FISHER_SAMPLES` of its samples, with labels drawn from the network's own
    predictions: the mean of squared gradients of the log-likelihood, sample by sample.

    References:
        Kirkpatrick et al. (2017), arXiv:1612.00796.
    """

    def __init__(self, situation: Situation) -> None:
        super().__init__(situation)
        self.anchors: list[dict[str, tuple[Tensor, Tensor]]] = []  # for each task, by parameter: F and θ*

    def loss(self, outputs: Tensor, targets: Tensor, x: Tensor) -> Tensor:
        """Compute the loss of a batch, with the penalty."""
        loss = super().loss(outputs, targets, x)
        params = dict(self.situation.model.named_parameters())
        for anchor in self.anchors:
            penalty = sum(
                (fisher * (_old_rows(params[name], old) - old).square()).sum() for name, (fisher, old) in anchor.items()
            )
            loss = loss + self.situation.options.penalty / 2 * penalty
        return loss

    def end(self, task: Task, model: nn.Module) -> None:
        """Estimate the Fisher information on the task, and keep it with the parameters."""
        assert self.situation.inputs is not None
        rng = generator_of(self.situation.seed, "memory", task.number)
        ids = torch.from_numpy(rng.permutation(task.train)[:FISHER_SAMPLES])
        generator = torch.Generator("cpu").manual_seed(int(rng.integers(2**62)))
        params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        fisher = {name: torch.zeros_like(param) for name, param in params.items()}
        with evaluation_mode(model):
            for x in self.situation.inputs(ids):
                logits: Tensor = model(x[None])
                label = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[0].to(logits.device)
                grads = torch.autograd.grad(F.cross_entropy(logits, label), list(params.values()), allow_unused=True)
                for name, grad in zip(params, grads, strict=True):
                    if grad is not None:
                        fisher[name] += grad.square() / len(ids)
        self.anchors.append({name: (fisher[name], param.detach().clone()) for name, param in params.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the Fisher information and the parameters of every task."""
        return {"anchors": [{name: list(pair) for name, pair in anchor.items()} for anchor in self.anchors]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        device = next(self.situation.model.parameters()).device
        self.anchors = [
            {name: (pair[0].to(device), pair[1].to(device)) for name, pair in anchor.items()}
            for anchor in state["anchors"]
        ]


def _old_rows(param: Tensor, old: Tensor) -> Tensor:
    """Take the rows that a parameter of a grown head had before."""
    return param if param.shape == old.shape else param[: len(old)]
