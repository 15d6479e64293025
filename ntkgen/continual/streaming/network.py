"""Networks of one architecture whose parameters are stacked, so that a step of all of them is one computation."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ntkgen.continual.streaming.architecture import architecture_of
from ntkgen.continual.streaming.layers import has_parameters, is_rectifier, steps_of
from ntkgen.errors import ModelError


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a forward pass gives.

    Attributes:
        outputs: The outputs, (members, outputs).
        rectified: The outputs of each ReLU, (members, units).
    """

    outputs: Tensor
    rectified: list[Tensor]


class StackedNetwork:
    """Networks that learn side by side. Each one, a member, gets one sample at a time.

    A chain of linear, convolutional, pooling and elementwise layers is computed by `streaming.layers`; any other
    network by `torch.func.vmap`. Both give what the networks give one by one, to rounding.

    Args:
        networks: The networks, all of one architecture.

    Attributes:
        parameters: The parameters by name, with the members first.
        architecture: The classes and attributes of the layers, see `architecture_of`.

    Raises:
        ModelError: If a network has buffers or draws random numbers, so it does not learn from single samples, or no
            weight of it learns.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        first = networks[0]
        _require_single_samples(first)
        self.parameters = _stacked([dict(each.named_parameters()) for each in networks])
        self._module = copy.deepcopy(first)
        self.architecture = architecture_of(first)
        self._steps = steps_of(first)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters that learn. Those with ``requires_grad=False`` in the networks stay as they are."""
        return {name: values for name, values in self.parameters.items() if values.requires_grad}

    @property
    def num_members(self) -> int:
        """Number of networks."""
        return len(next(iter(self.parameters.values())))

    def prepared(self, x: Tensor) -> Tensor:  # (members, …) -> what `forward` gets
        """Compute what does not depend on parameters. It can be used for several forward passes."""
        for step in self._steps or []:
            if has_parameters(step):
                break
            x = step(self.parameters, x)
        return x

    def forward(self, prepared: Tensor) -> Outcome:
        """Compute the outputs of every member for its own sample."""
        if self._steps is None:
            outputs, rectified = vmap(self._call)(self.parameters, prepared)
            return Outcome(outputs, list(rectified))
        x, found, has_begun = prepared, [], False
        for step in self._steps:
            has_begun = has_begun or has_parameters(step)
            if has_begun:
                x = step(self.parameters, x)
                if is_rectifier(step):
                    found.append(x.flatten(1))
        return Outcome(x, found)

    def outputs(self, member: int, x: Tensor) -> Tensor:  # (samples, …) -> (samples, outputs)
        """Compute the outputs of one member for many samples."""
        with torch.no_grad():
            found: Tensor = functional_call(self._module, self.member(member), (x,))
        return found

    def member(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a member. They share memory with the stack."""
        return {name: values.detach()[index] for name, values in self.parameters.items()}

    def module(self, index: int) -> nn.Module:
        """Return a module with a copy of the parameters of a member."""
        found, own = copy.deepcopy(self._module), self.member(index)
        with torch.no_grad():
            for name, values in found.named_parameters():  # a layer that occurs twice has one name here
                values.copy_(own[name])
        return found

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace the parameters of all members."""
        for name, values in self.parameters.items():
            values.copy_(parameters[name])

    def _call(self, parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: found.append(output.flatten()))
            for module in self._module.modules()
            if isinstance(module, nn.ReLU)
        ]
        try:
            outputs: Tensor = functional_call(self._module, parameters, (x[None],))
        finally:
            for hook in hooks:
                hook.remove()
        return outputs[0], tuple(found)


def _stacked(networks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack parameters. All of them are columns of one matrix, which an optimizer can change at once."""
    rows = [torch.cat([values.detach().flatten() for values in each.values()]) for each in networks]
    columns = torch.stack(rows).split([values.numel() for values in networks[0].values()], 1)
    return {
        name: part.view(len(networks), *values.shape).requires_grad_(values.requires_grad)
        for (name, values), part in zip(networks[0].items(), columns, strict=True)
    }


def _require_single_samples(model: nn.Module) -> None:
    """Refuse a network that cannot learn from single samples.

    Raises:
        ModelError: If it has buffers, such as batch norm, or dropout, or all its weights are frozen.
    """
    dropped = [name for name, module in model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if dropped:
        raise ModelError(
            f"This network does not learn from single samples: expected one without dropout, found it in the layer "
            f"{dropped[0]!r}. Was it made for epochs of training? A prediction and its gradient would be of two "
            "networks. Remove the layer, or use a network without, such as lenet-stream or mlp-stream."
        )
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ModelError(
            f"This network does not learn from single samples: expected one without buffers, found {buffers[0]!r}. "
            "Does it have batch norm, whose statistics need a batch? Use a network without, such as lenet-stream or "
            "mlp-stream."
        )
    if not any(values.requires_grad for name, values in model.named_parameters() if name.endswith("weight")):
        raise ModelError(
            "This network does not learn: expected a weight with requires_grad=True, found none. Are all its layers "
            "frozen? Leave at least one of them trainable."
        )
