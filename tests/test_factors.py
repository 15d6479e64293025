"""What is kept of a block: as much as planned, the same bits whoever asks, and never more blocks than allowed."""

import weakref

import pytest
import torch
from cases import CASES, CPU, every_case, relative_error
from hypothesis import given
from hypothesis import strategies as st

import ntkgen
from ntkgen.jacobian import dense, factors
from ntkgen.jacobian.capture import cotangents, record
from ntkgen.jacobian.contract import contract
from ntkgen.jacobian.cost import plan_jacobian
from ntkgen.jacobian.factors import FactorCache, compute_factors
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.reference import jacobian_rows, trainable
from ntkgen.kernel.tiles import Block


def prepared(name, precision="float64", batch_size=2, orders=()):
    case = CASES[name]()
    network = prepare(case.module, case.x, policy(precision))
    plan = plan_jacobian(
        network.profile, block_samples=4, batch_size=batch_size, workspace_numbers=1 << 20, orders=orders
    )
    return network, plan, case.x


def tensors_of(block):
    return [block.logits, block.rows, *(t for pair in block.pairs for t in (pair.inputs, pair.cotangents))]


@every_case
@pytest.mark.parametrize("order", [None, "gram"])
def test_as_many_numbers_are_kept_as_planned(name, order):
    num_layers = len(prepared(name)[0].profile.layers)
    network, plan, x = prepared(name, orders=[order] * num_layers if order else ())
    with exact_arithmetic(CPU):
        block = compute_factors(network, plan, x)
    assert sum(tensor.numel() for tensor in tensors_of(block)) == len(x) * plan.factor_numbers
    assert len(block) == len(x)


@every_case
def test_factors_are_those_of_every_sample_alone(name):
    network, plan, x = prepared(name, batch_size=3)
    single = plan_jacobian(network.profile, block_samples=4, batch_size=1, workspace_numbers=1 << 20)
    with exact_arithmetic(CPU):
        together, apart = compute_factors(network, plan, x), compute_factors(network, single, x)
    for one, other in zip(tensors_of(together), tensors_of(apart), strict=True):
        assert relative_error(one, other) < 1e-12


@every_case
def test_logits_are_the_outputs_in_evaluation_mode(name):
    network, plan, x = prepared(name)
    with exact_arithmetic(CPU):
        block = compute_factors(network, plan, x)
    expected = CASES[name]().module.double().eval()(network.input(x))
    assert relative_error(block.logits, expected.detach()) < 1e-13


@pytest.mark.parametrize("name", ["mlp", "conv", "residual_in_place", "transformer"])
def test_a_sample_has_the_same_bits_in_every_block(name):
    network, plan, x = prepared(name, "float32")
    with exact_arithmetic(CPU):
        whole, first, last = (compute_factors(network, plan, part) for part in (x, x[:2], x[2:3]))
    for tensor, two, one in zip(*map(tensors_of, (whole, first, last)), strict=True):
        assert torch.equal(tensor[:2], two)
        assert torch.equal(tensor[2:3], one)  # a batch of its own, padded


@every_case
def test_kept_rows_and_pairs_multiply_to_the_jacobian(name):
    """‖J[i o]‖² from the factors is that of the rows that torch.func forms."""
    network, plan, x = prepared(name)
    with exact_arithmetic(CPU):
        block = compute_factors(network, plan, x)
        rows = jacobian_rows(network.module, trainable(network.module), network.input(x))
    squares = contract(block, block, plan).diagonal().view(len(x), -1)
    assert relative_error(squares, rows.square().sum(-1)) < 1e-12


# capture --------------------------------------------------------------------------------------------------------------


def test_a_recording_is_of_the_layer_before_it_is_overwritten():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    recording = record(model, {"0": model[0]}, x)
    (use,) = recording.uses["0"]
    assert torch.equal(use.output, model[0](x))
    assert (use.output < 0).any()
    assert torch.equal(use.x, x)


def test_cotangents_are_the_gradients_of_one_output_after_the_other():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    recording = record(model, {"0": model[0], "2": model[2]}, x, count=3)
    for output, grads in enumerate(cotangents(recording)):
        hidden = torch.tanh(model[0](x))
        expected = (1 - hidden.square()) * model[2].weight[output]
        torch.testing.assert_close(grads["0"][0], expected[:3])
        assert torch.equal(grads["2"][0], torch.eye(2)[output].expand(3, 2))
    assert output == 1


# the cache ------------------------------------------------------------------------------------------------------------


class Watch:
    """Stands for `compute_factors`: counts calls and the blocks that are alive while another is computed."""

    def __init__(self, compute):
        self.compute, self.alive, self.calls, self.samples, self.peak = compute, [], 0, 0, 0

    def __call__(self, network, plan, x):
        self.alive = [reference for reference in self.alive if reference() is not None]
        block = self.compute(network, plan, x)
        self.calls, self.samples, self.peak = self.calls + 1, self.samples + len(x), max(self.peak, len(self.alive) + 1)
        self.alive.append(weakref.ref(block))
        return block


class Stand:
    """A block of factors that is only looked at."""

    def __init__(self, x):
        self.x = x


@pytest.fixture
def watch(monkeypatch):
    watched = Watch(factors.compute_factors)
    monkeypatch.setattr(factors, "compute_factors", watched)
    return watched


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(2, 9))
def test_the_cache_holds_the_blocks_used_last_and_no_more(asked, capacity):
    samples, blocks = torch.arange(16), Block(0, 16).pieces(2)
    with pytest.MonkeyPatch.context() as patch:
        watched = Watch(lambda _network, _plan, x: Stand(x))
        patch.setattr(factors, "compute_factors", watched)
        cache, recent, misses = FactorCache(None, None, samples, capacity), [], 0
        for index in asked:
            assert cache(blocks[index]).x.tolist() == [2 * index, 2 * index + 1]
            misses += index not in recent[:capacity]
            recent = [index, *(other for other in recent if other != index)]
    assert watched.calls == misses
    assert watched.peak <= capacity


def test_no_more_blocks_are_alive_than_the_cache_may_hold(watch, monkeypatch):
    """The projection counts two; a third, kept alive by a name in a loop, would exceed it."""
    monkeypatch.setattr(dense, "BLOCK_BYTES", 1)
    monkeypatch.setattr(dense, "BATCH_SIZE", 1)
    case = CASES["mlp"]()
    ntkgen.ntk(case.module, case.x)
    assert watch.calls > len(case.x)  # the cache of two was too small to hold all
    assert watch.peak == 2
