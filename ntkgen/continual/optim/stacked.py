"""The base of the optimizers: one network, or a stack of independent networks, as a single computation."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ntkgen.continual.optim.names import OPTIONS, checked_value
from ntkgen.continual.optim.noise import Noise
from ntkgen.continual.optim.segments import Layout, Segment, Slot, addresses_of
from ntkgen.errors import InputError, ShapeError

Params = Iterable[Any]
"""What a torch optimizer takes: parameters, named parameters, or groups of them with hyper-parameters."""


class StackedOptimizer(torch.optim.Optimizer):
    """The base of optimizers of one network, or of a stack of independent networks.

    In a stack of k networks the first axis of every parameter and of its gradient is the network. A step of the stack
    equals the steps of k optimizers, one per network: every norm and every maximum is taken within a network. Every
    number among the hyper-parameters is the same in all networks, or a tensor of shape (k,).

    The noise of a network is drawn at once, in the order of the parameters that have a gradient, by
    ``torch.empty(numbers).normal_(generator=…)``, network after network. Nothing is drawn for a network with σ = 0.
    The state of the given generators is part of `state_dict`. If everything that is kept of a parameter becomes zero,
    its number of steps too, it begins anew.

    Parameters without a gradient are left as they are, as in the optimizers of torch. A subclass says what a step does
    to matrices with a row per network and a column per number; see `advance`.

    Attributes:
        draws_ahead: Whether the noise of the next step is drawn by other threads while the networks compute. The
            numbers are the same. The generators must not be used elsewhere then. False at first.

    Args:
        params: Parameters, named parameters, or groups of them.
        defaults: Hyper-parameters by name.
        members: Number k of networks, or None for ordinary parameters of one network.
        generators: A source of noise per network; None for torch's global one.

    Raises:
        InputError: If a hyper-parameter is out of range, parameters differ in their type or device, or the number of
            generators is wrong.
        ShapeError: If a parameter or a hyper-parameter does not have one row per network.
    """

    traces: tuple[str, ...] = ()
    """Names of what is kept of each number, beginning with 0; see `kept` and `beginning`."""
    num_scratch = 1
    """Number of matrices for intermediate results."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        self.members = members
        self.generators = None if generators is None else tuple(generators)
        self.draws_ahead = False
        self._noise = Noise(self.generators)
        self._layout: Layout | None = None
        if self.generators is not None and len(self.generators) != self.num_rows:
            raise InputError(
                f"There is not one source of noise per network: expected {self.num_rows} generators, found "
                f"{len(self.generators)}. Was `members` forgotten? Give a torch.Generator for each network."
            )
        super().__init__(params, defaults)

    @property
    def num_rows(self) -> int:
        """Number of networks."""
        return 1 if self.members is None else self.members

    @property
    def needs_curvature(self) -> bool:
        """Whether a step needs the diagonal of the Hessian."""
        return bool(self.defaults.get("order") == "second")

    # what a subclass says --------------------------------------------------------------------------------------------

    @abstractmethod
    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step: change ``w`` and the traces of all parameters of some networks.

        Args:
            segments: The parameters, by group.
        """

    def kept(self, position: int) -> tuple[str, ...]:  # noqa: ARG002 - a subclass uses it
        """Name the traces that belong to the state of a parameter, given by its position among all of them."""
        return self.traces

    def beginning(self, trace: str, param: Tensor) -> Tensor | None:  # noqa: ARG002 - a subclass uses it
        """Return what the trace of a parameter begins with, or None for zeros."""
        return None

    # parameters and their hyper-parameters ---------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in every torch optimizer.

        Raises:
            InputError: If a hyper-parameter is out of range, or parameters differ in their type or device.
            ShapeError: If a parameter or a hyper-parameter does not have one row per network.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except (InputError, ShapeError):
            self.param_groups.pop()
            raise
        self._layout = None

    def _check(self, group: dict[str, Any]) -> None:
        for name, value in group.items():
            if name not in OPTIONS:
                continue
            if OPTIONS[name].kind is not float and value != self.defaults[name]:
                raise InputError(
                    f"A group of parameters has a choice of its own: expected `{name}` {self.defaults[name]!r} as in "
                    f"all groups, found {value!r}. Only numbers, such as `lr`, may differ. Use an optimizer for each."
                )
            if isinstance(value, Tensor) and value.ndim:
                self._check_tensor(name, value)
            else:
                group[name] = checked_value(name, value.item() if isinstance(value, Tensor) else value)
        first = self.param_groups[0]["params"][0]
        for param in group["params"]:
            if self.members is not None and param.shape[:1] != (self.members,):
                raise ShapeError(
                    f"A parameter is no stack of networks: expected {self.members} as the first axis, the number of "
                    f"`members`, found the shape {tuple(param.shape)}. Are these the parameters of one network? Stack "
                    "them, or leave `members` out."
                )
            if not param.is_floating_point() or param.dtype != first.dtype or param.device != first.device:
                raise InputError(
                    f"The parameters cannot be trained together: expected {first.dtype} on {first.device} as the first "
                    f"one has, a floating-point type, found {param.dtype} on {param.device}. Is a part of the network "
                    "on another device or in another precision? Use one optimizer for each part."
                )

    def _check_tensor(self, name: str, value: Tensor) -> None:
        if self.members is None or value.shape != (self.members,) or OPTIONS[name].kind is not float:
            expected = "one number" if self.members is None else f"one number, or the shape ({self.members},)"
            raise ShapeError(
                f"The hyper-parameter `{name}` does not fit: expected {expected}, found a tensor of shape "
                f"{tuple(value.shape)}. Was `members` forgotten? Give one value per network of a stack."
            )
        for each in value.tolist():
            checked_value(name, each)

    # state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the given generators, as plain values and tensors."""
        self._noise.rewind()
        found = super().state_dict()
        if self.generators is not None:
            found["generators"] = [generator.get_state() for generator in self.generators]
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` has returned. The tensors are copied."""
        self._noise.rewind()  # first: loading makes a new source, which knows nothing of drawing threads
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name, value in state.items():
                state[name] = value.clone() if isinstance(value, Tensor) else value
        for generator, state in zip(self.generators or (), state_dict.get("generators", ()), strict=False):
            generator.set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        self._noise.rewind()
        own = {"members": self.members, "generators": self.generators, "draws_ahead": self.draws_ahead}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layout = None
        self._noise = Noise(self.generators)

    # a step ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        curvature: Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Take a step.

        Args:
            closure: Computes the loss and its gradients anew.
            curvature: Diagonal of the Hessian for each parameter, in the order of the parameters, for learners of
                second order; see `hessian_diagonal`.

        Returns:
            What the closure returns.

        Raises:
            InputError: If the optimizer needs the curvature and there is none, or a gradient is sparse.
            ShapeError: If a curvature does not have the shape of its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_noisy = self._noisy_rows()
        layout = self._current_layout(has_noise=any(is_noisy))
        if layout is None:
            return loss
        params = [self._stacked(slot.param) for slot in layout.slots]
        grads = [self._stacked(cast("Tensor", slot.param.grad)) for slot in layout.slots]
        curved = self._curvature(layout, curvature) if self.needs_curvature else []
        if layout.noise is not None:
            self._noise.take(layout.noise, is_noisy)
        for block in layout.blocks:
            if not layout.is_in_place:
                block.gather(block.w, params)
            block.gather(block.g, grads)
            if block.h is not None:
                block.gather(block.h, curved)
            for segment in block.segments:
                segment.step += 1
            self.advance(block.segments)
            if not layout.is_in_place:
                block.scatter(block.w, params)
        layout.num_steps += 1
        torch._foreach_add_([self.state[slot.param]["step"] for slot in layout.slots], 1)
        if self.draws_ahead and layout.noise is not None:
            self._noise.draw_ahead(layout.noise, is_noisy)
        return loss

    def _stacked(self, tensor: Tensor) -> Tensor:  # (*shape) or (members, *shape) → (networks, *shape)
        return tensor if self.members is not None else tensor.unsqueeze(0)

    def _noisy_rows(self) -> list[bool]:
        """Say for each network whether noise is drawn."""
        is_noisy = [False] * self.num_rows
        for group in self.param_groups:
            sigma = group.get("sigma", 0.0)
            values = sigma.tolist() if isinstance(sigma, Tensor) and sigma.ndim else [float(sigma)] * self.num_rows
            is_noisy = [before or value > 0 for before, value in zip(is_noisy, values, strict=True)]
        return is_noisy

    def _curvature(self, layout: Layout, curvature: Sequence[Tensor | None] | None) -> list[Tensor]:
        """Find the curvature of the parameters that have a gradient.

        Raises:
            InputError: If there is none.
            ShapeError: If it does not have the shape of its parameter.
        """
        num_params = sum(len(group["params"]) for group in self.param_groups)
        if curvature is None or len(curvature) != num_params:
            found = "none" if curvature is None else f"{len(curvature)} tensors"
            raise InputError(
                f"A step of {type(self).__name__} of second order has no curvature: expected the diagonal of the "
                f"Hessian for {num_params} parameters, found {found}. Is a first-order utility meant? Give "
                '`curvature`, for example from `hessian_diagonal`, or use order="first".'
            )
        chosen = []
        for slot in layout.slots:
            h = curvature[slot.position]
            if h is None or h.shape != slot.param.shape:
                raise ShapeError(
                    f"The curvature of parameter {slot.position} does not fit: expected the shape "
                    f"{tuple(slot.param.shape)}, found {None if h is None else tuple(h.shape)}. Is it in another "
                    "order than the parameters? Give one tensor per parameter, in their order."
                )
            chosen.append(self._stacked(h))
        return chosen

    # the matrices ----------------------------------------------------------------------------------------------------

    def _current_layout(self, *, has_noise: bool) -> Layout | None:
        """Return the matrices of the parameters that have a gradient; they are made anew where something changed."""
        active = [each for each in self._positions() if each[1].grad is not None]
        if not active:
            return None
        layout = self._layout
        if layout is None or (layout.noise is not None) != has_noise or not self._fits(layout, active):
            layout = self._layout = self._made_layout(active, has_noise=has_noise)
        return layout

    def _known_layout(self) -> Layout | None:
        """Return the newest matrices. After `load_state_dict` they are those of the parameters that have a state."""
        active = [each for each in self._positions() if self.state.get(each[1])]
        if self._layout is None and active:
            self._layout = self._made_layout(active, has_noise=False)
        return self._layout

    def _positions(self) -> list[tuple[int, Tensor, dict[str, Any]]]:
        """List all parameters with their positions and their groups."""
        pairs = ((param, group) for group in self.param_groups for param in group["params"])
        return [(position, param, group) for position, (param, group) in enumerate(pairs)]

    def _fits(self, layout: Layout, active: Sequence[tuple[int, Tensor, dict[str, Any]]]) -> bool:
        """Say whether matrices still are those of some parameters, and what the optimizer keeps of them."""
        if len(active) != len(layout.slots) or layout.addresses != addresses_of(layout.slots):
            return False
        for slot, views, (_, param, group) in zip(layout.slots, layout.views, active, strict=True):
            if param is not slot.param or group is not slot.group or (param.dtype, param.device) != layout.kind:
                return False
            state = self.state[param]
            if int(state.get("step", -1)) != slot.step + layout.num_steps:
                return False
            if any(state.get(name) is not view for name, view in views.items()):
                return False
        return True

    def _made_layout(self, active: Sequence[tuple[int, Tensor, dict[str, Any]]], *, has_noise: bool) -> Layout:
        slots, start = [], 0
        for position, param, group in active:
            if param.grad is not None and param.grad.is_sparse:
                raise InputError(
                    f"The gradient of parameter {position} is sparse: expected a dense one. Is it of an embedding with "
                    "`sparse=True`? Make it without this option."
                )
            shape = param.shape if self.members is None else param.shape[1:]
            columns = slice(start, start + shape.numel())
            slots.append(Slot(param, position, group, int(self.state[param].get("step", 0)), columns, shape))
            start = columns.stop
        layout = Layout(
            slots,
            self.num_rows,
            self.traces,
            self.num_scratch,
            has_curvature=self.needs_curvature,
            has_noise=has_noise,
        )
        for slot, views in zip(slots, layout.views, strict=True):
            state = self.state[slot.param]
            state.setdefault("step", torch.zeros((), dtype=torch.int64, device="cpu"))
            for name in self.kept(slot.position):
                # what has been set to zero, its number of steps too, begins anew
                before = state[name] if slot.step and name in state else self.beginning(name, slot.param)
                if before is not None:
                    views[name].copy_(before)
                state[name] = views[name]
            for name in views.keys() - self.kept(slot.position):
                del views[name]
        return layout
