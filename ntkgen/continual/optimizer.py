"""The optimizer of a run."""

from typing import Any

import torch
from torch import nn

from ntkgen.continual import optim
from ntkgen.continual.chance import seed_of
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.optim.options import BATCH_LEARNERS


def make_optimizer(settings: RunSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a run. Steps of SGD and Adam are one fused kernel where torch has it.

    The noise of a learner has a generator of its own, which is part of the optimizer's state.
    """
    params = list(model.parameters())
    if settings.optimizer in BATCH_LEARNERS:
        noise = torch.Generator(params[0].device).manual_seed(seed_of(settings.seed, "optimizer"))
        return optim.make_optimizer(settings.optimizer, params, generators=[noise], **settings.optimizer_options)
    common: dict[str, Any] = {
        "lr": settings.step_size,
        "weight_decay": settings.weight_decay,
        "fused": _can_fuse(params),
    }
    if settings.optimizer == "adam":
        return torch.optim.Adam(params, **common)
    return torch.optim.SGD(params, momentum=settings.momentum, **common)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next steps."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _can_fuse(params: list[nn.Parameter]) -> bool:
    return all(param.is_floating_point() and param.device.type in {"cpu", "cuda"} for param in params)
