"""Every batch is checked, because a network may treat later samples differently from those of its trial."""

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import TOLERANCES, Call, in_turn, relative_error
from torch import Tensor, nn

import ntkgen
from ntkgen.errors import DivergedError, InputError, ModelError, RuleError
from ntkgen.jacobian import compute, dense, independence
from ntkgen.jacobian.operator import NTKOperator
from ntkgen.jacobian.probe import PROBE_BATCH
from ntkgen.jacobian.reference import reference_ntk

USUAL, NUM_SAMPLES = 16, 22  # the first ones, on which a network may be tried, are all alike


def numbers() -> Tensor:
    """Samples whose first number is positive, but for some of the last ones."""
    x = torch.randn(NUM_SAMPLES, 4)
    x[:, 0] = x[:, 0].abs() + 0.1
    x[USUAL + 1 :: 2, 0] *= -1
    return x


def tokens() -> Tensor:
    """Sequences of six tokens out of nine; 0 marks the end, and 1 an unknown one, which the last samples alone have."""
    ids = torch.randint(2, 9, (NUM_SAMPLES, 6))
    ids[:, 4:] = 0
    ids[USUAL + 1 :: 2, 1] = 1
    ids[-1, 4] = 3
    return ids


def routed(self: Call, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 3)
    for index, expert in ((x[:, 0] > 0, self.one), (x[:, 0] <= 0, self.other)):
        if index.any():
            out[index] = expert(x[index])
    return out


def sorted_by_content(self: Call, x: Tensor) -> Tensor:
    order = (x[:, 0] < 0).long().argsort(stable=True)
    return self.out(torch.tanh(self.body(x[order]))[order.argsort()])


def with_unknown_tokens(self: Call, ids: Tensor) -> Tensor:
    h = torch.where((ids == 1)[..., None], self.table.weight.mean(0), self.table(ids))
    return self.out(torch.tanh(h.mean(1)))


def with_a_second_use(self: Call, x: Tensor) -> Tensor:
    h = torch.tanh(self.body(x))
    return self.out(h) + torch.where(x[:, :1] < 0, h @ self.out.weight.T, 0)


def trimmed(self: Call, ids: Tensor) -> Tensor:
    length = int((ids > 0).sum(1).max())
    h = torch.tanh(self.table(ids[:, :length]))
    mask = (ids[:, :length] > 0).to(h)[..., None]
    return self.out((h * mask).sum(1) / mask.sum(1))


def with_early_exit(self: Call, x: Tensor) -> Tensor:
    h = torch.tanh(self.body(x))
    hard = x[:, 0] < 0
    deep = h.clone()
    deep[hard] = torch.tanh(self.deep(h[hard]))
    return self.out(deep)


def looked_up_once(self: Call, ids: Tensor) -> Tensor:
    unique, where = ids.unique(return_inverse=True)
    return self.out(torch.tanh(self.table(unique)[where].mean(1)))


def skipped_for_some(self: Call, x: Tensor) -> Tensor:
    h = torch.tanh(self.body(x))
    if bool((x[:, 0] > 0).all()):
        return self.out(h + self.more(h))
    return self.out(h + F.linear(h, self.more.weight, self.more.bias))


def halves_in_turn(self: Call, x: Tensor) -> Tensor:
    """A batch with unusual samples goes through a layer in two calls."""
    parts = x.split(1) if bool((x[:, 0] < 0).any()) else [x]
    return self.out(torch.tanh(torch.cat([self.body(part) for part in parts])))


def body_and_head() -> dict[str, nn.Module]:
    return {"body": nn.Linear(4, 4), "out": nn.Linear(4, 3)}


def table_and_head() -> dict[str, nn.Module]:
    return {"table": nn.Embedding(9, 4), "out": nn.Linear(4, 3)}


OTHERWISE_LATER: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "experts": (lambda: Call(routed, one=nn.Linear(4, 3), other=nn.Linear(4, 3)), numbers),
    "sorted and unsorted": (lambda: Call(sorted_by_content, **body_and_head()), numbers),
    "unknown tokens": (lambda: Call(with_unknown_tokens, **table_and_head()), tokens),
    "a weight used outside its layer": (
        lambda: Call(with_a_second_use, body=nn.Linear(4, 3), out=nn.Linear(3, 3)),
        numbers,
    ),
    "trimmed to the longest": (lambda: Call(trimmed, **table_and_head()), tokens),
    "early exit": (lambda: Call(with_early_exit, deep=nn.Linear(4, 4), **body_and_head()), numbers),
    "each token looked up once": (lambda: Call(looked_up_once, **table_and_head()), tokens),
    "a layer that is not called": (lambda: Call(skipped_for_some, more=nn.Linear(4, 4), **body_and_head()), numbers),
    "one sample at a time": (lambda: Call(halves_in_turn, **body_and_head()), numbers),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    network, samples = OTHERWISE_LATER[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return network(), samples()


@in_turn("name output", OTHERWISE_LATER, ["full", "trace"])
def test_a_network_that_treats_later_samples_otherwise_has_the_exact_kernel(name, output, monkeypatch):
    monkeypatch.setattr(dense, "batch_size_for", lambda _: 4)
    model, x = made(name)
    expected = reference_ntk(model, x)
    if output == "trace":
        expected = expected.view(len(x), 3, len(x), 3).diagonal(dim1=1, dim2=3).sum(2)
    found = ntkgen.ntk(model, x, output=output, precision="float64")
    assert relative_error(found, expected) < TOLERANCES["float64"]
    assert relative_error(ntkgen.ntk(model, x, output=output), expected) < TOLERANCES["float32"]


@pytest.mark.parametrize(
    "name", ["experts", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERWISE_LATER if n != "experts")]
)
def test_its_store_is_begun_anew_and_resumed(name, tmp_path):
    model, x = made(name)
    settings = {"precision": "float64", "dtypes": ("float64",), "tile_side": 15}
    store = ntkgen.compute(model, x, store=tmp_path / "k.zarr", **settings)
    assert relative_error(store.array[:, :], reference_ntk(model, x)) < TOLERANCES["float64"]
    kernel = next((tmp_path / "k.zarr" / "ntk_float64" / "c").glob("*/*"))
    before = kernel.read_bytes()
    kernel.unlink()
    again = ntkgen.compute(model, x, store=tmp_path / "k.zarr", **settings)
    assert again.is_complete
    assert kernel.read_bytes() == before


@pytest.mark.slow
def test_two_workers_begin_anew_too(tmp_path):
    model, x = made("a weight used outside its layer")
    settings = {"precision": "float64", "dtypes": ("float64",), "tile_side": 15}
    alone, shared = (
        ntkgen.compute(model, x, store=tmp_path / f"{workers}.zarr", workers=workers, **settings)
        for workers in (None, 2)
    )
    assert shared.manifest.plan.profile.fallback == alone.manifest.plan.profile.fallback != ()
    assert relative_error(shared.array[:, :], reference_ntk(model, x)) < TOLERANCES["float64"]


def with_positions(self: Call, x: Tensor) -> Tensor:
    return self.out(torch.tanh(x[..., None] + self.table(torch.arange(x.shape[1])[None])).mean(1))


def with_a_query(self: Call, x: Tensor) -> Tensor:
    scores = self.key(x[..., None] * x.new_ones(4)) @ self.query(x.new_ones(1, 1, 4)).mT
    return self.out((x[..., None] * scores.softmax(1)).sum(1) * x.new_ones(4))


@pytest.mark.parametrize("counts", [(1, 5), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["positions", "query"])
def test_an_input_without_samples_is_not_taken_for_a_batch_of_one(name, counts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (
            Call(with_positions, table=nn.Embedding(6, 4), out=nn.Linear(4, 2))
            if name == "positions"
            else Call(with_a_query, key=nn.Linear(4, 4), query=nn.Linear(4, 4), out=nn.Linear(4, 2))
        ).double()
        x1, x2 = (torch.randn(count, 6, dtype=torch.float64) for count in counts)
    found = ntkgen.ntk(model, x1, x2, precision="float64")
    assert relative_error(found, reference_ntk(model, x1, x2)) < TOLERANCES["float64"]


def test_a_store_with_tiles_is_not_begun_anew_and_the_advice_helps(tmp_path, monkeypatch):
    """Which of its tiles a wrong rule has spoilt is not known: they were made by a version that did not check."""
    model, x = made("a weight used outside its layer")
    folder, settings = tmp_path / "k.zarr", {"dtypes": ("float32",), "tile_side": 15, "certify": False}
    with monkeypatch.context() as unchecked:
        unchecked.setattr(compute, "has_true_factors", lambda *_: True)
        ntkgen.compute(model, x, store=folder, **settings)
    shutil.rmtree(folder / "diagonal" / "c")
    before = {path: path.read_bytes() for path in (folder / "ntk_float32" / "c").glob("*/*")}
    with pytest.raises(RuleError, match="remove it and run the same command again"):
        ntkgen.compute(model, x, store=folder, **settings)
    assert {path: path.read_bytes() for path in before} == before  # nothing of the user's is removed
    shutil.rmtree(folder)
    store = ntkgen.compute(model, x, store=folder, **settings)
    assert relative_error(store.array[:, :], reference_ntk(model, x)) < TOLERANCES["float32"]


# samples that mix in later batches ------------------------------------------------------------------------------------


def with_capacity(self: Call, x: Tensor) -> Tensor:
    """An expert takes two unusual samples of a batch at most."""
    unusual = (x[:, :1] < 0).to(x)
    return self.out(x) + (unusual.cumsum(0) <= 2) * unusual * self.expert(x)


def scaled_by_the_batch(self: Call, x: Tensor) -> Tensor:
    return self.out(x / x[:, 0].min().clamp(max=0.1).abs())


def padded_mean(self: Call, ids: Tensor) -> Tensor:
    """The mean over positions counts those that the longest sequence of the batch has."""
    length = int((ids > 0).sum(1).max())
    return self.out(torch.tanh(self.table(ids[:, :length])).mean(1))


MIXING_LATER: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "capacity": (lambda: Call(with_capacity, out=nn.Linear(4, 3), expert=nn.Linear(4, 3)), numbers),
    "scaled by the batch": (lambda: Call(scaled_by_the_batch, out=nn.Linear(4, 3)), numbers),
    "padded mean": (lambda: Call(padded_mean, **table_and_head()), tokens),
}


@pytest.mark.parametrize("name", MIXING_LATER)
def test_samples_that_mix_in_a_later_batch_are_refused(name, tmp_path):
    network, samples = MIXING_LATER[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = network(), samples()
        x = x[[*range(USUAL), *range(USUAL + 1, NUM_SAMPLES, 2), *range(USUAL, NUM_SAMPLES, 2)]]
    with pytest.raises(ModelError, match="mixes the samples of a batch"):
        ntkgen.ntk(model, x)
    with pytest.raises(ModelError, match="mixes the samples of a batch"):
        ntkgen.compute(model, x, store=tmp_path / "k.zarr")


def fewer_outputs(self: Call, x: Tensor) -> Tensor:
    return self.out(x) if len(x) <= PROBE_BATCH else self.out(x)[:, :1]  # which would be copied to all outputs


def rounded(self: Call, x: Tensor) -> Tensor:
    return self.out(x) if len(x) <= PROBE_BATCH else self.out(x).half()


@pytest.mark.parametrize("forward", [fewer_outputs, rounded])
def test_outputs_that_change_in_a_later_batch_are_refused(forward, tmp_path):
    model, x = Call(forward, out=nn.Linear(4, 3)), numbers()
    with pytest.raises(ModelError, match="change from batch to batch"):
        ntkgen.ntk(model, x)
    with pytest.raises(ModelError, match="change from batch to batch"):
        ntkgen.compute(model, x, store=tmp_path / "k.zarr")


def test_a_sample_that_is_not_a_number_is_found_in_a_later_batch():
    model, x = made("experts")
    x[-1, 1] = torch.nan
    with pytest.raises(DivergedError, match="not finite"):
        ntkgen.ntk(model, x)


# a wrong rule that two samples do not show ----------------------------------------------------------------------------


class ScaleOfPositives(nn.Module):
    """y = γ x where the first number is positive, and γ² x elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor([1.5, 0.5, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 0, self.gamma * x, self.gamma.square() * x)


def test_a_registered_rule_is_dropped_where_a_batch_disproves_it(monkeypatch):
    rule = ntkgen.jacobian.layers.LayerRule(vectors={"gamma": lambda module, x, grad: grad * x})
    monkeypatch.setitem(ntkgen.jacobian.layers.RULES, ScaleOfPositives, rule)
    model = nn.Sequential(ScaleOfPositives(), nn.Linear(4, 3))
    x = numbers()
    assert relative_error(ntkgen.ntk(model, x), reference_ntk(model, x)) < TOLERANCES["float32"]


# zero kernels ---------------------------------------------------------------------------------------------------------


class Adapted(nn.Linear):
    """A frozen linear layer with a low-rank adapter, which evaluation mode merges into the weight."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        update = self.b @ self.a
        return F.linear(x, self.weight + (update if self.training else update.detach()), self.bias)


def without_grad(self: Call, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.fc(x)


def detached(self: Call, x: Tensor) -> Tensor:
    return self.second(self.first(x).detach())


ZERO = {
    "no_grad": (lambda: Call(without_grad, fc=nn.Linear(4, 2)), r"not even its first layer.*torch\.no_grad"),
    "detached": (
        lambda: Call(detached, first=nn.Linear(4, 4), second=nn.Linear(4, 2).requires_grad_(False)),
        "output of 'first' has one, but the output of 'second', called next, has none",
    ),
    "through NumPy": (
        lambda: Call(lambda self, x: torch.from_numpy(self.fc(x).detach().numpy()), fc=nn.Linear(4, 2)),
        "output of 'fc' has one, but the outputs of the network have none",
    ),
    "merged adapters": (Adapted, "In training mode they depend on a, b.*merge adapters"),
    "unused": (
        lambda: Call(lambda self, x: self.used(x), used=nn.Linear(4, 2).requires_grad_(False), unused=nn.Linear(4, 2)),
        "depend on none of its trainable parameters",
    ),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_kernel_of_zeros_is_refused_and_the_message_says_where_the_gradient_ends(name):
    model, message = ZERO[name]
    with pytest.raises(ModelError, match=message) as raised:
        ntkgen.ntk(model(), numbers())
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, InputError)


def test_parameters_that_serve_training_alone_get_a_warning():
    model = nn.Sequential(Adapted(), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="depend on 0.a, 0.b in training mode, and not in evaluation mode"):
        kernel = ntkgen.ntk(model, numbers())
    assert kernel.norm() > 0


def test_the_operator_refuses_them_too():
    with pytest.raises(ModelError, match="depend on none"):
        NTKOperator(Adapted(), numbers())


# batches that a network treats otherwise than single samples --------------------------------------------------------


class BatchSize(nn.Module):
    """A network that does something else in batches of a certain size, or if an unusual sample is among them."""

    def __init__(self, kind: str, threshold: int) -> None:
        super().__init__()
        self.layer, self.kind, self.threshold = nn.Linear(3, 2), kind, threshold

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        if self.kind == "outputs":
            return outputs * (1 if len(x) < self.threshold else 2)
        if (len(x) if self.kind == "gradients" else float(x[:, 0].max())) < self.threshold:
            return outputs
        return outputs + (outputs.sum(0) - outputs.sum(0).detach())  # the same numbers


@pytest.mark.parametrize(("kind", "message"), [("outputs", "mixes"), ("gradients", "in its gradients"), ("late", "in")])
@pytest.mark.parametrize("samples", [4, 8, 40])
@pytest.mark.parametrize("kernel", [ntkgen.ntk, ntkgen.KernelFunction])
def test_a_network_that_treats_batches_otherwise_than_single_samples_is_refused(kind, message, samples, kernel):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))
    x[-1, 0] = 20
    with pytest.raises(ModelError, match=message):
        kernel(BatchSize(kind, 4), x)


def test_the_gradient_of_one_sample_may_differ_by_a_unit(monkeypatch):
    """A unit at zero has another sign alone. The batch is then looked at closely, and is right."""
    monkeypatch.setattr(independence, "SUSPICIOUS", -1.0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)
    assert relative_error(ntkgen.ntk(model, x), reference_ntk(model, x)) < 1e-5


def test_a_kernel_that_is_not_finite_names_the_sample():
    def root(module: nn.Module, x: Tensor) -> Tensor:
        return (x[:, :1] * module(x)).abs().sqrt()  # its gradient at zero is not finite

    model, x = nn.Linear(3, 1), 1 + torch.rand(40, 3)
    assert ntkgen.ntk(model, x, function=root).isfinite().all()
    x[37, 0] = 0
    for kernel in (ntkgen.ntk, lambda *args, **named: ntkgen.KernelFunction(*args, **named)(model)):
        with pytest.raises(DivergedError, match="sample 37, counted from 0"):
            kernel(model, x, function=root)


def test_an_error_of_a_late_sample_is_explained(tmp_path):
    model, x = nn.Sequential(nn.Embedding(3, 2), nn.Flatten()), torch.randint(3, (40, 2))
    x[37, 0] = 3
    for kernel in (ntkgen.ntk, ntkgen.KernelFunction, partial(ntkgen.compute, store=tmp_path / "k.zarr")):
        with pytest.raises(ModelError, match="IndexError: index out of range"):
            kernel(model, x)
