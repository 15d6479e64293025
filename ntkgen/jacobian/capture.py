"""The inputs and output cotangents of every layer for one batch. No gradient of a weight is computed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.failures import explained_errors
from ntkgen.jacobian.following import NO_JUNCTIONS
from ntkgen.jacobian.precision import without_autocast
from ntkgen.jacobian.recording import Recording, Use

Watch = Callable[[nn.Module, Tensor, Recording], AbstractContextManager[None]]


@contextmanager
def _recording_hooks(layers: dict[str, nn.Module], recording: Recording) -> Iterator[None]:
    """Record the calls of some modules.

    The hook returns a clone of the output. Later in-place operations (ReLU, a residual sum) then overwrite the clone,
    and the gradient is taken at the unchanged output of the layer.
    """

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not (isinstance(x, Tensor) and isinstance(output, Tensor) and output.requires_grad):
                return None
            if torch._C._functorch.is_functorch_wrapped_tensor(output):  # inside a transform it has no gradient outside
                return None
            use = Use(x.detach()[: recording.count], output, x.requires_grad, (x.shape, output.shape))
            recording.uses.setdefault(name, []).append(use)
            return output.clone()

        return hook

    with ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def record(
    module: nn.Module,
    layers: dict[str, nn.Module],
    batch: Tensor,
    count: int | None = None,
    watch: Watch = NO_JUNCTIONS.recording,
) -> Recording:
    """Run one forward pass and record the named layers, for the first ``count`` samples of the batch.

    Args:
        module: The network.
        layers: The layers by name.
        batch: The batch, with its padding.
        count: Number of samples without the padding; by default all.
        watch: A context that records more of the pass, such as `Following.recording`.

    Raises:
        NotInThisDtypeError: If the network raises an error.
        ModelError: If it enters an autocast region.
    """
    recording = Recording(len(batch) if count is None else count)
    hooks = _recording_hooks(layers, recording)
    with without_autocast(), hooks, watch(module, batch, recording), explained_errors(batch):
        recording.outputs = outputs_of(module, batch)
    return recording


class CountedNumbers(TorchDispatchMode):
    """Counts the numbers of all tensors that operations compute. A graph keeps at most as many."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += sum(part.numel() for part in tree_leaves(result) if isinstance(part, Tensor))
        return result


def cotangents(recording: Recording) -> Iterator[dict[str, list[Tensor]]]:
    """Yield, output by output, the gradient of that output with respect to every recorded layer output.

    Samples do not mix, so one backward pass per output is enough for the whole batch. The gradient is zero for a layer
    that the output does not depend on. The graph is kept for the check of the batch.
    """
    outputs = recording.outputs
    for index in range(outputs.shape[1]):
        weights = torch.zeros_like(outputs[0])
        weights[index] = 1
        yield pull_back(recording, weights, retain_graph=True)


def pull_back(
    recording: Recording,
    weights: Tensor,  # (outputs,), or (samples, outputs)
    *,
    retain_graph: bool = False,
) -> dict[str, list[Tensor]]:
    """Take the gradient of a weighted sum of the outputs with respect to every recorded layer output."""
    uses = [(name, use) for name, calls in recording.uses.items() for use in calls]
    grads = _gradients(recording.outputs, [use.output for _, use in uses], weights, retain_graph=retain_graph)
    by_layer: dict[str, list[Tensor]] = {name: [] for name in recording.uses}
    for (name, _), grad in zip(uses, grads, strict=True):
        # samples first in memory, so that the order of a sum over positions does not depend on the number of samples
        by_layer[name].append(grad[: recording.count].contiguous())
    return by_layer


def weighted_sum(outputs: Tensor, weights: Tensor) -> Tensor:
    """Sum the outputs with weights. For a scalar, autograd does not import symbolic shapes, which takes seconds."""
    return (outputs * weights).sum()


def _gradients(outputs: Tensor, nodes: Sequence[Tensor], weights: Tensor, *, retain_graph: bool) -> Sequence[Tensor]:
    if not nodes:
        return []
    if not outputs.requires_grad:
        return [torch.zeros_like(node) for node in nodes]
    grads = torch.autograd.grad(weighted_sum(outputs, weights), nodes, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(node) if grad is None else grad for node, grad in zip(nodes, grads, strict=True)]
