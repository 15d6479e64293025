"""The last layer of a classifier: the features that enter it, and how it gets more outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.errors import ModelError
from ntkgen.training.loop import evaluation_mode

# The tensors of a linear layer that have one row per output.
PARTS = ("weight", "bias")


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


def head_name(model: nn.Module, num_outputs: int) -> str:
    """Find the name of the last linear layer.

    Raises:
        ModelError: If there is no linear layer with as many outputs.
    """
    head = head_of(model, num_outputs)
    names: list[str] = [name for name, module in model.named_modules() if module is head]
    return names[0]


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


def growing_head(model: nn.Module, num_outputs: int, larger: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Find the heads of a network and of one that differs from it in the number of outputs alone.

    Args:
        model: The network.
        num_outputs: Its number of outputs.
        larger: The network of the same factory with more outputs.

    Raises:
        ModelError: If there is no head, if it does not get more outputs, or if other tensors depend on their number.
    """
    head, name = head_of(model, num_outputs), head_name(model, num_outputs)
    found = larger.get_submodule(name) if name in dict(larger.named_modules()) else None
    if not isinstance(found, nn.Linear) or found.out_features <= num_outputs:
        raise ModelError(
            f"The head of {type(model).__name__} cannot grow: expected a factory that builds it with more than "
            f"{num_outputs} outputs, found one that does not. Does it ignore `num_classes`? Give it this argument, or "
            "use the fixed `head`."
        )
    shapes, others = ({key: tensor.shape for key, tensor in each.state_dict().items()} for each in (model, larger))
    own = {f"{name}.{part}".removeprefix(".") for part in PARTS}
    differing = [key for key in {**shapes, **others} if key not in own and shapes.get(key) != others.get(key)]
    if differing:
        raise ModelError(
            f"The head of {type(model).__name__} cannot grow: expected that only its last linear layer depends on the "
            f"number of outputs, found that {differing[0]} does so too. Is a weight shared, or computed from others? "
            "Use the fixed `head`."
        )
    return head, found


def grow_head(head: nn.Linear, larger: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    """Give a head the last outputs of a larger one, in place.

    The old rows of the weight and of the bias keep their bits. The optimizer keeps its state of them, and begins with
    zeros for the new rows.

    Args:
        head: The head.
        larger: A head with more outputs, whose last rows are copied.
        optimizer: The optimizer of the network.
    """
    for name in PARTS:
        old, new = getattr(head, name), getattr(larger, name)
        if old is None:
            continue
        rows = torch.cat([old.detach(), new.detach()[len(old) :].to(old)])
        grown = nn.Parameter(rows, requires_grad=old.requires_grad)
        setattr(head, name, grown)
        for group in optimizer.param_groups:
            group["params"] = [grown if param is old else param for param in group["params"]]
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[grown] = {key: _with_zeros(value, old, grown) for key, value in state.items()}
    head.out_features = larger.out_features


def _with_zeros(value: Any, old: Tensor, grown: Tensor) -> Any:
    """Add zeros for new rows to what an optimizer keeps of each number of a parameter."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    return torch.cat([value, value.new_zeros(len(grown) - len(old), *old.shape[1:])])
