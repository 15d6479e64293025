"""The rule of every layer type against autograd, over how it can be configured, and rules of a user's own."""

import math
import subprocess
import sys

import pytest
import torch
from cases import Call, relative_error
from torch import Tensor, nn

import ntkgen
from ntkgen import jacobian
from ntkgen.errors import InputError
from ntkgen.jacobian.layers import RULES, LayerRule, register_rule
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import reference_ntk

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = (5, 4, 6)  # of the axes of an image; all different, and none a multiple of the strides


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def autograd_rows(module: nn.Module, param: str, x: Tensor, grad: Tensor) -> Tensor:
    """One backward pass per sample through the layer alone."""
    weight = module.get_parameter(param)
    rows = [torch.autograd.grad(module(x[i : i + 1]), weight, grad[i : i + 1])[0].flatten() for i in range(len(x))]
    return torch.stack(rows)


def rule_rows(module: nn.Module, param: str, x: Tensor, grad: Tensor) -> Tensor:
    rule = RULES[type(module)]
    if param == rule.matrix:
        return (rule.cotangents(module, grad).mT @ rule.inputs(module, x)).flatten(1)
    return rule.vectors[param](module, x, grad)


def check(module: nn.Module, x: Tensor) -> None:
    """Compare the rows of every parameter, for weights and buffers that are not what they start from."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        module.double().eval()
        for param in module.parameters():
            param.copy_(torch.randn_like(param))
        for name, buffer in module.named_buffers():
            if name in {"running_mean", "running_var"}:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        y = module(x)
        grad = torch.randn_like(y)
    assert list(module.parameters())
    for param, _ in module.named_parameters():
        found, expected = rule_rows(module, param, x, grad), autograd_rows(module, param, x, grad)
        assert relative_error(found, expected) < 1e-12


# convolution ----------------------------------------------------------------------------------------------------------

every_dimension = pytest.mark.parametrize("dimensions", [1, 2, 3])
MODES = ["zeros", "reflect", "replicate", "circular"]
CONFIGURATIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "pointwise": {"kernel_size": 1},
    "strided pointwise": {"kernel_size": 1, "stride": 2},
    "even kernel": {"kernel_size": 2, "padding": 1},
    "strides": {"stride": (2, 3, 1)},
    "dilation": {"kernel_size": 2, "dilation": (3, 1, 2), "padding": (1, 0, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8, "stride": 2, "padding": 1},
    "everything": {"groups": 2, "kernel_size": (2, 3, 1), "stride": (1, 2, 3), "dilation": (2, 1, 3), "padding": 2},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (4, 2, 2)},
    "same, dilation": {"padding": "same", "kernel_size": (2, 3, 2), "dilation": (3, 1, 2), "groups": 2},
}


def convolution(dimensions: int, **options: object) -> nn.Module:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    cut = {name: o[:dimensions] if isinstance(o, tuple) else o for name, o in options.items()}
    return CONVOLUTIONS[dimensions](**cut)


def image(dimensions: int, samples: int = 3) -> Tensor:
    return normal(samples, 4, *SIZES[:dimensions])


@every_dimension
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolution(dimensions, name):
    check(convolution(dimensions, **CONFIGURATIONS[name]), image(dimensions))


@every_dimension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [1, (2, 0, 1), "same", "valid"], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding(dimensions, mode, padding):
    options = {"kernel_size": (3, 2, 4)} if padding == "same" else {"stride": 2}
    check(convolution(dimensions, padding=padding, padding_mode=mode, **options), image(dimensions))


@every_dimension
@pytest.mark.parametrize("padding", [(1, 2, 0), "same"], ids=str)
def test_a_convolution_that_was_changed_after_it_was_built(dimensions, padding):
    """As dilated backbones are made: torch reads padding and dilation when it is called."""
    module = convolution(dimensions, padding=padding)
    module.dilation = (2,) * dimensions
    if padding != "same":
        module.padding = (2,) * dimensions
    check(module, image(dimensions))


@every_dimension
def test_a_convolution_of_inputs_in_any_layout(dimensions):
    x = image(dimensions)
    check(convolution(dimensions, groups=2, padding=1), x.transpose(1, -1).contiguous().transpose(1, -1))
    check(convolution(dimensions, padding=1), x[:1].expand(2, *x.shape[1:]))


@every_dimension
def test_a_convolution_has_the_sizes_that_plans_count(dimensions):
    module, x = convolution(dimensions, groups=2, stride=2).double(), image(dimensions)
    y, rule = module(x), RULES[type(module)]
    positions = math.prod(y.shape[2:])
    assert rule.inputs(module, x).shape == (3, 2, positions, 2 * 3**dimensions)
    assert rule.cotangents(module, y).shape == (3, 2, positions, 3)


@every_dimension
def test_a_pointwise_convolution_copies_nothing(dimensions):
    x = image(dimensions)
    module = convolution(dimensions, kernel_size=1, groups=2)
    assert RULES[type(module)].inputs(module, x).data_ptr() == x.data_ptr()


# dense and normalisation ----------------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: (nn.Linear(3, 4), normal(3, 3)),
    "linear without bias": lambda: (nn.Linear(3, 4, bias=False), normal(3, 5, 3)),
    "linear of grids": lambda: (nn.Linear(3, 4), normal(3, 2, 5, 3)),
    "batch norm of vectors": lambda: (nn.BatchNorm1d(4, eps=1e-2), normal(3, 4)),
    "layer norm of vectors": lambda: (nn.LayerNorm(4), normal(3, 4)),
    "layer norm of sequences": lambda: (nn.LayerNorm(4, eps=0.1), normal(3, 5, 4)),
    "layer norm of grids": lambda: (nn.LayerNorm([4]), normal(3, 2, 5, 4)),
    "layer norm without bias": lambda: (nn.LayerNorm(4, bias=False), normal(3, 5, 4)),
    "layer norm of whole samples": lambda: (nn.LayerNorm((2, 5, 4)), normal(3, 2, 5, 4)),
    "layer norm of two axes": lambda: (nn.LayerNorm((5, 4), eps=1e-3), normal(3, 2, 5, 4)),
    "layer norm far from zero": lambda: (nn.LayerNorm(4), 0.1 * normal(3, 5, 4) + 10),
    "layer norm of equal values": lambda: (nn.LayerNorm(4), normal(3, 5, 4) * (torch.arange(5) > 1).unsqueeze(1) + 1),
    "RMS norm of vectors": lambda: (nn.RMSNorm(4), normal(3, 4)),
    "RMS norm of sequences": lambda: (nn.RMSNorm(4, eps=0.1), normal(3, 5, 4)),
    "RMS norm of two axes": lambda: (nn.RMSNorm((5, 4)), normal(3, 2, 5, 4)),
    "RMS norm of tiny values": lambda: (nn.RMSNorm(4), 1e-8 * normal(3, 5, 4)),  # as large as the default eps
    "group norm of vectors": lambda: (nn.GroupNorm(2, 6), normal(3, 6)),
    "group norm of images": lambda: (nn.GroupNorm(3, 6, eps=1e-2), normal(3, 6, 4, 3)),
    "group norm of one group": lambda: (nn.GroupNorm(1, 4), normal(3, 4, 2, 3, 2)),
    "group norm of every channel": lambda: (nn.GroupNorm(4, 4), normal(3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    check(*LAYERS[name]())


@every_dimension
@pytest.mark.parametrize("tracks", [False, True])
def test_instance_norm(dimensions, tracks):
    norm = INSTANCE_NORMS[dimensions]
    check(norm(4, eps=1e-2, affine=True, track_running_stats=tracks), 2 * image(dimensions) + 1)


@every_dimension
@pytest.mark.parametrize("norm", [BATCH_NORMS.__getitem__, lambda _: nn.SyncBatchNorm], ids=["its own", "synchronised"])
def test_batch_norm(dimensions, norm):
    check(norm(dimensions)(4, eps=1e-2), 2 * image(dimensions) + 1)


# embedding ------------------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[0, 3, 3, 3], [1, 2, 0, 1], [4, 4, 4, 4]])


@pytest.mark.parametrize("padding", [None, 0, 3, -1])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2), (12,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding(padding, shape, dtype):
    check(nn.Embedding(6, 3, padding_idx=padding), TOKENS.reshape(shape).to(dtype))


def test_an_embedding_of_padding_alone_has_no_gradient():
    module, grad = nn.Embedding(5, 3, padding_idx=4), normal(3, 4, 3)
    rows = rule_rows(module, "weight", TOKENS, grad)
    assert rows[2].count_nonzero() == 0
    assert rows[:2].count_nonzero() == 3 * (2 + 3)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_an_embedding_whose_gradient_is_another_has_no_rule(option):
    rule = RULES[nn.Embedding]
    assert rule.applies(nn.Embedding(5, 3, padding_idx=1))
    assert not rule.applies(nn.Embedding(5, 3, **option))


@pytest.mark.parametrize("module_type", [t for t in RULES if t is not nn.Embedding], ids=lambda t: t.__name__)
def test_a_rule_applies_however_the_layer_is_configured(module_type):
    assert RULES[module_type].applies(nn.Module())


# rules of a user's own ------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """y = γ ∘ x, over any number of positions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Rotated(nn.Linear):
    """A linear layer of the reversed input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(-1))


def scale_rows(_module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    return (grad * x).flatten(1, -2).sum(1)


def rotated_inputs(_module: nn.Module, x: Tensor) -> Tensor:
    return x.flip(-1).reshape(len(x), 1, -1, x.shape[-1])


def network_of_own_layers() -> nn.Module:
    def forward(self: Call, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.rotated(self.scale(x))).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Call(forward, scale=Scale(3), rotated=Rotated(3, 4), out=nn.Linear(4, 2))


@pytest.fixture
def rules(monkeypatch):
    """Give a test the table, and put it back."""
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


LINEAR = RULES[nn.Linear]
RIGHT = {
    Scale: LayerRule(vectors={"gamma": scale_rows}),
    Rotated: LayerRule("weight", rotated_inputs, LINEAR.cotangents, LINEAR.vectors),
}
WRONG = {
    "values": {Scale: LayerRule(vectors={"gamma": lambda _module, _x, grad: grad.sum(1)}), Rotated: LINEAR},
    "shapes": {Scale: LayerRule(vectors={"gamma": lambda _module, x, grad: (x * grad).flatten(1)})},
    "the parameter's name": {Scale: LayerRule(vectors={"weight": scale_rows})},
    "the type": {Scale: RULES[nn.LayerNorm]},
}


def check_kernel(followed: tuple[str, ...]) -> None:
    """The parameters without a rule that holds are followed to their junctions."""
    model, x = network_of_own_layers(), normal(3, 2, 3)
    network = prepare(model, x, policy("float64"))
    assert network.fallback == ()
    found = [layer.full_name(param) for layer in network.following.layers for param in layer.params()]
    assert sorted(found) == sorted(followed)
    assert relative_error(ntkgen.ntk(model, x, precision="float64"), reference_ntk(model, x)) < 1e-10


def test_layers_without_a_rule_are_followed(rules):
    check_kernel(("scale.gamma", "rotated.weight", "rotated.bias"))


def test_a_registered_rule_is_used(rules):
    for module_type, rule in RIGHT.items():
        register_rule(module_type, rule)
    check_kernel(())


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_found_and_the_kernel_is_right(rules, what):
    for module_type, rule in {**RIGHT, **WRONG[what]}.items():
        register_rule(module_type, rule)
    wrong = ("scale.gamma", "rotated.weight") if Rotated in WRONG[what] else ("scale.gamma",)
    check_kernel(wrong)  # the bias of a linear layer does not see its input


def test_a_rule_that_does_not_apply_is_not_asked(rules):
    def unreachable(*_args: object) -> Tensor:
        raise AssertionError

    register_rule(Rotated, RIGHT[Rotated])
    register_rule(Scale, LayerRule(vectors={"gamma": unreachable}, applies=lambda module: module.gamma.numel() > 3))
    check_kernel(("scale.gamma",))


def test_a_registered_rule_takes_the_place_of_ours(rules):
    register_rule(nn.Linear, LayerRule(vectors={"bias": LINEAR.vectors["bias"]}))
    network = prepare(nn.Linear(2, 2), normal(2, 2), policy("float64"))
    assert [layer.name for layer in network.following.layers] == ["weight"]


REFUSED = {
    "a module": ((nn.Linear(2, 2), LINEAR), r"a subclass of torch.nn.Module, found Linear\(.*Pass type\(module\)"),
    "another type": ((Tensor, LINEAR), "a subclass of torch.nn.Module, found <class 'torch.Tensor'>"),
    "a function alone": (
        (Scale, scale_rows),
        "The rule of Scale must be a LayerRule, and is a function.*Pass for example",
    ),
    "no inputs": ((Scale, LayerRule("gamma")), "has the weight matrix 'gamma'.*one of the two is missing"),
    "no cotangents": ((Scale, LayerRule("gamma", rotated_inputs)), "or list the parameter in vectors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_rule_is_refused_in_one_line(rules, what):
    arguments, message = REFUSED[what]
    before = dict(RULES)
    with pytest.raises(InputError, match=message) as raised:
        register_rule(*arguments)
    assert "\n" not in str(raised.value)
    assert before == RULES


# the names of the package ---------------------------------------------------------------------------------------------


def test_the_public_names_are_found_on_first_use():
    assert jacobian.register_rule is register_rule
    assert jacobian.LayerRule is LayerRule
    assert {"LayerRule", "NTKOperator", "register_rule"} <= set(dir(jacobian))
    with pytest.raises(AttributeError, match="has no attribute 'regsiter_rule'"):
        _ = jacobian.regsiter_rule


def test_planning_loads_no_torch():
    code = "import sys, ntkgen.jacobian.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
