"""Hidden layers of networks, declared and derived, and the activations of their units."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import models.hidden
from models import MODELS
from ntkgen.continual.units import HiddenLayer, hidden_layers, recorded
from ntkgen.errors import ModelError

pytestmark = pytest.mark.numeric


def images(count=2, size=32, channels=3):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def built(name, **options):
    torch.manual_seed(0)
    return MODELS[name](**options)


def names_of(model):
    return [tuple(layer) for layer in hidden_layers(model)]


# the networks of the zoo ----------------------------------------------------------------------------------------------


def test_the_resnet_with_bias_is_the_published_one():
    """L08: parameters, biases, no max-pooling, 17 layers with 3,904 units, 100 outputs."""
    with torch.device("meta"):
        model = MODELS["resnet18-bias"](num_classes=100)
        assert sum(param.numel() for param in model.parameters()) == 11_224_932
        layers = hidden_layers(model)
        with recorded(model, layers) as features:
            assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 20
    assert all(conv.bias is not None for conv in convs)
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())
    stages = [(64, 32)] * 5 + [(128, 16)] * 4 + [(256, 8)] * 4 + [(512, 4)] * 3
    expected = [*((2, channels, size, size) for channels, size in stages), (2, 512)]
    assert [tuple(features[layer.activation].shape) for layer in layers] == expected
    assert len(layers) == 17
    assert sum(model.get_submodule(layer.incoming).out_channels for layer in layers) == 3904
    assert [model.get_submodule(name).stride for name in ("stages.1.0.0.branch.0", "stages.0.0.0.branch.0")] == [
        (2, 2),
        (1, 1),
    ]


def test_the_features_of_the_resnet_are_those_of_a_plain_loop():
    model = built("resnet18-bias", num_classes=5, width=4)
    x = images()
    model(x)  # statistics of batch norm
    model.eval()
    with torch.no_grad():
        h = F.relu(model.stem[1](model.stem[0](x)))
        expected = [h]
        for block in (block for stage in model.stages for block in stage):
            conv1, norm1, _, conv2, norm2 = block[0].branch
            inner = F.relu(norm1(conv1(h)))
            h = F.relu(norm2(conv2(inner)) + block[0].shortcut(h))
            expected += [inner, h]
        expected[-1] = h.mean((2, 3))
        with recorded(model, hidden_layers(model)) as features:
            outputs = model(x)
    assert len(features) == len(expected) == 17
    for found, each in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs, model.head(expected[-1]), rtol=1e-4, atol=1e-5)


def test_the_resnet_with_bias_is_drawn_by_fan_in():
    model = built("resnet10-bias", num_classes=400, width=64)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = 1 if name == "head" else 2
            expected = math.sqrt(gain / module.weight[0].numel())
            # The relative error of a standard deviation of n numbers is about 1 / √(2n); 5 of them.
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * module.weight.numel()))
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "count"), [("resnet10-bias", 9), ("resnet9", 9), ("resnet20", 19), ("resnet32", 31), ("resnet50", 49)]
)
def test_residual_networks_declare_their_main_path(name, count):
    with torch.device("meta"):
        model = MODELS[name](num_classes=7)
        layers = hidden_layers(model)
    assert len(layers) == count
    assert layers[-1].outgoing == "head"
    assert not any("shortcut" in each for layer in layers for each in layer)
    for layer, following in pairwise(layers):
        assert layer.outgoing == following.incoming
        assert model.get_submodule(layer.norm).num_features == model.get_submodule(layer.incoming).out_channels


def test_both_kinds_of_hidden_layer_have_the_same_fields():
    assert HiddenLayer._fields == models.hidden.HiddenLayer._fields


@pytest.mark.parametrize("name", ["wrn-28-2", "densenet121", "mobilenet", "mobilenetv2", "ntk-rnn"])
def test_other_networks_of_the_zoo_are_refused(name):
    with torch.device("meta"), pytest.raises(ModelError, match=r"hidden units of .* are not known: expected"):
        hidden_layers(MODELS[name]())


# chains ---------------------------------------------------------------------------------------------------------------


def test_layers_of_the_chains_of_the_zoo():
    with torch.device("meta"):
        assert names_of(MODELS["mlp"]()) == [("2", "1", None, "3"), ("4", "3", None, "5"), ("6", "5", None, "7")]
        assert names_of(MODELS["lenet"]()) == [
            ("2", "0", None, "3"),
            ("5", "3", None, "7"),
            ("8", "7", None, "9"),
            ("10", "9", None, "11"),
        ]
        assert names_of(MODELS["cnn"]())[1:5] == [
            ("0.6", "0.3", "0.4", "0.7"),
            ("0.9", "0.7", "0.8", "0.10"),
            ("0.12", "0.10", "0.11", "2"),
            ("3", "2", None, "4"),
        ]
        vgg = names_of(MODELS["vgg11"]())
        assert vgg[0] == ("features.3", "features.0", "features.1", "features.4")
        assert vgg[-1] == ("features.28", "features.25", "features.26", "head")
        assert len(vgg) == 8
        assert names_of(MODELS["logistic"]()) == []


def test_layers_of_a_chain_with_everything():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.BatchNorm2d(1),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Dropout2d()),
        nn.Flatten(),
        nn.Sequential(nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout()),
        nn.Linear(5, 6),
        nn.Linear(6, 2),
        nn.Identity(),
    )
    expected = [("2.3", "2.0", "2.2", "4.0"), ("4.2", "4.0", "4.1", "5"), ("5", "5", None, "6")]
    assert names_of(model) == expected
    with recorded(model, hidden_layers(model)) as features:
        model(torch.randn(3, 64))
    assert {name: tuple(h.shape) for name, h in features.items()} == {"2.3": (3, 4, 3, 3), "4.2": (3, 5), "5": (3, 6)}


class Custom(nn.Module):
    def __init__(self, layers=None):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
        if layers is not None:
            self.hidden_layers = layers

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def test_anybodys_network_may_declare_its_layers():
    assert names_of(Custom((("act", "first", None, "second"),))) == [("act", "first", None, "second")]


ACT = nn.ReLU()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Custom(), "found a Custom. Does it compute units in another way"),
        (Custom((("act", "frist", None, "second"),)), "found 'frist'. Is a name misspelt"),
        (Custom((("act", "first", None, "act"),)), "plain weights as act, found a ReLU"),
        (Custom((("act", "second", None, "first"),)), "each of the 2 units of second, found 4"),
        (Custom((("act", "first", "act", "second"),)), r"batch norm of the 3 units of first as act, found ReLU\(\)"),
        (nn.Sequential(nn.LSTM(4, 3), nn.Linear(3, 2)), "found a LSTM as 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "found a LayerNorm as 1"),
        (nn.Sequential(nn.Linear(4, 4), ACT, nn.Linear(4, 4), ACT, nn.Linear(4, 2)), "modules 1 and 3 are the same"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2)), "each of the 4 units of 0, found 2"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(8, 2)), "an nn.Flatten between 0 and 2, found none"),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2)),
            "with plain weights as 0, found a ParametrizedLinear",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2)),
            "batch norm of the 4 units of 0 as 2",
        ),
    ],
)
def test_a_network_whose_units_are_not_known_is_refused(model, match):
    with pytest.raises(ModelError, match=match):
        hidden_layers(model)


def test_an_attribute_of_the_same_name_is_no_declaration():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model.hidden_layers = [model[0]]
    assert names_of(model) == [("1", "0", None, "2")]


# activations ----------------------------------------------------------------------------------------------------------


def test_hooks_are_there_within_the_block_alone():
    model = Custom((("act", "first", None, "second"),))
    x = torch.randn(5, 4)
    with recorded(model, hidden_layers(model)) as features:
        assert features == {}
        outputs = model(x)
    assert torch.equal(features["act"], model.act(model.first(x)))
    assert not features["act"].requires_grad
    assert torch.equal(outputs, model(x))
    model(x + 1)
    assert torch.equal(features["act"], model.act(model.first(x)))
    assert not model.act._forward_hooks
    with pytest.raises(ZeroDivisionError), recorded(model, hidden_layers(model)):
        _ = 1 / 0
    assert not model.act._forward_hooks
