"""The last layer of a classifier, and the features that enter it."""

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.training.loop import evaluation_mode


def head_of(model: nn.Module, num_outputs: int) -> nn.Linear:
    """Find the last linear layer, which gives the outputs.

    Raises:
        ModelError: If there is no linear layer with as many outputs.
    """
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear) and module.out_features == num_outputs:
            return module
    raise ModelError(
        f"{type(model).__name__} has no head: expected a torch.nn.Linear with {num_outputs} outputs as its last layer, "
        "found none. Does it compute its outputs in another way? Use a method that needs no features, or let the "
        "network end with a linear layer."
    )


def features_of(
    model: nn.Module,
    head: nn.Linear,
    x: Tensor,  # (samples, …)
) -> Tensor:  # (samples, features)
    """Compute what enters the head, divided by its norm sample by sample."""
    entered: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    return nn.functional.normalize(entered[-1].flatten(1), dim=1)


def in_evaluation_mode(model: nn.Module, x: Tensor, head: nn.Linear) -> Tensor:
    """Compute features in evaluation mode without gradients, and restore the mode."""
    with evaluation_mode(model), torch.no_grad():
        return features_of(model, head, x)
