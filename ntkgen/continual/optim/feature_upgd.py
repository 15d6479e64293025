"""UPGD with a utility per hidden unit, and the gates that measure it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ntkgen.continual.optim.descent import decay, descend
from ntkgen.continual.optim.segments import Segment
from ntkgen.continual.optim.stacked import Params, StackedOptimizer
from ntkgen.continual.optim.upgd import gated_direction
from ntkgen.continual.optim.utility import accumulate, largest_utility, unprotected
from ntkgen.errors import InputError, ModelError

# Name of the parameter of a gate. An optimizer recognises gates by it.
GATE = "gate"
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SiLU)
# Layers that may stand between a layer and its activation, because they keep its units.
TRANSPARENT = (nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity)


class Gate(nn.Module):
    """Multiplies each hidden unit by 1, so that the derivative by this factor tells the utility of the unit.

    Args:
        units: Number of units, the second axis of the inputs.
        like: A tensor of the type and on the device that the factors get.
    """

    def __init__(self, units: int, like: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(units, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:  # (samples, units, …) → (samples, units, …)
        """Multiply by the gate."""
        return x * self.gate.view(-1, *[1] * (x.ndim - 2))


def gated(model: nn.Sequential) -> nn.Sequential:
    """Put a `Gate` behind each activation of a sequential network.

    Args:
        model: The network. Its layers, and so its parameters, are shared with the result.

    Returns:
        A network with the same outputs. Layers keep their names, and the gate behind layer ``name`` is ``name_gate``.

    Raises:
        ModelError: If the network is not sequential, or the units of an activation are not those of a linear layer or a
            convolution.
    """
    made, _ = _gated(model, None)
    return made


def _gated(model: nn.Module, feeding: nn.Module | None) -> tuple[nn.Sequential, nn.Module | None]:
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise ModelError(
            f"{type(model).__name__} cannot get gates: expected a torch.nn.Sequential, whose layers run in turn, found "
            "another module. Does it join paths? Use a learner with a utility per weight."
        )
    made = nn.Sequential()
    for name, layer in model.named_children():
        if isinstance(layer, nn.Sequential):
            inner, feeding = _gated(layer, feeding)
            made.add_module(name, inner)
            continue
        made.add_module(name, layer)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            feeding = layer
        elif isinstance(layer, ACTIVATIONS) and feeding is not None:
            made.add_module(f"{name}_{GATE}", Gate(len(feeding.weight), feeding.weight))  # type: ignore[arg-type]
            feeding = None
        elif isinstance(layer, ACTIVATIONS):
            raise ModelError(
                f"The activation {name} ({type(layer).__name__}) cannot get a gate: expected one that acts on the "
                "units of a torch.nn.Linear or Conv2d, found none before it. Does another layer stand between them? "
                "Put the activation directly behind its layer, or use a learner with a utility per weight."
            )
        elif not isinstance(layer, TRANSPARENT):
            feeding = None
    return made, feeding


class FeatureUPGD(StackedOptimizer):
    """UPGD with a utility per hidden unit: weights that enter a useful unit get small steps and little noise.

    The network has gates, factors q = 1 of its hidden units; see `gated`. The utility of a unit is U = −q ∂L/∂q to
    first order, or −q ∂L/∂q + ½ q² ∂²L/∂q² to second order, which is the change of the loss if the unit becomes 0. It
    is averaged and scaled to s as in `UPGD`, among all units (``global``) or those of a layer (``local``). For weights
    and biases of the layer that feeds unit i, a step is

        w ← (1 − αλ) w − α (g + ξ) (1 − sᵢ)     protecting
        w ← (1 − αλ) w − α (g + ξ (1 − sᵢ))     not protecting

    with ξ = σ N(0, 1). All other parameters take the step w ← (1 − αλ) w − α g. Gates keep the value 1.

    References:
        Elsayed, Mahmood (2024), ICLR, arXiv:2404.00781, feature-wise UPGD.

    Args:
        params: Named parameters of a network with gates, in the order of the network, or groups of them.
        lr: Learning rate α.
        beta_utility: Decay rate β of the running mean of the utilities.
        sigma: Standard deviation σ of the noise.
        weight_decay: Weight decay λ.
        order: ``first`` or ``second`` order of the utility; the second one needs ``curvature`` in `step`.
        normalisation: ``global`` or ``local``.
        largest: Whether utilities are divided by the largest ``corrected`` or the largest ``raw`` one.
        protecting: Whether weights of useful units are protected from the gradient too.
        members: Number of networks of a stack; None for one network.
        generators: A source of noise per network; None for torch's global one.

    Raises:
        InputError: If there are no gates among the parameters, or the parameters have no names.
        UnknownNameError: If there is no such choice.
    """

    traces = ("utility",)

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        beta_utility: float | Tensor = 0.999,
        sigma: float | Tensor = 0.001,
        weight_decay: float | Tensor = 0.0,
        *,
        order: str = "first",
        normalisation: str = "global",
        largest: str = "corrected",
        protecting: bool = True,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta_utility": beta_utility,
            "sigma": sigma,
            "weight_decay": weight_decay,
            "order": order,
            "normalisation": normalisation,
            "largest": largest,
            "protecting": protecting,
        }
        super().__init__(params, defaults, members=members, generators=generators)
        if not self._gate_of().values():
            raise InputError(
                "FeatureUPGD has no gates: expected named parameters with gates among them, found no gate. Were the "
                "parameters of the network without gates given? Give `gated(model).named_parameters()`."
            )

    def _gate_of(self) -> dict[int, int]:
        """Find the gate of each parameter that feeds one, by their positions."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        params = [param for group in self.param_groups for param in group["params"]]
        axis = 0 if self.members is None else 1
        found: dict[int, int] = {}
        for position, name in enumerate(names):
            if not _is_gate(name):
                continue
            found[position] = position
            for before in range(position - 1, -1, -1):
                if _is_gate(names[before]) or params[before].shape[axis : axis + 1] != params[position].shape[axis:]:
                    break
                found[before] = position
                if params[before].ndim > axis + 1:  # the weight: what is before it belongs to another layer
                    break
        return found

    def kept(self, position: int) -> tuple[str, ...]:
        """Keep the utilities of gates alone."""
        return self.traces if self._gate_of().get(position) == position else ()

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        choices, gate_of = self.defaults, self._gate_of()
        single = {each.slots[0].position: each for segment in segments for each in segment.singles()}
        gates = {position: each for position, each in single.items() if gate_of.get(position) == position}
        for gate in gates.values():
            accumulate(gate)
        largest = None
        if choices["normalisation"] == "global" and gates:
            largest = largest_utility(list(gates.values()), choices["largest"])
        shares = {position: unprotected(gate, largest, gate.scratch[0]) for position, gate in gates.items()}
        for position, each in single.items():
            if position in gates:
                continue
            decay(each)
            share = shares.get(gate_of.get(position, -1))
            if share is not None:
                each.scratch[0].view(*share.shape, -1).copy_(share.unsqueeze(-1))
                gated_direction(each, each.scratch[0], protecting=choices["protecting"], gate_noise=True)
            descend(each, each.g)


def _is_gate(name: str) -> bool:
    return name.rpartition(".")[2] == GATE
