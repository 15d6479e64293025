"""What the tests run on, as data: networks, tolerances, and one small kernel job.

A network is one row here, and a row buys every test. It says which of its parameters are expected to be left to
autograd; all others must be treated by a rule.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ntkgen.engine import run as running
from ntkgen.engine.machine import environment
from ntkgen.files.lock import write_lock
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.plan.plan import Budget, Choices, Plan, make_plan
from ntkgen.plan.tiles import make_grid
from ntkgen.progress import Report
from ntkgen.store.manifest import Manifest
from ntkgen.store.opening import create_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore
from ntkgen.store.tidy import tidy

# Relative Frobenius error that a kernel computed or stored in a dtype may have against the reference.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-3}
# ‖J̃ − J‖₂ / ‖J‖₂ of a Jacobian in float32, on any machine: a few roundings of 6e-8 a layer. Measured: 1e-7 to 4e-7.
FLOAT32_JACOBIAN = 1e-6

CPU = torch.device("cpu")


def relative_error(found: Any, expected: Any) -> float:
    """Compare in the Frobenius norm; where zeros are expected, absolutely."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected)) / (float(np.linalg.norm(expected)) or 1.0)


@dataclass(frozen=True)
class Case:
    """A network, samples it takes, and its parameters that have no rule or whose rule does not hold."""

    module: nn.Module
    x: Tensor  # (samples, …)
    fallback: tuple[str, ...] = ()

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Two batches of different lengths, or the one sample twice."""
        return self.x[: len(self.x) // 2 + 1], self.x[len(self.x) // 2 :]


CASES: dict[str, Callable[[], Case]] = {}


def case(factory: Callable[[], Case]) -> Callable[[], Case]:
    """Register a factory under its name, seeded, and without touching the process's own random state."""

    def seeded() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # not the devices, for which torch formats the stack three times
            return factory()

    CASES[factory.__name__] = seeded
    return seeded


class Call(nn.Module):
    """Named modules, and the function of them and the batch that is the network."""

    def __init__(self, forward: Callable[["Call", Tensor], Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def settle(module: nn.Module, x: Tensor) -> nn.Module:
    """Take a few training steps, so that batch statistics and affine parameters are not what they start from."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x + 0.5 * torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    module.zero_grad(set_to_none=True)
    return module


# dense ----------------------------------------------------------------------------------------------------------------


@case
def mlp() -> Case:
    return Case(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(5, 6)
    )


@case
def linear_itself() -> Case:
    return Case(nn.Linear(4, 3), torch.randn(5, 4))


@case
def linear_without_bias() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 2, bias=False)), torch.randn(4, 4))


@case
def one_output() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 4))


@case
def one_sample() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(1, 4))


@case
def many_outputs() -> Case:
    return Case(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 11)), torch.randn(3, 3))


@case
def relu_at_zero() -> Case:
    x = torch.randint(-1, 2, (5, 4)).float()
    return Case(nn.Sequential(nn.ReLU(), nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)), x * (x > 0))


@case
def dropout() -> Case:
    return Case(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 4))


@case
def sequence() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(self.tokens(x)).mean(1)), tokens=nn.Linear(3, 6))
    model.out = nn.Linear(6, 2)
    return Case(model, torch.randn(4, 7, 3))


@case
def sequence_of_grids() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(self.cells(x)).sum(-1).flatten(1)), cells=nn.Linear(3, 5))
    model.out = nn.Linear(8, 2)
    return Case(model, torch.randn(4, 2, 4, 3))


@case
def sequence_first() -> Case:
    """Two time steps, as many as samples in the coverage check: only the values tell that axis 0 is not samples."""
    model = Call(lambda self, x: self.out(torch.tanh(self.steps(x.transpose(0, 1))).prod(0)), steps=nn.Linear(3, 5))
    model.out = nn.Linear(5, 2)
    return Case(model, torch.randn(4, 2, 3))


# convolution ----------------------------------------------------------------------------------------------------------


def convolutional(layer: nn.Module, channels: int, size: int, *, outputs: int = 2) -> Case:
    x = torch.randn(4, channels, size, size)
    body = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
    return Case(nn.Sequential(*body, nn.Linear(body(x).shape[1], outputs)), x)


def classifier(layer: nn.Module, x: Tensor, fallback: tuple[str, ...] = ()) -> Case:
    """One layer of any kind below a linear one of two outputs, its parameters moved from where they start."""
    with torch.no_grad():
        for param in layer.parameters():
            param.add_(0.3 * torch.randn_like(param))
        body = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
        return Case(nn.Sequential(*body, nn.Linear(body(x).shape[1], 2)), x, fallback)


@case
def conv() -> Case:
    x = torch.randn(4, 2, 6, 6)
    layers = [nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    return Case(nn.Sequential(*layers, nn.Linear(12, 3)), x)


@case
def conv_without_bias() -> Case:
    return convolutional(nn.Conv2d(2, 3, 3, bias=False), 2, 5)


@case
def conv_groups() -> Case:
    return convolutional(nn.Conv2d(6, 9, 3, groups=3, padding=1), 6, 5)


@case
def conv_depthwise() -> Case:
    return convolutional(nn.Conv2d(4, 8, 3, groups=4), 4, 5)


@case
def conv_pointwise() -> Case:
    return convolutional(nn.Conv2d(4, 3, 1), 4, 4)


@case
def conv_stride() -> Case:
    return convolutional(nn.Conv2d(2, 3, 3, stride=(2, 3), padding=1), 2, 7)


@case
def conv_dilation() -> Case:
    return convolutional(nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=(2, 0)), 2, 7)


@case
def conv_oblong() -> Case:
    return convolutional(nn.Conv2d(2, 3, (1, 4), padding=(0, 2)), 2, 5)


@case
def conv_reflect() -> Case:
    return convolutional(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), 2, 5)


@case
def conv_circular() -> Case:
    return convolutional(nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular", stride=2), 2, 5)


@case
def conv_replicate() -> Case:
    return convolutional(nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate", groups=2), 4, 4)


@case
def conv_same() -> Case:
    """An odd total of padding, with one column more at the end than at the start. Torch warns once about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convolutional(nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)), 2, 6)


@case
def conv_same_reflect() -> Case:
    return convolutional(nn.Conv2d(2, 3, (3, 4), padding="same", padding_mode="reflect"), 2, 6)


@case
def conv1d() -> Case:
    return classifier(nn.Conv1d(4, 6, 3, groups=2, stride=2, dilation=2, padding=1), torch.randn(4, 4, 7))


@case
def conv1d_depthwise_reflect() -> Case:
    return classifier(nn.Conv1d(3, 6, 4, groups=3, padding=2, padding_mode="reflect"), torch.randn(4, 3, 5))


@case
def conv1d_same_circular() -> Case:
    layer = nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular", bias=False)
    return classifier(layer, torch.randn(4, 2, 5))


@case
def conv3d() -> Case:
    layer = nn.Conv3d(2, 2, (2, 1, 3), stride=(1, 2, 1), dilation=(1, 1, 2), padding=(1, 0, 2))
    return classifier(layer, torch.randn(3, 2, 2, 3, 3))


@case
def conv3d_same_replicate() -> Case:
    layer = nn.Conv3d(2, 4, (2, 3, 1), groups=2, padding="same", padding_mode="replicate")
    return classifier(layer, torch.randn(3, 2, 2, 2, 3))


@case
def conv_changed_after_it_was_built() -> Case:
    """Stride, padding and dilation as dilated backbones have them: torch reads them when it is called."""
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    layer.stride, layer.padding, layer.dilation = (1, 1), (2, 2), (2, 2)
    return classifier(layer, torch.randn(4, 2, 4, 4))


@case
def conv_transposed() -> Case:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(147, 2))
    return Case(model, torch.randn(4, 2, 3, 3))


@case
def max_pool_ties() -> Case:
    """Integer inputs and weights of one sign: many maxima are shared, and autograd chooses among them."""
    model = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    nn.init.constant_(model[1].weight, 0.5)
    return Case(model, torch.randint(0, 2, (4, 1, 10, 10)).float())


# normalisation --------------------------------------------------------------------------------------------------------


@case
def batch_norm_1d() -> Case:
    x = torch.randn(5, 4) * 2 + 1
    return Case(settle(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), x), x)


@case
def batch_norm_1d_over_sequences() -> Case:
    x = torch.randn(4, 3, 5) * 2 - 1
    return Case(settle(nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)), x), x)


@case
def batch_norm_2d() -> Case:
    x = torch.randn(4, 2, 5, 5) + 1
    conv = nn.Conv2d(2, 4, 3, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4, eps=1e-2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    return Case(settle(model, x), x)


@case
def batch_norm_3d() -> Case:
    x = torch.randn(4, 2, 2, 3, 2)
    return Case(settle(nn.Sequential(nn.BatchNorm3d(2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), x), x)


@case
def batch_norm_without_affine() -> Case:
    x = torch.randn(4, 4)
    return Case(settle(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)), x), x)


@case
def batch_norm_weight_frozen() -> Case:
    x = torch.randn(4, 4)
    model = settle(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), x)
    model[1].weight.requires_grad_(False)
    return Case(model, x)


@case
def batch_norm_synchronised() -> Case:
    """What distributed training leaves behind; in evaluation mode a batch norm like any other."""
    x = torch.randn(4, 2, 3) + 1
    model = settle(nn.Sequential(nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)), x)
    return Case(nn.SyncBatchNorm.convert_sync_batchnorm(model), x)


@case
def layer_norm() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    return Case(settle(model, torch.randn(4, 4)), torch.randn(4, 4))


@case
def layer_norm_of_positions() -> Case:
    return classifier(nn.LayerNorm(3, eps=1e-2, bias=False), torch.randn(4, 2, 3, 3) + 1)


@case
def layer_norm_of_two_axes() -> Case:
    return classifier(nn.LayerNorm((2, 3)), torch.randn(4, 3, 2, 3) * 2)


@case
def rms_norm() -> Case:
    return classifier(nn.RMSNorm(4), torch.randn(4, 3, 4) + 1)


@case
def rms_norm_of_two_axes() -> Case:
    return classifier(nn.RMSNorm((3, 2), eps=0.1), torch.randn(4, 3, 2))


@case
def group_norm() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4, eps=1e-2), nn.Flatten(), nn.Linear(36, 2))
    return Case(settle(model, torch.randn(3, 2, 5, 5)), torch.randn(3, 2, 5, 5))


@case
def group_norm_of_vectors() -> Case:
    return classifier(nn.GroupNorm(2, 6), torch.randn(4, 6))


@case
def instance_norm() -> Case:
    return classifier(nn.InstanceNorm2d(3, affine=True), torch.randn(4, 3, 2, 3) + 1)


@case
def instance_norm_by_running_statistics() -> Case:
    x = torch.randn(4, 3, 4) * 2 + 1
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    return Case(settle(nn.Sequential(norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), x), x)


@case
def instance_norm_3d() -> Case:
    return classifier(nn.InstanceNorm3d(2, affine=True, eps=1e-2), torch.randn(3, 2, 2, 2, 2))


@case
def weight_norm() -> Case:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    return Case(model, torch.randn(4, 4))


@case
def spectral_norm() -> Case:
    """A parametrized weight is computed, not a parameter; the bias is one, of a type that has no rule."""
    layer = parametrizations.spectral_norm(nn.Conv1d(2, 3, 2))
    return classifier(layer, torch.randn(4, 2, 4))


# in place -------------------------------------------------------------------------------------------------------------


@case
def in_place_relu() -> Case:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)
    )
    return Case(model, torch.randn(5, 4))


@case
def in_place_relu_after_conv() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3), nn.ReLU(inplace=True)
    )
    return Case(nn.Sequential(*model, nn.Flatten(), nn.Linear(27, 3)), torch.randn(4, 2, 5, 5))


@case
def residual_in_place() -> Case:
    x = torch.randn(4, 2, 5, 5)

    def forward(self: Call, x: Tensor) -> Tensor:
        stem = self.stem(x)
        out = self.norm1(self.conv1(stem))
        out = self.norm2(self.conv2(F.relu_(out)))
        out += self.shortcut(stem)
        return self.head(F.relu_(out).mean((2, 3)))

    model = Call(forward, stem=nn.Conv2d(2, 3, 3), shortcut=nn.Conv2d(3, 4, 1), head=nn.Linear(4, 3))
    model.conv1, model.conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    model.norm1, model.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    return Case(settle(model, x), x)


@case
def residual_with_shortcut() -> Case:
    """A pre-activation block whose shortcut is a strided 1 × 1 convolution of the same activation."""
    x = torch.randn(4, 2, 4, 4)

    def forward(self: Call, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.stem(x)))
        out = self.conv2(F.relu(self.norm2(self.conv1(h)))) + self.shortcut(h)
        return self.head(out.mean((2, 3)))

    model = Call(forward, stem=nn.Conv2d(2, 3, 3, padding=1, bias=False), head=nn.Linear(4, 2))
    model.shortcut = nn.Conv2d(3, 4, 1, stride=2, bias=False)
    model.conv1, model.conv2 = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    model.norm1, model.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
    return Case(settle(model, x), x)


# sharing --------------------------------------------------------------------------------------------------------------


@case
def tied_weights() -> Case:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return Case(model, torch.randn(4, 4))


@case
def tied_to_its_transpose() -> Case:
    """An autoencoder that uses one weight through its module and once more beside it."""
    model = Call(lambda self, x: F.linear(torch.tanh(self.code(x)), self.code.weight.T), code=nn.Linear(4, 3))
    return Case(model, torch.randn(5, 4))


@case
def reused_layer() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(self.fc(torch.tanh(self.fc(x))))), fc=nn.Linear(4, 4))
    model.out = nn.Linear(4, 2)
    return Case(model, torch.randn(4, 4))


@case
def reused_at_two_sizes() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        large = torch.tanh(self.norm(self.conv(x)))
        small = torch.tanh(self.norm(self.conv(F.avg_pool2d(x, 2))))
        return self.out(large.mean((2, 3)) * small.mean((2, 3)))

    x = torch.randn(4, 2, 6, 6)
    model = Call(forward, conv=nn.Conv2d(2, 4, 3, padding=1), norm=nn.BatchNorm2d(4), out=nn.Linear(4, 2))
    return Case(settle(model, x), x)


@case
def one_module_under_two_names() -> Case:
    model = Call(lambda self, x: self.out(self.second(torch.tanh(self.first(x)))), first=nn.Linear(4, 4))
    model.second, model.out = model.first, nn.Linear(4, 2)
    return Case(model, torch.randn(4, 4))


@case
def reused_norm() -> Case:
    """One norm at two depths, as networks do that are applied to their own output."""
    model = Call(lambda self, x: self.out(self.norm(torch.tanh(self.fc(self.norm(x))))), fc=nn.Linear(4, 4))
    model.norm, model.out = nn.LayerNorm(4), nn.Linear(4, 2)
    return Case(model, torch.randn(4, 4) + 1)


@case
def queries_keys_and_values() -> Case:
    """Three linear layers of one input, mixed by attention; with two heads as two batches of matrices."""

    def forward(self: Call, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.softmax(q @ k.mT, dim=-1) @ v
        return self.out(x + mixed.transpose(1, 2).flatten(2)).mean(1)

    model = Call(forward, q=nn.Linear(4, 4), k=nn.Linear(4, 4, bias=False), v=nn.Linear(4, 4), out=nn.Linear(4, 2))
    return Case(model, torch.randn(3, 5, 4))


# frozen and unused ----------------------------------------------------------------------------------------------------


@case
def frozen_layer() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].requires_grad_(False)
    return Case(model, torch.randn(4, 4))


@case
def frozen_body() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2))
    model[0].requires_grad_(False)
    return Case(model, torch.randn(4, 2, 5, 5))


@case
def frozen_bias() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    model[0].bias.requires_grad_(False)
    return Case(model, torch.randn(4, 2, 5, 5))


@case
def frozen_weight() -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    model[0].weight.requires_grad_(False)
    return Case(model, torch.randn(4, 2, 5, 5))


@case
def unused_parameter() -> Case:
    model = Call(lambda self, x: self.fc(x), fc=nn.Linear(4, 2), spare=nn.Parameter(torch.randn(3)))
    return Case(model, torch.randn(4, 4), ("spare",))


@case
def unused_head() -> Case:
    model = Call(lambda self, x: self.head(torch.tanh(self.body(x))), body=nn.Linear(4, 5), head=nn.Linear(5, 2))
    model.other_head = nn.Linear(5, 7)
    return Case(model, torch.randn(4, 4), ("other_head.weight", "other_head.bias"))


@case
def jacobian_of_zeros() -> Case:
    """The outputs depend on the trainable parameters, and the gradient is zero."""
    forward = lambda self, x: self.frozen(x) + 0 * self.trained(x)  # noqa: E731
    model = Call(forward, frozen=nn.Linear(4, 2).requires_grad_(False), trained=nn.Linear(4, 2))
    return Case(model, torch.randn(4, 4))


@case
def separate_heads() -> Case:
    """Each output depends on one head alone: the other's cotangents are absent, not zero, to autograd."""

    def forward(self: Call, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return torch.cat([self.left(h), self.right(h)], dim=1)

    return Case(Call(forward, body=nn.Linear(4, 5), left=nn.Linear(5, 2), right=nn.Linear(5, 1)), torch.randn(4, 4))


@case
def detached_branch() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(self.side(x)).detach() + x), side=nn.Linear(4, 4))
    model.out = nn.Linear(4, 2)
    return Case(model, torch.randn(4, 4))


# tokens ---------------------------------------------------------------------------------------------------------------


def tokens_of(vocabulary: int, samples: int, length: int) -> Tensor:
    """Draw token ids. The first sample repeats some of them, so their gradients add up."""
    ids = torch.randint(0, vocabulary, (samples, length))
    ids[0, -1] = ids[0, 0]
    return ids


@case
def embedding() -> Case:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2))
    return Case(model, torch.randint(0, 7, (4, 4)))


@case
def embedding_of_repeated_and_padding_tokens() -> Case:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Tanh(), nn.Linear(15, 2))
    return Case(model, torch.tensor([[0, 2, 2, 1, 1], [4, 4, 4, 4, 1], [3, 2, 0, 4, 2], [1, 1, 1, 1, 1]]))


@case
def embedding_scaled_by_frequency() -> Case:
    """Autograd scales by how often a token occurs in a sample: a repeated one, which the first two samples lack."""
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2))
    return Case(model, torch.tensor([[0, 1, 2, 3], [2, 3, 4, 0], [3, 3, 3, 3]]), ("0.weight",))


@case
def embedding_of_limited_norm() -> Case:
    """The table changes as it is read: in the copy, not in the user's."""
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2))
    return Case(model, tokens_of(5, 3, 2), ("0.weight",))


@case
def embedding_used_twice() -> Case:
    """One table for both halves of a sample, as one token each."""

    def forward(self: Call, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x[:, 0])) * self.embed(x[:, 1]))

    return Case(Call(forward, embed=nn.Embedding(4, 3), out=nn.Linear(3, 2)), tokens_of(4, 4, 2))


@case
def embedding_of_positions() -> Case:
    """Two positions, as many as samples in the coverage check: only the values tell that axis 0 is not samples."""

    def forward(self: Call, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.tokens(x) + self.positions(torch.arange(2, device=x.device))).flatten(1))

    model = Call(forward, tokens=nn.Embedding(4, 3), positions=nn.Embedding(2, 3), out=nn.Linear(6, 2))
    return Case(model, tokens_of(4, 4, 2))


@case
def embedding_tied_to_the_output() -> Case:
    model = Call(lambda self, x: self.out(self.norm(self.embed(x).tanh().sum(1))), embed=nn.Embedding(5, 3))
    model.norm, model.out = nn.LayerNorm(3), nn.Linear(3, 5)
    model.out.weight = model.embed.weight
    return Case(model, tokens_of(5, 4, 3))


@case
def language_model() -> Case:
    """A causal transformer that predicts the next token, with the weights of embedding and output tied."""

    def forward(self: Call, x: Tensor) -> Tensor:
        mask = torch.full((4, 4), float("-inf"), dtype=self.positions.dtype, device=x.device).triu(1)
        h = self.block(self.embed(x) + self.positions, src_mask=mask)
        return F.linear(self.norm(h)[:, -1], self.embed.weight)

    block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
    model = Call(forward, embed=nn.Embedding(5, 4), positions=nn.Parameter(torch.randn(4, 4)), block=block)
    model.norm = nn.LayerNorm(4)
    return Case(model, tokens_of(5, 3, 4))


@case
def transformer_of_tokens() -> Case:
    """A classifier with nothing that lacks a rule: one head, an RMS norm, a gated feed-forward layer."""

    def forward(self: Call, x: Tensor) -> Tensor:
        h = self.embed(x)
        u = self.norm1(h)
        h = h + self.mix(F.softmax(self.q(u) @ self.k(u).mT, dim=-1) @ u)
        u = self.norm2(h)
        return self.out((h + self.down(F.silu(self.gate(u)) * self.up(u))).mean(1))

    model = Call(forward, embed=nn.Embedding(5, 4), norm1=nn.RMSNorm(4), norm2=nn.RMSNorm(4, eps=1e-3))
    model.q, model.k, model.mix = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(4, 4)
    model.gate, model.up, model.down = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)
    model.out = nn.Linear(4, 2)
    return Case(model, tokens_of(5, 3, 4))


# without a rule, or against it ----------------------------------------------------------------------------------------


@case
def bare_parameter() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(self.scale * self.fc(x))), fc=nn.Linear(4, 5), out=nn.Linear(5, 2))
    model.scale = nn.Parameter(torch.randn(5))
    return Case(model, torch.randn(4, 4))


@case
def only_bare_parameters() -> Case:
    model = Call(lambda self, x: torch.tanh(x * self.scale) @ self.mix, scale=nn.Parameter(torch.randn(4)))
    model.mix = nn.Parameter(torch.randn(4, 2))
    return Case(model, torch.randn(4, 4))


@case
def called_by_keyword() -> Case:
    model = Call(lambda self, x: self.out(input=torch.tanh(self.fc(input=x))), fc=nn.Linear(4, 5), out=nn.Linear(5, 2))
    return Case(model, torch.randn(4, 4))


class Squared(nn.Linear):
    """A linear layer in name alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.square(), self.bias)


@case
def subclass_with_other_semantics() -> Case:
    return Case(nn.Sequential(Squared(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 4))


@case
def hook_that_never_fires() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(F.linear(x, self.fc.weight, self.fc.bias))), fc=nn.Linear(4, 5))
    model.out = nn.Linear(5, 2)
    return Case(model, torch.randn(4, 4))


def _double(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return 2 * output


@case
def hooked_by_the_user() -> Case:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].register_forward_hook(_double)
    return Case(model, torch.randn(4, 4))


@case
def lstm() -> Case:
    model = Call(lambda self, x: self.out(self.cell(x)[0][:, -1]), cell=nn.LSTM(3, 4, batch_first=True))
    model.out = nn.Linear(4, 2)
    return Case(model, torch.randn(3, 5, 3))


@case
def gru() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[1].transpose(0, 1).flatten(1))  # the last states of both directions

    cell = nn.GRU(2, 3, batch_first=True, bidirectional=True)
    model = Call(forward, cell=cell, out=nn.Linear(6, 2))
    return Case(model, torch.randn(3, 3, 2))


@case
def rnn_of_tokens() -> Case:
    """A recurrent cell that is called once per token, its states mixed by a layer that is, too."""

    def forward(self: Call, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 3, dtype=self.out.weight.dtype, device=x.device)
        for token in self.embed(x).unbind(1):
            state = torch.tanh(self.mix(self.cell(token, state)))
        return self.out(state)

    model = Call(forward, embed=nn.Embedding(4, 2), cell=nn.RNNCell(2, 3), mix=nn.Linear(3, 3), out=nn.Linear(3, 2))
    return Case(model, tokens_of(4, 3, 3))


@case
def rnn() -> Case:
    model = Call(lambda self, x: self.out(self.cell(x)[0].mean(1)), cell=nn.RNN(2, 3, num_layers=2, batch_first=True))
    model.out = nn.Linear(3, 2)
    return Case(model, torch.randn(3, 3, 2))


def attention(*, batch_first: bool) -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        tokens = self.project(x) if batch_first else self.project(x).transpose(0, 1)
        mixed = self.mix(tokens, tokens, tokens, need_weights=False)[0]
        return self.out(mixed.mean(1 if batch_first else 0))

    mix = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    model = Call(forward, project=nn.Linear(3, 4), mix=mix, out=nn.Linear(4, 2))
    return Case(model, torch.randn(3, 5, 3))


@case
def attention_batch_first() -> Case:
    return attention(batch_first=True)


@case
def attention_sequence_first() -> Case:
    return attention(batch_first=False)


@case
def transformer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = Call(lambda self, x: self.out(self.encoder(x).mean(1)), encoder=encoder, out=nn.Linear(4, 2))
    return Case(model, torch.randn(3, 5, 4))


@case
def layer_called_without_samples() -> Case:
    """A hypernetwork: a layer that is called on a parameter, so that what it returns has no axis of samples."""
    layers = {"gen": nn.Linear(2, 4), "out": nn.Linear(4, 2)}
    model = Call(lambda self, x: self.out(x * torch.tanh(self.gen(self.c))), c=nn.Parameter(torch.randn(2)), **layers)
    return Case(model, torch.randn(3, 4))


@case
def embedding_sparse() -> Case:
    model = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    return Case(model, torch.randint(0, 7, (4, 4)))


@case
def pretrained_in_bfloat16() -> Case:
    """Weights of another dtype are cast exactly, not refused."""
    return Case(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).bfloat16(), torch.randn(4, 4))


def every_case(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test once per network, under its name."""
    return pytest.mark.parametrize("name", CASES)(test)


# One of each kind: of layer, of axes, of use, of parameter without a rule, of what the outputs do not depend on.
CHOSEN = (
    "mlp", "one_sample", "sequence_first", "conv", "conv_groups", "conv_stride", "conv_same_reflect", "conv3d",
    "batch_norm_2d", "layer_norm_of_two_axes", "group_norm", "weight_norm", "residual_in_place", "tied_weights",
    "reused_at_two_sizes", "frozen_weight", "jacobian_of_zeros", "separate_heads",
    "embedding_of_repeated_and_padding_tokens", "language_model", "bare_parameter", "attention_batch_first", "lstm",
)  # fmt: skip


def chosen(values: Iterable[Any], some: Container[Any]) -> list[Any]:
    """List the values of a parameter: those that are not among some are slow. A tile is one value."""
    every = {value: value if type(value) is tuple else (value,) for value in values}
    return [value if value in some else pytest.param(*each, marks=pytest.mark.slow) for value, each in every.items()]


def chosen_cases(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test once per network, where another shows that each is treated rightly: all but a few are slow."""
    return pytest.mark.parametrize("name", chosen(CASES, CHOSEN[::2]))(test)


def in_turn(
    argnames: str,
    values: Iterable[Any],
    *others: Sequence[Any],
    always: Sequence[tuple[Any, ...]] = (),
) -> pytest.MarkDecorator:
    """Run a test with every combination of some parameters. Only a few combinations are not marked as slow.

    Each value is run with the combinations in ``always``, and with one of the other combinations, which are used in
    turn. All other combinations are marked as slow. A value that is marked itself keeps its marks in all combinations.
    """
    combinations = list(itertools.product(*others))
    rest = [number for number, each in enumerate(combinations) if each not in always]
    params = []
    for at, value in enumerate(values):
        name, marks = (value.values[0], value.marks) if isinstance(value, type(pytest.param())) else (value, ())
        for number, each in enumerate(combinations):
            is_quick = number == rest[at % len(rest)] or number not in rest
            params.append(pytest.param(name, *each, marks=marks or (() if is_quick else pytest.mark.slow)))
    return pytest.mark.parametrize(argnames.split(), params)


def chosen_cases_in_turn(argnames: str, *others: Sequence[Any]) -> pytest.MarkDecorator:
    """Run a test once per network and combination: the chosen networks with one each, in turn, the others slow."""
    first_chosen = [*CHOSEN, *(name for name in CASES if name not in CHOSEN)]
    return in_turn(argnames, chosen(first_chosen, CHOSEN), *others)


@cache
def reference_of(name: str) -> Tensor:
    """The reference kernel of a case, computed once for all tests."""
    case = CASES[name]()
    return reference_ntk(case.module, case.x)


# a kernel on disk -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A network, its samples and the plan of their kernel: everything that a store is made of."""

    module: nn.Module
    x: Tensor
    network: Network
    plan: Plan

    @property
    def reference(self) -> np.ndarray:
        """The kernel that a store should hold."""
        return reference_ntk(self.module, self.x).numpy()

    @property
    def samples(self) -> Samples:
        """Positions and labels that are not those of the rows."""
        return Samples(np.arange(len(self.x)) * 2, np.arange(len(self.x)) % 5)

    def create(
        self, path: Path, dtypes: tuple[str, ...] = ("float16", "float32"), layout: str = "upper"
    ) -> KernelStore:
        """Create an empty store."""
        identity = {"network": "3f2a", "samples": "91bc"}
        provenance = Provenance(model="small", dataset="noise")
        return create_store(path, Manifest(identity, provenance, self.plan, dtypes, layout), self.samples)

    def run(self, store: KernelStore, cached_blocks: int = 2, report: Report = lambda *_: None) -> KernelStore:
        """Compute what a store is missing."""
        running.run(self.network, self.x, store, cached_blocks=cached_blocks, report=report)
        return store

    def resume(self, path: Path) -> KernelStore:
        """Continue a store as the command line does."""
        with write_lock(path):
            store = open_store(path, mode="r+")
            tidy(store, self.samples)
            return self.run(store)


def small_network() -> nn.Module:
    """A convolution, whose kept rows are cheapest, and two dense layers, whose factors are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        body = [nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 7), nn.Tanh()]
        return nn.Sequential(*body, nn.Linear(7, 3))


def make_job(
    num_samples: int = 11, precision: str = "float32", block_samples: int | None = None, **options: Any
) -> Job:
    """Plan a kernel of 3 outputs in tiles of 3 samples: 4 × 4 tiles for 11 samples, the last block ragged."""
    module = options.get("module") or small_network()
    x = torch.randn(num_samples, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * options.get("scale", 1)
    network = prepare(module, x, policy(precision))
    plan = make_plan(
        network.profile,
        make_grid(num_samples, 3, options.get("side", 9)),
        Choices(precision),
        budget=Budget(1 << 30, 1 << 30),
        environment=environment(CPU, options.get("threads", 1)),
    )
    if block_samples:
        plan = cut(plan, block_samples)
    return Job(module, x, network, plan)


def cut(plan: Plan, block_samples: int) -> Plan:
    """Cut the tiles of a plan into smaller blocks."""
    sizes = dataclasses.replace(plan.jacobian.sizes, block_samples=block_samples)
    return dataclasses.replace(plan, jacobian=dataclasses.replace(plan.jacobian, sizes=sizes))


def files_of(path: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_files(path: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder, as `files_of` read them."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


# followed to their junctions -----------------------------------------------------------------------------------------


@case
def weights_divided_by_the_root_of_the_width() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(x, self.w / 2, 0.1 * self.b))
        return F.linear(hidden, self.v / 6**0.5)

    parts = {name: nn.Parameter(torch.randn(shape)) for name, shape in {"w": (6, 4), "b": (6,), "v": (2, 6)}.items()}
    return Case(Call(forward, **parts), torch.randn(5, 4))


@case
def weight_of_inputs_and_outputs() -> Case:
    """As in the layers of GPT-2: positions and samples share an axis, and the weight is (inputs, outputs)."""

    def forward(self: Call, x: Tensor) -> Tensor:
        flat = torch.addmm(self.b, x.reshape(-1, x.shape[-1]), self.w)
        return self.out(torch.tanh(flat.view(*x.shape[:-1], -1)).mean(1))

    model = Call(forward, w=nn.Parameter(torch.randn(3, 5)), b=nn.Parameter(torch.randn(5)), out=nn.Linear(5, 2))
    return Case(model, torch.randn(4, 3, 3))


@case
def class_token_and_positions() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.out(torch.tanh(self.gain * tokens).mean(1))

    shapes = {"token": (1, 1, 3), "positions": (1, 5, 3), "gain": (3,)}
    model = Call(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
    model.out = nn.Linear(3, 2)
    return Case(model, torch.randn(3, 4, 3))


@case
def weights_on_the_left_masked_sliced_and_joined() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        left = torch.tanh(self.left @ x)  # (samples, 4, 2)
        masked = torch.tanh(left.mT @ (self.masked * self.mask).T)  # (samples, 2, 5)
        one, two = torch.cat([self.part, self.other]).split([1, 3])
        first = masked @ self.joint[:5] + (x @ one.T).mT @ self.joint[5:8]
        return first.sum(1) + (x.mean(1) @ two.T) @ self.joint[8:]

    shapes = {"left": (4, 3), "masked": (5, 4), "part": (2, 2), "other": (2, 2), "joint": (11, 2)}
    model = Call(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
    model.register_buffer("mask", (torch.rand(5, 4) > 0.3).float())
    return Case(model, torch.randn(4, 3, 2))


@case
def einsum_and_powers_of_weights() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        heads = torch.einsum("ntd,hdk->nhtk", x, self.heads)
        return self.out((heads / (1 + self.scale**2)).relu().flatten(2).sum(-1)) * self.gate.sigmoid()

    shapes = {"heads": (3, 2, 2), "scale": (3, 1, 1), "gate": ()}
    model = Call(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
    model.out = nn.Linear(3, 2)
    return Case(model, torch.randn(4, 3, 2))


@case
def scaled_convolutions() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv2d(x, self.w / 3, 0.5 * self.b, stride=(1, 2), padding=1, groups=2))
        return F.conv2d(hidden, self.v, padding="same").mean((2, 3))

    shapes = {"w": (4, 1, 3, 3), "b": (4,), "v": (2, 4, 1, 3)}
    model = Call(forward, **{name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
    return Case(model, torch.randn(3, 2, 4, 5))


@case
def lstm_in_two_directions_and_layers() -> Case:
    cell = nn.LSTM(3, 4, 2, bidirectional=True)
    model = Call(lambda self, x: self.out(self.cell(x.transpose(0, 1))[0].sum(0)), cell=cell, out=nn.Linear(8, 2))
    return Case(model, torch.randn(3, 3, 3))


@case
def attention_with_masks_and_biases() -> Case:
    def forward(self: Call, x: Tensor) -> Tensor:
        padding = torch.zeros(len(x), 3, dtype=torch.bool)
        padding[:, 2] = x[:, 2, 0] > 0
        causal = torch.ones(2, 3, dtype=torch.bool).triu(1)
        return self.attn(x[:, :2], x, self.keys(x), key_padding_mask=padding, attn_mask=causal)[0].flatten(1)

    attn = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True, kdim=4, vdim=3)
    return Case(Call(forward, attn=attn, keys=nn.Linear(4, 3)), torch.randn(4, 3, 4))


@case
def weight_that_changes_a_part_in_place() -> Case:
    """Gradients are taken at the results of calls, and a later call overwrites these."""

    def forward(self: Call, x: Tensor) -> Tensor:
        hidden = x.clone()
        hidden[:, 0] += self.first
        hidden *= self.gain
        return self.out(torch.tanh(hidden).mean(1))

    model = Call(forward, first=nn.Parameter(torch.randn(3)), gain=nn.Parameter(torch.randn(3)), out=nn.Linear(3, 2))
    return Case(model, torch.randn(4, 2, 3), ("first", "gain"))


# left to autograd -----------------------------------------------------------------------------------------------------


class _Cubed(torch.autograd.Function):
    """y = x w³ in the style that `torch.func` refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w**3, (3 * grad * x * w**2).sum(0)


class _CubedForFunc(torch.autograd.Function):
    """The same in the style of `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w**3, (3 * grad * x * w**2).sum(0)


@case
def own_autograd_function() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(_Cubed.apply(x, self.w))), w=nn.Parameter(torch.randn(4)))
    model.out = nn.Linear(4, 2)
    return Case(model, torch.randn(5, 4), ("w",))


@case
def own_autograd_function_for_torch_func() -> Case:
    model = Call(lambda self, x: self.out(torch.tanh(_CubedForFunc.apply(x, self.w))), w=nn.Parameter(torch.randn(4)))
    model.out = nn.Linear(4, 2)
    return Case(model, torch.randn(5, 4), ("w",))
