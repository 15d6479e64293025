"""Which rule treats which parameter, what is refused, and that nothing of the user's is touched."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CPU, Call, every_case
from torch import nn

import ntkgen
from ntkgen.errors import ModelError
from ntkgen.jacobian.capture import record
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import POLICIES, policy


@every_case
@pytest.mark.parametrize("precision", POLICIES)
def test_a_rule_treats_every_parameter_that_it_holds_for_and_no_other(name, precision):
    case = CASES[name]()
    network = prepare(case.module, case.x, policy(precision))
    assert network.fallback == case.fallback
    treated = [layer.full_name(param) for layer in network.layers for param in layer.params()]
    trainable = [name for name, param in case.module.named_parameters() if param.requires_grad]
    assert sorted([*treated, *network.fallback]) == sorted(trainable)


@every_case
def test_the_profile_counts_every_trainable_scalar_once(name):
    case = CASES[name]()
    profile = prepare(case.module, case.x, policy("float32")).profile
    assert profile.num_params == sum(p.numel() for p in case.module.parameters() if p.requires_grad)
    assert profile.num_params == profile.dense_params + sum(shape.num_params for shape in profile.layers)
    assert profile.num_outputs == case.module.eval().float()(case.x).shape[1]
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
        "mixes the samples of a batch even in evaluation mode.*randomness",
    ),
    "no axis of outputs": (
        lambda: Call(lambda self, x: self.fc(x).sum(1), fc=nn.Linear(4, 2)),
        r"must return one row per sample, \(2, outputs\), and returned \(2,\)",
    ),
    "two axes of outputs": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))), r"returned \(2, 2, 3\)"),
    "one row for all samples": (
        lambda: Call(lambda self, x: self.fc(x).sum(0, keepdim=True), fc=nn.Linear(4, 2)),
        r"returned \(1, 2\)",
    ),
    "several values": (lambda: Call(lambda self, x: (self.fc(x), x), fc=nn.Linear(4, 2)), "returned tuple"),
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


@every_case
@pytest.mark.parametrize("training", [True, False])
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
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        record(model, {"0": model[0], "1": model[1]}, torch.ones(2, 4))
    assert not any(layer._forward_hooks for layer in model)


def test_a_layer_that_returns_no_tensor_is_left_alone():
    layer = Call(lambda self, x: SimpleNamespace(value=self.fc(x)), fc=nn.Linear(2, 2))
    model = Call(lambda self, x: self.layer(x).value, layer=layer)
    recording = record(model, {"layer": layer}, torch.ones(1, 2))
    assert recording.uses == {}
