"""The contribution of each junction to the Jacobian, from its activations and the gradient of its result.

At a junction y = F(x, W) a weight expression W = φ(θ) meets an activation x. For one sample and output, the Jacobian
row of W is the product of the gradient of y with ∂F/∂W, and that of θ is the row of W times Dφ. A matrix product or a
convolution has the row Σ_t g[t] ⊗ a[t], so it is contracted like a layer. Other functions are differentiated sample by
sample.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd.graph import _engine_run_backward
from torch.func import vjp, vmap
from torch.nn import functional as F

from ntkgen.jacobian.calls import Call, Path
from ntkgen.jacobian.layers import table_rows

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MUL = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_PRODUCTS = {"matmul", "__matmul__", "mm"}
_CONVOLUTIONS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


@dataclass(frozen=True)
class SampleAxis:
    """The axis of a tensor that has the samples; ``is_merged`` if positions of a sample follow each other in it."""

    axis: int
    is_merged: bool = False

    def first(self, tensor: Tensor, num_samples: int) -> Tensor:
        """View a tensor with the samples as first axis."""
        if self.is_merged:
            tensor = torch.unflatten(tensor, self.axis, (num_samples, -1))
        return tensor.movedim(self.axis, 0)

    def back(self, tensor: Tensor) -> Tensor:
        """Undo `first`."""
        moved = tensor.movedim(0, self.axis)
        return moved.flatten(self.axis, self.axis + 1) if self.is_merged else moved

    def alone(self, sample: Tensor) -> Tensor:
        """Make one sample of `first` the only one of a batch."""
        return sample if self.is_merged else sample.unsqueeze(self.axis)


def sample_axis(one: torch.Size, three: torch.Size) -> SampleAxis | None:
    """Find the axis of the samples from the shapes for one and for three samples; None if no axis differs.

    Raises:
        ValueError: If the shapes do not tell.
    """
    if one == three:
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(one, three, strict=True)) if a != b]
    if len(differing) != 1 or three[differing[0]] != 3 * one[differing[0]]:
        raise ValueError("no axis of samples")
    return SampleAxis(differing[0], is_merged=one[differing[0]] != 1)


@dataclass(frozen=True)
class Junction:
    """What every batch must repeat: the function, the parameters that its weights depend on, and the axes of samples.

    Attributes:
        name: Name of the function.
        weights: The parameters of each weight expression, by its path.
        axes: The axis of samples of each tensor argument, by its path; None for one without samples.
        result: The axis of samples of the result.
        form: How it is a matrix product: ``linear`` x Wᵀ, ``right`` x W, ``left`` W x, ``convolution``, or ``""``.
        matrix: The path of the weight of the matrix product.
    """

    name: str
    weights: tuple[tuple[Path, frozenset[str]], ...]
    axes: Mapping[Path, SampleAxis | None]
    result: SampleAxis
    form: str = ""
    matrix: Path = ()

    def accepts(self, call: Call) -> bool:
        """Say whether a call is this junction."""
        return call.name == self.name and tuple(call.weights.items()) == self.weights

    def node(self, result: Tensor, num_samples: int) -> Tensor:
        """View the result with the samples first and, for a matrix product, the channels last."""
        first = self.result.first(result, num_samples)
        return first.mT if self.form == "left" and first.ndim > 2 else first

    def unchanged(self, node: Tensor) -> Tensor:
        """Undo `node`."""
        return self.result.back(node.mT if self.form == "left" and node.ndim > 2 else node)

    def inputs(self, call: Call, num_samples: int) -> Tensor:
        """Find the activation that the matrix is multiplied with, with samples first and the inputs last."""
        path = self._other(call)
        axis = self.axes[path]
        assert axis is not None
        x = axis.first(call.argument(path), num_samples)
        return x.mT if self.form == "left" and x.ndim > 2 else x

    def _other(self, call: Call) -> Path:
        return next(x for form, weight, x in _possible_forms(call) if (form, weight) == (self.form, self.matrix))


def junction_of(
    call: Call, one: Sequence[torch.Size], three: Sequence[torch.Size], result: Sequence[torch.Size]
) -> Junction:
    """Describe a junction, from the shapes of its tensors for one and for three samples.

    Raises:
        ValueError: If the shapes do not tell the axis of the samples.
    """
    paths = [*call.weights, *call.activations]
    axes = {path: sample_axis(a, b) for path, a, b in zip(paths, one, three, strict=True)}
    axis = sample_axis(*result)
    if axis is None:
        raise ValueError("no axis of samples")
    junction = Junction(call.name, tuple(call.weights.items()), axes, axis)
    form, matrix = _form(call, junction)
    return dataclasses.replace(junction, form=form, matrix=matrix)


def _form(call: Call, junction: Junction) -> tuple[str, Path]:
    """Recognise a matrix product of an activation with a weight."""
    for form, weight, x in _possible_forms(call):
        axis = junction.axes.get(x)
        is_weight = weight in call.weights and junction.axes[weight] is None
        if is_weight and x in call.activations and axis is not None and _is_product(call, form, weight, x, axis):
            return form, weight
    return "", ()


def _possible_forms(call: Call) -> list[tuple[str, Path, Path]]:
    """List the forms that a function may have, with the paths of the weight and of the activation."""
    if call.name == "linear":
        return [("linear", (1,) if len(call.args) > 1 else ("weight",), (0,) if call.args else ("input",))]
    if call.name in _PRODUCTS and len(call.args) == 2:
        return [("right", (1,), (0,)), ("left", (0,), (1,))]
    if call.name == "addmm" and len(call.args) == 3 and not call.kwargs:
        return [("right", (2,), (1,))]
    return [("convolution", (1,), (0,))] if call.name in _CONVOLUTIONS and len(call.args) > 1 else []


def _is_product(call: Call, form: str, weight: Path, x: Path, axis: SampleAxis) -> bool:
    """Say whether the samples are not on an axis that is summed over, or where positions are expected."""
    if form == "convolution":
        return axis == SampleAxis(0) and bool(call.argument(x).ndim == call.argument(weight).ndim)
    num_axes = call.argument(x).ndim
    if call.argument(weight).ndim != 2 or num_axes < 2:
        return False
    if form == "left":
        return bool(axis.axis == 1 if num_axes == 2 else axis.axis < num_axes - 2)
    return bool(axis.axis < num_axes - 1)


def convolution_like(call: Call) -> nn.Module:
    """Make a module, without parameters, that has the settings of a call of a convolution."""
    axes = int(call.name[4])

    def each(value: Any) -> tuple[int, ...]:
        return (
            (int(value),) * axes
            if isinstance(value, int)
            else tuple(int(part) for part in value) * (axes // len(value))
        )

    weight = call.argument((1,))
    padding = call.given(4, "padding", 0)
    groups = int(call.given(6, "groups", 1))
    return _CONVOLUTIONS[call.name](
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=each(call.given(3, "stride", 1)),
        padding=padding if isinstance(padding, str) else each(padding),
        dilation=each(call.given(5, "dilation", 1)),
        groups=groups,
        bias=False,
        device="meta",
    )


# rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """A weight expression that has entries of one parameter, times a number: W = c θ[positions].

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
        rows = self._weight_rows(grad)
        if entries is None:
            return pulled(self.weight, param, rows)
        flat = rows.flatten(rows.ndim - self.weight.ndim) if self.weight.ndim else rows.unsqueeze(-1)
        if entries.is_in_order and flat.shape[-1] == param.numel():
            return flat
        found = flat.new_zeros(*flat.shape[:-1], param.numel())
        found[..., entries.positions] = flat * entries.scale
        return found

    def _weight_rows(self, grad: Tensor) -> Tensor:  # (…, samples, *weight)
        if self._last is not None and self._last[0].data_ptr() == grad.data_ptr():  # several parameters of one weight
            return self._last[1]
        rows = self._rows_of(grad)
        self._last = (grad, rows)
        return rows

    def _rows_of(self, grad: Tensor) -> Tensor:
        junction, call = self.junction, self.call
        if self.path == junction.matrix and junction.form != "convolution":
            a = junction.inputs(call, self.num_samples)[: self.count].detach()
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
            values = grad * axis.first(call.argument(path), self.num_samples)[: self.count].detach()
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
        tokens = axis.first(call.argument((0,)), self.num_samples)[: self.count]
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
        values = [
            axis.first(call.argument(path), self.num_samples)[: self.count].detach() for path, axis in batched.items()
        ]

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


def pulled(weight: Tensor, param: Tensor, rows: Tensor) -> Tensor:  # (…, *weight) → (…, parameter)
    """Multiply rows of a weight expression by Dφ, all at once."""
    lead = rows.shape[: rows.ndim - weight.ndim]

    def pull(row: Tensor) -> Tensor:
        keep_graph, create_graph, allow_unused = True, False, True
        (found,) = _engine_run_backward(
            (weight,), (row,), keep_graph, create_graph, (param,), allow_unused, accumulate_grad=False
        )
        return torch.zeros_like(param) if found is None else found

    found: Tensor = _vmap(pull, 0, 0)(rows.reshape(-1, *weight.shape))
    return found.reshape(*lead, param.numel())
