"""Every network of the zoo against the reference, on two samples of noise."""

from functools import cache

import pytest
import torch
from cases import TOLERANCES, chosen, relative_error
from torch import Tensor, nn

import ntkgen
from models import MODELS
from ntkgen.jacobian import dense
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import reference_ntk

# Those whose reference takes a fraction of a second on one core; the others take up to minutes.
QUICK = {"lenet", "logistic"}
# Two forward passes and a few backward ones are quick for this one too, which has residuals and batch norms.
QUICK_TO_PREPARE = QUICK | {"resnet9"}


def every_model(quick: set[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
    )


def noise(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name](num_classes=10)


def settled(model: nn.Module) -> nn.Module:
    """Give the batch norms the statistics of a batch, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        model.train()(noise(16, seed=2))
    return model


@cache
def reference_of(name: str) -> Tensor:
    return reference_ntk(network(name), noise(2, seed=1), max_bytes=2 << 30)


def kernels_by_autograd(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Compute the kernel by plain autograd in the network's dtype, of samples alone and in a batch."""
    module = model.eval()
    params = list(module.parameters())

    def kernel(outputs: Tensor) -> Tensor:
        rows = [torch.autograd.grad(output, params, retain_graph=True) for output in outputs.flatten()]
        by_param = (torch.stack(grads).flatten(1).double() for grads in zip(*rows, strict=True))
        return torch.stack([J @ J.T for J in by_param]).sum(0)

    return [kernel(torch.cat([module(sample[None]) for sample in x])), kernel(module(x))]


def error_of_float32(name: str) -> float:
    """The error of the same kernel from plain autograd in float32.

    A ReLU that flips, as rounding differs between batch sizes, costs as much there.
    """
    return max(relative_error(K, reference_of(name)) for K in kernels_by_autograd(network(name), noise(2, seed=1)))


@every_model(QUICK)
@pytest.mark.numeric
def test_equals_the_reference_in_float64(name):
    found = ntkgen.ntk(network(name), noise(2, seed=1), precision="float64")
    assert relative_error(found, reference_of(name)) < TOLERANCES["float64"]


@every_model(QUICK)
@pytest.mark.parametrize("precision", ["float32", pytest.param("float64-accumulate", marks=pytest.mark.slow)])
@pytest.mark.numeric
def test_equals_the_reference_in_float32_as_well_as_autograd_does(name, precision):
    found = ntkgen.ntk(network(name), noise(2, seed=1), precision=precision)
    error = relative_error(found, reference_of(name))
    assert error < TOLERANCES["float32"] or error < 3 * error_of_float32(name)


# how the work is cut --------------------------------------------------------------------------------------------------


def smooth(model: nn.Module) -> nn.Module:
    """Put a smooth activation in place of each ReLU, whose slope jumps where rounding changes a sign."""
    for name, child in list(model.named_modules()):
        if isinstance(child, nn.ReLU | nn.ReLU6):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.GELU())
    return model


def cut_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.diagonal().max())


def cut_into_single_samples(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(dense, "BLOCK_BYTES", dense.plan_ntk(model, x).jacobian.factor_bytes)
    return ntkgen.ntk(model, x)


@every_model(QUICK)
@pytest.mark.numeric
def test_neither_blocks_nor_batches_nor_threads_change_a_smooth_network(name, monkeypatch):
    """No more than batches change the kernel by plain autograd, where rounding grows from layer to layer."""
    model, x, threads = smooth(network(name)), noise(2, seed=1), torch.get_num_threads()
    assert not any(isinstance(child, nn.ReLU | nn.ReLU6) for child in model.modules())
    whole = ntkgen.ntk(model, x)
    try:
        torch.set_num_threads(threads + 1)
        errors = [cut_error(ntkgen.ntk(model, x), whole)]
    finally:
        torch.set_num_threads(threads)
    errors.append(cut_error(cut_into_single_samples(model, x, monkeypatch), whole))
    assert max(errors) <= 1e-5 or max(errors) <= 3 * cut_error(*kernels_by_autograd(model, x))


@every_model(QUICK)
@pytest.mark.numeric
def test_blocks_do_not_change_a_network_with_kinks_whose_batches_stay_the_same(name, monkeypatch):
    """In batches of another size a ReLU may flip, which changes the network itself: as it does for plain autograd."""
    monkeypatch.setattr(dense, "batch_size_for", lambda _: 1)
    model, x = settled(network(name)), noise(2, seed=1)
    whole = ntkgen.ntk(model, x)
    assert cut_error(cut_into_single_samples(model, x, monkeypatch), whole) <= 1e-5


@every_model(QUICK_TO_PREPARE)
@pytest.mark.parametrize("state", chosen(["as drawn", "settled"], ["settled"]))
def test_every_parameter_has_a_rule(name, state):
    model = network(name) if state == "as drawn" else settled(network(name))
    assert prepare(model, noise(2, seed=1), policy("float32")).fallback == ()
