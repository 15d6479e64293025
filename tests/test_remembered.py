"""Preparations are remembered: a second kernel of a module has no trial, and is right whatever has changed."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ntkgen
from ntkgen.errors import ModelError
from ntkgen.jacobian import network as preparation
from ntkgen.jacobian import remembered
from ntkgen.jacobian.layers import DENSE, RULES, LayerRule
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.jacobian.remembered import REMEMBERED

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Configured(nn.Module):
    """A network whose forward pass depends on an object that is no module, which no comparison of modules sees."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(kind="plain")
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.bare = nn.Parameter(torch.randn(4, 5))
        self.slope = 1.0
        self.double()

    def forward(self, x):
        kind, h = self.config.kind, torch.tanh(self.first(x) + x @ self.bare)
        if kind == "squared":
            h = torch.tanh(self.first(x) + x @ self.bare.square())
        if kind == "without bare":
            h = torch.tanh(self.first(x))
        if kind == "matrix of another":
            h = torch.tanh(F.linear(x, self.first.weight.flip(0), self.first.bias) + x @ self.bare)
        if kind == "twice":
            h = torch.tanh(self.first(x) + self.first(x.square()) + x @ self.bare)
        if kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.second(h)
        if kind == "fewer":
            return self.second(h)[:, :1]
        if kind == "rounded":
            return self.second(h).float()
        return self.slope * self.second(h)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Configured()


@pytest.fixture
def trials(monkeypatch):
    """Count the trials of networks."""
    counted = []
    original = preparation.try_network

    def try_network(*args, **kwargs):
        counted.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(preparation, "try_network", try_network)
    return counted


def assert_right(net, x=X, **asked):
    expected = reference_ntk(net, x)
    assert torch.allclose(ntkgen.ntk(net, x, **asked), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_a_network_that_is_trained_is_tried_once(net, trials):
    assert_right(net)
    for step in range(3):
        with torch.no_grad():
            for param in net.parameters():
                param.add_(0.1 * (step + 1))
        assert_right(net, X[step:] + step)  # of other samples, and of another number of them
    assert len(trials) == 1


def test_the_bits_are_those_of_a_first_kernel(net):
    first = ntkgen.ntk(net, X)
    assert torch.equal(ntkgen.ntk(net, X), first)
    assert torch.equal(ntkgen.ntk(copy.deepcopy(net), X), first)


@pytest.mark.parametrize("kind", ["squared", "without bare", "matrix of another", "twice"])
def test_a_change_that_no_comparison_sees_is_found_by_the_proof_of_the_batch(net, trials, kind):
    assert_right(net)
    net.config.kind = kind
    assert_right(net)
    assert len(trials) > 1
    net.config.kind = "plain"
    assert_right(net)


def test_an_autocast_region_that_appears_later_is_refused(net):
    assert_right(net)
    net.config.kind = "autocast"
    with pytest.raises(ModelError, match="autocast"):
        ntkgen.ntk(net, X)


def test_outputs_that_become_fewer_are_the_new_ones(net):
    assert_right(net)
    net.config.kind = "fewer"
    assert ntkgen.ntk(net, X).shape == (6, 6)
    assert_right(net)


def test_outputs_of_another_dtype_that_appear_later_are_refused(net):
    assert_right(net)
    net.config.kind = "rounded"
    with pytest.raises(ModelError, match="float32"):
        ntkgen.ntk(net, X)


def frozen(net):
    net.first.weight.requires_grad = False


def thawed(net):
    frozen(net)
    ntkgen.ntk(net, X)
    net.first.weight.requires_grad = True


def with_a_slope(net):
    net.slope = 2.0


def tied(net):
    net.second = nn.Linear(5, 5).double()
    ntkgen.ntk(net, X)
    net.second.bias = net.first.bias


def with_a_hook(net):
    net.first.register_forward_hook(lambda _module, _args, output: output * 2)


def with_a_parametrization(net):
    nn.utils.parametrizations.weight_norm(net.second)


def with_another_layer(net):
    net.second = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


@pytest.mark.parametrize(
    "change", [frozen, thawed, with_a_slope, tied, with_a_hook, with_a_parametrization, with_another_layer]
)
def test_a_changed_network_is_tried_again(net, trials, change):
    assert_right(net)
    change(net)
    before = len(trials)
    assert_right(net)
    assert len(trials) > before or change is thawed  # which is known


def test_other_questions_are_tried_and_remembered_too(net, trials):
    for _ in range(2):
        for asked in ({}, {"output": "sum"}, {"params": "first.*"}, {"select": "[:, 1]"}):
            found = ntkgen.ntk(net, X, **asked)
            assert torch.equal(found, ntkgen.ntk(copy.deepcopy(net), X, **asked))
    assert len(trials) == 4 + 8  # those of the copies are never known


def test_only_the_last_questions_are_remembered(net, trials):
    for index in (0, 1, 2, 0):
        ntkgen.ntk(net, X, output=f"index:{index}")
    assert len(trials) == 3
    for output in ("sum", "trace", "diagonal", "full"):
        ntkgen.ntk(net, X, output=output)
    ntkgen.ntk(net, X, output="index:0")
    assert len(trials) == 3 + 4 + 1


def test_a_function_of_the_user_is_not_remembered(net, trials):
    for scale in (1.0, 2.0):
        found = ntkgen.ntk(net, X, function=lambda module, x, scale=scale: scale * module(x))
        assert torch.allclose(found, scale**2 * reference_ntk(net, X), rtol=1e-10)
    assert len(trials) == 2


def hidden(module, x):
    return torch.tanh(module.first(x))


def shifted(module, x):
    return module.first(x).square()


def test_a_function_that_holds_nothing_is_remembered(net, trials, monkeypatch):
    for index in range(3):
        found = ntkgen.ntk(net, X + index, function=hidden)
        assert torch.allclose(found, reference_ntk(net, X + index, function=hidden), rtol=1e-9)
    assert len(trials) == 1
    assert torch.allclose(ntkgen.ntk(net, X, function=shifted), reference_ntk(net, X, function=shifted), rtol=1e-9)
    assert len(trials) == 2
    monkeypatch.setattr(hidden, "__code__", shifted.__code__)  # as a notebook does that loads a file again
    assert torch.equal(ntkgen.ntk(net, X, function=hidden), ntkgen.ntk(net, X, function=shifted))
    assert len(trials) == 3


def residual(module, x):
    """A residual with derivatives of its own, which no rule treats."""
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    return slope.square() - module(x)[:, :1]


def test_a_residual_is_tried_once(net, trials):
    for index in range(2):
        found, expected = (kernel(net, X + index, function=residual) for kernel in (ntkgen.ntk, reference_ntk))
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert len(trials) == 1


def test_a_rule_that_is_registered_later_is_used(net, trials, monkeypatch):
    assert_right(net)
    wrong = LayerRule("weight", DENSE.inputs, lambda module, grad: 2 * DENSE.cotangents(module, grad), DENSE.vectors)
    monkeypatch.setitem(RULES, nn.Linear, wrong)
    assert_right(net)  # without this rule
    assert len(trials) > 1


def test_samples_of_another_shape_are_tried(trials):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten()).double()
    for x in (X, X[:, None], X[:, None].expand(-1, 2, -1)):
        assert_right(net, x)
    assert len(trials) == 3


def test_a_network_that_has_died_is_forgotten(net):
    ntkgen.ntk(net, X)
    key = id(net)
    assert key in REMEMBERED._known
    del net
    gc.collect()
    # pytest's fixture still holds the network: only its own death counts
    other = Configured()
    ntkgen.ntk(other, X)
    key = id(other)
    del other
    gc.collect()
    assert key not in REMEMBERED._known


def test_no_copy_of_the_parameters_is_kept(net):
    ntkgen.ntk(net, X)
    ((_, network),) = REMEMBERED._known[id(net)]
    assert not list(network.module.parameters())
    assert not any(list(layer.module.parameters()) for layer in network.layers)


def test_large_preparations_are_not_kept(net, trials, monkeypatch):
    monkeypatch.setattr(remembered, "MAX_NUMBERS", 10)
    assert_right(net)
    assert_right(net)
    assert len(trials) == 2


def test_the_error_of_a_later_call_is_explained(net):
    ntkgen.ntk(net, X)
    with pytest.raises(ntkgen.errors.NtkgenError, match="finite"):
        ntkgen.ntk(net, torch.full_like(X, torch.nan))


def test_a_warning_is_given_every_time():
    class InTraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x) + self.other(x) if self.training else self.layer(x)

    net = InTraining().double()
    for _ in range(2):
        with pytest.warns(UserWarning, match="in training mode"):
            ntkgen.ntk(net, X)
