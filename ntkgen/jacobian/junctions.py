"""The contribution of each junction to the Jacobian, from its activations and the gradient of its result.

At a junction y = F(x, W) a weight expression W = φ(θ) meets an activation x. For one sample and output, the Jacobian
row of W is the product of the gradient of y with ∂F/∂W, and that of θ is the row of W times Dφ. A matrix product or a
convolution has the row Σ_t g[t] ⊗ a[t], so it is contracted like a layer. Other functions are differentiated sample by
sample.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.jacobian.calls import Call, Path

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
