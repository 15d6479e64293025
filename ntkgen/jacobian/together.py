"""Several backward passes through one graph, all at once."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.func import vmap


def pull_together(
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],  # for each output, (passes, *output)
    nodes: Sequence[Tensor],
) -> list[Tensor | None]:  # for each node, (passes, *node)
    """Take the gradients Σ ⟨w_p, y⟩ of some tensors y with respect to some nodes, for all passes p. Keep the graph.

    This is ``torch.autograd.grad`` with ``is_grads_batched``, which would import sympy for a second, and whose older
    `vmap` treats more operations one by one.

    Returns:
        The gradients; None for a node that no output depends on.

    Raises:
        RuntimeError: If `torch.vmap` does not support an operation.
    """
    reached: list[bool] = []

    def pull(*each: Tensor) -> tuple[Tensor, ...]:
        keep_graph, create_graph, allow_unused = True, False, True
        grads = _engine_run_backward(
            tuple(outputs), each, keep_graph, create_graph, tuple(nodes), allow_unused, accumulate_grad=False
        )
        reached.extend(grad is not None for grad in grads)
        return tuple(grad for grad in grads if grad is not None)

    with warnings.catch_warnings(action="ignore"):  # an operation without a rule of its own is only slower
        found = iter(vmap(pull)(*weights))
    return [next(found) if is_reached else None for is_reached in reached]


def zeros_for(node: Tensor, passes: int) -> Tensor:  # (passes, *node)
    """Make the gradients of a node that no output depends on."""
    return torch.zeros_like(node).expand(passes, *node.shape)
