"""Our copy of a network: whatever a module carries, of the right values, and nothing of the user's is touched."""

import copy
import functools
import sys
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from cases import Call, in_turn, relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ntkgen
from ntkgen.errors import ModelError
from ntkgen.jacobian.evaluation import evaluation_copy


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def plain_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Differentiate the user's own module, output by output, in float64; it may be changed."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.double()
    params = [param for param in model.parameters() if param.requires_grad]
    rows = []
    for sample in x.double():
        for output in range(model(sample[None].clone()).shape[1]):
            grads = torch.autograd.grad(model(sample[None].clone())[0, output], params, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows) @ torch.stack(rows).T


def assert_exact(build, x=None):
    """Compare the engine, the reference and the operator with plain autograd on a newly built module."""
    x = noise(4, 3) if x is None else x
    model = seeded(build)
    model.eval()
    expected = plain_kernel(model, x)
    K = ntkgen.reference_ntk(seeded(build), x)
    assert relative_error(K, expected) < 1e-12
    assert relative_error(ntkgen.ntk(seeded(build), x, precision="float64"), expected) < 1e-12
    found = ntkgen.NTKOperator(seeded(build), x)
    assert relative_error(found @ torch.eye(len(K)), expected) < 1e-12


def hidden(model, *shape):
    """Run a network once, so that it keeps what it computed."""
    model(noise(*(shape or (2, 3))))
    return model


# what copy.deepcopy refuses -------------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Keeps its last activations in an attribute and in nested containers, without using them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.kept: dict[str, list[Tensor]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.fc(x).tanh()
        self.kept["all"].append(self.last)
        return self.out(self.last)


def pruned():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.4)
    return model


def pruned_convolution():
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    prune.ln_structured(model[1], "weight", amount=0.5, n=2, dim=0)
    return model


def old_weight_norm():
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))


def old_spectral_norm():
    layer = torch.nn.utils.spectral_norm(nn.Linear(3, 5))
    return hidden(nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 2)))


@pytest.mark.parametrize(
    "build", [lambda: hidden(Keeps()), pruned, pruned_convolution, old_weight_norm, old_spectral_norm]
)
def test_what_was_computed_is_detached(build):
    assert_exact(build)


def a_file():
    return open(__file__)


def counts():
    yield from range(3)


@pytest.mark.parametrize(
    "make",
    [threading.Lock, a_file, lambda: types, counts, lambda: {"nested": [(threading.RLock(),)]}],
    ids=["lock", "file", "module", "generator", "nested"],
)
def test_what_cannot_be_copied_is_shared(make):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    K = ntkgen.reference_ntk(model, noise(4, 3))
    model.part = model[0].part = part = make()
    ours = evaluation_copy(model, torch.float64)
    assert model.part is model[0].part is part
    assert ours.part is ours[0].part
    assert isinstance(part, dict) or ours.part is part
    assert ours[0].weight.data_ptr() != model[0].weight.data_ptr()
    assert relative_error(ntkgen.reference_ntk(model, noise(4, 3)), K) == 0
    if hasattr(part, "close"):
        part.close()


def test_a_process_group_is_shared():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without it")
    store = torch.distributed.HashStore()
    model = nn.Linear(3, 2)
    model.group = torch.distributed.ProcessGroupGloo(store, 0, 1)
    model.lock = threading.Lock()
    assert evaluation_copy(model, torch.float64).group is model.group


class Uncopied(nn.Module):
    def __deepcopy__(self, memo: dict[int, object]) -> "Uncopied":
        raise NotImplementedError("only once")


def test_a_module_that_refuses_to_be_copied_is_refused():
    with pytest.raises(ModelError, match=r"Sequential cannot be copied \(NotImplementedError: only once\)"):
        ntkgen.ntk(nn.Sequential(nn.Linear(3, 2), Uncopied()), noise(2, 3))


class Part:
    """A user's object that cannot be copied. Each attempt to copy it creates another such object."""

    def __reduce__(self):
        return (dict, ({"lock": threading.Lock()},))


def test_parts_without_end_are_refused():
    model = nn.Linear(3, 2)
    model.part = Part()
    with pytest.raises(ModelError, match="cannot be copied"):
        evaluation_copy(model, torch.float64)


def test_the_users_module_stays_as_it_was():
    model = hidden(Keeps())
    model.lock, model.fc.weight.grad = threading.Lock(), torch.ones(5, 3)
    before = dict(vars(model)), copy.deepcopy(model.state_dict()), model.last, list(model.kept["all"])
    model.fc.register_forward_hook(lambda module, args, output: output * 2)
    hooks = dict(model.fc._forward_hooks)
    ntkgen.ntk(model, noise(4, 3))
    assert vars(model) == before[0]
    assert all(torch.equal(before[1][name], value) for name, value in model.state_dict().items())
    assert model.last is before[2]
    assert model.last.grad_fn is not None
    assert [id(kept) for kept in model.kept["all"]] == [id(kept) for kept in before[3]]
    assert model.fc._forward_hooks == hooks
    assert torch.equal(model.fc.weight.grad, torch.ones(5, 3))
    assert all(child.training for child in model.modules())


# what copy.deepcopy keeps as it is, and refers to the original --------------------------------------------------------


class Slope(nn.Module):
    """Its activation is a function that holds the module itself, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.slope = nn.Parameter(torch.tensor([0.3, 0.2, -0.4, 0.7, 1.1]))
        slopes = [self.slope]

        def inner(x: Tensor) -> Tensor:
            return torch.where(x > 0, x, x * self.slope)

        myself = weakref.ref(self)
        self.myself = myself
        self.act = {
            "closure": lambda x: torch.where(x > 0, x, x * self.slope),
            "default": lambda x, module=self: torch.where(x > 0, x, x * module.slope),
            "keyword": _keyword_only(self),
            "nested": lambda x: 2 * inner(x) - inner(x),
            "partial": functools.partial(lambda scale, x: scale * inner(x), 2.0),
            "list": lambda x: torch.where(x > 0, x, x * slopes[0]),
            "weakref": lambda x: inner(x) if self.myself() is self else x.new_zeros(x.shape),
            "weakly held": lambda x: torch.where(x > 0, x, x * myself().slope),
            "method": self.activation,
        }[way]

    def activation(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * self.slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(x)))


def _keyword_only(module):
    def act(x: Tensor, *, of: nn.Module = module) -> Tensor:
        return torch.where(x > 0, x, x * of.slope)

    return act


WAYS = ["closure", "default", "keyword", "nested", "partial", "list", "weakref", "weakly held", "method"]


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_holds_the_module_holds_the_copy(way):
    model = seeded(lambda: Slope(way))
    before, scale = dict(vars(model)), 2 if way == "partial" else 1
    ours = evaluation_copy(model, torch.float64)
    assert vars(model) == before
    h = ours.fc(noise(4, 3).double())
    expected = ours.out(torch.where(h > 0, h, h * ours.slope) * scale)
    with torch.no_grad():
        model.slope.zero_()
    assert torch.equal(ours(noise(4, 3).double()), expected)
    assert_exact(lambda: Slope(way))


def test_a_forward_that_was_replaced_is_that_of_the_copy():
    def build():
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        model.forward = lambda x: model[1](model[0](x).sin())
        return model

    assert_exact(build)


def test_a_hook_that_holds_another_layer_holds_its_copy():
    def build():
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        model[1].register_forward_hook(lambda module, args, output: output * model[2].weight[0])
        return model

    assert_exact(build)


def test_two_functions_that_share_a_variable_share_it_in_the_copy():
    def build():
        model = Call(lambda self, x: self.after(self.before(self.fc(x))), fc=nn.Linear(3, 2))
        kept = []
        total = 0

        def before(x):
            nonlocal total
            total += 1
            kept.append(x.sin())
            return x

        def after(x):
            return x * kept.pop() * total / total

        model.before, model.after, model.recursive = before, after, lambda n: model.recursive(n - 1) if n else 0
        return model

    assert_exact(build)


class Held:
    """A user's object with a function that refers to the module."""

    def __init__(self, module: nn.Module) -> None:
        self.act = lambda x: x * module.slope


IN_FLOAT64 = [functools.partial(ntkgen.ntk, precision="float64"), ntkgen.reference_ntk, ntkgen.NTKOperator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entry", IN_FLOAT64)
def test_a_copy_that_goes_on_to_use_the_original_is_refused(dtype, entry, monkeypatch):
    model = Slope("method").to(dtype)
    monkeypatch.setitem(globals(), "everywhere", model)
    model.act = lambda x: x * everywhere.slope.to(x)  # noqa: F821
    other = Slope("method").to(dtype)
    other.held = Held(other)
    other.forward = types.MethodType(lambda self, x: self.out(self.held.act(self.fc(x))), other)
    for network in (model, other):
        with pytest.raises(ModelError, match="uses slope of the original"):
            entry(network, noise(2, 3))


# evaluation mode ------------------------------------------------------------------------------------------------------


class SilentTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def train(self, mode: bool = True) -> None:
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x))


def test_train_may_return_nothing():
    assert_exact(SilentTrain)
    assert_exact(lambda: nn.Sequential(SilentTrain(), nn.Linear(2, 2)))


class Fits(nn.Linear):
    def train(self, x: Tensor, y: Tensor) -> None:
        raise AssertionError


def test_a_train_method_of_another_kind_is_refused():
    with pytest.raises(ModelError, match=r"eval\(\) raised TypeError.*Rename"):
        ntkgen.ntk(Fits(3, 2), noise(2, 3))


def compiled_inside():
    return nn.Sequential(torch.compile(nn.Linear(3, 4), backend="eager"), nn.Tanh(), nn.Linear(4, 2))


def compiled_twice():
    return torch.compile(compiled_inside(), backend="eager")


def averaged():
    return torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def in_parallel():
    return nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def traced_by_fx():
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


@pytest.mark.parametrize("build", [compiled_inside, compiled_twice, averaged, in_parallel, traced_by_fx])
def test_a_module_in_a_wrapper_is_what_it_wraps(build):
    plain = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model, x = seeded(build), noise(4, 3)
    K, wrapped = ntkgen.reference_ntk(plain, x), list(model.modules())
    assert torch.equal(ntkgen.reference_ntk(model, x), K)
    assert relative_error(ntkgen.ntk(model, x, precision="float64"), K) < 1e-12
    assert relative_error(ntkgen.NTKOperator(model, x) @ torch.eye(8), K) < 1e-12
    assert list(model.modules()) == wrapped


# parameters that are tied or made -------------------------------------------------------------------------------------


def test_tied_parameters_stay_tied():
    def build():
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        model.also = model[0].bias
        model.lock = threading.Lock()
        return model

    ours = evaluation_copy(build(), torch.float64)
    assert ours[2].weight is ours[0].weight
    assert ours.also is ours[0].bias
    assert_exact(build)


@pytest.mark.parametrize(
    "parametrized", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrizations_work_beside_what_cannot_be_copied(parametrized):
    def build():
        model = nn.Sequential(parametrized(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))
        model.lock = threading.Lock()
        return model.double().eval()

    assert_exact(build)


@pytest.mark.parametrize(("dtype", "complex_dtype"), [(torch.float64, torch.complex128), (torch.float32, torch.cfloat)])
def test_real_and_complex_numbers_get_the_precision_and_integers_stay(dtype, complex_dtype):
    model = nn.Linear(2, 2)
    model.register_buffer("shift", torch.ones(2, dtype=torch.bfloat16))
    model.register_buffer("table", torch.tensor([1 + 2j], dtype=torch.complex64), persistent=False)
    model.register_buffer("steps", torch.tensor([3]))
    model.register_buffer("mask", torch.tensor([True]))
    model.weight = nn.Parameter(torch.complex(noise(2, 2), noise(2, 2)).conj())
    ours = evaluation_copy(model, dtype)
    assert (ours.weight.dtype, ours.table.dtype) == (complex_dtype, complex_dtype)
    assert (ours.bias.dtype, ours.shift.dtype, ours.steps.dtype, ours.mask.dtype) == (
        dtype,
        dtype,
        torch.int64,
        torch.bool,
    )
    assert torch.equal(ours.weight.detach().to(torch.complex64), model.weight.detach())
    assert ours.table.imag.item() == 2
    assert torch.view_as_real(ours.weight.detach()).is_contiguous()


def test_it_shares_nothing_with_the_original():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ours = evaluation_copy(model, torch.float32)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in ours.state_dict().values())
    assert not any(module.training for module in ours.modules())
    assert all(module.training for module in model.modules())


# refusals -------------------------------------------------------------------------------------------------------------


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2)
        self.register_buffer("scale", nn.parameter.UninitializedBuffer())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


def scripted():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(nn.Linear(3, 2))


def traced_inside():
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(torch.jit.trace(nn.Linear(3, 4), noise(2, 3)), nn.Linear(4, 2))


def quantised():
    with warnings.catch_warnings(action="ignore"):
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def quantised_buffer():
    model = nn.Linear(3, 2)
    with warnings.catch_warnings(action="ignore"):
        model.register_buffer("table", torch.quantize_per_tensor(noise(3), 0.1, 0, torch.qint8))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2)), "0.weight .* not initialised"),
        (Lazy, "scale of Lazy is not initialised"),
        (lambda: nn.Linear(3, 2, device="meta"), "device meta"),
        (scripted, "TorchScript"),
        (traced_inside, "0 of Sequential is a TorchScript module"),
        (quantised, "0 of Sequential is a quantised module"),
        (quantised_buffer, "table of Linear is quantised"),
    ],
)
@pytest.mark.parametrize("entry", [ntkgen.ntk, ntkgen.reference_ntk, ntkgen.NTKOperator])
def test_what_has_no_differentiable_numbers_is_refused(build, message, entry):
    with pytest.raises(ModelError, match=message) as refused:
        entry(build(), noise(2, 3))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("build", [scripted, traced_inside, quantised, quantised_buffer, nn.Flatten])
def test_the_class_of_the_user_is_named_on_every_way(build, run, tmp_path, monkeypatch):
    """A selection of parameters, and the command line, put an adapter around a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = types.ModuleType("users_nets")
    module.build = build
    monkeypatch.setitem(sys.modules, "users_nets", module)
    np.savez("x.npz", input=np.ones((4, 3)))
    code, _, err = run("compute", "--models", "users_nets:build", "--dataset", "x.npz", "--epochs", 0, "-q")
    assert code == 2
    assert type(build()).__name__ in err
    assert "Adapter" not in err


def test_what_is_no_module_is_refused():
    for entry in (ntkgen.ntk, ntkgen.reference_ntk, ntkgen.NTKOperator):
        with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module, found function"):
            entry(lambda x: x, noise(2, 3))


class InFloat64Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        if self.out.weight.dtype != torch.float64:
            raise TypeError("wrong dtype")
        return self.out(x)


def test_a_network_that_runs_in_float64_alone_says_so(tmp_path):
    model = InFloat64Alone()
    for call in (ntkgen.ntk, lambda *args: ntkgen.compute(*args, store=tmp_path / "k.zarr")):
        with pytest.raises(ModelError, match=r"run only in float64.*Choose the precision float64"):
            call(model, noise(4, 3))
    assert not (tmp_path / "k.zarr").exists()
    assert ntkgen.ntk(model, noise(4, 3), precision="float64").shape == (8, 8)


def test_a_tensor_that_is_no_buffer_stays_in_float32():
    model = nn.Linear(3, 2)
    model.factor = torch.ones(3, 3)
    model.forward = lambda x: nn.functional.linear(x @ model.factor, model.weight)
    with pytest.raises(ModelError, match=r"run only in float32.*register_buffer"):
        ntkgen.NTKOperator(model, noise(4, 3))


# the caller's memory --------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Normalises what it is given where it lies, as many image networks do, before anything else."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way, self.scale = way, nn.Parameter(torch.tensor([0.5, 2.0, -1.0]))
        self.fc = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "plain":
            x -= 0.5
            x /= 0.25
        elif self.way == "relu":
            nn.functional.relu_(x)
        elif self.way == "parameter":
            x.mul_(self.scale)
        elif self.way == "slice":
            x[:, 0] = x[:, 1] * x[:, 2]
        return self.fc(x)


@in_turn("way dtype", ["plain", "relu", "parameter", "slice"], [torch.float64, torch.float32])
def test_a_network_that_works_in_place_overwrites_nothing(way, dtype, tmp_path):
    x, model = noise(5, 3).to(dtype), model_of(way)
    before = x.clone()
    assert_exact(lambda: InPlace(way), x)
    store = ntkgen.compute(model, x, store=tmp_path / "k.zarr", precision="float64", dtypes=("float64",), tile_side=4)
    assert relative_error(store.array, plain_kernel(model_of(way), x)) < 1e-12
    for push in ("forward", "double-backward", "rows"):
        found = ntkgen.NTKOperator(model, x, x[:2], batch_size=2)
        found.push = push
        assert relative_error(found @ torch.eye(4), plain_kernel(model_of(way), x)[:, :4]) < 1e-12
    assert torch.equal(x, before)


def model_of(way):
    return seeded(lambda: InPlace(way))


def test_token_ids_are_not_overwritten_either():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids: Tensor) -> Tensor:
            ids[ids == 4] = 0  # unknown tokens
            ids.add_(1)
            return self.out(self.table(ids).tanh().sum(1))

    ids, model = torch.tensor([[0, 4], [1, 2], [4, 3]]), seeded(Tokens)
    mapped = seeded(Tokens)
    mapped.forward = lambda x: mapped.out(mapped.table(x).tanh().sum(1))
    K = ntkgen.reference_ntk(mapped, torch.tensor([[1, 1], [2, 3], [1, 4]]))
    assert relative_error(ntkgen.reference_ntk(model, ids), K) < 1e-13
    assert relative_error(ntkgen.ntk(model, ids, precision="float64"), K) < 1e-12
    assert relative_error(ntkgen.NTKOperator(model, ids) @ torch.eye(6), K) < 1e-12
    assert torch.equal(ids, torch.tensor([[0, 4], [1, 2], [4, 3]]))


def test_a_batch_that_is_one_sample_many_times_is_taken():
    assert relative_error(ntkgen.reference_ntk(model_of("plain"), noise(1, 3).expand(3, 3)),
                          plain_kernel(model_of("plain"), noise(1, 3).repeat(3, 1))) < 1e-12  # fmt: skip
