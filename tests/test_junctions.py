"""Decompositions of composite functions, the axis of samples, entries of parameters, and what is left to autograd."""

import pytest
import torch
from cases import CASES, Call, relative_error
from torch import nn
from torch.nn import functional as F

import ntkgen
from ntkgen.errors import ModelError
from ntkgen.jacobian.calls import CallMode, mark_samples
from ntkgen.jacobian.junction_rows import entries_of
from ntkgen.jacobian.junctions import SampleAxis, sample_axis
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import reference_ntk


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


RECURRENT = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "lstm without biases": lambda: nn.LSTM(3, 4, bias=False, batch_first=True),
    "lstm with projection": lambda: nn.LSTM(3, 4, 2, proj_size=2),
    "gru": lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True),
    "gru without biases": lambda: nn.GRU(3, 4, bias=False),
    "tanh": lambda: nn.RNN(3, 4, 2),
    "relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


def require_the_same(module, call):
    """Compare results and gradients with those of the function that is replaced."""
    params = list(module.parameters())
    joined = []

    def join(found):
        joined.append(found.name)
        return found.function(*found.args, **found.kwargs)

    results = []
    for mode in (None, CallMode({id(param): name for name, param in module.named_parameters()}, join)):
        if mode is None:
            result = call()
        else:
            with mode:
                result = call()
        found = [each for each in torch.utils._pytree.tree_leaves(result) if each is not None]
        total = sum((each * normal(*each.shape)).sum() for each in found)
        results.append([*found, *torch.autograd.grad(total, params)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-12
    assert joined
    assert set(joined) <= {"linear", "cat", "add", "__add__", "chunk", "split"}


def sample(*shape):
    found = normal(*shape)
    mark_samples(found)
    return found


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # once per process
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_decomposed(name):
    module, x = RECURRENT[name]().double(), sample(5, 2, 3)
    require_the_same(module, lambda: module(x))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_decomposed(name, bias):
    module, x = CELLS[name](3, 4, bias=bias).double(), sample(2, 3)
    require_the_same(module, lambda: module(x))


ATTENTION = {
    "plain": ({}, {}),
    "weights of each head": ({"bias": False}, {"average_attn_weights": False}),
    "no weights, causal": ({}, {"need_weights": False, "attn_mask": torch.ones(4, 4).triu(1).bool()}),
    "added mask of each head": ({}, {"attn_mask": normal(6, 4, 4)}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False] * 4, [False, False, True, True]])}),
    "biases and zeros": ({"add_bias_kv": True, "add_zero_attn": True}, {"attn_mask": normal(4, 4)}),
    "other sizes": ({"kdim": 2, "vdim": 5}, {}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_decomposed(name):
    settings, options = ATTENTION[name]
    module = nn.MultiheadAttention(6, 3, **settings).double()
    query = sample(4, 2, 6)
    key = query if "kdim" not in settings else sample(4, 2, settings["kdim"])
    value = query if "vdim" not in settings else sample(4, 2, settings["vdim"])
    require_the_same(module, lambda: module(query, key, value, **options))
    if "kdim" not in settings:
        other = sample(4, 2, 6) + 1
        require_the_same(module, lambda: module(query, other, other, **options))


def test_the_axis_of_samples_is_told_by_the_shapes_of_one_and_of_three_samples():
    size = torch.Size
    assert sample_axis(size([4, 1, 3]), size([4, 3, 3])) == SampleAxis(1)
    assert sample_axis(size([5, 2]), size([15, 2])) == SampleAxis(0, is_merged=True)
    assert sample_axis(size([5, 2]), size([5, 2])) is None
    with pytest.raises(ValueError, match="no axis"):
        sample_axis(size([1, 1]), size([3, 3]))
    x = normal(6, 5, 2)
    axis = SampleAxis(1, is_merged=True)
    first = axis.first(x[:, :, 0].repeat(1, 3), 3)
    assert first.shape == (3, 6, 5)
    assert torch.equal(axis.back(first), x[:, :, 0].repeat(1, 3))


def test_the_entries_of_a_weight_expression_are_found():
    theta = nn.Parameter(normal(3, 4))
    found = entries_of(-2 * theta[1:].T, theta)
    assert found.scale == -2
    assert torch.equal(-2 * theta.flatten()[found.positions], (-2 * theta[1:].T).flatten())
    assert entries_of(theta, theta).is_in_order
    for expression in (theta * theta, theta @ normal(4, 2), torch.cat([theta, theta]), theta * normal(3, 4), theta + 1):
        assert expression.shape == (3, 4) or entries_of(expression, theta) is None
    assert entries_of(theta * normal(3, 4), theta) is None


def test_what_is_known_of_each_parameter():
    """A tied weight has rows, a slice is a matrix of its own, and a factor goes into the inputs."""

    def kinds(name):
        network = prepare(CASES[name]().module, CASES[name]().x, policy("float64"))
        return {layer.name: layer.has_matrix for layer in network.following.layers}

    assert kinds("weights_divided_by_the_root_of_the_width") == {"w": True, "b": False, "v": True}
    found = kinds("weights_on_the_left_masked_sliced_and_joined")
    assert found == {
        "left": True,
        "masked": False,
        "part": False,
        "other": False,
        "joint[0]": True,
        "joint[1]": True,
        "joint[2]": True,
    }
    assert kinds("embedding_tied_to_the_output") == {"embed.weight": False}
    assert kinds("scaled_convolutions") == {"w": True, "b": False, "v": True}


def test_a_network_whose_calls_depend_on_the_samples_is_left_to_autograd():
    def forward(self, x):
        if float(x[0, 0]) > 0:
            return F.linear(torch.tanh(F.linear(x, self.w)), self.v)
        return F.linear(torch.tanh(F.linear(x, self.w).clone()), self.v)

    model = Call(forward, w=nn.Parameter(normal(4, 3)), v=nn.Parameter(normal(2, 4)))
    x = normal(40, 3)
    x[:, 0] = x[:, 0].abs()
    x[36, 0] *= -1  # the first sample of a batch of the plan
    for samples in (x, x.flip(0)):
        found = ntkgen.ntk(model, samples, precision="float64")
        assert relative_error(found, reference_ntk(model, samples)) < 1e-10


def test_a_junction_that_fails_for_later_samples_is_left_to_autograd():
    """The weight is used once more, where a sample is large."""

    def forward(self, x):
        hidden = F.linear(x, self.w)
        large = x.abs().amax(1, keepdim=True) > 5
        return self.out(torch.where(large, hidden * self.w.sum().detach() ** 2, hidden).tanh())

    model = Call(forward, w=nn.Parameter(normal(4, 3)), out=nn.Linear(4, 2).double())
    x = normal(12, 3)
    x[9] *= 20
    found = ntkgen.ntk(model, x, precision="float64")
    assert relative_error(found, reference_ntk(model, x)) < 1e-10


def test_a_gradient_that_is_zero_does_not_disprove_a_rule():
    """The keys of attention have a bias without effect, whose rows are rounding."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6)
    model = Call(lambda self, x: self.out(self.attn(x, self.keys(x), x)[0].mean(1)), attn=attention)
    model.keys, model.out = nn.Linear(8, 6), nn.Linear(8, 3)
    with torch.no_grad():
        attention.in_proj_bias.add_(torch.randn(24, generator=torch.Generator().manual_seed(1)))
    x = normal(40, 5, 8).float() * 3
    assert prepare(model, x, policy("float32")).fallback == ()
    assert relative_error(ntkgen.ntk(model, x), reference_ntk(model, x)) < 1e-5


def test_a_state_that_the_forward_pass_makes_has_the_dtype_of_the_network():
    def forward(self, x):
        state = torch.zeros(len(x), 4)
        for step in x.unbind(1):
            state = torch.tanh(self.inputs(step) + F.linear(state, self.w))
        return self.out(state)

    model = Call(forward, inputs=nn.Linear(3, 4), w=nn.Parameter(normal(4, 4).float()), out=nn.Linear(4, 2))
    x = normal(5, 3, 3).float()
    assert prepare(model, x, policy("float64")).fallback == ()
    for precision, tolerance in (("float64", 1e-10), ("float32", 1e-5)):
        assert relative_error(ntkgen.ntk(model, x, precision=precision), reference_ntk(model, x)) < tolerance
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_an_autocast_region_is_refused(precision):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.first(x)
        return self.out(torch.tanh(hidden.to(x.dtype)))

    model = Call(forward, first=nn.Linear(3, 4), out=nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"found an autocast region of torch\.bfloat16 in its forward pass"):
        ntkgen.ntk(model, normal(4, 3).float(), precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")


def test_a_kernel_function_follows_what_the_weights_are_multiplied_with():
    """The factor is a buffer, which changes between two calls, and so does what is added to the weight."""

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.w * self.factor)), self.v + self.shift)

    def network(factor, shift):
        made = Call(forward, w=nn.Parameter(normal(4, 3)), v=nn.Parameter(normal(2, 4)))
        made.register_buffer("factor", torch.tensor(factor, dtype=torch.float64))
        made.register_buffer("shift", torch.tensor(shift, dtype=torch.float64))
        return made

    x = normal(6, 3)
    function = ntkgen.KernelFunction(network(0.5, 0.0), x, precision="float64")
    for factor, shift in ((0.5, 0.0), (2.0, 0.5), (-1e-3, 3.0)):
        changed = network(factor, shift)
        assert relative_error(function(changed), reference_ntk(changed, x)) < 1e-10
