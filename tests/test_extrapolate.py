"""The law of log-determinants, on prefixes that follow it exactly and on kernels whose prefixes are known."""

import dataclasses
import json
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from filled import fill_store
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gammaln

from ntkgen import cli
from ntkgen.analysis.extrapolation import ExtrapolateSettings, Law, extrapolate, fit, fitted, warnings_of
from ntkgen.analysis.matrix import open_matrix
from ntkgen.errors import InputError
from ntkgen.files.folder import LocalFolder

X = np.arange(1.0, 401.0)
LAW = Law(to=100_000)
SETTINGS = ExtrapolateSettings(to=100_000, memory_bytes=1 << 40)


@contextmanager
def power_law(num_samples, num_outputs, nu, log_scale=1.0):
    """A kernel in a store, adding whose x-th sample multiplies the determinant by (x^−ν e^scale)^outputs."""
    rng = np.random.default_rng(0)
    x = np.repeat(np.arange(1, num_samples + 1), num_outputs)
    L = np.tril(rng.normal(size=(len(x), len(x))) * 0.2 / np.sqrt(len(x)), -1) + np.eye(len(x))
    L *= np.sqrt(x**-nu * np.exp(log_scale))
    with tempfile.TemporaryDirectory() as folder:
        store, _ = fill_store(
            LocalFolder(Path(folder) / "k.zarr", fsync=False),
            L @ L.T,
            labels=np.zeros(num_samples, np.int64),
            num_outputs=num_outputs,
            tile_samples=50,
        )
        yield open_matrix(store)


numbers = st.floats(-5, 5)


@given(st.integers(0, 2), st.integers(0, 1), st.floats(-1, 1), st.lists(numbers, min_size=6, max_size=6))
def test_the_coefficients_of_a_law_are_found(q, powers, alpha, coefficients):
    law = Law(to=9, q=q, powers=powers, alpha=alpha)
    known = np.array(coefficients[: len(law.terms)])
    found = fit(law, X, law.basis(X) @ known)
    np.testing.assert_allclose(found.coefficients, known, atol=1e-6)
    far = np.array([4000.0])
    np.testing.assert_allclose(found.at(far), law.basis(far) @ known, atol=1e-6)


@given(st.integers(0, 4), st.integers(0, 2), st.floats(-1, 1))
def test_the_fit_is_that_of_weighted_least_squares(q, powers, alpha):
    law = Law(to=9, q=q, powers=powers, alpha=alpha)
    x = X[40:]
    y = x * np.log(x) + np.random.default_rng(0).normal(size=len(x))
    found, w = fit(law, x, y), x**-alpha
    residual, design = w * (found.at(x) - y), w[:, None] * law.basis(x)
    correlations = residual @ design / np.linalg.norm(design, axis=0) / np.linalg.norm(w * y)
    assert np.abs(correlations).max() < 1e-12
    np.testing.assert_allclose(found.scales, np.linalg.norm(design, axis=0))


def test_terms_are_those_of_the_paper():
    law = Law(to=9, q=2, powers=1)
    assert law.terms == ["ln x!", "x", "1", "ln x!/x^1", "ln x!/x^2", "x^-1"]
    factorial = gammaln(X + 1)
    np.testing.assert_allclose(
        law.basis(X), np.stack([factorial, X, 0 * X + 1, factorial / X, factorial / X**2, 1 / X], axis=1)
    )


def test_the_weights_decide_which_prefixes_count():
    y = np.where(X < 200, 3 * X, 5 * X - 400)  # two slopes
    early, late = (fit(Law(to=9, q=0, alpha=alpha), X[9:], y[9:]) for alpha in (6.0, -6.0))
    errors = [
        np.abs(found.at(X[part]) - y[part]).mean()
        for part in (slice(9, 40), slice(350, 400))
        for found in (early, late)
    ]
    assert errors[0] < errors[1] / 5
    assert errors[3] < errors[2] / 5


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_nu_and_the_prediction_are_those_of_the_kernel(num_outputs):
    with power_law(60, num_outputs, nu=0.8) as matrix:
        found = extrapolate(matrix, SETTINGS)
    exact = num_outputs * (-0.8 * gammaln(100_001.0) + 100_000)
    assert found.nu == pytest.approx(0.8 * num_outputs, abs=1e-5)
    assert found.nu_per_output == pytest.approx(0.8, abs=1e-5)
    assert found.logdet == pytest.approx(exact, rel=1e-5)
    assert found.to_rows == 100_000 * num_outputs
    assert found.logdet_per_row == pytest.approx(exact / found.to_rows, rel=1e-5)
    assert (found.burn_in, found.fitted_from, found.fitted_to, found.prefixes_used) == (6, 7, 60, 54)
    assert (found.holdout, found.holdout_from) == (13, 48)
    assert found.holdout_error_relative < 1e-6


def test_the_error_on_held_out_prefixes_is_that_of_a_fit_that_has_not_seen_them():
    y = np.where(X <= 300, -0.5 * gammaln(X + 1), -0.5 * gammaln(X + 1) + 0.01 * (X - 300) ** 2)
    found = fitted(Law(to=1000, burn_in=0, holdout=0.25), X, y, 2)
    assert found.holdout_from == 301
    assert found.holdout_error == pytest.approx(-100, abs=1e-4)
    assert found.holdout_error_relative == pytest.approx(100 / abs(y[-1]), rel=1e-5)
    assert found.holdout_error_per_row == pytest.approx(100 / 800, rel=1e-5)
    assert fitted(Law(to=1000, holdout=0.0), X, y, 2).holdout == 0


def test_a_prediction_that_depends_on_which_prefixes_were_fitted_is_not_to_be_trusted():
    y = -3 * gammaln(X + 1) + 7 * X + np.where(X > 300, 20.0, 0.0) * (X - 300)
    found = dataclasses.replace(fitted(Law(to=100_000, burn_in=0), X, y, 2), store="k.zarr")
    assert found.holdout_logdet == pytest.approx(-3 * gammaln(100_001) + 700_000, rel=1e-6)
    (warning,) = warnings_of(found)
    assert "not determined by the kernel at k.zarr" in warning
    assert warnings_of(fitted(Law(to=100_000), X, -3 * gammaln(X + 1) + 7 * X, 2)) == []
    assert warnings_of(fitted(Law(to=100_000, holdout=0.0), X, y, 2)) == []


def test_the_settings_are_recorded_and_the_result_remembered():
    law = ExtrapolateSettings(500, burn_in=9, q=1, powers=1, alpha=0.25, holdout=0.5, memory_bytes=1 << 40)
    with power_law(40, 2, nu=0.3) as matrix:
        first, second = (extrapolate(matrix, law) for _ in range(2))
        other = extrapolate(matrix, dataclasses.replace(SETTINGS, to=501))
    assert (first.remembered, second.remembered, other.remembered) == (False, True, False)
    for name in ("to", "burn_in", "q", "powers", "alpha"):
        assert getattr(first, name) == getattr(second, name) == getattr(law, name)
    assert (first.unit, first.num_outputs, first.holdout, first.fitted_from) == ("samples", 2, 15, 10)
    assert list(first.coefficients) == list(first.column_scales) == law.terms


def test_the_shift_counts():
    with power_law(40, 1, nu=0.3) as matrix:
        found = extrapolate(matrix, dataclasses.replace(SETTINGS, shift=0.5))
        K = matrix.block(slice(None), slice(None)) + 0.5 * np.eye(40)
    x = np.arange(5.0, 41.0)
    expected = fit(LAW, x, np.array([np.linalg.slogdet(K[: int(n), : int(n)]).logabsdet for n in x]))
    assert found.logdet == pytest.approx(expected.at(np.array([1e5]))[0], rel=1e-6)
    assert found.shift == 0.5


@pytest.mark.parametrize(
    "wrong", [{"to": 0}, {"burn_in": -1}, {"q": -1}, {"powers": -2}, {"holdout": 1.0}, {"alpha": float("nan")}]
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(InputError, match=r"^The law cannot be fitted: found .* which must"):
        Law(**{"to": 10, **wrong})


def test_too_few_prefixes_and_too_many_terms_are_refused():
    with pytest.raises(InputError, match=r"too few prefixes .* at least 5, .* found 4 .*Lower `q`"):
        fitted(Law(to=9, holdout=0), X[:4], X[:4], 1)
    with pytest.raises(InputError, match=r"do not determine the law: .* for 28 terms and 361 prefixes"):
        fit(Law(to=9, q=25), X[39:], X[39:])


def test_the_command_says_what_it_found(capsys):
    with power_law(40, 2, nu=0.5) as matrix:
        command = ["analyze", "extrapolate", matrix.name, "--to", "1000", "--q", "1", "--memory", "4GB"]
        assert cli.run([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {"store", "seconds", "peak_bytes", "logdet", "nu", "shift", "holdout_error", "coefficients"} <= set(
            found
        )
        assert found["logdet"] == pytest.approx(2 * (-0.5 * gammaln(1001.0) + 1000), rel=1e-5)
        assert cli.run(command) == 0
        page = capsys.readouterr().out
        for part in (
            f"{found['logdet']:.8g} nats for 1,000 samples",
            "36 prefixes of 5 to 40 samples",
            "by a fit below",
        ):
            assert part in page
        assert cli.run([*command[:3], "--to", "0"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
