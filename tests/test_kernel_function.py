"""A kernel as a function of parameters: equal to `ntkgen.ntk` whatever the parameters become."""

import argparse
import copy
import dataclasses
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, CHOSEN, TOLERANCES, chosen, chosen_cases, relative_error
from torch import nn
from torch.nn.utils import prune

import ntkgen
from ntkgen.errors import DivergedError, InputError, RuleError, ShapeError
from ntkgen.jacobian.capture import cotangents, record
from ntkgen.jacobian.joint import JointFactors, join_biases, plan_jointly, pull_back_all
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy

pytestmark = pytest.mark.numeric


def moved(module: nn.Module, seed: int = 5) -> nn.Module:
    """Copy a network and change all of its parameters and floating-point buffers."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor))
    return other


@pytest.mark.parametrize("name", chosen(CASES, CHOSEN))
def test_equals_the_kernel_of_other_parameters(name):
    case = CASES[name]()
    later = moved(case.module)
    function = ntkgen.KernelFunction(case.module, case.x, precision="float64")
    expected = ntkgen.ntk(later, case.x, precision="float64")
    assert relative_error(function(later), expected) <= TOLERANCES["float64"]
    first = ntkgen.ntk(case.module, case.x, precision="float64")
    assert relative_error(function(case.module.state_dict()), first) <= TOLERANCES["float64"]


@chosen_cases
def test_the_kernels_of_the_modules_add_up_to_the_kernel(name):
    case = CASES[name]()
    parts = ntkgen.KernelFunction(case.module, case.x, case.x[:2], precision="float64", per_layer=True)(case.module)
    named = {key.rpartition(".")[0] for key, param in case.module.named_parameters() if param.requires_grad}
    assert set(parts) == named
    expected = ntkgen.reference_ntk(case.module, case.x, case.x[:2])
    assert relative_error(sum(parts.values()), expected) <= TOLERANCES["float64"]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3))


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block_bytes", [1, 1 << 30])
def test_the_logits_of_the_last_call_are_those_of_the_rows(monkeypatch, block_bytes):
    monkeypatch.setattr("ntkgen.jacobian.dense.BLOCK_BYTES", block_bytes)
    net, later = mlp(), moved(mlp())
    function = ntkgen.KernelFunction(net, X, X[:2] + 1, precision="float64")
    function(later)
    expected = copy.deepcopy(later).double().eval()(X.double()).detach()
    first = function.logits
    assert relative_error(first, expected) <= TOLERANCES["float64"]
    function(net)
    assert not torch.equal(function.logits, first)


def test_the_kernel_of_one_module_is_that_of_its_parameters_alone():
    net = mlp()
    found = ntkgen.KernelFunction(net, X, precision="float64", per_layer=True)(net)
    for name, kernel in found.items():
        alone = copy.deepcopy(net).requires_grad_(False)
        alone.get_submodule(name).requires_grad_(True)
        assert relative_error(kernel, ntkgen.reference_ntk(alone, X)) <= TOLERANCES["float64"]


@pytest.mark.parametrize("output", ["full", "sum", "centered", "index:1", "trace", "diagonal"])
@pytest.mark.parametrize("columns", [None, X[:3] + 1])
def test_every_output_in_float32(output, columns):
    net, later = mlp(), moved(mlp())
    function = ntkgen.KernelFunction(net, X, columns, output=output)
    assert relative_error(function(later), ntkgen.ntk(later, X, columns, output=output)) <= TOLERANCES["float32"]


def test_equal_parameters_give_equal_bits_and_a_result_of_their_own():
    net, later = mlp(), moved(mlp())
    function = ntkgen.KernelFunction(net, X)
    first = function(net)
    kept = first.clone()
    assert not torch.equal(function(later), first)
    assert torch.equal(first, kept)
    assert torch.equal(function(net), first)
    assert torch.equal(ntkgen.KernelFunction(later, X)(net), first)


def test_several_blocks(monkeypatch):
    monkeypatch.setattr("ntkgen.jacobian.dense.BLOCK_BYTES", 700)
    net, later = mlp(), moved(mlp())
    function = ntkgen.KernelFunction(net, X, precision="float64", per_layer=True)
    assert len(function._rows) > 2
    expected = ntkgen.reference_ntk(later, X)
    assert relative_error(sum(function(later).values()), expected) <= TOLERANCES["float64"]


def test_the_network_and_the_random_state_stay_as_they_are():
    net = mlp().train()
    net(X).sum().backward()
    numbers = [tensor.clone() for tensor in [*net.parameters(), *net.buffers()]]
    grads, state = [param.grad.clone() for param in net.parameters()], torch.get_rng_state()
    function = ntkgen.KernelFunction(net, X)
    function(net)
    assert net.training
    assert all(map(torch.equal, numbers, [*net.parameters(), *net.buffers()]))
    assert all(map(torch.equal, grads, [param.grad for param in net.parameters()]))
    assert torch.equal(state, torch.get_rng_state())


def test_running_statistics_are_those_of_the_call():
    net = mlp()
    function = ntkgen.KernelFunction(net, X, precision="float64")
    net.train()(torch.randn(32, 4) * 5)
    assert relative_error(function(net), ntkgen.reference_ntk(net.eval(), X)) <= TOLERANCES["float64"]


class Scaled(nn.Linear):
    """A linear layer with a number that is neither parameter nor buffer."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = state


@pytest.mark.parametrize("as_state", [lambda net: net, lambda net: net.state_dict()])
def test_extra_state_is_that_of_the_call(as_state):
    net = nn.Sequential(Scaled(4, 2))
    function = ntkgen.KernelFunction(net, X, precision="float64")
    net[0].scale = 3.0
    assert relative_error(function(as_state(net)), ntkgen.reference_ntk(net, X)) <= TOLERANCES["float64"]


def test_a_state_of_another_architecture_is_refused():
    function = ntkgen.KernelFunction(mlp(), X)
    with pytest.raises(InputError, match=r"found no 0\.bias, 0\.weight, 2\.bias and 6 more"):
        function({})
    with pytest.raises(InputError, match=r"found 4\.bias, 4\.weight as well"):
        function(nn.Sequential(*mlp(), nn.Linear(3, 3)))
    with pytest.raises(ShapeError, match=r"3.weight has another shape: expected \(3, 6\).*found \(5, 6\)"):
        function(nn.Sequential(*mlp()[:3], nn.Linear(6, 5)))
    with pytest.raises(InputError, match="was given a list"):
        function([1.0])
    with pytest.raises(InputError, match="model is none"):
        function({"model": mlp().state_dict()})


def test_a_network_that_trains_other_parameters_is_refused():
    net = mlp()
    function = ntkgen.KernelFunction(net, X)
    net[0].requires_grad_(False)
    with pytest.raises(InputError, match=r"requires_grad of 0\.weight, 0\.bias"):
        function(net)


def test_a_network_that_was_untied_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    function = ntkgen.KernelFunction(net, X)
    with pytest.raises(InputError, match=r"2\.weight was tied"):
        function(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))


def test_a_network_that_was_tied_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    function = ntkgen.KernelFunction(net, X)
    net[2].weight = net[0].weight
    with pytest.raises(InputError, match=r"2\.weight was not tied .* found that it is tied to 0\.weight now"):
        function(net)
    function = ntkgen.KernelFunction(net, X)
    assert relative_error(function(copy.deepcopy(net)), ntkgen.ntk(net, X)) <= TOLERANCES["float32"]
    net[2].weight = nn.Parameter(net[0].weight.detach().clone())  # of equal values
    with pytest.raises(InputError, match=r"2\.weight was tied to 0\.weight .* found that it is not tied now"):
        function(net)


def test_only_the_parameters_of_the_kernel_must_be_trained_as_before():
    net = mlp()
    function = ntkgen.KernelFunction(net, X, params="3.*")
    net[0].requires_grad_(False)
    assert relative_error(function(net), ntkgen.ntk(net, X, params="3.*")) <= TOLERANCES["float32"]
    net[3].bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"requires_grad of 3\.bias"):
        function(net)


class Sum(nn.Linear):
    def forward(self, first, second):
        return super().forward(first) + super().forward(second).tanh()


@pytest.mark.parametrize(
    ("net", "samples"),
    [
        (mlp(), lambda x: x),
        (mlp(), lambda x: x.numpy()),
        (mlp(), lambda x: {"input": x}),
        (Sum(4, 2), lambda x: (x, x.numpy())),
    ],
)
@pytest.mark.parametrize("prepare", [ntkgen.KernelFunction, ntkgen.NTKOperator])
def test_the_samples_are_those_of_the_preparation(net, samples, prepare):
    x, columns = X.double(), X[:3].double() + 1
    function = prepare(net, samples(x), samples(columns), precision="float64")

    def kernel():
        return function(net) if prepare is ntkgen.KernelFunction else function @ torch.eye(function.shape[1]).double()

    before = kernel()
    x.mul_(3)
    columns.mul_(3)
    assert relative_error(kernel(), before) <= TOLERANCES["float64"]


class Routed(nn.Module):
    """Two experts; which of them takes a sample depends on the parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.gate = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        chosen = self.gate(x)[:, 0] > 0
        out = x.new_zeros(len(x), 3)
        for expert, rows in ((self.first, chosen), (self.second, ~chosen)):
            if rows.any():
                out = out.index_put((rows.nonzero()[:, 0],), expert(x[rows]))
        return out + 0 * self.gate(x)


def test_a_call_that_routes_samples_in_another_way_is_exact_or_refused():
    net = Routed()
    with torch.no_grad():
        net.gate.weight.zero_()
        net.gate.bias.fill_(1.0)
    function = ntkgen.KernelFunction(net, X, precision="float64")
    later = copy.deepcopy(net)
    with torch.no_grad():
        later.gate.weight.normal_(generator=torch.Generator().manual_seed(0))
        later.gate.bias.zero_()
    try:
        found = function(later)
    except RuleError:
        return
    assert relative_error(found, ntkgen.reference_ntk(later, X)) <= TOLERANCES["float64"]


def test_outputs_that_are_not_finite_are_refused():
    net = mlp()
    function = ntkgen.KernelFunction(net, X)
    with torch.no_grad():
        net[3].bias.fill_(float("nan"))
    with pytest.raises(DivergedError):
        function(net)


class Doubled(torch.autograd.Function):
    """An operation of a user's own, which `torch.vmap` does not support."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        assert type(grad.sum().item()) is float
        return grad * 2


class Double(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


def test_a_network_whose_outputs_are_not_differentiated_together():
    net = nn.Sequential(nn.Linear(4, 5), Double(), nn.Linear(5, 3))
    function = ntkgen.KernelFunction(net, X, precision="float64")
    assert relative_error(function(net), ntkgen.reference_ntk(net, X)) <= TOLERANCES["float64"]


@pytest.mark.parametrize("kernel", [{"kernel_size": 3}, {"kernel_size": 3, "stride": 2, "padding": 1}])
@pytest.mark.parametrize("num_channels", [4, 64])  # rows are kept, or products are ordered
def test_the_bias_of_a_convolution_in_groups(kernel, num_channels):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, num_channels, bias=True, groups=2, **kernel), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )
    x = torch.randn(5, 2, 7, 7, generator=torch.Generator().manual_seed(2))
    net(x)
    function = ntkgen.KernelFunction(net, x, precision="float64", per_layer=True)
    for name, kernel_of_layer in function(net).items():
        alone = copy.deepcopy(net).requires_grad_(False)
        alone.get_submodule(name).requires_grad_(True)
        assert relative_error(kernel_of_layer, ntkgen.reference_ntk(alone, x)) <= TOLERANCES["float64"]


def joint_factors(net):
    network = prepare(net, X, policy("float64"))
    plan = plan_jointly(network, len(X), "float64", "none")
    return JointFactors(join_biases(network, plan), plan, len(X))


def test_a_wrong_bias_is_found():
    joint = joint_factors(mlp())
    joint(X, prove=True)
    joint._inputs["3"][:, :, -1] = 1.1
    with pytest.raises(RuleError) as error:
        joint(X, prove=True)
    assert set(error.value.params) == {"3.bias"}


def test_one_backward_pass_for_all_outputs_equals_one_for_each():
    net = mlp().eval()
    recording = record(net, {"0": net[0], "3": net[3]}, X)
    together, each = pull_back_all(recording), list(cotangents(recording))
    for name in ("0", "3"):
        torch.testing.assert_close(together[name][0], torch.stack([grads[name][0] for grads in each]))


# attributes -----------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A network with one head per task, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.task, self.slope, self.num_calls = nn.Linear(4, 6), 0, 1.0, 0
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(2))

    def forward(self, x):
        self.num_calls += 1
        return self.heads[self.task](torch.tanh(self.slope * self.body(x)))


@pytest.mark.parametrize(("attribute", "value", "shown"), [("task", 1, "task 0, found 1"), ("slope", 2.0, "slope 1.0")])
def test_a_network_with_another_attribute_is_refused(attribute, value, shown):
    torch.manual_seed(0)
    net = Heads()
    function = ntkgen.KernelFunction(net, X)
    net(X)  # counts, which changes nothing
    assert relative_error(function(net), ntkgen.ntk(net, X)) <= TOLERANCES["float32"]
    setattr(net, attribute, value)
    with pytest.raises(InputError, match=shown):
        function(net)


def test_a_network_with_other_modules_is_refused():
    function = ntkgen.KernelFunction(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), X)
    with pytest.raises(InputError, match=r"expected 1\.__class__ torch.*Tanh, found torch.*ReLU"):
        function(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.ones(2), torch.tanh, nn.ReLU, {1, 2}, slice(3)])
def test_a_second_network_of_one_factory_is_the_same(value):
    nets = []
    for _ in range(2):
        net = nn.Linear(4, 3)
        net.extra = copy.deepcopy(value)
        net.act = lambda x: x
        nets.append(net)
    function = ntkgen.KernelFunction(nets[0], X)
    assert relative_error(function(nets[1]), ntkgen.ntk(nets[1], X)) <= TOLERANCES["float32"]
    if isinstance(value, list | dict | torch.Tensor):
        nets[1].extra = type(value)() if not isinstance(value, torch.Tensor) else torch.zeros(2)
        with pytest.raises(InputError, match="extra"):
            function(nets[1])


def times(held):
    return lambda x: held[0] * x


class Config:
    def __init__(self):
        self.scale, self.sizes = 1.0, {"hidden": [4, 3]}


@dataclasses.dataclass
class Settings:
    scale: float = 1.0


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Config, lambda value: setattr(value, "scale", 2.0)),
        (Config, lambda value: value.sizes["hidden"].append(1)),
        (Settings, lambda value: setattr(value, "scale", 2.0)),
        (lambda: SimpleNamespace(scale=1.0, act=nn.Tanh()), lambda value: setattr(value, "scale", 2.0)),
        (lambda: argparse.Namespace(scale=1.0), lambda value: setattr(value, "scale", 2.0)),
        (lambda: {"first": Settings()}, lambda value: setattr(value["first"], "scale", 2.0)),
        (lambda: np.ones(3), lambda value: value.fill(2)),
        (lambda: [np.ones(3)], lambda value: value[0].fill(2)),
        (lambda: partial(torch.mul, other=torch.ones(1)), lambda value: value.keywords["other"].fill_(2)),
        (
            lambda: times([1.0]),
            lambda value: value.__closure__[0].cell_contents.append(2),
        ),
    ],
)
def test_attributes_are_compared_by_content(make, change):
    nets = [nn.Linear(4, 3) for _ in range(2)]
    for net in nets:
        net.extra = make()
    function = ntkgen.KernelFunction(nets[0], X)
    for net in (nets[0], nets[1], copy.deepcopy(nets[0])):
        function(net)
    change(nets[1].extra)
    with pytest.raises(InputError, match="extra"):
        function(nets[1])


def test_an_object_that_trains_is_compared_by_its_class():
    net = mlp()
    net.optimizer = torch.optim.Adam(net.parameters())
    function = ntkgen.KernelFunction(net, X)
    net(X).sum().backward()
    net.optimizer.step()
    assert relative_error(function(net), ntkgen.ntk(net, X)) <= TOLERANCES["float32"]


def test_the_configuration_of_a_transformer_is_seen(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=1,
        n_embd=4,
        vocab_size=9,
        n_positions=8,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    net = transformers.GPT2ForSequenceClassification(config)
    function = ntkgen.KernelFunction(net, {"input_ids": torch.arange(6).reshape(2, 3)}, select="logits")
    first = function(net)
    net.save_pretrained(tmp_path)
    assert torch.equal(function(net), first)
    net.config.pad_token_id = 7
    with pytest.raises(InputError, match=r"config\.pad_token_id 0, found 7"):
        function(net)


def scaled_by(factor):
    return lambda _module, _args, output: factor * output


def halved(_module, args):
    return (args[0] / 2,)


def test_hooks_that_were_added_changed_or_removed_are_refused():
    net = mlp()
    function = ntkgen.KernelFunction(net, X)
    for part, register in ((net, "register_forward_hook"), (net[0], "register_forward_pre_hook")):
        handle = getattr(part, register)(halved if "pre" in register else scaled_by(2))
        with pytest.raises(InputError, match="hooks nothing, found"):
            function(net)
        handle.remove()
    function(net)
    net[0].register_forward_hook(scaled_by(2))
    function, second, third = ntkgen.KernelFunction(net, X), mlp(), mlp()
    second[0].register_forward_hook(scaled_by(2))
    third[0].register_forward_hook(scaled_by(3))
    assert torch.equal(function(second), function(net))
    for other in (mlp(), third):
        with pytest.raises(InputError, match="forward hooks"):
            function(other)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.r, self.head = kind(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.r(x[:, None])[0][:, -1])


def pruned():
    net = mlp()
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    return net


def normalised():
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
    return net


@pytest.mark.parametrize(
    "make", [lambda: Recurrent(nn.LSTM), lambda: Recurrent(nn.GRU), lambda: Recurrent(nn.RNN), pruned, normalised]
)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_tensors_that_follow_from_parameters_are_no_attributes(make, precision):
    torch.manual_seed(0)
    net = make()
    function = ntkgen.KernelFunction(net, X, precision=precision)
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(1.5)
        net(X)
    assert relative_error(function(net), ntkgen.ntk(net, X, precision=precision)) <= TOLERANCES[precision]


def test_a_message_shows_no_bytes_and_names_the_state_dict():
    net = nn.Linear(4, 3)
    net.mask = torch.ones(3)
    function = ntkgen.KernelFunction(net, X)
    net.mask = torch.zeros(3)
    with pytest.raises(
        InputError, match=r"mask a torch.float32 tensor of \(3,\), found .* with other values.*state_dict"
    ):
        function(net)
    function(net.state_dict())


def test_a_rule_that_fails_in_a_call_asks_for_a_new_kernel_function(monkeypatch):
    function = ntkgen.KernelFunction(mlp(), X)

    def fail(*_args, **_kwargs):
        raise RuleError(["0.weight"])

    monkeypatch.setattr(function, "_factors", fail)
    with pytest.raises(RuleError, match=r"gradients of 0\.weight .* Prepare a new KernelFunction"):
        function(mlp())
