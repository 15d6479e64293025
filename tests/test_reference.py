"""The oracle itself, against autograd in plain loops and against kernels known in closed form."""

import copy

import pytest
import torch
from cases import CASES, TOLERANCES, chosen_cases, reference_of, relative_error
from torch import Tensor, nn

from ntkgen.jacobian import reference
from ntkgen.jacobian.reference import reference_ntk


def plain_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """One backward pass per sample and output."""
    module = copy.deepcopy(model).eval().double()
    params = [param for param in module.parameters() if param.requires_grad]
    rows = []
    for sample in x.double() if x.is_floating_point() else x:
        for output in module(sample[None])[0]:
            module.zero_grad()
            if output.requires_grad:
                output.backward(retain_graph=True)
            grads = (torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in params)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


@chosen_cases
def test_equals_plain_autograd(name):
    case = CASES[name]()
    J = plain_jacobian(case.module, case.x)
    assert relative_error(reference_of(name), J @ J.T) < 1e-13


@chosen_cases
def test_of_two_batches_equals_plain_autograd(name):
    case = CASES[name]()
    J1, J2 = (plain_jacobian(case.module, x) for x in case.halves)
    assert relative_error(reference_ntk(case.module, *case.halves), J1 @ J2.T) < 1e-13


def test_of_a_linear_layer_is_known_in_closed_form():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.kron(x @ x.T + 1, torch.eye(3, dtype=torch.float64))  # K[i a, j b] = δ_ab (x_i · x_j + 1)
    torch.testing.assert_close(reference_ntk(nn.Linear(5, 3), x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "tied_weights", "transformer"])
@pytest.mark.parametrize("parts", [2, 3, 10**9])
def test_holds_few_bytes_of_the_jacobian_and_does_not_depend_on_how_many(name, parts, monkeypatch):
    case, expected, groups = CASES[name](), reference_of(name), []
    max_bytes = 8 * len(expected) * sum(param.numel() for param in case.module.parameters()) // parts

    def jacobian_rows(module, params, x):
        rows = original(module, params, x)
        groups.append((len(params), rows.nbytes))
        return rows

    original = reference.jacobian_rows
    monkeypatch.setattr(reference, "jacobian_rows", jacobian_rows)
    assert relative_error(reference_ntk(case.module, case.x, max_bytes=max_bytes), expected) < 1e-14
    assert 1 < len(groups) <= len(list(case.module.parameters()))
    assert all(num_params == 1 or nbytes <= max_bytes for num_params, nbytes in groups)


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.float64])
def test_is_float64_on_the_cpu_whatever_comes_in(x_dtype):
    case = CASES["mlp"]()
    kernel = reference_ntk(case.module, case.x.to(x_dtype))
    assert (kernel.dtype, kernel.device.type, kernel.requires_grad) == (torch.float64, "cpu", False)
    assert relative_error(kernel, reference_of("mlp")) < TOLERANCES["float16"]


def test_ignores_the_mode_that_the_process_is_in():
    case, expected = CASES["conv"](), reference_of("conv")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reference_ntk(case.module, case.x), expected)
