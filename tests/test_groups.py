"""Groups of parameters with a kernel each: `per_layer` in memory."""

import copy

import pytest
import torch
from cases import CASES, TOLERANCES, chosen_cases, in_turn, relative_error
from torch import nn

import ntkgen
from ntkgen.errors import InputError

pytestmark = pytest.mark.numeric

SPLIT = {"biases": "*bias*", "matrices": "!*bias*"}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3))


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def of_these_alone(model, names, *x):
    """Compute the kernel of some parameters, with all others frozen in a copy."""
    other = copy.deepcopy(model).requires_grad_(False)
    for name, param in other.named_parameters():
        param.requires_grad = name in names
    return ntkgen.reference_ntk(other, *x)


def reduced(kernel, output, m):
    blocks = kernel.reshape(len(kernel) // m, m, -1, m)
    return {
        "full": lambda: kernel,
        "trace": lambda: torch.einsum("iojo->ij", blocks),
        "sum": lambda: blocks.sum((1, 3)),
    }[output]()


def assert_add_up(parts, kernel, precision="float64"):
    assert relative_error(sum(parts.values()), kernel) <= TOLERANCES[precision]


# the kernels of groups ------------------------------------------------------------------------------------------------


@chosen_cases
def test_the_kernel_of_each_group_is_that_of_its_parameters_alone(name):
    case = CASES[name]()
    names = [name for name, param in case.module.named_parameters() if param.requires_grad]
    groups = {"even": names[::2], "odd": names[1::2]} if len(names) > 1 else {"all": names}
    parts = ntkgen.ntk(case.module, *case.halves, precision="float64", per_layer=groups)
    assert list(parts) == list(groups)
    for group, kernel in parts.items():
        expected = of_these_alone(case.module, groups[group], *case.halves)
        assert relative_error(kernel, expected) <= TOLERANCES["float64"]


# tied weights as one matrix and as several, LSTM, attention, a parameter that is left to autograd
VARIED = [
    "tied_weights", "embedding_tied_to_the_output", "lstm", "attention_with_masks_and_biases", "bare_parameter",
    "weight_that_changes_a_part_in_place", "own_autograd_function",
]  # fmt: skip


@in_turn("name output", VARIED, ["full", "trace", "sum"])
def test_the_kernels_of_the_groups_add_up_to_the_kernel(name, output):
    case = CASES[name]()
    x = case.x[: len(case.x) // 2 + 1], case.x
    kernel = ntkgen.reference_ntk(case.module, *x)
    expected = reduced(kernel, output, len(kernel) // len(x[0]))
    for per_layer in (True, {"biases": "*bias*"} if "bias" in str(case.module.state_dict()) else ["*"]):
        for precision in ("float64", "float32"):
            found = ntkgen.ntk(case.module, *x, output=output, precision=precision, per_layer=per_layer)
            assert_add_up(found, expected, precision)


@pytest.mark.parametrize("block_bytes", [700, 1 << 30])
@pytest.mark.parametrize("columns", [None, X[:3] + 1])
def test_a_bias_of_another_group_is_not_joined_to_its_matrix(monkeypatch, block_bytes, columns):
    monkeypatch.setattr("ntkgen.jacobian.dense.BLOCK_BYTES", block_bytes)
    net = mlp()
    names = {name for name, _ in net.named_parameters()}
    function = ntkgen.KernelFunction(net, X, columns, precision="float64", per_layer=SPLIT)
    assert function.layers == ["biases", "matrices"]
    for found in (function(net), ntkgen.ntk(net, X, columns, precision="float64", per_layer=SPLIT)):
        for group, params in (
            ("biases", {n for n in names if "bias" in n}),
            ("matrices", {n for n in names if "bias" not in n}),
        ):
            x = (X,) if columns is None else (X, columns)
            assert relative_error(found[group], of_these_alone(net, params, *x)) <= TOLERANCES["float64"]


def test_every_parameter_without_a_group_is_in_the_last_one():
    net = mlp()
    found = ntkgen.ntk(net, X, precision="float64", per_layer={"head": "3.*", "norm": ["2.*", "!*bias"]})
    assert list(found) == ["head", "norm", "other"]
    assert relative_error(found["other"], of_these_alone(net, {"0.weight", "0.bias", "2.bias"}, X)) <= 1e-10
    assert_add_up(found, ntkgen.reference_ntk(net, X))


def test_patterns_alone_are_the_names_and_true_means_the_modules():
    net = mlp()
    assert list(ntkgen.ntk(net, X, per_layer=["3.*", "0.*"])) == ["3.*", "0.*", "other"]
    assert list(ntkgen.ntk(net, X, per_layer="*")) == ["*"]
    assert list(ntkgen.ntk(net, X, per_layer=True)) == ["0", "2", "3"]
    assert isinstance(ntkgen.ntk(net, X, per_layer=False), torch.Tensor)


def test_groups_of_chosen_parameters_and_of_a_function():
    net = mlp()

    def doubled(module, x):
        return 2 * module(x)

    found = ntkgen.ntk(net, X, function=doubled, params="!0.*", precision="float64", per_layer={"head": "3.*"})
    assert list(found) == ["head", "other"]
    assert relative_error(found["head"], 4 * of_these_alone(net, {"3.weight", "3.bias"}, X)) <= 1e-10
    assert relative_error(found["other"], 4 * of_these_alone(net, {"2.weight", "2.bias"}, X)) <= 1e-10


def test_a_tied_parameter_belongs_to_the_group_of_any_of_its_names():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    found = ntkgen.ntk(net, X, precision="float64", per_layer={"second": "2.*"})
    assert relative_error(found["second"], of_these_alone(net, {"0.weight", "2.bias"}, X)) <= 1e-10
    with pytest.raises(InputError, match=r"belongs to two groups, 'first' and 'second'"):
        ntkgen.ntk(net, X, per_layer={"first": "0.*", "second": "2.*"})


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_layer", "message"),
    [
        ({"head": "hed.*"}, r"No parameter matches the pattern 'hed\.\*'.*Names that are close"),
        ({"a": "0.*", "b": "*weight"}, r"0\.weight belongs to two groups, 'a' and 'b'"),
        (["0.*", "0.*"], r"0\.weight belongs to two groups"),
        ({"norm": "2.*"}, r"group 'norm' has no trainable parameter"),
        ({"other": "0.*"}, r"'other' is that of the parameters that no group has"),
        ({}, r"`per_layer` names groups"),
        ({"": "0.*"}, r"`per_layer` names groups"),
        ({"a": []}, r"`per_layer` chooses parameters by patterns"),
        ([], r"`per_layer` chooses parameters by patterns"),
        ([1], r"`per_layer` chooses parameters by patterns.*found a list of int"),
        (3, r"`per_layer` chooses parameters by patterns.*found something of type int"),
        ({"a": 3}, r"`per_layer` chooses parameters by patterns.*found something of type int"),
    ],
)
def test_groups_that_do_not_fit_are_refused_in_one_line(per_layer, message):
    net = mlp()
    net[2].requires_grad_(False)
    for compute in (ntkgen.ntk, ntkgen.KernelFunction):
        with pytest.raises(InputError, match=message) as error:
            compute(net, X, per_layer=per_layer)
        assert "\n" not in str(error.value)


def test_a_group_that_params_leaves_out_is_refused():
    with pytest.raises(InputError, match="left out by `params`"):
        ntkgen.ntk(mlp(), X, params="3.*", per_layer={"body": "0.*"})
