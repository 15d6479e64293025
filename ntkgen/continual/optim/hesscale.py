"""HesScale: an approximation of the diagonal of the Hessian, at the cost of about one backward pass."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ntkgen.continual.optim.feature_upgd import Gate
from ntkgen.errors import InputError, ModelError, ShapeError, UnknownNameError

LOSSES = ("cross-entropy", "mse")

Values = Mapping[str, Tensor]
"""The parameters of a layer by their names in the layer."""
Back = tuple[Tensor, dict[str, Tensor]]
"""The curvature of the inputs of a layer, and that of its parameters."""


@dataclass(frozen=True)
class Rule:
    """What a kind of layers does to inputs and to curvature.

    Attributes:
        forward: Computes the outputs from the layer, its parameters and its inputs.
        backward: Computes the curvature of inputs and parameters from the layer, its parameters, its inputs, and the
            curvature and gradient of its outputs.
        is_curved: Whether it needs this gradient.
    """

    forward: Callable[[Any, Values, Tensor], Tensor]
    backward: Callable[[Any, Values, Tensor, tuple[Tensor, Tensor]], Back]
    is_curved: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer of a sequential network.

    Attributes:
        module: The layer.
        rule: Its rule.
        values: Its parameters, by their names in the layer.
        names: Their names in the network.
    """

    module: nn.Module
    rule: Rule
    values: Values
    names: Mapping[str, str]


def hessian_diagonal(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    x: Tensor,  # (samples, …)
    targets: Tensor,  # (samples,), or the shape of the outputs for mse
    loss: str = "cross-entropy",
) -> dict[str, Tensor]:
    """Approximate the diagonal of the Hessian of a mean loss in the parameters of a sequential network.

    From the last layer to the first, h = ∂²L/∂a² is carried back as if the Hessian in the outputs a of each layer were
    diagonal. At the outputs, h = (p − p²) / N for the cross-entropy with probabilities p, and h = 2 / (N · outputs) for
    the squared error. Through a = W x + b,

        h_W = Σₙ h_a ⊗ x²,   h_b = Σₙ h_a,   h_x = (W²)ᵀ h_a,

    with squares of each number; through an activation x = φ(a), h_a = φ'(a)² h_x + φ''(a) ∂L/∂x. A convolution is such
    a linear map, with sums over positions. It is exact for a single layer. It works under `torch.func.vmap`, for stacks
    of networks.

    References:
        Elsayed, Mahmood (2022), HesScale, arXiv:2210.11639.

    Args:
        model: A `torch.nn.Sequential` of linear layers, convolutions, ReLU, leaky ReLU, tanh, max-pooling, average
            pooling, flattening and gates.
        parameters: Its parameters by name, or some of them. The others are those of the network.
        x: Inputs.
        targets: Labels for the cross-entropy, outputs for the squared error.
        loss: ``cross-entropy`` or ``mse``, each a mean.

    Returns:
        The approximation for each of the given parameters, by name, in their order.

    Raises:
        ModelError: If a layer is of another kind.
        InputError: If the network does not have one of the parameters.
        ShapeError: If outputs and targets do not fit.
        UnknownNameError: If there is no such loss.
    """
    names = {id(own): name for name, own in model.named_parameters()}
    layers = list(_layers(model, "", names, parameters))
    inputs = [x]
    for layer in layers:
        inputs.append(layer.rule.forward(layer.module, layer.values, inputs[-1]))
    found = _carried_back(layers, inputs, *_at_outputs(inputs[-1], targets, loss))
    for name in parameters:
        if name not in found:
            raise InputError(
                f"The network has no parameter {name!r}: expected one of {', '.join(found)}. Are these the parameters "
                "of another network? Give those of `model.named_parameters()`."
            )
    return {name: found[name] for name in parameters}


def _carried_back(layers: Sequence[Layer], inputs: Sequence[Tensor], h: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Carry curvature and gradient of the outputs back, and return the curvature of all parameters by name."""
    found: dict[str, Tensor] = {}
    first = next((index for index, layer in enumerate(layers) if layer.values), len(layers))
    is_curved = any(layer.rule.is_curved for layer in layers)
    for layer, x in zip(reversed(layers[first:]), reversed(inputs[first:-1]), strict=True):
        before, own = layer.rule.backward(layer.module, layer.values, x, (h, g))
        for name, value in own.items():
            key = layer.names[name]
            found[key] = found[key] + value if key in found else value  # a layer that occurs twice
        if is_curved:
            g = _pull(functools.partial(layer.rule.forward, layer.module, layer.values), x, g)
        h = before
    return found


def _at_outputs(outputs: Tensor, targets: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Compute the diagonal of the Hessian and the gradient of the loss in the outputs.

    Raises:
        ShapeError: If outputs and targets do not fit.
        UnknownNameError: If there is no such loss.
    """
    if loss not in LOSSES:
        raise UnknownNameError("loss", loss, LOSSES)
    expected = outputs.shape if loss == "mse" else outputs.shape[:1]
    if outputs.ndim != 2 or targets.shape != expected:
        raise ShapeError(
            f"Outputs and targets do not fit: expected outputs (samples, outputs) and targets of shape "
            f"{tuple(expected)}, found {tuple(outputs.shape)} and {tuple(targets.shape)}. Is a layer missing, such as "
            "torch.nn.Flatten, or is the loss another one? Correct it."
        )
    if loss == "mse":
        count = outputs.numel()
        return torch.full_like(outputs, 2 / count), 2 / count * (outputs - targets)
    p = torch.softmax(outputs, 1)
    return (p - p * p) / len(outputs), (p - F.one_hot(targets, outputs.shape[1])) / len(outputs)


# layers ---------------------------------------------------------------------------------------------------------------


def _layers(
    model: nn.Module, place: str, names: Mapping[int, str], parameters: Mapping[str, Tensor]
) -> Iterator[Layer]:
    """List the layers in the order in which they run.

    Args:
        model: The network, or a part of it.
        place: Where the part is.
        names: Name of each parameter, by its identity.
        parameters: Values of parameters by name.

    Raises:
        ModelError: If a layer has no rule.
    """
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        for name, child in model._modules.items():  # `named_children` leaves out a layer that occurs twice
            yield from _layers(child, f"{place}.{name}" if place else name, names, parameters)
        return
    rule = RULES.get(type(model))
    if rule is None or not _is_plain(model):
        raise ModelError(
            f"HesScale has no rule for {f'the layer {place}' if place else 'the network'}, {type(model).__name__}: "
            f"expected a torch.nn.Sequential of {', '.join(kind.__name__ for kind in RULES)}, without padding in "
            "pooling, and with a number of zeros in convolutions. Does the network join paths, or normalise? Use a "
            "learner of first order."
        )
    own = dict(model.named_parameters())
    values = {name: parameters.get(names[id(param)], param) for name, param in own.items()}
    yield Layer(model, rule, values, {name: names[id(param)] for name, param in own.items()})


def _is_plain(layer: nn.Module) -> bool:
    """Say whether a layer has no option that the rules leave out."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.AvgPool2d):
        return layer.padding in {0, (0, 0)} and not layer.ceil_mode
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return layer.output_size in {1, (1, 1)}
    return True


def _pull(function: Callable[[Tensor], Tensor], x: Tensor, of_outputs: Tensor) -> Tensor:
    """Multiply by the transposed Jacobian of a function."""
    found: Tensor = torch.func.vjp(function, x)[1](of_outputs)[0]
    return found


def _linear_back(_: nn.Linear, values: Values, x: Tensor, of_outputs: tuple[Tensor, Tensor]) -> Back:
    h, _g = of_outputs
    found = {"weight": h.flatten(0, -2).T @ x.square().flatten(0, -2)}
    if "bias" in values:
        found["bias"] = h.flatten(0, -2).sum(0)
    return h @ values["weight"].square(), found


def _convolve(layer: nn.Conv2d, values: Values, x: Tensor) -> Tensor:
    return F.conv2d(x, values["weight"], values.get("bias"), layer.stride, layer.padding, layer.dilation, layer.groups)


def _convolution_back(layer: nn.Conv2d, values: Values, x: Tensor, of_outputs: tuple[Tensor, Tensor]) -> Back:
    (h, _g), weight = of_outputs, values["weight"]
    how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    found = {"weight": conv2d_weight(x.square(), weight.shape, h, *how)}
    if "bias" in values:
        found["bias"] = h.sum((0, 2, 3))
    return conv2d_input(x.shape, weight.square(), h, *how), found


def _gate_back(_: Gate, values: Values, x: Tensor, of_outputs: tuple[Tensor, Tensor]) -> Back:
    h, _g = of_outputs
    gate = values["gate"].view(-1, *[1] * (x.ndim - 2))
    return gate.square() * h, {"gate": (h * x.square()).transpose(0, 1).flatten(1).sum(1)}


def _without_parameters(backward: Callable[[Any, Tensor, Tensor, Tensor], Tensor], *, is_curved: bool = False) -> Rule:
    """Make the rule of a layer without parameters, from the curvature of its inputs."""

    def back(layer: nn.Module, _: Values, x: Tensor, of_outputs: tuple[Tensor, Tensor]) -> Back:
        return backward(layer, x, *of_outputs), {}

    return Rule(lambda layer, _, x: layer(x), back, is_curved)


def _area(layer: nn.AvgPool2d) -> int:
    """Number of inputs that a mean is divided by."""
    height, width = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 2
    return layer.divisor_override or height * width


def _tanh_back(_: nn.Tanh, x: Tensor, h: Tensor, g: Tensor) -> Tensor:
    y = torch.tanh(x)
    slope = 1 - y * y
    return slope * slope * h - 2 * y * slope * g


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(lambda _, values, x: F.linear(x, values["weight"], values.get("bias")), _linear_back),
    nn.Conv2d: Rule(_convolve, _convolution_back),
    Gate: Rule(lambda _, values, x: x * values["gate"].view(-1, *[1] * (x.ndim - 2)), _gate_back),
    nn.ReLU: _without_parameters(lambda _, x, h, _g: h * (x > 0)),
    nn.LeakyReLU: _without_parameters(lambda layer, x, h, _g: torch.where(x > 0, h, layer.negative_slope**2 * h)),
    nn.Tanh: _without_parameters(_tanh_back, is_curved=True),
    nn.MaxPool2d: _without_parameters(lambda layer, x, h, _g: _pull(layer, x, h)),
    # A mean over k numbers has the weights 1/k, whose squares are 1/k times the weights.
    nn.AvgPool2d: _without_parameters(lambda layer, x, h, _g: _pull(layer, x, h) / _area(layer)),
    nn.AdaptiveAvgPool2d: _without_parameters(lambda layer, x, h, _g: _pull(layer, x, h) / x[0, 0].numel()),
    nn.Flatten: _without_parameters(lambda _, x, h, _g: h.reshape(x.shape)),
    nn.Identity: _without_parameters(lambda _, _x, h, _g: h),
}
"""The rule of each kind of layers."""
