"""The rule of each layer type: how inputs and cotangents become factors.

A layer's weight matrix has, for one sample and output o, the Jacobian row ``Σ_t g_o[t] ⊗ a[t]``; a rule says what the
inputs a and the cotangents g are. Its other parameters are vectors, with rows that are sums over positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

Rows = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _never(_module: nn.Module, _tensor: Tensor) -> Tensor:
    raise AssertionError("a rule without a weight matrix has no factors")


@dataclass(frozen=True)
class LayerRule:
    """How the parameters of one layer type appear in the Jacobian.

    ``inputs`` maps the layer's input to (samples, groups, positions, k) and ``cotangents`` the gradient of its output
    to (samples, groups, positions, c), such that the row of ``matrix``, flattened, is Σ_t g[t] ⊗ a[t], group by group.
    ``vectors`` maps each other parameter to a function of (module, input, gradient) that gives its rows
    (samples, parameter).
    """

    matrix: str | None = None
    inputs: Callable[[nn.Module, Tensor], Tensor] = _never
    cotangents: Callable[[nn.Module, Tensor], Tensor] = _never
    vectors: Mapping[str, Rows] = field(default_factory=dict)


def _sum_to_channels_last(_module: nn.Module, _x: Tensor, grad: Tensor) -> Tensor:
    """Sum over every axis but samples and the last: the bias of a linear layer."""
    return grad.flatten(1, -2).sum(1) if grad.ndim > 2 else grad


def _sum_to_channels_first(_module: nn.Module, _x: Tensor, grad: Tensor) -> Tensor:
    """Sum over every axis but samples and the first after it: the bias of a convolution or a batch norm."""
    return grad.flatten(2).sum(2) if grad.ndim > 2 else grad


def _positions_of_vectors(_module: nn.Module, x: Tensor) -> Tensor:
    """Make every leading axis but the samples' a position: a linear layer's inputs, and its cotangents."""
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def _conv2d_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Unfold the padded input into one row per output position, in the order of the flattened weight."""
    assert isinstance(module, nn.Conv2d)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if module.kernel_size == module.stride == (1, 1):
        columns = padded.flatten(2)  # already one column per position
    else:
        columns = F.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return columns.reshape(len(x), module.groups, -1, columns.shape[2]).mT


def _conv2d_cotangents(module: nn.Module, grad: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    return grad.reshape(len(grad), module.groups, grad.shape[1] // module.groups, -1).mT


def _batch_norm_weight(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Weight the cotangent by the normalised input, Σ_t g[t] ∘ x̂[t] (evaluation mode: running statistics)."""
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (1, -1) + (1,) * (x.ndim - 2)
    scale = (module.running_var + module.eps).rsqrt().view(shape)
    return _sum_to_channels_first(module, x, grad * (x - module.running_mean.view(shape)) * scale)


_BATCH_NORM = LayerRule(vectors={"weight": _batch_norm_weight, "bias": _sum_to_channels_first})

RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LayerRule("weight", _positions_of_vectors, _positions_of_vectors, {"bias": _sum_to_channels_last}),
    nn.Conv2d: LayerRule("weight", _conv2d_inputs, _conv2d_cotangents, {"bias": _sum_to_channels_first}),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
}
