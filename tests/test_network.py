"""Which rule treats which parameter, what is refused, and that nothing of the user's is touched."""

import copy
import random
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    CPU,
    TOLERANCES,
    Call,
    chosen_cases,
    chosen_cases_in_turn,
    reference_of,
    relative_error,
)
from strategies import pieces_of
from torch import nn

import ntkgen
from ntkgen.blocks import Block
from ntkgen.errors import ModelError, ShapeError
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.capture import record
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import fill_kernel
from ntkgen.jacobian.cost import ORDERS
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import POLICIES, exact_arithmetic, policy


@chosen_cases_in_turn("name precision", [name for name in POLICIES if name != "tf32"])  # which is for other devices
def test_a_rule_treats_every_parameter_that_it_holds_for_and_no_other(name, precision):
    case = CASES[name]()
    network = prepare(case.module, case.x, policy(precision))
    assert network.fallback == case.fallback
    treated = {layer.full_name(param) for layer in network.layers for param in layer.params()}
    trainable = [name for name, param in case.module.named_parameters() if param.requires_grad]
    assert sorted([*treated, *network.fallback]) == sorted(trainable)


@chosen_cases
def test_the_profile_counts_every_trainable_scalar_once(name):
    case = CASES[name]()
    profile = prepare(case.module, case.x, policy("float32")).profile
    assert profile.num_params == sum(p.numel() for p in case.module.parameters() if p.requires_grad)
    assert profile.num_params == profile.dense_params + sum(shape.num_params for shape in profile.layers)
    assert profile.num_outputs == case.module.eval().float()(case.x).shape[1]
    assert profile.num_logits == profile.num_outputs
    assert profile.input_numbers == case.x[0].numel()
    assert profile.fallback == case.fallback


def test_the_profile_has_the_sizes_of_every_layer():
    x = torch.zeros(1, 4, 9, 9)
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, groups=2)  # 4 × 4 positions
    shapes = prepare(nn.Sequential(conv, nn.Flatten(), nn.Linear(96, 5)), x, policy("float32")).profile.layers
    found = [(s.name, s.positions, s.inputs, s.channels, s.groups) for s in shapes]
    assert found == [("0", 16, 12, 3, 2), ("2", 1, 96, 5, 1)]


def test_positions_are_summed_over_the_uses_of_a_layer():
    case = CASES["reused_at_two_sizes"]()
    shapes = {shape.name: shape for shape in prepare(case.module, case.x, policy("float32")).profile.layers}
    assert shapes["conv"].positions == 6 * 6 + 3 * 3


def test_the_profile_counts_what_the_graph_keeps():
    narrow, wide = (nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)) for width in (10, 1000))
    counts = [
        prepare(model, torch.ones(2, 3), policy("float32")).profile.activation_numbers for model in (narrow, wide)
    ]
    assert counts[1] - counts[0] == 990  # what tanh keeps is what the next layer keeps


def test_a_network_whose_parameters_live_nowhere_else_is_computed_on_the_cpu():
    network = prepare(nn.Linear(2, 2), torch.ones(1, 2), policy("float64"))
    assert network.device == CPU
    assert {param.dtype for param in network.module.parameters()} == {torch.float64}


def test_the_first_layer_passes_no_gradients_on():
    """So that a pass back ends at its output; a frozen layer before it changes nothing."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(2, 2, 5, 5)
    shapes = prepare(model, x, policy("float32")).profile.layers
    assert [(shape.name, shape.passes_back) for shape in shapes] == [("0", False), ("2", True), ("4", True)]
    model[0].requires_grad_(False)
    shapes = prepare(model, x, policy("float32")).profile.layers
    assert [(shape.name, shape.passes_back) for shape in shapes] == [("2", False), ("4", True)]


def test_convolutions_in_steps_of_one_have_windows():
    layers = [nn.Conv2d(2, 3, (3, 2), padding=(1, 0)), nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 2, 1)]
    network = prepare(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2)), torch.randn(2, 2, 5, 6), policy("float32"))
    found = [(shape.taps, shape.pixels, shape.positions) for shape in network.profile.layers]
    assert found == [(6, 30, 25), (1, 0, 4), (1, 0, 4), (1, 0, 1)]
    assert set(network.windows) == {"0"}


# output maps ----------------------------------------------------------------------------------------------------------


def kernel_of(network, x, order):
    sizes = pieces_of(3, 2, 2, 60)
    orders = [order] * len(network.profile.layers) if order else ()
    plan = plan_jacobian(network.profile, sizes, precision="float64", orders=orders)
    blocks = Block(0, len(x)).pieces(3)
    factors = BlockCache(lambda block: compute_factors(network, plan, x[block.start : block.stop]), capacity=2)
    with exact_arithmetic(CPU):
        return fill_kernel(blocks, blocks, factors, plan)


@cache
def network_of(name):
    case = CASES[name]()
    return prepare(case.module, case.x, policy("float64")), case.x


@chosen_cases_in_turn("name more", [-1, 0, 2])
def test_a_kernel_seen_through_a_matrix_is_that_of_the_mapped_outputs(name, more):
    """(I ⊗ A) K (I ⊗ A)ᵀ, also of the parameters without a rule; A has fewer rows than logits, as many, or more."""
    network, x = network_of(name)
    m = network.profile.num_logits
    A = torch.randn(max(1, m + more), m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    seen = network.seen_through(A)
    assert (seen.profile.num_outputs, seen.profile.num_logits) == A.shape
    whole = torch.kron(torch.eye(len(x), dtype=torch.float64), A)
    expected = whole @ reference_of(name) @ whole.T
    for order in (None, *ORDERS):
        found = kernel_of(seen, x, order)
        assert torch.equal(found, found.T)
        assert relative_error(found, expected) < TOLERANCES["float64"]
    assert network.transform is None


def test_logits_are_those_of_the_network_whatever_it_is_seen_through():
    network, x = network_of("mlp")
    plan = plan_jacobian(network.profile, pieces_of(9, 9, 9, 99), precision="float64")
    with exact_arithmetic(CPU):
        expected = compute_factors(network, plan, x).logits
        seen = network.seen_through(torch.ones(1, 3))
        plan = plan_jacobian(seen.profile, pieces_of(9, 9, 9, 99), precision="float64")
        assert torch.equal(compute_factors(seen, plan, x).logits, expected)


def test_without_a_matrix_the_network_is_seen_as_it_is():
    network, _ = network_of("mlp")
    assert network.seen_through(None) is network


@pytest.mark.parametrize("shape", [(3,), (2, 4), (3, 2), (0, 3), (1, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "lstm", "attention_batch_first"])
def test_a_matrix_that_does_not_fit_is_refused(name, shape):
    network, _ = network_of(name)
    m = network.profile.num_logits
    wrong = tuple(size + m - 3 if size else 0 for size in shape)  # as written for three logits
    with pytest.raises(ShapeError, match=rf"expected \(outputs, {m}\)") as raised:
        network.seen_through(torch.ones(wrong))
    assert "\n" not in str(raised.value)


# what is refused ------------------------------------------------------------------------------------------------------


def centred(self: Call, x: torch.Tensor) -> torch.Tensor:
    return self.fc(x - x.mean(0))


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))


REFUSED = {
    "batch norm without running statistics": (batch_normed, "Layer 1 mixes the samples.*track_running_stats=True"),
    "batch norm as the whole network": (
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        "Layer BatchNorm1d mixes the samples",
    ),
    "subtracts the batch mean": (lambda: Call(centred, fc=nn.Linear(4, 2)), "mixes the samples of a batch"),
    "draws at random": (
        lambda: Call(lambda self, x: F.dropout(self.fc(x), training=True), fc=nn.Linear(4, 20)),
        "change between two calls with the same samples.*random",
    ),
    "one row for all samples": (
        lambda: Call(lambda self, x: self.fc(x).sum(0, keepdim=True), fc=nn.Linear(4, 2)),
        r"first axis is that of the 3 samples, and are \(1, 2\)",
    ),
    "several values": (lambda: Call(lambda self, x: (self.fc(x), x), fc=nn.Linear(4, 2)), "returns several values"),
    "all frozen": (lambda: nn.Linear(4, 2).requires_grad_(False), "Linear has no trainable parameter"),
    "no parameter": (nn.Flatten, "Flatten has no trainable parameter"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_network_without_a_kernel_is_refused_in_one_line(why):
    factory, message = REFUSED[why]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = factory(), torch.randn(5, 4)
    with pytest.raises(ModelError, match=message) as raised:
        ntkgen.ntk(model, x)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_samples_that_mix_are_found_even_where_the_first_two_are_equal():
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    x[1] = x[0]
    with pytest.raises(ModelError, match="mixes the samples"):
        ntkgen.ntk(Call(centred, fc=nn.Linear(4, 2)), x)


@pytest.mark.parametrize("strength", [1e-1, 1e-2, 1e-3, 1e-5])
def test_samples_that_mix_a_little_are_found(strength):
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    model = Call(lambda self, x: self.fc(x - strength * x.mean(0)), fc=nn.Linear(4, 2))
    with pytest.raises(ModelError, match="mixes the samples"):
        ntkgen.ntk(model, x)


def test_outputs_of_another_dtype_are_refused():
    model = Call(lambda self, x: self.fc(x).bfloat16(), fc=nn.Linear(4, 2))
    with pytest.raises(ModelError, match="bfloat16"):
        ntkgen.ntk(model, torch.ones(2, 4))


# what is left as it was -----------------------------------------------------------------------------------------------


def everything_of(module: nn.Module) -> dict[str, object]:
    """What a user could notice of a change: bytes, addresses, gradients, flags, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": {name: (t.data_ptr(), t.dtype, t._version) for name, t in module.state_dict().items()},
        "values": {name: t.double().numpy().tobytes() for name, t in module.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.tolist() for n, p in module.named_parameters()},
        "trainable": {name: param.requires_grad for name, param in module.named_parameters()},
        "training": {name: child.training for name, child in module.named_modules()},
        "hooks": [len(getattr(child, hook)) for child in module.modules() for hook in hooks],
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
    }


def randomness() -> list[object]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


@chosen_cases_in_turn("name training", [True, False])
def test_nothing_of_the_users_changes(name, training):
    case = CASES[name]()
    module, x = case.module.train(training), case.x
    list(module.modules())[-1].train(not training)  # a mixture of flags
    for param in list(module.parameters())[::2]:
        param.grad = torch.ones_like(param)
    x_before = x.clone()
    before = (everything_of(module), randomness())
    ntkgen.ntk(module, *case.halves)
    assert (everything_of(module), randomness()) == before
    assert torch.equal(x, x_before)


def test_samples_that_require_a_gradient_get_none():
    case = CASES["conv"]()
    x = case.x.requires_grad_()
    kernel = ntkgen.ntk(case.module, x)
    assert not kernel.requires_grad
    assert x.grad is None


def test_train_mode_does_not_change_the_kernel():
    case = CASES["batch_norm_2d"]()
    kernels = [ntkgen.ntk(copy.deepcopy(case.module).train(mode), case.x) for mode in (True, False)]
    assert torch.equal(*kernels)


def test_hooks_are_removed_even_where_the_network_fails():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="shapes cannot be multiplied"):
        record(model, {"0": model[0], "1": model[1]}, torch.ones(2, 4))
    assert not any(layer._forward_hooks for layer in model)


def test_a_layer_that_returns_no_tensor_is_left_alone():
    layer = Call(lambda self, x: SimpleNamespace(value=self.fc(x)), fc=nn.Linear(2, 2))
    model = Call(lambda self, x: self.layer(x).value, layer=layer)
    recording = record(model, {"layer": layer}, torch.ones(1, 2))
    assert recording.uses == {}
