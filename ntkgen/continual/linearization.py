"""The lazy error: how far the outputs move from those of the network linearised at an earlier time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.jacobian.evaluation import as_input, evaluation_copy, outputs_of
from ntkgen.jacobian.modes import PUSHES, choose_push
from ntkgen.jacobian.patterns import COMPILED
from ntkgen.jacobian.precision import exact_arithmetic

# Maximum number of samples per forward pass.
BATCH_SIZE = 256
# What is measured at each time.
MEASURES = {
    "lazy_error": "‖Δf − J Δθ‖_F / ‖Δf‖_F of the outputs on the probe, since the last recorded time",
    "lazy_error_from_start": "‖Δf − J Δθ‖_F / ‖Δf‖_F of the outputs on the probe, since the first recorded time",
    "buffer_drift": "‖f(θ', b') − f(θ', b)‖_F / ‖f(θ', b') − f(θ, b)‖_F since the last recorded time: the part of the "
    "change of the outputs that buffers make",
}

# The parameters and buffers of a network by name, and its outputs on the probe.
State = dict[str, Tensor]
OUTPUTS = "outputs on the probe"


class LazyError:
    """Compares the change of a network's outputs on the probe with the change to first order in the parameters.

    From the parameters θ and buffers b to θ' and b', the outputs change by Δf = f(θ', b) − f(θ, b), and the linearised
    network by J Δθ with the Jacobian J at (θ, b) and Δθ = θ' − θ. The lazy error is ‖Δf − J Δθ‖_F / ‖Δf‖_F (Chizat,
    Oyallon, Bach 2019, arXiv:1812.07956, for lazy training). The change that buffers make, such as the statistics of
    batch norm, f(θ', b') − f(θ', b), is not part of Δf and is reported apart. The network is in evaluation mode. The
    given network and all random states are not changed. Rounding limits a lazy error to about ε ‖f‖ / ‖Δf‖, where ε is
    1e-7 in float32 and 1e-16 in float64.

    If a head has grown, the outputs that existed before are compared.

    Args:
        model: The network.
        probe: The probe samples, (n, …).
        dtype: The dtype of the computation.
    """

    def __init__(self, model: nn.Module, probe: Tensor, dtype: torch.dtype) -> None:
        self._probe, self._dtype = probe, dtype
        self._prepare(model)
        self._first: State | None = None
        self._last: State | None = None

    def measure(
        self,
        model: nn.Module,
        outputs: Tensor,  # (n, outputs)
        *,
        is_first: bool,
    ) -> dict[str, float]:
        """Compare with the last and the first time, and take this time as the next last one.

        Args:
            model: The network.
            outputs: Its outputs on the probe.
            is_first: Whether this is the first time.

        Returns:
            The numbers of `MEASURES`; NaN where there is no earlier time, or where the outputs have not changed.
        """
        state = _tensors(model)
        if _shapes(state) != self._shapes or _trained(model) != self._trained:
            self._prepare(model)
        state[OUTPUTS] = outputs
        with exact_arithmetic(self._device):
            error, drift = self._compared(self._last, state)
            from_start = error if self._first is self._last else self._compared(self._first, state)[0]
        self._last = state
        if is_first:
            self._first = state
        return dict(zip(MEASURES, (error, from_start, drift), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters, buffers and outputs of the first and the last time."""
        return {"first": self._first, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""
        self._first, self._last = state["first"], state["last"]

    def _prepare(self, model: nn.Module) -> None:
        self._device = next((param.device for param in model.parameters()), torch.device("cpu"))
        self._module = evaluation_copy(model, self._dtype)
        self._shapes, self._trained = _shapes(_tensors(model)), _trained(model)
        self._batches = as_input(self._probe, self._dtype, self._device).split(BATCH_SIZE)
        with exact_arithmetic(self._device):
            self._push = PUSHES[choose_push(self._module, self._batches[0][:1])]

    def _compared(self, before: State | None, after: State) -> tuple[float, float]:
        """Compute the lazy error, and the part of the change that buffers make."""
        if before is None or (moved := _moved(before, after, self._trained)) is None:
            return float("nan"), float("nan")
        first, last = before[OUTPUTS].to(self._device), after[OUTPUTS]
        last = last[:, : first.shape[1]]
        reached = last if self._is_same(moved, after) else self._outputs(moved)
        self._load(before)
        own = dict(self._module.named_parameters())
        directions = [(moved[name].to(own[name]) - own[name].detach())[None] for name in self._trained]
        linear = torch.cat([self._push(self._module, batch, directions)[0] for batch in self._batches]).detach()
        change = reached - first
        return _ratio(change - linear, change), _ratio(last - reached, last - first)

    def _is_same(self, moved: State, after: State) -> bool:
        """Check whether the trained parameters alone have changed. They are equal by construction."""
        others = [name for name in moved if name != OUTPUTS and name not in self._trained]
        has_grown = any(moved[name].shape != after[name].shape for name in self._trained)
        return not has_grown and all(torch.equal(moved[name].to(after[name]), after[name]) for name in others)

    def _outputs(self, state: State) -> Tensor:
        self._load(state)
        with torch.no_grad():
            return torch.cat([outputs_of(self._module, batch) for batch in self._batches])

    def _load(self, state: State) -> None:
        """Give our copy the tensors of a state. A head may have another number of rows than when it was copied."""
        for name, param in self._module.named_parameters():
            param.data = state[name].to(param).contiguous()
        for name, buffer in self._module.named_buffers():
            buffer.data = state[name].to(buffer, copy=True)  # a network may count its calls in one


def _tensors(model: nn.Module) -> State:
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace(COMPILED, ""): tensor.detach().clone() for name, tensor in found}


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _trained(model: nn.Module) -> list[str]:
    return [name.replace(COMPILED, "") for name, param in model.named_parameters() if param.requires_grad]


def _moved(before: State, after: State, trained: list[str]) -> State | None:
    """Take the trained parameters of the later state, and all else of the earlier one; None if they do not fit."""
    if before.keys() != after.keys() or not all(_fits(before[name], after[name]) for name in trained):
        return None
    moved = dict(before)
    for name in trained:
        moved[name] = after[name] if before[name].ndim == 0 else after[name][: len(before[name])]
    return moved


def _fits(before: Tensor, after: Tensor) -> bool:
    """Check whether a tensor has kept its shape, or has got more rows."""
    return before.shape == after.shape or (
        before.ndim == after.ndim > 0 and before.shape[1:] == after.shape[1:] and len(before) < len(after)
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size else float("nan")
