"""The rows of `networks.py`: networks from one seed, with their samples, and those of functions, graphs and images."""

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from zoo_of_sequences import (
    CLASSES,
    FEATURES,
    HIDDEN,
    Attention,
    BareRecurrent,
    Encoder,
    Recurrent,
    SelectiveStateSpace,
    Subject,
    bert,
    gpt2,
    gpt2_lora,
    llama,
    sequences,
)

from ntkgen.training import zoo

SEED = 0


@dataclass(frozen=True)
class Row:
    """One row of the benchmark."""

    name: str
    build: Callable[[], Subject]
    packages: tuple[str, ...] = ()
    """Packages beside those of the project."""
    slow: bool = False
    """Whether it takes tens of seconds, and is left out unless it is asked for."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(name for name in self.packages if importlib.util.find_spec(name) is None)

    def subject(self) -> Subject:
        """Build the network in evaluation mode, and draw its samples. Both are the same in each call."""
        torch.manual_seed(SEED)
        model, x = self.build()
        return model.eval(), x


# functions and graphs -------------------------------------------------------------------------------------------------


def mlp(*sizes: int, wrap: Callable[[nn.Linear], nn.Module] = lambda layer: layer) -> nn.Sequential:
    """Build a network of linear layers with tanh between them."""

    def parts() -> Iterator[nn.Module]:
        for inputs, outputs in itertools.pairwise(sizes):
            yield wrap(nn.Linear(inputs, outputs))
            yield nn.Tanh()

    return nn.Sequential(*list(parts())[:-1])


class GraphNetwork(nn.Module):
    """Two graph convolutions on a fixed graph, written as in PyTorch Geometric. The samples are numbers of nodes.

    References:
        Kipf, Welling (2017), ICLR, arXiv:1609.02907.
    """

    def __init__(self, nodes: int = 40, edges: int = 120) -> None:
        super().__init__()
        pairs = torch.randint(nodes, (2, edges))
        loops = torch.arange(nodes).expand(2, -1)
        source, target = torch.cat([pairs, pairs.flip(0), loops], 1)
        degrees = torch.bincount(target, minlength=nodes).to(torch.get_default_dtype())
        self.register_buffer("source", source)
        self.register_buffer("target", target)
        self.register_buffer("norm", (degrees[source] * degrees[target]).rsqrt())
        self.register_buffer("features", torch.randn(nodes, FEATURES))
        self.first, self.second = nn.Linear(FEATURES, HIDDEN, bias=False), nn.Linear(HIDDEN, 4, bias=False)
        self.biases = nn.ParameterList([0.1 * torch.randn(HIDDEN), 0.1 * torch.randn(4)])

    def propagate(
        self,
        h: Tensor,  # (nodes, features)
    ) -> Tensor:  # (nodes, features)
        """Add up the messages of all edges at their targets."""
        source, target, norm = self.get_buffer("source"), self.get_buffer("target"), self.get_buffer("norm")
        return torch.zeros_like(h).index_add(0, target, norm[:, None] * h[source])

    def forward(
        self,
        index: Tensor,  # (samples,), integers
    ) -> Tensor:  # (samples, outputs)
        """Return the outputs of some nodes."""
        hidden = torch.relu(self.propagate(self.first(self.get_buffer("features"))) + self.biases[0])
        found: Tensor = self.propagate(self.second(hidden)) + self.biases[1]
        return found[index]


class DeepONet(nn.Module):
    """An operator network: the product of a branch and a trunk, with one scalar (Lu et al. 2021, arXiv:1910.03193)."""

    def __init__(self, sensors: int = 20, width: int = 64) -> None:
        super().__init__()
        self.sensors = sensors
        self.branch, self.trunk = mlp(sensors, width, width), mlp(2, width, width)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        x: Tensor,  # (samples, sensors + 2): values of the function, then a position
    ) -> Tensor:  # (samples, 1)
        """Return the value at the position."""
        products: Tensor = self.branch(x[:, : self.sensors]) * self.trunk(x[:, self.sensors :])
        return products.sum(-1, keepdim=True) + self.bias


class FourierFeatures(nn.Module):
    """A network of coordinates with trainable frequencies (Tancik et al. 2020, arXiv:2006.10739)."""

    def __init__(self, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, frequencies))
        self.layers = mlp(2 * frequencies, 64, 64, 3)

    def forward(
        self,
        x: Tensor,  # (samples, 2)
    ) -> Tensor:  # (samples, outputs)
        """Return the colours of some positions."""
        phases = 2 * math.pi * x @ self.frequencies
        found: Tensor = self.layers(torch.cat([phases.cos(), phases.sin()], -1))
        return found


class NTKLinear(nn.Module):
    """A linear layer in NTK parametrisation, which scales its weight in each call."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(
        self,
        x: Tensor,  # (samples, inputs)
    ) -> Tensor:  # (samples, outputs)
        """Multiply by the scaled weight."""
        return F.linear(x, self.weight / math.sqrt(self.weight.shape[1]))


def ntk_linear(width: int, samples: int) -> Subject:
    """Build 10-width-width-1 of `NTKLinear` with ReLU."""
    layers = NTKLinear(10, width), nn.ReLU(), NTKLinear(width, width), nn.ReLU(), NTKLinear(width, 1)
    return nn.Sequential(*layers), torch.randn(samples, 10)


# images ---------------------------------------------------------------------------------------------------------------


def images(model: nn.Module, samples: int, size: int = 32) -> Subject:
    """Join a network with images. Statistics of batch norms become those of the images."""
    x = torch.randn(samples, 3, size, size)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    if norms:
        with torch.no_grad():
            model.train()(x)
    return model, x


def vgg() -> nn.Module:
    """Build a VGG-11 without batch norm, of half the width, with one linear layer."""
    layers: list[nn.Module] = []
    before = 3
    for stage in ((32,), (64,), (128, 128), (256, 256), (256, 256)):
        for after in stage:
            conv = nn.Conv2d(before, after, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU()]
            before = after
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10))


def of_timm(name: str, samples: int, **options: Any) -> Callable[[], Subject]:
    """Build a network of timm for images of 224 × 224 pixels, or of the size in the options."""

    def build() -> Subject:
        timm: Any = importlib.import_module("timm")
        model = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return images(model, samples, options.get("img_size", 224))

    return build


# rows -----------------------------------------------------------------------------------------------------------------

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)}
RECURRENT = {"hidden_size": HIDDEN, "batch_first": True}


def normalised(normalise: Callable[[nn.Linear], nn.Module]) -> Callable[[], Subject]:
    """Build a network whose weights are normalised in each call."""
    return lambda: (mlp(FEATURES, 64, 64, CLASSES, wrap=normalise), torch.randn(40, FEATURES))


def recurrent(layer: Callable[..., nn.RNNBase], **options: Any) -> Callable[[], Subject]:
    """Build a network with a recurrent layer."""
    return lambda: sequences(Recurrent(layer(FEATURES, **RECURRENT, **options)))


# The rows of issue 17, then those that must not become slower.
ROWS = {
    row.name: row
    for row in (
        Row("gpt2", gpt2, ("transformers",)),
        Row("llama", llama, ("transformers",)),
        Row("gpt2-lora", gpt2_lora, ("transformers", "peft")),
        Row("bert", bert, ("transformers",)),
        Row("attention", lambda: sequences(Attention(), HIDDEN)),
        Row("encoder", lambda: sequences(Encoder(), HIDDEN)),
        Row("lstm", recurrent(nn.LSTM)),
        Row("lstm-2-layers-both", recurrent(nn.LSTM, num_layers=2, bidirectional=True)),
        Row("gru", recurrent(nn.GRU)),
        Row("rnn", recurrent(nn.RNN)),
        Row("rnn-bare", lambda: sequences(BareRecurrent())),
        Row("state-space", lambda: sequences(SelectiveStateSpace())),
        Row("weight-norm", normalised(parametrizations.weight_norm)),
        Row("spectral-norm", normalised(parametrizations.spectral_norm)),
        Row("graph", lambda: (GraphNetwork(), torch.arange(40))),
        Row("deeponet", lambda: (DeepONet(), torch.randn(100, 22))),
        Row("fourier-features", lambda: (FourierFeatures(), torch.rand(100, 2))),
        Row("ntk-linear", lambda: ntk_linear(1024, 500)),
        Row("mlp", lambda: (mlp(10, 64, 1), torch.randn(64, 10))),
        Row("lenet", lambda: images(zoo.build("lenet", 10, seed=SEED), 96)),
        Row("resnet20", lambda: images(zoo.build("resnet20", 10, seed=SEED), 16)),
        Row("vgg-without-norm", lambda: images(vgg(), 8)),
        Row("vit-tiny", of_timm("vit_tiny_patch16_224", 16), ("timm",), slow=True),
        Row("efficientnet", of_timm("efficientnet_b0", 16), ("timm",), slow=True),
        Row("swin", of_timm("swin_tiny_patch4_window7_224", 32, **SWIN), ("timm",), slow=True),
    )
}
