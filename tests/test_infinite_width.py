"""Kernels of one hidden layer converge to the analytic kernel of infinite width, as 1 / √width."""

import runpy

import numpy as np
import pytest
import torch
from test_layout import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "infinite_width.py"))


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_the_error_falls_with_the_root_of_the_width(activation):
    widths = (128, 2048, 65_536)
    found = SCRIPT["errors"](activation, widths, 8)
    assert found.mean(1)[-1] < 0.01
    assert -0.65 < SCRIPT["slope"](widths, found) < -0.4


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_the_analytic_kernel_is_the_mean_over_normal_weights(activation):
    """E[φ φ'] + Σ E[φ' φ'], by two million draws."""
    x = np.array([[1.0, 0.5, -1.0], [0.2, 2.0, 0.3]])
    weights = torch.randn(2_000_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = (weights @ torch.from_numpy(x.T) / 3**0.5).requires_grad_()
    values = SCRIPT["ACTIVATIONS"][activation](hidden)
    (slopes,) = torch.autograd.grad(values.sum(), hidden)
    values = values.detach()
    expected = values.T @ values / len(weights) + torch.from_numpy(x @ x.T / 3) * (slopes.T @ slopes) / len(weights)
    np.testing.assert_allclose(SCRIPT["analytic_kernel"](x, activation), expected.numpy(), atol=5e-3)
