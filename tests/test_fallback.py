"""Rows that are left to autograd: for many samples at once, by whichever way is right, and proved in every batch."""

import warnings

import pytest
import torch
from cases import CASES, Call, relative_error
from torch import nn

import ntkgen
from ntkgen.jacobian import fallback
from ntkgen.jacobian.cost import FALLBACK_WAYS
from ntkgen.jacobian.fallback import WAYS, choose_way, chunk_samples
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import jacobian_rows, reference_ntk

EXPECTED = {
    "own_autograd_function": "backward",  # torch.func refuses it
    "own_autograd_function_for_torch_func": "function",
    "unused_parameter": "function",
    "embedding_of_limited_norm": "backward",  # the forward pass changes the weights
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_quickest_way_that_is_right_is_chosen(name):
    case = CASES[name]()
    profile = prepare(case.module, case.x, policy("float64")).profile
    assert profile.fallback == case.fallback
    assert profile.fallback_way == EXPECTED[name]


@pytest.mark.parametrize("way", FALLBACK_WAYS)
@pytest.mark.parametrize("transform", [None, torch.tensor([[1.0, -2.0], [0.5, 1.0], [0.0, 3.0]]).double()])
def test_all_ways_give_the_same_rows(way, transform):
    case = CASES["mlp"]()
    model = nn.Sequential(case.module, nn.Linear(3, 2)).double()
    names, x = [name for name, _ in model.named_parameters()][::2], case.x.double()
    rows = jacobian_rows(model, names, x)
    expected = rows if transform is None else transform @ rows
    assert relative_error(WAYS[way](model, names, x, transform), expected) < 1e-12


def test_a_way_that_is_wrong_is_not_chosen(monkeypatch):
    case = CASES["mlp"]()
    model, x = case.module.double(), case.x.double()
    right = dict(WAYS)
    for wrong in ("function", "backward"):
        monkeypatch.setitem(WAYS, wrong, lambda *given, way=wrong: right[way](*given) * 1.001)
        expected = "backward" if wrong == "function" else "one by one"
        assert choose_way(model, ["0.weight"], x) == expected


@pytest.mark.parametrize("name", ["own_autograd_function", "own_autograd_function_for_torch_func"])
def test_rows_that_are_wrong_in_a_later_batch_are_computed_again(name, monkeypatch):
    case = CASES[name]()
    way = EXPECTED[name]
    right, calls = WAYS[way], []

    def wrong_later(*given):
        calls.append(1)
        return right(*given) * (1 if len(calls) == 1 else 2)

    monkeypatch.setitem(WAYS, way, wrong_later)
    found = ntkgen.ntk(case.module, case.x, precision="float64")
    assert len(calls) > 1
    assert relative_error(found, reference_ntk(case.module, case.x)) < 1e-10


class _Opaque(torch.autograd.Function):
    """y = x w, in NumPy, which cannot run for several backward passes at once."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, torch.from_numpy((grad * x).numpy().sum(0))


def test_many_single_passes_cause_a_warning():
    model = Call(
        lambda self, x: self.out(_Opaque.apply(x, self.w)), w=nn.Parameter(torch.randn(3)), out=nn.Linear(3, 10)
    )
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(action="error"):
        ntkgen.ntk(model, x[:4])
    with pytest.warns(fallback.SlowParametersWarning, match="The rows of w take 1,000 backward passes"):
        found = ntkgen.ntk(model, x)
    assert relative_error(found, reference_ntk(model, x)) < 1e-5


def test_batches_fit_the_memory(monkeypatch):
    assert chunk_samples("one by one", 10, 10, 10) == 1
    assert chunk_samples("function", 1000, 10, 1000) == fallback.CHUNK_NUMBERS // 20_000
    assert chunk_samples("backward", 1000, 10, 1000) ** 2 * 10_000 <= fallback.SQUARE_NUMBERS
    assert chunk_samples("backward", 10**9, 10, 10**9) == chunk_samples("function", 10**9, 10, 10**9) == 1


def test_a_function_that_differentiates_inside_is_exact_in_batches():
    """The first weights of a force are left to autograd, because double backward uses them beside their calls."""
    model = Call(
        lambda self, x: torch.autograd.grad(self.out(torch.tanh(self.first(x))).sum(), x, create_graph=True)[0],
        first=nn.Linear(3, 5),
        out=nn.Linear(5, 1),
    )

    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = model

        def forward(self, x):
            with torch.enable_grad():
                return self.energy(x.detach().requires_grad_())

    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    force = Force()
    profile = prepare(force, x, policy("float64")).profile
    assert profile.fallback_way == "backward"
    assert set(profile.fallback) == {"energy.first.weight", "energy.out.weight"}
    assert relative_error(ntkgen.ntk(force, x, precision="float64"), reference_ntk(force, x)) < 1e-10
