"""Complex and zero-dimensional parameters: exact, against autograd on real and imaginary parts of their own."""

import pytest
import torch
from cases import Call, files_of, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import ntkgen
from ntkgen.errors import InputError
from ntkgen.jacobian.layers import RULES, LayerRule
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.operator import PUSHES
from ntkgen.jacobian.precision import policy


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def complex_noise(*shape: int) -> Tensor:
    return torch.complex(noise(*shape, seed=2), noise(*shape, seed=3))


def split_kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Differentiate each output of each sample in a loop. Complex parameters are computed from real leaves."""
    leaves, values = [], {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
        if not tensor.requires_grad:
            values[name] = wide
        elif tensor.is_complex():
            leaves += [real := wide.real.clone().requires_grad_(), imaginary := wide.imag.clone().requires_grad_()]
            values[name] = torch.complex(real, imaginary)
        else:
            leaves.append(wide.clone().requires_grad_())
            values[name] = leaves[-1]
    rows = []
    for sample in x.double():
        for output in functional_call(model, values, (sample[None].clone(),))[0]:
            grads = torch.autograd.grad(output, leaves, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows) @ torch.stack(rows).T


class Spectral(nn.Module):
    """A layer of a Fourier neural operator: complex weights for the lowest frequencies, beside a real layer."""

    def __init__(self, channels: int = 3, modes: int = 3) -> None:
        super().__init__()
        self.lift, self.skip = nn.Conv1d(1, channels, 1), nn.Conv1d(channels, channels, 1)
        self.modes = nn.Parameter(complex_noise(channels, channels, modes) / 3)
        self.out = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x[:, None])
        spectrum = torch.fft.rfft(h)
        mixed = torch.zeros_like(spectrum)
        kept = self.modes.shape[2]
        mixed[..., :kept] = torch.einsum("ncf,cdf->ndf", spectrum[..., :kept], self.modes)
        return self.out(torch.tanh(torch.fft.irfft(mixed, n=h.shape[-1]) + self.skip(h)).mean(2))


class Rotary(nn.Module):
    """Positions are turned by a table of complex numbers, a buffer; all parameters are real."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 4))
        weights = (self.turned(self.q(x)) @ self.turned(self.k(x)).mT).softmax(-1)
        return self.out(weights @ x).sum(1)


class Recurrence(nn.Module):
    """A diagonal state space with complex poles, as in S4D and LRU: exp, powers and a conjugate transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.pole, self.b = nn.Parameter(complex_noise(4) / 4), nn.Parameter(complex_noise(4, 1))
        self.c, self.skip = nn.Parameter(complex_noise(4, 2)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        poles = torch.exp(-torch.exp(self.pole.real) + 1j * self.pole.imag)
        state = x.new_zeros(len(x), 4) + 0j
        for step in range(x.shape[1]):
            state = state * poles + x[:, step, None] * self.b.mH
        return (state @ self.c.conj()).real + self.skip * x[:, :2]


class Phases(nn.Module):
    """Unit phases of a circuit: |U x|² through a complex matrix that is tied to its conjugate transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(complex_noise(3, 3) / 2)
        self.phase = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = (x + 0j) @ self.u
        h = h * torch.exp(1j * self.phase)
        return (h + (x + 0j) @ self.u.mH).abs().square()


def with_complex_linear(end):
    return nn.Sequential(
        nn.Linear(3, 4),
        Call(lambda self, h: end(self.fc(h.tanh() + 0j)), fc=nn.Linear(4, 3, dtype=torch.complex64)),
        nn.Linear(3, 2),
    )


def complex_weight_norm():
    scale = Call(lambda self, x: (x + 0j) @ self.w.mT, w=nn.Parameter(complex_noise(3, 3)))
    return nn.Sequential(scale, Call(lambda self, z: torch.view_as_real(z).flatten(1)), nn.Linear(6, 2))


def frozen_complex():
    model = with_complex_linear(lambda z: z.real + z.imag)
    model[1].fc.weight.requires_grad_(False)
    return model


def conjugated():
    return Call(lambda self, x: ((x + 0j) @ self.w).real, w=nn.Parameter(complex_noise(2, 3).mH))


def scalars():
    return Call(
        lambda self, x: self.scale * self.fc(x) + self.shift,
        fc=nn.Linear(3, 2), scale=nn.Parameter(torch.tensor(1.5)), shift=nn.Parameter(torch.tensor(-0.3)),
    )  # fmt: skip


def complex_scalar():
    return Call(
        lambda self, x: (self.z * self.fc(x)).abs() + (self.z * self.z).imag,
        fc=nn.Linear(3, 2), z=nn.Parameter(torch.tensor(0.5 - 1.5j)),
    )  # fmt: skip


def only_a_scalar():
    return Call(lambda self, x: torch.cat([self.s.sin() * x, self.s * x], 1), s=nn.Parameter(torch.tensor(0.4)))


def scalar_in_a_residual():
    """ReZero: a scalar per block, at zero."""
    block = Call(
        lambda self, x: x + self.alpha * self.fc(x).relu(), fc=nn.Linear(3, 3), alpha=nn.Parameter(torch.tensor(0.0))
    )
    return nn.Sequential(block, nn.Linear(3, 2))


def frozen_scalar():
    model = scalars()
    model.shift.requires_grad_(False)
    return model


def prelu_of_one():
    """PReLU has one slope, of one dimension; beside it a temperature has none."""
    head = Call(lambda self, h: self.fc(h) / self.temperature.exp(), fc=nn.Linear(4, 2),
                temperature=nn.Parameter(torch.tensor(0.2)))  # fmt: skip
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(), head)


NETWORKS = {
    "absolute square": (lambda: with_complex_linear(lambda z: z.abs().square()), 3),
    "real part": (lambda: with_complex_linear(lambda z: z.real), 3),
    "spectral": (Spectral, 8),
    "rotary": (Rotary, 12),
    "recurrence": (Recurrence, 5),
    "phases": (Phases, 3),
    "complex layer first": (complex_weight_norm, 3),
    "frozen complex": (frozen_complex, 3),
    "conjugated": (conjugated, 3),
    "scalars": (scalars, 3),
    "complex scalar": (complex_scalar, 3),
    "only a scalar": (only_a_scalar, 3),
    "scalar in a residual": (scalar_in_a_residual, 3),
    "frozen scalar": (frozen_scalar, 3),
    "a slope and a temperature": (prelu_of_one, 3),
}


def network_of(name):
    build, width = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(), noise(4, width)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_to_the_kernel_is_the_loop_over_real_and_imaginary_parts(name):
    model, x = network_of(name)
    expected = split_kernel(model, x)
    m = len(expected) // len(x)
    assert float(expected.diagonal().min()) > 0
    assert relative_error(ntkgen.reference_ntk(model, x), expected) < 1e-12
    assert relative_error(ntkgen.reference_ntk(model, x, max_bytes=1), expected) < 1e-12
    assert relative_error(ntkgen.ntk(model, x, precision="float64"), expected) < 1e-10
    assert relative_error(ntkgen.ntk(model, x[:1], x[1:], precision="float64"), expected[:m, m:]) < 1e-10
    assert relative_error(ntkgen.ntk(model, x), expected) < 1e-5
    operator = ntkgen.NTKOperator(model, x, batch_size=3)
    assert operator.push == "forward"
    for push in PUSHES:
        operator.push = push
        assert relative_error(operator @ torch.eye(len(expected)), expected) < 1e-10
        assert operator.push == push


@pytest.mark.parametrize("name", ["absolute square", "spectral", "scalars"])
def test_a_store_of_it_is_exact_and_is_continued(name, tmp_path):
    model, x = network_of(name)
    settings = {"precision": "float64", "dtypes": ("float64",), "tile_side": 2}
    store = ntkgen.compute(model, x, store=tmp_path / "k.zarr", **settings)
    assert relative_error(store.array, split_kernel(model, x)) < 1e-10
    assert store.manifest.certificate.errors[0].relative_bound < 1e-10
    before = files_of(tmp_path / "k.zarr")
    ntkgen.compute(network_of(name)[0], x, store=tmp_path / "k.zarr", **settings)
    assert files_of(tmp_path / "k.zarr") == before


def test_a_complex_parameter_counts_as_two_real_ones():
    model, x = network_of("complex scalar")
    profile = prepare(model, x, policy("float64")).profile
    assert (profile.num_params, profile.dense_params, profile.fallback) == (10, 4, ("z",))
    model, x = network_of("frozen complex")
    network = prepare(model, x, policy("float64"))
    assert network.profile.num_params == 16 + 2 * 3 + 8
    assert network.fallback == ("1.fc.bias",)


def test_rules_of_real_parameters_hold_beside_a_complex_table():
    model, x = network_of("rotary")
    assert prepare(model, x, policy("float64")).fallback == ()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(noise(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


def test_a_layer_of_complex_values_has_no_rule(monkeypatch):
    """Its row would be Re(ḡ x), and the rule gives g x."""
    monkeypatch.setitem(RULES, Scale, LayerRule(vectors={"gamma": lambda module, x, grad: grad * x}))
    model = nn.Sequential(Call(lambda self, x: torch.complex(x, x.flip(1))), Scale(), Call(lambda self, z: z.abs()))
    x = noise(4, 3)
    assert prepare(model, x, policy("float64")).fallback == ("1.gamma",)
    assert relative_error(ntkgen.ntk(model, x, precision="float64"), split_kernel(model, x)) < 1e-10


class Skew(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.matrix_exp(w - w.mH)


def test_a_parametrized_complex_layer():
    """A unitary matrix, as the exponential of a skew-Hermitian one."""

    def build():
        layer = nn.Linear(3, 3, dtype=torch.complex64)
        parametrize.register_parametrization(layer, "weight", Skew())
        return Call(lambda self, x: self.fc(x + 0j).abs(), fc=layer)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    x = noise(4, 3)
    K = ntkgen.reference_ntk(model, x)
    assert relative_error(K, split_kernel(model, x)) < 1e-12
    assert relative_error(ntkgen.ntk(model, x, precision="float64"), K) < 1e-10
    assert relative_error(ntkgen.NTKOperator(model, x) @ torch.eye(len(K)), K) < 1e-10


# refusals -------------------------------------------------------------------------------------------------------------


def complex_outputs():
    return Call(lambda self, x: self.fc(x + 0j), fc=nn.Linear(3, 2, dtype=torch.complex64))


def complex_outputs_of_tokens():
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), complex_outputs())


@pytest.mark.parametrize("entry", [ntkgen.ntk, ntkgen.reference_ntk, ntkgen.NTKOperator])
@pytest.mark.parametrize(
    ("network", "x"), [(complex_outputs, noise(2, 3)), (complex_outputs_of_tokens, torch.tensor([[1], [2]]))]
)
def test_a_complex_output_is_two_real_ones(entry, network, x):
    model = network()
    as_real = nn.Sequential(model, Call(lambda self, z: torch.view_as_real(z).flatten(1)))
    kernels = [entry(each, x) for each in (model, as_real)]
    if entry is ntkgen.NTKOperator:
        kernels = [operator @ torch.eye(8, dtype=torch.float64) for operator in kernels]
    assert kernels[0].shape == (8, 8)
    torch.testing.assert_close(*kernels)


def test_complex_vectors_and_transforms_are_refused():
    model, x = network_of("absolute square")
    operator = ntkgen.NTKOperator(model, x)
    for v in (torch.ones(8, dtype=torch.complex64), torch.ones(8, 2, dtype=torch.complex128)):
        with pytest.raises(InputError, match="complex"):
            _ = operator @ v
    with pytest.raises(InputError, match="complex"):
        ntkgen.NTKOperator(model, x, transform=torch.ones(1, 2, dtype=torch.complex64))
