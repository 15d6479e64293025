"""Every network of the zoo: its size, its shapes, its seed, its independence of the batch."""

import math

import pytest
import torch
from cases import chosen
from torch import Tensor, nn

from models import MODELS
from models.conv import he_normal

NUM_PARAMS = {
    "resnet9": 4_903_242,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet68": 41_353_546,
    "resnet101": 42_512_970,
    "resnet152": 58_156_618,
    "resnet10-bias": 4_906_122,
    "resnet18-bias": 11_178_762,
    "mobilenet": 3_217_226,
    "mobilenetv2": 2_296_922,
    "vgg11": 9_231_114,
    "vgg13": 9_416_010,
    "lenet": 62_006,
    "wrn-28-2": 1_468_506,
    "wrn-28-5": 9_134_874,
    "wrn-28-10": 36_483_674,
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet56": 869_530,
    "mlp": 328_510,
    "ntk-rnn": 318_300,
    "cnn": 6_312_170,
    "logistic": 30_730,
    "lenet-stream": 62_006,
    "mlp-stream": 968_560,
    "densenet121": 6_956_298,
}
RESNETS = [name for name in NUM_PARAMS if name.startswith("resnet")]
WITH_WIDTH = [*RESNETS, "mlp", "ntk-rnn", "cnn"]
# Half of the width that a network has by default.
HALF = {name: 8 if name in {"resnet20", "resnet32", "resnet56"} else 32 for name in RESNETS}

every_model = pytest.mark.parametrize("name", NUM_PARAMS)
# One of each family, and not the largest, where a network is built and run.
FAMILIES = ("resnet9", "resnet50", "mobilenet", "mobilenetv2", "vgg11", "lenet", "wrn-28-2", "logistic", "densenet121")
some_models = pytest.mark.parametrize("name", chosen(NUM_PARAMS, FAMILIES[::3]))
model_of_each_family = pytest.mark.parametrize("name", chosen(NUM_PARAMS, FAMILIES))


def count(network: nn.Module) -> int:
    return sum(param.numel() for param in network.parameters() if param.requires_grad)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def small(name: str, seed: int) -> nn.Module:
    """Build the network, the ResNets narrow to save time."""
    torch.manual_seed(seed)
    return MODELS[name](**({"width": 16} if MODELS[name].has_width else {}))


def test_every_network_has_a_row_in_this_file():
    assert list(MODELS) == list(NUM_PARAMS)


@every_model
def test_parameter_count(name):
    with torch.device("meta"):
        assert count(MODELS[name](num_classes=10)) == NUM_PARAMS[name]


@some_models
@pytest.mark.parametrize("num_classes", [7])
def test_logits_have_one_column_per_class(name, num_classes):
    with torch.device("meta"):
        assert MODELS[name](num_classes=num_classes)(torch.empty(2, 3, 32, 32)).shape == (2, num_classes)


@model_of_each_family
@torch.no_grad()
def test_evaluation_of_a_sample_ignores_the_rest_of_the_batch(name):
    network = small(name, seed=0).eval()
    x, other = images(seed=1), images(seed=2)
    alone, first, second = network(x[:1]), network(x), network(torch.cat([x[:1], other[1:]]))
    # An untrained network in evaluation mode may have logits of 1e7: compare relative to their size.
    tolerance = {"rtol": 0, "atol": 1e-4 * alone.abs().max().item()}
    torch.testing.assert_close(first[:1], alone, **tolerance)
    torch.testing.assert_close(second[:1], alone, **tolerance)
    assert not torch.allclose(first[1], second[1], **tolerance)


@some_models
def test_the_seed_fixes_the_parameters(name):
    networks = [small(name, seed) for seed in (0, 0, 1)]
    for param, same, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(param, same)
        # Biases and batch norms may start from constants; a matrix or a filter may not.
        assert param.ndim == 1 or not torch.equal(param, other)


@pytest.mark.slow
@every_model
def test_parameters_and_batch_statistics_are_all_that_is_stored(name):
    with torch.device("meta"):
        network = MODELS[name]()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.track_running_stats and norm.affine for norm in norms)
    assert len(list(network.buffers())) == 3 * len(norms)


@every_model
def test_paper_names_author_and_year(name):
    assert len(MODELS[name].paper.split("(")[0]) > 3
    assert 1950 < int(MODELS[name].paper.split("(")[1][:4]) < 2030


def test_these_networks_take_a_width():
    assert {name for name, entry in MODELS.items() if entry.has_width} == set(WITH_WIDTH)
    with pytest.raises(TypeError, match="width"):
        MODELS["vgg11"](width=32)


@pytest.mark.parametrize("name", chosen(RESNETS, FAMILIES))
def test_width_scales_every_layer(name):
    with torch.device("meta"):
        narrow, default = MODELS[name](width=HALF[name]), MODELS[name]()
        for small, large in zip(narrow.parameters(), default.parameters(), strict=True):
            assert all(n in {m, 2 * m} for m, n in zip(small.shape, large.shape, strict=True))
        assert count(default) / count(narrow) == pytest.approx(4, rel=0.02)
        assert narrow(torch.empty(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "num_params"), [("resnet20", 278_324), ("resnet32", 472_756), ("resnet56", 892_660), ("cnn", 6_402_260)]
)
def test_parameter_count_at_100_classes(name, num_params):
    with torch.device("meta"):
        assert count(MODELS[name](num_classes=100)) == num_params


def test_the_mlp_in_ntk_parametrisation_divides_by_the_root_of_the_fan_in():
    torch.manual_seed(0)
    network = MODELS["mlp"](width=500, parametrization="ntk")
    assert network[1][1].weight.std().item() == pytest.approx(1, rel=0.01)
    assert not network[1][1].bias.any()
    x = torch.randn(200, 3, 32, 32)
    assert network[:2](x).std().item() == pytest.approx(1, rel=0.02)
    assert count(network) == count(MODELS["mlp"](width=500))


def test_the_recurrent_network_is_its_formula():
    torch.manual_seed(0)
    network = MODELS["ntk-rnn"](width=7, num_steps=3, inputs=12, num_classes=2)
    x, h = torch.randn(4, 3, 2, 2), torch.zeros(4, 7)
    u, w, v = (network.get_parameter(f"{name}.weight") for name in ("input", "state", "head"))
    for part in x.flatten(1).split(4, dim=1):
        h = torch.erf(part @ u.T / 2 + h @ w.T / 7**0.5 + network.input.bias)
    torch.testing.assert_close(network(x), h @ v.T / 7**0.5)


def test_he_normal_draws_by_fan_out_and_zeroes_the_bias():
    torch.manual_seed(0)
    dense, depthwise = he_normal(nn.Sequential(nn.Conv2d(3, 512, 3), nn.Conv2d(512, 512, 3, groups=512)))
    assert dense.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.05)
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert not dense.bias.any()
