"""Policies, and the switches of the process: exact inside, as they were outside."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from cases import CASES, CPU, FLOAT32_JACOBIAN, relative_error
from torch import nn

import ntkgen
from ntkgen.errors import InputError, ModelError, UnknownNameError
from ntkgen.jacobian.cost import ORDERS
from ntkgen.jacobian.precision import POLICIES, check_device, exact_arithmetic, policy, reduced_products, widen
from ntkgen.jacobian.reference import evaluation_copy, jacobian_rows, trainable


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_found_by_its_name(name):
    found = policy(name)
    assert found.name == name
    assert found.accumulate_dtype.itemsize >= found.compute_dtype.itemsize >= found.factor_dtype.itemsize


# What a name promises: the dtypes of the network, of what is kept, of products and sums.
DTYPES = {
    "float64": (torch.float64, torch.float64, torch.float64),
    "float64-accumulate": (torch.float32, torch.float32, torch.float64),
    "float32": (torch.float32, torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.float32, torch.bfloat16, torch.float32),
}


def test_policies_are_what_their_names_say():
    found = {name: (p.compute_dtype, p.factor_dtype, p.accumulate_dtype) for name, p in POLICIES.items()}
    assert found == DTYPES
    assert {name for name, p in POLICIES.items() if p.rounding != "ieee"} == {"tf32", "bfloat16"}


def test_an_unknown_precision_names_the_close_ones():
    with pytest.raises(UnknownNameError, match=r"^Unknown precision 'float46'\. Did you mean float64.*Known: [^\n]*$"):
        policy("float46")


def switches():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "flushed": bool(torch.tensor([1e-38]).mul(0.1) == 0),
    }


EXACT = {
    "grad": True,
    "inference": False,
    "autocast": False,
    "threads": 3,
    "cudnn": (True, False, True),
    "flushed": True,  # a number below the smallest normal one takes a CPU a hundred times longer
}


def reduced_precision():
    """The switches of float32 products by their older names, which torch refuses to read inside."""
    tf32 = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return torch.get_float32_matmul_precision(), tf32


@pytest.fixture
def medium():
    """Allow TF32 and bfloat16 inside float32 products, for one test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


MODES = {
    "as it is": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_exact_inside_and_as_it_was_outside(mode, medium):
    with MODES[mode]():
        before = (switches(), reduced_precision())
        with exact_arithmetic(CPU, threads=3):
            assert switches() == EXACT
        assert (switches(), reduced_precision()) == before
    assert before[1] == ("medium", (True, True))


def test_everything_is_as_it_was_after_an_error(medium):
    before = (switches(), reduced_precision())
    with pytest.raises(ZeroDivisionError), torch.no_grad(), exact_arithmetic(CPU, threads=3):
        _ = 1 / 0
    assert (switches(), reduced_precision()) == before


@pytest.mark.parametrize("flushed", [True, False])
def test_denormal_numbers_are_treated_as_before(flushed):
    torch.set_flush_denormal(flushed)
    try:
        with exact_arithmetic(CPU):
            assert switches()["flushed"]
        assert switches()["flushed"] == flushed
    finally:
        torch.set_flush_denormal(False)


def test_threads_are_left_alone_unless_asked_for():
    before = torch.get_num_threads()
    with exact_arithmetic(CPU):
        assert torch.get_num_threads() == before


# Every switch is set in a process of its own: some of them cannot be set back.
EVERY_SWITCH = """
import json, os, sys, torch
from ntkgen.jacobian.precision import exact_arithmetic

backends = torch.backends
places = {
    "all": backends, "cuda.matmul": backends.cuda.matmul, "cudnn": backends.cudnn, "cudnn.conv": backends.cudnn.conv,
    "cudnn.rnn": backends.cudnn.rnn, "mkldnn.matmul": backends.mkldnn.matmul, "mkldnn.conv": backends.mkldnn.conv,
    "mkldnn.rnn": backends.mkldnn.rnn,
}

def state():
    return {name: place.fp32_precision for name, place in places.items()}

def apart(function):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            found = function()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 1 << 16))

def around(name, value):
    places[name].fp32_precision = value
    before = state()
    with exact_arithmetic(torch.device("cpu")):
        inside = state()
    return before, inside, state()

def later(name, value, ours):
    found = []
    for place, chosen in ((name, value), ("all", "ieee"), ("all", "tf32")):
        if ours:
            with exact_arithmetic(torch.device("cpu")):
                pass
        places[place].fp32_precision = chosen
        found.append(state())
    return found

report = {}
for name in places:
    for value in ("ieee", "tf32"):
        report[f"{name} {value}"] = {
            "around": apart(lambda: around(name, value)),
            "later": [apart(lambda: later(name, value, ours)) for ours in (False, True)],
        }
print(json.dumps(report))
"""

PLACES = ["all", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"]
SETTINGS = [f"{place} {value}" for place in PLACES for value in ("ieee", "tf32")]


@pytest.fixture(scope="module")
def report():
    done = subprocess.run([sys.executable, "-c", EVERY_SWITCH], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_products_are_ieee_whatever_the_user_has_chosen(report, setting):
    around = report[setting]["around"]
    assert isinstance(around, list), around  # otherwise the error that torch raised
    before, inside, after = around
    assert {value for place, value in inside.items() if place.startswith("mkldnn.")} <= {"ieee", "none"}
    assert after == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_user_chooses_later_means_what_it_would_have_meant(report, setting):
    without, with_ours = report[setting]["later"]
    assert with_ours == without


# devices --------------------------------------------------------------------------------------------------------------

REFUSED = {("tf32", "cpu"), ("tf32", "mps"), ("float64", "mps"), ("float64-accumulate", "mps")}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_a_device_that_cannot_follow_a_policy_is_refused(name, kind):
    if (name, kind) not in REFUSED:
        check_device(policy(name), torch.device(kind))
        return
    with pytest.raises(InputError, match=rf"`precision` {name} .*expected .*`(device|precision)`") as raised:
        check_device(policy(name), torch.device(kind))
    assert "\n" not in str(raised.value)


def test_tf32_is_refused_before_anything_is_computed():
    def never(*_args):
        raise AssertionError("the network was run")

    model = nn.Linear(4, 2)
    model.register_forward_hook(never)
    with pytest.raises(InputError, match="tensor cores: expected `device` cuda, found cpu"):
        ntkgen.ntk(model, torch.ones(3, 4), precision="tf32")


def test_numbers_are_widened_exactly():
    x = torch.tensor([1.0, 2.0**-23, 3e38], dtype=torch.float32)
    assert widen(x).dtype == torch.float64
    assert torch.equal(widen(x).float(), x)


# the process ----------------------------------------------------------------------------------------------------------

CPU_POLICIES = [name for name in POLICIES if name != "tf32"]


@pytest.mark.parametrize("name", CPU_POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_leaves_the_process_as_it_was_in_every_policy(name, mode, medium):
    case = CASES["conv"]()
    with MODES[mode]():
        before = (switches(), reduced_precision())
        ntkgen.ntk(case.module, case.x, precision=name)
        assert (switches(), reduced_precision()) == before
    assert before[1] == ("medium", (True, True))


@pytest.mark.parametrize("name", CPU_POLICIES)
def test_a_kernel_leaves_the_process_as_it_was_after_an_error(name, medium):
    def fails_later(x):
        if len(x) > 3:  # not when it is tried
            raise ZeroDivisionError
        return x

    class Fails(nn.Linear):
        def forward(self, x):
            return super().forward(fails_later(x))

    before = (switches(), reduced_precision())
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        ntkgen.ntk(nn.Sequential(Fails(4, 3), nn.Linear(3, 2)), torch.randn(5, 4), precision=name)
    assert (switches(), reduced_precision()) == before


@pytest.mark.parametrize("rounding", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_the_switch_of_reduced_products_is_as_before(rounding, kind):
    """Whatever the product was: one that worked, and one that raised."""
    switch = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}.get(kind)
    before, inherited = switch and switch.fp32_precision, reduced_precision()
    with reduced_products(torch.device(kind), rounding):
        within = switch and switch.fp32_precision
    is_switched = (kind, rounding) in {("cpu", "tf32"), ("cpu", "bf16"), ("cuda", "tf32")}
    assert within == (rounding if is_switched else before)
    assert (switch and switch.fp32_precision, reduced_precision()) == (before, inherited)
    with pytest.raises(ZeroDivisionError), reduced_products(torch.device(kind), rounding):
        _ = 1 / 0
    assert (switch and switch.fp32_precision, reduced_precision()) == (before, inherited)


def test_reduced_products_end_where_they_should():
    """Inside exact arithmetic a product of bfloat16 numbers is reduced, and the next one of float32 is not."""
    a = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    expected = a.double() @ a.double().T
    with exact_arithmetic(CPU):
        with reduced_products(CPU, "bf16"):
            _ = a @ a.T
        assert relative_error(a @ a.T, expected) < 1e-6


# what float64-accumulate promises -------------------------------------------------------------------------------------

EXPONENTS = torch.arange(64) * 20 // 63  # singular values from 1 to 2⁻²⁰, most of them several times


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix of ± 1 / √size: exact, where that is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def linear_model_of_known_spectrum(outputs: int) -> tuple[nn.Module, torch.Tensor]:
    """J = x ⊗ I of a linear layer without bias has the singular values of x, each as often as there are outputs.

    x = H diag(s), with s powers of two, has exactly these in float32.
    """
    x = (hadamard(64) * 2.0**-EXPONENTS).float()
    assert torch.equal(x.double(), hadamard(64) * 2.0**-EXPONENTS)
    return nn.Linear(64, outputs, bias=False), x


def eigenvalue_errors(model: nn.Module, x: torch.Tensor, order: str, precision: str, outputs: int) -> torch.Tensor:
    """Relative errors of the eigenvalues, from the largest to the smallest; they are 4 to the minus EXPONENTS."""
    K = ntkgen.ntk(model, x, precision=precision, orders=[order])
    found = torch.linalg.eigvalsh(K.double()).flip(0)
    expected = (4.0**-EXPONENTS).double().repeat_interleave(outputs)
    return (found / expected - 1).abs()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.numeric
def test_float64_sums_of_float32_factors_keep_eigenvalues_that_float32_loses(order, outputs):
    """Down to 2⁻⁴⁰, 1e-12 of the largest one: to 1 % there, where float32 has rounding and nothing else."""
    model, x = linear_model_of_known_spectrum(outputs)
    for precision in ("float64", "float64-accumulate"):
        errors = eigenvalue_errors(model, x, order, precision, outputs)
        assert errors.max() < 1e-2
        assert errors[: len(errors) // 2].max() < 1e-8
    errors = eigenvalue_errors(model, x, order, "float32", outputs)
    assert errors[: len(errors) // 4].max() < 1e-2
    assert errors[-len(errors) // 4 :].median() > 1


def log_determinant_per_row(K: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(K.double()).log().mean())


def convolutional(activation: type[nn.Module], pool: type[nn.Module]) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Conv2d(1, 6, 5), activation(), pool(2), nn.Conv2d(6, 8, 3), activation(), pool(2), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(32, 20), activation(), nn.Linear(20, 4))


def noise(samples: int) -> torch.Tensor:
    return torch.randn(samples, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def gaps(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:  # (samples,)
    """How far each sample is from the nearest kink, in float64: a ReLU input from zero, a maximum from the second."""
    module, x = evaluation_copy(model, torch.float64), x.double()
    found = []
    for layer in module:
        if isinstance(layer, nn.ReLU):
            found.append(x.flatten(1).abs().amin(1))
        if isinstance(layer, nn.MaxPool2d):
            first, second = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).topk(2).values.unbind(-1)
            found.append(torch.where(first > 0, first - second, torch.inf).flatten(1).amin(1))  # no gradient passes 0
        x = layer(x)
    return torch.stack(found).amin(0).detach()


def eta(model: nn.Module, x: torch.Tensor) -> float:
    """‖J̃ − J‖₂ / ‖J‖₂ of a Jacobian from plain autograd in float32, and that in float64."""
    single, double = (
        jacobian_rows(module := evaluation_copy(model, dtype), trainable(module), x.to(dtype)).flatten(0, 1).double()
        for dtype in (torch.float32, torch.float64)
    )
    return float(torch.linalg.matrix_norm(single - double, 2) / torch.linalg.matrix_norm(double, 2))


MARGIN = 1e-5  # what float32 makes of numbers around one is a tenth of it, on any machine


def away_from_kinks() -> tuple[nn.Sequential, torch.Tensor]:
    model, x = convolutional(nn.ReLU, nn.MaxPool2d), noise(40)
    is_far = gaps(model, x) > MARGIN
    assert is_far.sum() >= 24
    return model, x[is_far][:24]


NETWORKS = {"smooth": lambda: (convolutional(nn.Tanh, nn.AvgPool2d), noise(24)), "away from kinks": away_from_kinks}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.numeric
def test_float32_factors_keep_every_eigenvalue_to_what_the_rounded_jacobian_allows(kind):
    """|λ̃ / λ − 1| ≤ 2 η √(λ_max / λ), and a log-determinant to their mean; the η of factors may be twice autograd's."""
    model, x = NETWORKS[kind]()
    size = eta(model, x)
    assert size < FLOAT32_JACOBIAN
    exact, found = (ntkgen.ntk(model, x, precision=name) for name in ("float64", "float64-accumulate"))
    values = torch.linalg.eigvalsh(exact)
    allowed = 4 * size * (values[-1] / values).sqrt()
    assert allowed.max() < 1e-2  # else nothing is promised
    assert ((torch.linalg.eigvalsh(found) / values - 1).abs() <= allowed).all()
    assert abs(log_determinant_per_row(found) - log_determinant_per_row(exact)) <= allowed.mean()


@pytest.mark.numeric
def test_a_relu_input_within_rounding_of_zero_costs_the_rows_of_its_sample():
    """On the two sides of a kink there are two Jacobians. Which one float32 takes depends on the processor."""
    model, x = away_from_kinks()
    inputs = model[:8](x)  # of the last ReLU
    sample, unit = divmod(int(inputs.abs().argmin()), inputs.shape[1])
    kernels = []
    for side in (-1e-9, 1e-9):
        moved = copy.deepcopy(model).double()
        with torch.no_grad():
            moved[7].bias[unit] += side - moved[:8](x.double())[sample, unit]
        kernels.append(ntkgen.ntk(moved, x, precision="float64"))
    left, right = (K.view(24, 4, 24, 4).transpose(1, 2) for K in kernels)
    changes = (right - left).flatten(2).norm(dim=2) / left.flatten(2).norm(dim=2)
    others = torch.arange(24) != sample
    assert changes[others][:, others].max() < 1e-6
    assert changes[sample, sample] > 1e-4
    assert abs(log_determinant_per_row(kernels[0]) - log_determinant_per_row(kernels[1])) > 1e-6
