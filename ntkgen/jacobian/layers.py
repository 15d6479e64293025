"""The rule of each layer type, which computes factors from the inputs and cotangents of a layer.

For one sample and output o, the Jacobian row of a layer's weight matrix is ``Σ_t g_o[t] ⊗ a[t]``. A rule computes the
inputs a and the cotangents g. The other parameters of a layer are vectors. Their rows are sums over positions.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntkgen.errors import InputError

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Rows = Callable[[nn.Module, Tensor, Tensor], Tensor]
Layout = Callable[[Tensor], Tensor]
Normalise = Callable[[nn.Module, Tensor], Tensor]


def _never(_module: nn.Module, _tensor: Tensor) -> Tensor:
    raise AssertionError("a rule without a weight matrix has no factors")


def _always(_module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class LayerRule:
    """How the parameters of one layer type appear in the Jacobian.

    ``inputs`` maps the layer's input to an array a of shape (samples, groups, positions, k). ``cotangents`` maps the
    gradient of its output to an array g of shape (samples, groups, positions, c). The Jacobian row of the parameter
    ``matrix`` is Σ_t g[t] ⊗ a[t] for each group, flattened. ``layout`` views a parameter with another order of entries
    as this matrix, (groups · channels, k). ``vectors`` maps each other parameter to a function of (module, input,
    gradient) that returns its rows (samples, parameter). ``applies`` tells whether the rule holds for the configuration
    of a module. It is needed only if a comparison on a few samples might not reveal that the rule is wrong.
    """

    matrix: str | None = None
    inputs: Callable[[nn.Module, Tensor], Tensor] = _never
    cotangents: Callable[[nn.Module, Tensor], Tensor] = _never
    vectors: Mapping[str, Rows] = field(default_factory=dict)
    applies: Callable[[nn.Module], bool] = _always
    layout: Layout | None = None

    def entries(self, param: Tensor) -> Tensor | None:
        """List the entries of a flattened parameter in the order of the matrix; None if the rule changes no order.

        Raises:
            ValueError: If the layout does not have every entry once.
        """
        if self.layout is None:
            return None
        numbers = torch.arange(param.numel(), device=param.device)
        entries = self.layout(numbers.view(param.shape)).flatten()
        if not torch.equal(entries.sort().values, numbers):
            raise ValueError("a layout must have every entry of the parameter once")
        return entries


# dense ----------------------------------------------------------------------------------------------------------------


def _positions_of_vectors(_module: nn.Module, x: Tensor) -> Tensor:
    """Flatten all axes between the first and the last to positions, for the inputs and cotangents of a linear layer."""
    return x.reshape(x.shape[0], 1, -1, x.shape[-1])


def _sum_to_channels_last(_module: nn.Module, _x: Tensor, grad: Tensor) -> Tensor:
    """Sum over all axes except the samples and the last axis, for the bias of a linear layer."""
    return grad.flatten(1, -2).sum(1) if grad.ndim > 2 else grad


# convolution ----------------------------------------------------------------------------------------------------------


def _convolution_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Arrange the window of each output position in the order of the flattened weight, (c_in / groups, *kernel).

    The windows are a view of the padded input. They are copied once, with positions as the contiguous axis. This is up
    to five times faster than im2col. A 1 × 1 kernel of stride 1 needs no copy.
    """
    assert isinstance(module, Convolution)
    columns = windows_first(module, x)
    return columns.reshape(len(x), module.groups, -1, math.prod(columns.shape[-(x.ndim - 2) :])).mT


def windows_first(module: Convolution, x: Tensor) -> Tensor:  # (samples, channels, *kernel, *positions)
    """View the padded input of a convolution as its windows."""
    axes = x.ndim - 2
    windows = padded(module, x)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    positions = range(2, axes + 2)
    kernel = range(axes + 2, 2 * axes + 2)
    return windows.permute(0, 1, *kernel, *positions)


def padding_of(module: Convolution) -> list[tuple[int, int]]:  # (before, after) of each axis
    """Return the padding of a convolution. For "same", an odd total has one more position at the end, as in torch.

    >>> padding_of(nn.Conv2d(1, 1, (4, 3), padding="same"))
    [(1, 2), (1, 1)]
    """
    if module.padding == "same":
        totals = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    return [(int(padding), int(padding)) for padding in module.padding]


def padded(module: Convolution, x: Tensor) -> Tensor:
    """Pad an input as a convolution does. Without padding, return the input itself."""
    pads = [pad for sides in reversed(padding_of(module)) for pad in sides]  # torch names the last axis first
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, pads, mode=mode) if any(pads) else x


def _convolution_cotangents(module: nn.Module, grad: Tensor) -> Tensor:
    assert isinstance(module, Convolution)
    return grad.reshape(len(grad), module.groups, grad.shape[1] // module.groups, -1).mT


def _sum_to_channels_first(_module: nn.Module, _x: Tensor, grad: Tensor) -> Tensor:
    """Sum over all axes except the first two, for the bias of a convolution or a batch norm."""
    return grad.flatten(2).sum(2) if grad.ndim > 2 else grad


# normalisation --------------------------------------------------------------------------------------------------------


def _affine(normalise: Normalise, total: Rows) -> LayerRule:
    """Build the rule of y = γ ∘ x̂ + β. The rows are Σ_t g[t] ∘ x̂[t] for γ and Σ_t g[t] for β."""
    return LayerRule(vectors={"weight": partial(_weighted_total, normalise, total), "bias": total})


def _weighted_total(normalise: Normalise, total: Rows, module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    return total(module, x, grad * normalise(module, x))


def _by_running_statistics(module: nn.Module, x: Tensor) -> Tensor:
    """Normalise as in evaluation mode, x̂ = (x − μ) / √(σ² + ε)."""
    assert isinstance(module, nn.modules.batchnorm._NormBase)
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (x - module.running_mean.view(shape)) * (module.running_var + module.eps).rsqrt().view(shape)


def _by_instance(module: nn.Module, x: Tensor) -> Tensor:
    """Normalise each channel of each sample separately, or by running statistics if these are tracked."""
    assert isinstance(module, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return _by_running_statistics(module, x) if module.track_running_stats else F.instance_norm(x, eps=module.eps)


def _by_group(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    return F.group_norm(x, module.num_groups, eps=module.eps)


def _by_position(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    return F.layer_norm(x, module.normalized_shape, eps=module.eps)


def _by_mean_square(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.RMSNorm)
    return F.rms_norm(x, module.normalized_shape, eps=module.eps)


def _sum_to_normalised(module: nn.Module, _x: Tensor, grad: Tensor) -> Tensor:
    """Sum over all axes except the samples and the normalised axes, which are the last ones."""
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    return grad.reshape(len(grad), -1, math.prod(module.normalized_shape)).sum(1)


# embedding ------------------------------------------------------------------------------------------------------------


def table_rows(
    tokens: Tensor,  # (samples, …)
    grad: Tensor,  # (samples, …, numbers)
    size: int,
    padding: int | None,
) -> Tensor:  # (samples, size, numbers)
    """Add the gradient at each position to the row of its token, Σ_t e[token t] ⊗ g[t]. The padding token gets zero.

    The function of torch that adds gradients for a whole batch is called with a separate table for each sample. The
    result is therefore as reproducible as a gradient of torch.
    """
    samples = len(tokens)
    table = size * torch.arange(samples, device=tokens.device).unsqueeze(1)
    rows: Tensor = torch.ops.aten.embedding_dense_backward(
        grad.reshape(samples, -1, grad.shape[-1]),
        tokens.reshape(samples, -1) + table,
        num_weights=samples * size,
        padding_idx=-1,
        scale_grad_by_freq=False,
    ).view(samples, size, -1)
    if padding is not None:
        rows[:, padding] = 0
    return rows


def _embedding_rows(module: nn.Module, tokens: Tensor, grad: Tensor) -> Tensor:
    assert isinstance(module, nn.Embedding)
    return table_rows(tokens, grad, module.num_embeddings, module.padding_idx).flatten(1)


def _is_plain_embedding(module: nn.Module) -> bool:
    """Return whether the gradient is dense and not scaled by frequency, and no forward pass changes the weights."""
    assert isinstance(module, nn.Embedding)
    return module.max_norm is None and not module.sparse and not module.scale_grad_by_freq


# the table ------------------------------------------------------------------------------------------------------------

CONVOLUTION = LayerRule(
    "weight", _convolution_inputs, _convolution_cotangents, vectors={"bias": _sum_to_channels_first}
)


def dense_rule(weight: str = "weight", bias: str = "bias", layout: Layout | None = None) -> LayerRule:
    """Make the rule of a layer y = W x + b, for all axes between the samples and the last axis.

    Args:
        weight: The name of the parameter W, (channels, inputs).
        bias: The name of the parameter b. A layer need not have it.
        layout: For a parameter with another order of entries, a function that views it as W.

    >>> inputs_first = dense_rule(layout=lambda weight: weight.T)  # y = x @ weight + b
    >>> inputs_first.entries(torch.zeros(2, 3))
    tensor([0, 3, 1, 4, 2, 5])
    """
    return LayerRule(weight, _positions_of_vectors, _positions_of_vectors, {bias: _sum_to_channels_last}, layout=layout)


DENSE = dense_rule()
_BATCH_NORM = _affine(_by_running_statistics, _sum_to_channels_first)
_INSTANCE_NORM = _affine(_by_instance, _sum_to_channels_first)

RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: DENSE,
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.SyncBatchNorm: _BATCH_NORM,
    nn.InstanceNorm1d: _INSTANCE_NORM,
    nn.InstanceNorm2d: _INSTANCE_NORM,
    nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.GroupNorm: _affine(_by_group, _sum_to_channels_first),
    nn.LayerNorm: _affine(_by_position, _sum_to_normalised),
    nn.RMSNorm: _affine(_by_mean_square, _sum_to_normalised),
    nn.Embedding: LayerRule(vectors={"weight": _embedding_rows}, applies=_is_plain_embedding),
}


def register_rule(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Apply a rule to all modules of exactly this type, in place of autograd or of an earlier rule.

    For every network and parameter, the result of the rule is compared with that of autograd, first on a few samples
    and then on every batch. If they differ, the parameter is computed by autograd, which is slower and equally exact.

    Args:
        module_type: The layer's class. A subclass needs its own rule, because it may compute something else.
        rule: The functions that compute its inputs, cotangents and vectors. `dense_rule` makes those of a dense layer.

    Raises:
        InputError: If the type is not a module class, the rule is not a `LayerRule`, or the rule lacks a function.

    A layer y = γ ∘ x has the row Σ_t g[t] ∘ x[t]:

    >>> class Scale(nn.Module):
    ...     def __init__(self, size):
    ...         super().__init__()
    ...         self.gamma = nn.Parameter(torch.ones(size))
    ...
    ...     def forward(self, x):
    ...         return self.gamma * x
    >>> register_rule(Scale, LayerRule(vectors={"gamma": lambda module, x, grad: (grad * x).flatten(1, -2).sum(1)}))
    >>> x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # one sample of two positions
    >>> RULES[Scale].vectors["gamma"](Scale(2), x, torch.ones_like(x))
    tensor([[4., 6.]])
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise InputError(
            f"A rule needs a type of layer: expected a subclass of torch.nn.Module, found {module_type!r}. "
            "Was a module passed instead of its class? Pass type(module)."
        )
    if not isinstance(rule, LayerRule):
        raise InputError(
            f"The rule of {module_type.__name__} must be a LayerRule, and is a {type(rule).__name__}: {rule!r}. Was "
            "one of its functions passed alone? Pass for example LayerRule(vectors={'weight': rows})."
        )
    if rule.matrix is not None and _never in {rule.inputs, rule.cotangents}:
        raise InputError(
            f"The rule of {module_type.__name__} has the weight matrix {rule.matrix!r}: expected the functions inputs "
            "and cotangents, found that one of the two is missing. Is the parameter a vector? Give LayerRule both "
            "functions, or list the parameter in vectors."
        )
    RULES[module_type] = rule


# the layers of a network ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A module with a rule, and its trainable parameters that the rule treats.

    The vector ``joined`` is kept as the last column of the matrix, as if the inputs had an additional input of one.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    has_matrix: bool
    vectors: tuple[str, ...]
    joined: str | None = None
    may_join: bool = True  # whether a bias may be joined to the matrix
    owner: str | None = None  # path of the module that has the parameters, if it is not the recorded module
    positions: Tensor | None = None  # entries of the parameter that the matrix consists of; None for all in order

    def full_name(self, param: str) -> str:
        """Return the name of a parameter in `nn.Module.named_parameters`."""
        return f"{self.path}.{param}" if self.path else param

    @property
    def path(self) -> str:
        """Path of the module that has the parameters."""
        return self.name if self.owner is None else self.owner

    def params(self) -> Iterator[str]:
        """List the names of the treated parameters within the module: those of the matrix first, then the vectors."""
        yield from self.of_matrix
        yield from self.vectors

    @property
    def of_matrix(self) -> tuple[str, ...]:
        """The names of the matrix and of the vector that is joined to it."""
        names = (self.rule.matrix if self.has_matrix else None, self.joined)
        return tuple(name for name in names if name is not None)

    def without(self, excluded: Collection[str]) -> "Layer":
        """Remove the parameters with these full names."""
        kept = {param for param in self.params() if self.full_name(param) not in excluded}
        vectors = tuple(vector for vector in self.vectors if vector in kept)
        return dataclasses.replace(self, has_matrix=self.rule.matrix in kept, vectors=vectors)

    def with_joined_bias(self) -> "Layer":
        """Join a bias to the matrix. Its rows are Σ_t g[t], which are the rows Σ_t g[t] ⊗ 1 of an input of one."""
        sums = (_sum_to_channels_last, _sum_to_channels_first)
        bias = next((vector for vector in self.vectors if self.rule.vectors[vector] in sums), None)
        if bias is None or not self.has_matrix or not self.may_join:
            return self
        vectors = tuple(vector for vector in self.vectors if vector != bias)
        return dataclasses.replace(self, vectors=vectors, joined=bias)


def sum_over_uses(parts: Iterable[Tensor]) -> Tensor:
    """Add the contributions of the uses of a layer. A single contribution is returned without a copy."""
    first, *others = parts
    return torch.stack([first, *others]).sum(0) if others else first


def layers_with_rules(module: nn.Module) -> Iterator[Layer]:
    """Find the modules with a rule. A parameter of two modules is tied, and is treated in neither."""
    owners = Counter(id(param) for child in module.modules() for param in child.parameters(recurse=False))
    for name, child in module.named_modules():
        rule = RULES.get(type(child))  # the exact type: a subclass may compute something else
        if rule is None or not rule.applies(child):
            continue
        untied = {
            n
            for n, p in child.named_parameters(recurse=False)
            if p.requires_grad and owners[id(p)] == 1 and not p.is_complex()  # rules assume real numbers
        }
        vectors = tuple(vector for vector in rule.vectors if vector in untied)
        layer = Layer(name, child, rule, has_matrix=False, vectors=vectors)
        if rule.matrix in untied:
            with suppress(Exception):  # a layout that raises an error does not hold
                entries = rule.entries(child.get_parameter(rule.matrix))
                layer = dataclasses.replace(layer, has_matrix=True, positions=entries)
        if any(layer.params()):
            yield layer
