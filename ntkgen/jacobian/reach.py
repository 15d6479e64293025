"""The trainable parameters that the outputs of a network depend on, and the layer after which a gradient is lost."""

import warnings
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.jacobian.evaluation import as_input, evaluation_copy, outputs_of
from ntkgen.jacobian.reference import trainable

# Maximum number of parameters in a message.
NAMED = 3


class UnreachedParameterWarning(UserWarning):
    """The outputs depend on some parameters in training mode, and not in evaluation mode."""


def require_reached(model: nn.Module, module: nn.Module, samples: Tensor, reached: Collection[str]) -> tuple[str, ...]:
    """Refuse a network whose outputs depend on none of its trainable parameters, because its kernel would be zero.

    Parameters that have a gradient only in training mode contribute zero to the kernel. They cause a warning.

    Args:
        model: The user's module.
        module: Its evaluation copy.
        samples: A few samples.
        reached: The parameters for which autograd found a gradient.

    Returns:
        The parameters of the warning.

    Raises:
        ModelError: If no parameter has a gradient.
    """
    unreached = [name for name in trainable(module) if name not in reached]
    if not unreached:
        return ()
    in_training = reached_in_training(model, samples)
    only_in_training = [name for name in unreached if name in in_training]
    if not reached:
        raise ModelError(
            "The outputs of the network depend on none of its trainable parameters, so its kernel would be zero: "
            f"expected a gradient, and {where_gradient_ends(module, samples)}. {_cause(only_in_training)}"
        )
    if only_in_training:
        warnings.warn(
            f"The outputs depend on {_listed(only_in_training)} in training mode, and not in evaluation mode. The "
            "kernel is that of evaluation mode, so these parameters add nothing to it. Does eval() merge adapters into "
            "frozen weights? Keep them separate, or ignore this warning if the parameters are used only in training.",
            UnreachedParameterWarning,
            stacklevel=2,
        )
    return tuple(only_in_training)


def _cause(only_in_training: list[str]) -> str:
    if only_in_training:
        return (
            f"In training mode they depend on {_listed(only_in_training)}. Does eval() merge adapters into frozen "
            "weights? Keep them separate in evaluation mode."
        )
    return "Does the forward pass use torch.no_grad(), detach() or .data, or go through NumPy? Remove that."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def reached_in_training(model: nn.Module, samples: Tensor) -> set[str]:
    """List the trainable parameters with a gradient in training mode. List none if that mode raises an error."""
    reached: set[str] = set()
    with suppress(Exception), warnings.catch_warnings(action="ignore"), torch.random.fork_rng():
        device = next(model.parameters()).device
        module = evaluation_copy(model, torch.float32, device)
        module.train()
        params = {name: value for name, value in module.named_parameters() if value.requires_grad}
        outputs = outputs_of(module, as_input(samples, torch.float32, device))
        grads = torch.autograd.grad(outputs.sum(), list(params.values()), allow_unused=True)
        reached = {name for name, grad in zip(params, grads, strict=True) if grad is not None}
    return reached


@dataclass(frozen=True)
class _Call:
    """One call of a module, and whether its output has a gradient."""

    name: str
    has_gradient: bool


def where_gradient_ends(module: nn.Module, samples: Tensor) -> str:
    """Describe the module after which the outputs of a network have no gradient."""
    calls: list[_Call] = []

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.append(_Call(name, output.requires_grad))

        return hook

    with ExitStack() as stack:
        for name, child in module.named_modules():
            stack.callback(child.register_forward_hook(hook_of(name)).remove)
        outputs_of(module, samples)
    last = max((index for index, call in enumerate(calls) if call.has_gradient), default=None)
    if last is None:
        return "not even its first layer gives one"
    if last + 1 == len(calls):
        return "its last layer has one with which no parameter is connected"
    after = calls[last + 1].name
    end = f"the output of {after!r}, called next, has none" if after else "the outputs of the network have none"
    return f"the output of {calls[last].name!r} has one, but {end}"
