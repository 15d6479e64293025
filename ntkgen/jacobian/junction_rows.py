"""The rows of parameters in a junction, from its activations and the gradient of its result."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional as F

from ntkgen.jacobian.calls import Call, Path
from ntkgen.jacobian.junctions import Junction
from ntkgen.jacobian.layers import table_rows
from ntkgen.jacobian.together import pull_together, zeros_for

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MUL = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}


@dataclass(frozen=True)
class Entries:
    """A weight expression that has entries of one parameter, times a number: W = c θ[positions], plus a constant.

    Attributes:
        positions: The entry of the flattened parameter that each entry of the flattened W is.
        scale: The number c.
    """

    positions: Tensor
    scale: float

    @functools.cached_property
    def is_in_order(self) -> bool:
        """Whether W has the first entries of the parameter, in their order."""
        order = torch.arange(len(self.positions), device=self.positions.device)
        return self.scale == 1 and torch.equal(self.positions, order)

    def now(self, weight: Tensor, param: Tensor) -> "Entries | None":
        """Return the entries with the present number c, which may depend on a buffer; None if others are used."""
        if weight is param or (self.scale == 1 and _share_memory(weight, param)):
            return self
        if _equal(weight.detach().flatten(), self.scale * param.detach().flatten()[self.positions]):
            return self
        found = entries_of(weight, param)
        return found if found is not None and torch.equal(found.positions, self.positions) else None


def _share_memory(weight: Tensor, param: Tensor) -> bool:
    return weight.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Say whether two weights are equal to rounding."""
    rounding = 32 * torch.finfo(found.dtype).eps
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())


def entries_of(weight: Tensor, param: Tensor) -> Entries | None:
    """Find which entries of a parameter a weight expression has, from the products of Dφ with 1 and with 1, 2, 3, …."""
    numbers = torch.arange(1, weight.numel() + 1, dtype=weight.dtype, device=weight.device).view(weight.shape)
    if weight is param:
        return Entries(torch.arange(param.numel(), device=param.device), 1.0)
    if weight.is_complex() or param.is_complex():
        return None
    ones, found = (
        torch.autograd.grad(weight, param, each, retain_graph=True)[0].flatten()
        for each in (torch.ones_like(weight), numbers)
    )
    used = ones.nonzero().flatten()
    if len(used) != weight.numel():
        return None
    scale = float(ones[used[0]])
    order = (found[used] / scale).round()
    is_exact = torch.allclose(ones[used], ones[used[0]], rtol=1e-12, atol=0) and torch.allclose(
        found[used], scale * order, rtol=1e-9, atol=0
    )
    places = order.long() - 1
    if not is_exact or int(places.min()) < 0 or len(places.unique()) != weight.numel():
        return None
    positions = torch.empty_like(places)
    positions[places] = used
    return Entries(positions, scale)


@dataclass(eq=False)
class Meeting:
    """A junction in one batch, from which rows are computed.

    Attributes:
        junction: The junction.
        call: The call, whose activations are those of the batch.
        path: The path of the weight.
        node_ndim: Number of axes of the node.
        num_samples: Number of samples of the batch, with its padding.
        count: Number of samples without the padding.
    """

    junction: Junction
    call: Call
    path: Path
    node_ndim: int
    num_samples: int
    count: int
    _last: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def weight(self) -> Tensor:
        """The weight expression, in the graph of its parameters."""
        found: Tensor = self.call.argument(self.path)
        return found

    def rows(self, param: Tensor, entries: Entries | None, grad: Tensor) -> Tensor:  # (…, samples, parameter)
        """Compute the rows of a parameter from the gradient of the node, (samples, …) or (outputs, samples, …)."""
        rows = self.weight_rows(grad)
        if entries is None:
            return pulled([self.weight], [rows], [param])[0][..., : self.count, :]
        flat = rows.flatten(rows.ndim - self.weight.ndim) if self.weight.ndim else rows.unsqueeze(-1)
        flat = flat[..., : self.count, :]
        if entries.is_in_order and flat.shape[-1] == param.numel():
            return flat
        found = flat.new_zeros(*flat.shape[:-1], param.numel())
        found[..., entries.positions] = flat * entries.scale
        return found

    def weight_rows(self, grad: Tensor) -> Tensor:  # (…, samples with the padding, *weight)
        """Compute the rows of the weight expression from the gradient of the node.

        The rows of the padding are zero. They are computed too, because the bits of a sample's rows may depend on the
        number of samples.
        """
        if self._last is not None and self._last[0].data_ptr() == grad.data_ptr():  # several parameters of one weight
            return self._last[1]
        padding = [0, 0] * (self.node_ndim - 1) + [0, self.num_samples - self.count]
        rows = self._rows_of(F.pad(grad, padding) if self.count < self.num_samples else grad)
        self._last = (grad, rows)
        return rows

    def _rows_of(self, grad: Tensor) -> Tensor:
        junction, call = self.junction, self.call
        if self.path == junction.matrix and junction.form != "convolution":
            a = junction.inputs(call, self.num_samples).detach()
            flat = grad.flatten(a.ndim - 2 + self._extra(grad), -2) if a.ndim > 2 else grad.unsqueeze(-2)
            rows: Tensor = flat.mT @ a.reshape(len(a), -1, a.shape[-1])
            return rows.mT if junction.form == "right" else rows
        if junction.form == "left" and grad.ndim - self._extra(grad) > 2:
            grad = grad.mT
        simple = self._simple(grad)
        if simple is not None:
            return simple
        return vmap(self._differentiated)(grad) if self._extra(grad) else self._differentiated(grad)

    def _extra(self, grad: Tensor) -> int:
        """Count the axes before that of the samples: 1 if there are several outputs."""
        return grad.ndim - self.node_ndim

    def _simple(self, grad: Tensor) -> Tensor | None:
        """Compute the rows of a sum, a product or a table, without differentiating; None for another function."""
        junction, call = self.junction, self.call
        if junction.axes[self.path] is not None:
            return None
        if junction.name == "embedding":
            return self._of_table(grad)
        values, bias = grad, {"linear": 2, "addmm": 0}.get(junction.name)
        if junction.name in _MUL and len(call.args) == 2:
            path = (1 - int(self.path[0]),)
            axis = junction.axes.get(path)
            if axis is None or axis != junction.result or call.argument(path).ndim != self._num_axes:
                return None
            values = grad * axis.first(call.argument(path), self.num_samples).detach()
        elif call.kwargs or not (self.path == (bias,) or junction.name in _ADD):
            return None
        lead = 1 + self._extra(grad)
        # the axes of a batch of one, behind that of the samples
        alone = values if junction.result.is_merged else values.unsqueeze(junction.result.axis + lead)
        missing = self._num_axes - self.weight.ndim
        if missing < 0:
            return None
        shape = (1,) * missing + tuple(self.weight.shape)
        summed = [axis + lead for axis, size in enumerate(shape) if size == 1 and alone.shape[axis + lead] != 1]
        rows = alone.sum(summed) if summed else alone
        return rows.reshape(*rows.shape[:lead], *self.weight.shape)

    @property
    def _num_axes(self) -> int:
        """Number of axes of the result."""
        return self.node_ndim - self.junction.result.is_merged

    def _of_table(self, grad: Tensor) -> Tensor | None:
        """Add the gradient at each token to the row of the token."""
        call, axis = self.call, self.junction.axes.get((0,))
        settings = [
            call.given(number, name) for number, name in ((3, "max_norm"), (5, "scale_grad_by_freq"), (6, "sparse"))
        ]
        if axis is None or self.path != (1,) or any(settings):
            return None
        tokens = axis.first(call.argument((0,)), self.num_samples)
        many = grad.flatten(0, 1) if self._extra(grad) else grad
        tokens = tokens.repeat(len(many) // len(tokens), *[1] * (tokens.ndim - 1))
        padding = call.given(2, "padding_idx")
        rows = table_rows(tokens, many, self.weight.shape[0], None if padding is None else int(padding))
        return rows.unflatten(0, grad.shape[:2]) if self._extra(grad) else rows

    def _differentiated(self, grad: Tensor) -> Tensor:
        """Differentiate the function with respect to the weight, for each sample alone."""
        junction, call = self.junction, self.call
        of_weights = {path: self._alone(path) for path in call.weights}
        weight = of_weights.pop(self.path)
        batched = {path: axis for path, axis in junction.axes.items() if axis is not None and path not in call.weights}
        values = [axis.first(call.argument(path), self.num_samples).detach() for path, axis in batched.items()]

        def one(g: Tensor, *samples: Tensor) -> Tensor:
            alone = {path: axis.alone(x) for (path, axis), x in zip(batched.items(), samples, strict=True)}

            def result(w: Tensor) -> Tensor:
                found: Tensor = call.called_with({**of_weights, **alone, self.path: w})
                return found

            pulled_back: Tensor = vjp(result, weight)[1](junction.result.alone(g))[0]
            return pulled_back

        with torch.no_grad():
            rows: Tensor = vmap(one)(grad, *values)
        axis = junction.axes[self.path]
        if axis is None:
            return rows
        # the weight has samples, which are equal, because it was expanded: they count as one
        behind = self.weight.ndim - 1 - axis.axis
        return F.pad(rows, [0, 0] * behind + [0, self.weight.shape[axis.axis] - weight.shape[axis.axis]])

    def _alone(self, path: Path) -> Tensor:
        """Take what a weight is for a batch of one."""
        weight: Tensor = self.call.argument(path).detach()
        axis = self.junction.axes[path]
        if axis is None:
            return weight
        return weight.narrow(axis.axis, 0, weight.shape[axis.axis] // self.num_samples)


def pulled(
    weights: Sequence[Tensor], rows: Sequence[Tensor], params: Sequence[Tensor]
) -> list[Tensor]:  # each (…, *weight) → each (…, parameter)
    """Multiply rows of weight expressions by Dφ, and sum over the expressions of each parameter, all at once."""
    lead = rows[0].shape[: rows[0].ndim - weights[0].ndim]
    flat = [each.reshape(-1, *weight.shape) for each, weight in zip(rows, weights, strict=True)]
    found = zip(params, pull_together(weights, flat, params), strict=True)
    passes = len(flat[0])
    return [(zeros_for(param, passes) if grad is None else grad).reshape(*lead, -1) for param, grad in found]
