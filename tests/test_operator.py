"""The kernel as an operator: equal to the reference on every network, with no trace left on the user's module."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, CHOSEN, TOLERANCES, chosen, chosen_cases, reference_of, relative_error
from scipy.sparse.linalg import eigsh, svds
from torch import Tensor, nn

from ntkgen.errors import InputError, ModelError, ShapeError, UnknownNameError
from ntkgen.jacobian import operator
from ntkgen.jacobian.modes import PUSHES
from ntkgen.jacobian.operator import NTKOperator
from ntkgen.jacobian.reference import reference_ntk


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", chosen(CASES, CHOSEN))
@pytest.mark.numeric
def test_the_operator_is_the_reference(name):
    case, K = CASES[name](), reference_of(name)
    found = NTKOperator(case.module, case.x, batch_size=2)
    V = noise(len(K), 3)
    assert found.shape == K.shape
    assert relative_error(found @ V, K @ V) < 1e-10
    assert relative_error(found @ V[:, 0], K @ V[:, 0]) < 1e-10


# torch's fused weight norm has no forward mode; the treatment of a table's gradients by torch is not a derivative
WITHOUT_FORWARD_MODE = {
    "weight_norm": "double-backward",
    "embedding_of_repeated_and_padding_tokens": "double-backward",
    "embedding_scaled_by_frequency": "rows",
    "own_autograd_function": "double-backward",
    "own_autograd_function_for_torch_func": "double-backward",
}


@pytest.mark.parametrize("name", chosen(CASES, [*CHOSEN, *WITHOUT_FORWARD_MODE]))
def test_the_cheapest_way_is_chosen(name):
    case = CASES[name]()
    assert NTKOperator(case.module, case.x).push == WITHOUT_FORWARD_MODE.get(name, "forward")


@chosen_cases
def test_every_way_to_the_product_is_the_same(name):
    case = CASES[name]()
    found = NTKOperator(case.module, case.x, batch_size=3)
    V = noise(found.shape[1], 2)
    for push in list(PUSHES)[list(PUSHES).index(found.push) :]:
        found.push = push
        assert relative_error(found @ V, reference_of(name) @ V) < 1e-10
        assert found.push == push


@chosen_cases
def test_rectangular_kernels_and_their_transposes(name):
    case = CASES[name]()
    left, right = case.halves
    K, found = reference_ntk(case.module, left, right), NTKOperator(case.module, left, right, batch_size=2)
    V, W = noise(K.shape[1], 2), noise(K.shape[0], 2)
    assert (found.shape, found.T.shape, found.T.T.shape) == (K.shape, K.T.shape, K.shape)
    assert relative_error(found @ V, K @ V) < 1e-10
    assert relative_error(found.T @ W, K.T @ W) < 1e-10
    inner, adjoint = (found @ V * W).sum(), (V * (found.T @ W)).sum()
    assert abs(inner - adjoint) < 1e-10 * (found @ V).norm() * W.norm() + 1e-14


@pytest.mark.parametrize("name", ["mlp", "conv", "batch_norm_2d", "transformer"])
@pytest.mark.numeric
def test_float32_is_float32(name):
    case = CASES[name]()
    found = NTKOperator(case.module, case.x, precision="float32")
    V = noise(found.shape[1], 2)
    assert (found.dtype, (found @ V).dtype) == (torch.float32, torch.float32)
    assert 1e-12 < relative_error(found @ V, reference_of(name) @ V) < TOLERANCES["float32"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_batches_change_nothing(batch_size):
    case, K = CASES["conv"](), reference_of("conv")
    V = noise(len(K), 2)
    assert relative_error(NTKOperator(case.module, case.x, batch_size=batch_size) @ V, K @ V) < 1e-13


def test_columns_are_taken_in_groups_that_fit(monkeypatch):
    case, K = CASES["mlp"](), reference_of("mlp")
    found, V, reports = NTKOperator(case.module, case.x, batch_size=2), noise(len(K), 5), []
    sizes = []

    def spy(module: nn.Module, batch: Tensor, directions: list[Tensor]) -> Tensor:
        sizes.append(len(directions[0]))
        return PUSHES["double-backward"](module, batch, directions)

    num_params = sum(param.numel() for param in case.module.parameters())
    monkeypatch.setattr(operator, "DIRECTION_BYTES", 2 * 8 * num_params + 8)
    monkeypatch.setitem(PUSHES, "forward", spy)
    assert relative_error(found.matmat(V, lambda *report: reports.append(report)), K @ V) < 1e-10
    assert sizes == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert reports == [("exact product", done, 18) for done in range(19)]


def test_a_parameter_too_large_for_the_limit_is_one_column(monkeypatch):
    case, K = CASES["mlp"](), reference_of("mlp")
    monkeypatch.setattr(operator, "DIRECTION_BYTES", 1)
    V = noise(len(K), 2)
    assert relative_error(NTKOperator(case.module, case.x) @ V, K @ V) < 1e-10


def test_other_dtypes_of_vectors_are_converted():
    case, K = CASES["mlp"](), reference_of("mlp")
    found = NTKOperator(case.module, case.x)
    for v in (torch.arange(len(K)), torch.ones(len(K)), torch.ones(len(K), requires_grad=True)):
        product = found @ v
        assert (product.dtype, product.requires_grad) == (torch.float64, False)
        assert relative_error(product, K @ v.detach().double()) < 1e-12
    assert (found @ torch.zeros(len(K), 0)).shape == (len(K), 0)


def test_inference_mode_changes_nothing():
    case, K = CASES["in_place_relu"](), reference_of("in_place_relu")
    with torch.inference_mode():
        x, v = case.x.clone(), torch.ones(len(K))
        found = NTKOperator(case.module, x) @ v
    assert relative_error(found, K @ torch.ones(len(K), dtype=torch.float64)) < 1e-12


# a linear map of the outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_the_outputs_can_be_mapped(num_rows):
    case, K = CASES["conv"](), reference_of("conv")
    A = noise(num_rows, 3)
    found = NTKOperator(case.module, case.x, transform=A, batch_size=3)
    mapping = torch.kron(torch.eye(len(case.x), dtype=torch.float64), A)
    expected = mapping @ K @ mapping.T
    V = noise(len(expected), 2)
    assert found.shape == expected.shape
    for found.push in PUSHES:
        assert relative_error(found @ V, expected @ V) < 1e-10


# scipy ----------------------------------------------------------------------------------------------------------------


def test_scipy_finds_the_largest_eigenvalues():
    case, K = CASES["conv"](), reference_of("conv")
    found = eigsh(NTKOperator(case.module, case.x).to_scipy(), k=3, return_eigenvectors=False, v0=np.ones(len(K)))
    np.testing.assert_allclose(np.sort(found), np.linalg.eigvalsh(K)[-3:], rtol=1e-10)


def test_scipy_finds_singular_values_of_rectangular_kernels():
    case = CASES["mlp"]()
    left, right = case.x[:2], case.x[2:]
    K = reference_ntk(case.module, left, right).numpy()
    view = NTKOperator(case.module, left, right).to_scipy()
    found = svds(view, k=2, return_singular_vectors=False, v0=np.ones(6))
    np.testing.assert_allclose(np.sort(found), np.sort(np.linalg.svd(K)[1])[-2:], rtol=1e-8)


def test_scipys_products_are_numpys():
    case, K = CASES["mlp"](), reference_of("mlp").numpy()[:6]
    view = NTKOperator(case.module, case.x[:2], case.x).to_scipy()
    V, W = noise(K.shape[1], 2).numpy(), noise(K.shape[0], 2).numpy()
    V.flags.writeable = False
    assert (view.shape, view.dtype) == (K.shape, np.float64)
    for found, expected in [
        (view @ V, K @ V),
        (view @ V[:, 0], K @ V[:, 0]),
        (view.rmatvec(W[:, 0]), K.T @ W[:, 0]),
        (view.rmatmat(W), K.T @ W),
    ]:
        assert isinstance(found, np.ndarray)
        assert relative_error(found, expected) < 1e-12


def test_float32_is_float32_to_scipy():
    case = CASES["mlp"]()
    view = NTKOperator(case.module, case.x, precision="float32").to_scipy()
    assert (view.dtype, (view @ np.ones(view.shape[1], np.float32)).dtype) == (np.float32, np.float32)


# networks that forward mode cannot do ---------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """A user's operation with a differentiable backward pass and without forward mode."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CubeOnce(Cube):
    """Its backward cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CubeWrong(Cube):
    """Its forward mode is wrong."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x**2 * tangent


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize(
    ("function", "push"), [(Cube, "double-backward"), (CubeOnce, "rows"), (CubeWrong, "double-backward")]
)
def test_an_operation_without_forward_mode_is_differentiated_in_reverse(function, push):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 4), Apply(function), nn.Linear(4, 2)), torch.randn(5, 3)
    found, K = NTKOperator(model, x, batch_size=2), reference_ntk(model, x)
    V = noise(len(K), 2)
    assert found.push == push
    assert relative_error(found @ V, K @ V) < 1e-12


class Tokens(nn.Module):
    """A table with an option that changes gradients, tied to the output, and used without a module that says so."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table, self.options = nn.Parameter(torch.randn(6, 3)), options

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table, **self.options).tanh().sum(1) @ self.table.T


@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.parametrize(
    ("options", "push"), [({"padding_idx": 0}, "double-backward"), ({"scale_grad_by_freq": True}, "rows")]
)
def test_what_only_later_samples_show_is_noticed(as_module, options, push):
    """The first sample has no padding and no token twice, so that forward mode is right for it alone."""
    x = torch.tensor([[1, 2, 3], [3, 0, 0], [4, 4, 5], [0, 1, 1]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Tokens(**options)
    if as_module:
        table = nn.Embedding(6, 3, **options, _weight=model.table.detach())
        model = nn.Sequential(table, nn.Tanh(), nn.Flatten(), nn.Linear(9, 6))
    found, K = NTKOperator(model, x, batch_size=3), reference_ntk(model, x)
    assert found.push == (push if as_module else "forward")
    V, reports = noise(len(K), 2), []
    assert relative_error(found.matmat(V, lambda *report: reports.append(report)), K @ V) < 1e-12
    assert found.push == push
    assert max(reports) == reports[-1]
    assert relative_error(found @ V, K @ V) < 1e-12


# no side effects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", "batch_norm_2d", "tied_weights", "transformer", "frozen_layer"])
def test_the_module_and_the_process_are_as_before(name):
    case = CASES[name]()
    module = case.module.train()
    before = copy.deepcopy(module.state_dict())
    flags = [param.requires_grad for param in module.parameters()]
    state, x = torch.random.get_rng_state(), case.x.clone()
    found = NTKOperator(module, case.x)
    V = noise(found.shape[1], 2)
    kept = V.clone()
    _ = found @ V
    assert all(child.training for child in module.modules())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert flags == [param.requires_grad for param in module.parameters()]
    assert all(param.grad is None for param in module.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(x, case.x)
    assert torch.equal(kept, V)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_later_training_does_not_change_the_operator():
    case, K = CASES["mlp"](), reference_of("mlp")
    found = NTKOperator(case.module, case.x)
    with torch.no_grad():
        case.module[0].weight.zero_()
    v = noise(len(K))
    assert relative_error(found @ v, K @ v) < 1e-12


# refusals -------------------------------------------------------------------------------------------------------------


def test_wrong_lengths_are_refused_with_both_numbers():
    case = CASES["mlp"]()
    found = NTKOperator(case.module, case.x[:2], case.x)
    for wrong in (noise(6), noise(6, 2), noise(15, 2, 2), noise()):
        with pytest.raises(ShapeError, match=r"expected \(15,\) or \(15, columns\), found") as error:
            _ = found @ wrong
        assert str(tuple(wrong.shape)) in str(error.value)
    with pytest.raises(ShapeError):
        found.matvec(noise(15, 1))
    with pytest.raises(ShapeError):
        found.matmat(noise(15))


def test_batches_that_cannot_be_meant_are_refused():
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    with pytest.raises(ShapeError, match="different shapes"):
        NTKOperator(model, x, torch.ones(4, 2))
    with pytest.raises(InputError, match="empty batch"):
        NTKOperator(model, x, x[:0])
    with pytest.raises(InputError, match="is a set"):
        NTKOperator(model, {1.0})
    with pytest.raises(InputError, match="at least 1"):
        NTKOperator(model, x, batch_size=0)
    with pytest.raises(UnknownNameError):
        NTKOperator(model, x, precision="float16")
    with pytest.raises(ModelError, match="no trainable"):
        NTKOperator(nn.Linear(3, 2).requires_grad_(False), x)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (0, 2)])
def test_a_transform_that_does_not_fit_is_refused(shape):
    with pytest.raises(ShapeError, match=r"expected \(outputs, 2\)"):
        NTKOperator(nn.Linear(3, 2), torch.ones(4, 3), transform=torch.ones(shape))


def test_it_says_what_it_is():
    assert repr(NTKOperator(nn.Linear(3, 2), torch.ones(4, 3))) == "<NTKOperator 8 × 8, torch.float64, forward>"


# samples that are not treated one by one ------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts. Each takes at most eight samples of a batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        chosen, out = self.gate(x).argmax(-1), x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)[:8]
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Neighbours(nn.Module):
    """Averages over the samples that are close by: two of sixty."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        near = (torch.cdist(x, x) < 0.5).to(x)
        return near / near.sum(1, keepdim=True) @ self.out(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(x) * (1 + 0.3 * (len(x) > 20))


class DetachedMean(nn.Module):
    """The outputs are a sample's own; their gradients are so for a batch of one alone."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = self.out(x)
        return h + h.mean(0) - h.mean(0).detach()


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, grad):
        return grad.clamp(-0.05, 0.05)


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(Clip.apply(self.body(x)))


class Keeping(nn.Module):
    """Returns for a batch that it has seen what it computed then."""

    def __init__(self):
        super().__init__()
        self.body, self.out, self.kept = nn.Linear(6, 5), nn.Linear(5, 3), {}

    def forward(self, x):
        key = (x.shape, x.dtype, float(x.sum()))
        if key not in self.kept:
            self.kept[key] = torch.tanh(self.body(x))
        return self.out(self.kept[key])


def seeded(factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(60, 6)
        x[7] = x[6] + 0.01
        return factory(), x


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Experts, "mixes the samples"),
        (Neighbours, "mixes the samples"),
        (Counting, "mixes the samples"),
        (Clipped, "backward pass is not linear"),
        (Keeping, "a result of an earlier call"),
    ],
)
@pytest.mark.numeric
def test_a_batch_whose_rows_are_not_those_of_its_samples_is_refused(factory, message, precision):
    model, x = seeded(factory)
    with pytest.raises(ModelError, match=message):
        NTKOperator(model, x, precision=precision) @ torch.ones(180)


@pytest.mark.numeric
def test_gradients_that_a_batch_changes_are_taken_one_by_one():
    model, x = seeded(DetachedMean)
    found, V = NTKOperator(model, x), noise(180, 2)
    assert relative_error(found @ V, reference_ntk(model, x) @ V) < 1e-12


@pytest.mark.parametrize("name", ["bfloat16", "tf32", "float64-accumulate"])
def test_an_operator_has_two_precisions(name):
    with pytest.raises(UnknownNameError, match="float32, float64"):
        NTKOperator(nn.Linear(2, 1), torch.ones(3, 2), precision=name)
