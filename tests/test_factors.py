"""The factors of a block: their planned size, their bits, and the maximum number of blocks in memory."""

import weakref

import pytest
import torch
from cases import CASES, CPU, chosen, chosen_cases, chosen_cases_in_turn, in_turn, make_job, relative_error
from strategies import pieces_of

import ntkgen
from ntkgen.engine import run as running
from ntkgen.jacobian import dense
from ntkgen.jacobian.capture import cotangents, record
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import contract
from ntkgen.jacobian.cost import ORDERS
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import POLICIES, exact_arithmetic, policy
from ntkgen.jacobian.reference import jacobian_rows, trainable


def prepared(name, precision="float64", batch_size=2, orders=()):
    case = CASES[name]()
    network = prepare(case.module, case.x, policy(precision))
    sizes = pieces_of(4, batch_size, 16, 1 << 20)
    return network, plan_jacobian(network.profile, sizes, precision=precision, orders=orders), case.x


def tensors_of(block):
    return [block.logits, block.rows, *(t for pair in block.pairs for t in (pair.inputs, pair.cotangents))]


@chosen_cases_in_turn("name order", [None, *ORDERS])
def test_as_many_numbers_are_kept_as_planned(name, order):
    num_layers = len(prepared(name)[0].profile.layers)
    network, plan, x = prepared(name, orders=[order] * num_layers if order else ())
    with exact_arithmetic(CPU):
        block = compute_factors(network, plan, x)
    assert sum(tensor.numel() for tensor in tensors_of(block)) == len(x) * plan.factor_numbers
    assert len(block) == len(x)


CPU_POLICIES = [name for name in POLICIES if name != "tf32"]


@pytest.mark.parametrize("name", ["conv", "residual_in_place", "embedding", "transformer"])
@pytest.mark.parametrize("precision", CPU_POLICIES)
def test_as_many_bytes_are_kept_as_planned_and_a_few_more_of_logits(name, precision):
    network, plan, x = prepared(name, precision)
    with exact_arithmetic(CPU):
        block = compute_factors(network, plan, x)
    assert block.logits.dtype == policy(precision).compute_dtype
    assert {tensor.dtype for tensor in tensors_of(block)[1:]} == {policy(precision).factor_dtype}
    kept = sum(tensor.nbytes for tensor in tensors_of(block))
    assert 0 <= kept - len(x) * plan.factor_bytes <= block.logits.nbytes


@chosen_cases
@pytest.mark.numeric
def test_factors_are_those_of_every_sample_alone(name):
    network, plan, x = prepared(name, batch_size=3)
    single = plan_jacobian(network.profile, pieces_of(4, 1, 16, 1 << 20), precision="float64")
    with exact_arithmetic(CPU):
        together, apart = compute_factors(network, plan, x), compute_factors(network, single, x)
    for one, other in zip(tensors_of(together), tensors_of(apart), strict=True):
        assert relative_error(one, other) < 1e-12


@chosen_cases
def test_logits_are_the_outputs_in_evaluation_mode(name):
    network, plan, x = prepared(name)
    with exact_arithmetic(CPU):
        block = compute_factors(network, plan, x)
    expected = CASES[name]().module.double().eval()(network.input(x))
    assert relative_error(block.logits, expected.detach()) < 1e-13


# The rows of some had other bits in a padded batch: sums over positions where these come before the samples in memory,
# and functions that are differentiated for all samples at once.
SAME_BITS = [
    "mlp", "conv", "residual_in_place", "transformer", "lstm", "attention_batch_first", "attention_sequence_first",
    "conv_transposed", "spectral_norm",
]  # fmt: skip


@pytest.mark.parametrize("name", chosen(CASES, SAME_BITS))
@pytest.mark.numeric
def test_a_sample_has_the_same_bits_in_every_block(name):
    """One thread is used. Several threads would divide a sum over one sample differently from a sum over two."""
    network, plan, x = prepared(name, "float32")
    with exact_arithmetic(CPU, threads=1):
        whole = compute_factors(network, plan, x)
        for start, stop in ((0, 2), (0, 1), (2, 3)):  # a batch, and padded ones
            if stop <= len(x):
                part = compute_factors(network, plan, x[start:stop])
                for tensor, other in zip(tensors_of(whole), tensors_of(part), strict=True):
                    assert torch.equal(tensor[start:stop], other)


@chosen_cases
def test_kept_rows_and_pairs_multiply_to_the_jacobian(name):
    """‖J[i o]‖² from the factors is that of the rows that autograd forms."""
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


# number of blocks in memory -------------------------------------------------------------------------------------------


class Watch:
    """A substitute for `compute_factors` that counts its calls, and the blocks in memory during each call."""

    def __init__(self, compute):
        self.compute, self.alive, self.calls, self.peak = compute, [], 0, 0

    def __call__(self, network, plan, x):
        self.alive = [reference for reference in self.alive if reference() is not None]
        block = self.compute(network, plan, x)
        self.calls, self.peak = self.calls + 1, max(self.peak, len(self.alive) + 1)
        self.alive.append(weakref.ref(block))
        return block


def test_no_more_blocks_are_alive_than_the_cache_may_hold(monkeypatch):
    """The projection counts two blocks. A third one, kept in memory by a name in a loop, would exceed it."""
    watch = Watch(compute_factors)
    monkeypatch.setattr(dense, "compute_factors", watch)
    monkeypatch.setattr(dense, "BLOCK_BYTES", 1)
    monkeypatch.setattr(dense, "JOINT_NUMBERS", 0)
    case = CASES["mlp"]()
    ntkgen.ntk(case.module, case.x)
    assert watch.calls > len(case.x)  # the cache of two was too small to hold all
    assert watch.peak == 2


@in_turn("cached block_samples", chosen([2, 3, 4, 6, 9], [2, 3, 9]), [1, 3])
def test_no_more_blocks_are_alive_in_a_run_than_were_allowed(block_samples, cached, monkeypatch, tmp_path):
    watch = Watch(compute_factors)
    monkeypatch.setattr(running, "compute_factors", watch)
    job = make_job(block_samples=block_samples)
    job.run(job.create(tmp_path / "k.zarr"), cached)
    assert watch.peak == min(cached, -(-len(job.x) // block_samples))
