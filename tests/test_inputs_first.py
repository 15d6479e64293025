"""Rules for layers whose weight is laid out (inputs, channels), as that of Hugging Face's Conv1D."""

import pytest
import torch
from cases import CPU, TOLERANCES, Call, in_turn, relative_error
from torch import Tensor, nn

import ntkgen
from ntkgen.blocks import Block
from ntkgen.jacobian import dense_rule, joint
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.choice import candidates, plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import fill_kernel
from ntkgen.jacobian.cost import ORDERS, sizes_for
from ntkgen.jacobian.layers import RULES, LayerRule, register_rule
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.reference import reference_ntk


class InputsFirst(nn.Module):
    """y = x W + b, with W of (inputs, channels)."""

    def __init__(self, inputs: int, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, channels) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


TRANSPOSED = dense_rule(layout=lambda weight: weight.T)
# With bias, without, and with parameters that are not trained.
KINDS = ["with bias", "without bias", "frozen bias", "frozen weight"]
X = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def forward(self: Call, x: Tensor) -> Tensor:
    h = torch.tanh(self.first(x))
    return self.last(torch.tanh(self.square(self.square(h))).mean(1))


def network(kind: str = "with bias", kept: type[nn.Module] = InputsFirst) -> nn.Module:
    """Three layers: one of positions, a square one that is used twice, and one without positions."""
    sizes = {"first": (3, 5), "square": (5, 5), "last": (5, 2)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = {name: kept(*size, bias=kind != "without bias") for name, size in sizes.items()}
    for layer in layers.values():
        if kind.startswith("frozen"):
            layer.get_parameter(kind.removeprefix("frozen ")).requires_grad_(False)
    return Call(forward, **layers).double()


@pytest.fixture
def rules():
    before = dict(RULES)
    register_rule(InputsFirst, TRANSPOSED)
    yield
    RULES.clear()
    RULES.update(before)


def reduced(kernel: Tensor, output: str, m: int) -> Tensor:
    n1, n2 = (length // m for length in kernel.shape)
    blocks = kernel.view(n1, m, n2, m)
    return {"full": kernel, "trace": blocks.diagonal(dim1=1, dim2=3).sum(-1), "sum": blocks.sum((1, 3))}[output]


def require_by_rule(model: nn.Module, x: Tensor) -> None:
    """No parameter is followed or left to autograd."""
    found = prepare(model, x, policy("float64"))
    assert found.following.layers == found.fallback == ()
    assert all((layer.positions is not None) == layer.has_matrix for layer in found.layers)


# the kernel -----------------------------------------------------------------------------------------------------------


@in_turn("kind output", KINDS, ["full", "trace", "sum"])
@pytest.mark.parametrize("block_bytes", [3000, 1 << 30])
def test_the_kernel_is_that_of_the_reference(kind, output, block_bytes, rules, monkeypatch):
    monkeypatch.setattr("ntkgen.jacobian.dense.BLOCK_BYTES", block_bytes)
    model = network(kind)
    require_by_rule(model, X)
    for columns in (None, X[:3] + 1):
        x = (X,) if columns is None else (X, columns)
        expected = reduced(reference_ntk(model, *x), output, 2)
        assert relative_error(ntkgen.ntk(model, *x, output=output), expected) < TOLERANCES["float64"]


@pytest.mark.parametrize("keeps_rows", [False, True])
@in_turn("order kind", ORDERS, ["with bias", "without bias"])
def test_every_order_with_joined_biases(order, keeps_rows, kind, rules, monkeypatch):
    """The rows of the matrix and of the bias that is joined to it lie side by side, for each channel."""

    def only(*args):
        plans = list(candidates(*args))
        return [plan for plan in plans if plan.order == order and plan.keeps_rows == keeps_rows] or plans

    monkeypatch.setattr(joint, "candidates", only)
    model = network(kind)
    function = ntkgen.KernelFunction(model, X, per_layer=True)
    assert all((layer.joined is None) == (kind == "without bias") for layer in function._network.layers)
    kernels = function(model, prove=True)
    for name, kernel in kernels.items():
        alone = network(kind).requires_grad_(False)
        alone.get_submodule(name).requires_grad_(True)
        assert relative_error(kernel, reference_ntk(alone, X)) < TOLERANCES["float64"]
    assert relative_error(sum(kernels.values()), reference_ntk(model, X)) < TOLERANCES["float64"]


@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_in_ragged_batches(order, kind, rules):
    model = network(kind)
    prepared = prepare(model, X, policy("float64"))
    orders = [order] * len(prepared.profile.layers) if order else ()
    plan = plan_jacobian(prepared.profile, sizes_for("cpu", 3, 2), precision="float64", orders=orders)
    blocks = Block(0, len(X)).pieces(3)
    factors = BlockCache(lambda block: compute_factors(prepared, plan, X[block.start : block.stop]), capacity=2)
    with exact_arithmetic(CPU):
        found = fill_kernel(blocks, blocks, factors, plan)
    assert relative_error(found, reference_ntk(model, X)) < TOLERANCES["float64"]


def test_a_bias_of_another_group_and_a_store(rules, tmp_path):
    model, groups = network(), {"biases": "*bias"}
    found = ntkgen.ntk(model, X, per_layer=groups)
    alone = network()
    for name, param in alone.named_parameters():
        param.requires_grad_("bias" in name)
    assert relative_error(found["biases"], reference_ntk(alone, X)) < TOLERANCES["float64"]
    assert relative_error(sum(found.values()), reference_ntk(model, X)) < TOLERANCES["float64"]
    store = ntkgen.compute(
        model, X, store=tmp_path / "k.zarr", precision="float64", dtypes=("float64",), tile_side=6, fsync=False
    )
    assert store.manifest.plan.profile.fallback == ()
    assert relative_error(store.kernel("float64"), reference_ntk(model, X)) < TOLERANCES["float64"]


def test_other_names_and_more_axes(rules):
    class Experts(nn.Module):
        """One matrix of (inputs, channels) for each part of the features."""

        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Parameter(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)))

        def forward(self, x):  # (samples, 6) → (samples, 8)
            return torch.einsum("ngk,gkc->ngc", x.view(-1, 2, 3), self.maps).flatten(1)

    register_rule(
        Experts,
        LayerRule(
            "maps",
            lambda _, x: x.reshape(len(x), 2, 1, 3),
            lambda _, grad: grad.reshape(len(grad), 2, 1, 4),
            layout=lambda maps: maps.mT,
        ),
    )
    model, x = nn.Sequential(Experts(), nn.Tanh(), nn.Linear(8, 2)).double(), X.flatten(1)[:, :6]
    assert prepare(model, x, policy("float64")).following.layers == ()
    assert relative_error(ntkgen.ntk(model, x), reference_ntk(model, x)) < TOLERANCES["float64"]


@pytest.mark.slow
def test_the_attention_of_a_gpt2():
    transformers = pytest.importorskip("transformers", reason="GPT-2 is built by transformers")
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, ids = transformers.GPT2LMHeadModel(config).double(), torch.randint(0, 30, (5, 6))
    asked = {"select": "logits[:, -1, [5, 7]]", "params": "*c_*"}
    expected = reference_ntk(model, ids, **asked)
    before = dict(RULES)
    try:
        register_rule(Conv1D, TRANSPOSED)
        assert relative_error(ntkgen.ntk(model, ids, **asked), expected) < TOLERANCES["float64"]
    finally:
        RULES.clear()
        RULES.update(before)


# layouts that do not hold ---------------------------------------------------------------------------------------------

WRONG = {
    "none": None,  # square matrices hide it from a comparison of shapes
    "a part": lambda weight: weight[:1],
    "entries twice": lambda weight: torch.cat([weight[:-1], weight[:1]]),
    "an error": lambda weight: weight.view(-1, 97),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_layout_is_found_and_the_kernel_is_right(what, rules):
    register_rule(InputsFirst, dense_rule(layout=WRONG[what]))
    model = network()
    layers = prepare(model, X, policy("float64")).following.layers
    followed = {layer.full_name(param) for layer in layers for param in layer.params()}
    assert followed == {"first.weight", "square.weight", "last.weight"}
    assert relative_error(ntkgen.ntk(model, X), reference_ntk(model, X)) < TOLERANCES["float64"]
