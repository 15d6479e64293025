"""The density of eigenvalues on a logarithmic axis, against that of all eigenvalues of the dense matrix."""

import json

import numpy as np
import pytest
from cases import chosen
from click.testing import CliRunner
from filled import fill_store, gram

from ntkgen.analysis import eigenvalue_density as densities
from ntkgen.analysis.eigenvalue_density import (
    DensitySettings,
    density,
    draw,
    exact_rule,
    normalized,
    plan_probes,
    sampled_rule,
)
from ntkgen.analysis.linalg.krylov import Krylov, Sizes
from ntkgen.analysis.linalg.quadrature import Moments, gauss
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.products import space_bytes
from ntkgen.cli import cli
from ntkgen.cli import run as run_command
from ntkgen.errors import BudgetError


def store_of(path, K, **options):
    options.setdefault("tile_samples", -(-len(K) // 5))
    return open_matrix(fill_store(path, K, labels=np.zeros(len(K), int), **options)[0])


@pytest.fixture
def sampled(monkeypatch):
    """Have the density sampled however small the kernel."""
    monkeypatch.setattr(densities, "is_dense", lambda *_: False)


def smooth(values, axis, bandwidth):
    """The density of log₁₀ of some numbers, one by one."""
    found = np.zeros(len(axis))
    for place in np.log10(values):
        found += np.exp(-(((axis - place) / bandwidth) ** 2) / 2) / (bandwidth * np.sqrt(2 * np.pi))
    return found / len(values)


@pytest.mark.parametrize("layout", ["upper", "full"])
@pytest.mark.parametrize("bandwidth", [0.1, 0.03, 1.0])
def test_the_density_of_all_eigenvalues(tmp_path, layout, bandwidth):
    K = gram(25)
    result = density(store_of(tmp_path / "k.zarr", K, layout=layout), DensitySettings(bandwidth=bandwidth))
    axis, values = np.array(result.log10_eigenvalues), np.linalg.eigvalsh(K)
    np.testing.assert_allclose(result.density, smooth(values, axis, bandwidth), atol=1e-10)
    assert np.trapezoid(result.density, axis) == pytest.approx(1, abs=1e-3)
    # a grid point may be an eigenvalue, which rounding puts on either side
    away = np.abs(np.log10(values)[:, None] - axis).min(axis=0) > 1e-9
    expected = (np.log10(values)[:, None] > axis).mean(axis=0)
    np.testing.assert_allclose(np.array(result.fraction_above)[away], expected[away], atol=1e-12)
    assert set(result.density_errors) == {0.0}
    assert (result.method, result.passes, result.resolved_above) == ("all", 1, None)
    assert result.fraction_off_axis == 0


def test_what_is_not_positive_is_off_the_axis(tmp_path):
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))[0]
    K = (Q * [5, 4, 3, 2, 1, 1, 0, 0, -1e-3, -1e-5]) @ Q.T
    result = density(store_of(tmp_path / "k.zarr", (K + K.T) / 2))
    assert result.fraction_off_axis == pytest.approx(0.4)
    assert np.trapezoid(result.density, result.log10_eigenvalues) == pytest.approx(0.6, abs=1e-3)
    assert result.fraction_above[0] == pytest.approx(0.6)


def test_a_kernel_of_zeros(tmp_path):
    result = density(store_of(tmp_path / "k.zarr", np.zeros((4, 4))))
    assert (result.log10_eigenvalues, result.fraction_off_axis) == ([], 1.0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_rule_has_the_moments_of_its_probes(steps):
    """Exactly, up to the degree 2q − 1."""
    K, block = gram(50) / 100, 5
    krylov = Krylov(lambda V: K @ V, Sizes(50, block, 6))
    for _ in range(steps):
        krylov.advance()
    rule = gauss(krylov)
    omega = np.random.default_rng(0).standard_normal((50, block))
    weights = (krylov.ritz(krylov.width)[1][:block].T @ krylov.start) ** 2
    for degree in range(2 * steps):
        expected = np.einsum("ij,ij->j", omega, np.linalg.matrix_power(K, degree) @ omega)
        np.testing.assert_allclose(rule.nodes**degree @ weights, expected, rtol=1e-10)
    assert (rule.weights[: rule.num_known] == 1).all()
    np.testing.assert_allclose(rule.weights[rule.num_known :], weights[rule.num_known :])


@pytest.mark.parametrize("power", chosen([0.4, 1.0], [0.4]))
def test_a_sampled_density_is_within_its_errors(power):
    values = np.arange(1, 1001.0) ** -power
    krylov = Krylov(lambda V: values[:, None] * V, Sizes(1000, 32, 12))
    while not krylov.is_full:
        krylov.advance()
    moments = Moments(1000, values.sum(), (values**2).sum())
    found = draw(normalized(gauss(krylov), moments), 1000, 0.2)
    axis = np.array(found.log10_eigenvalues)
    assert np.trapezoid(found.density, axis) == pytest.approx(1, abs=1e-3)
    assert found.fraction_above[0] == pytest.approx(1)
    exact = smooth(values, axis, 0.2)
    is_resolved = axis > (-np.inf if found.resolved_above is None else np.log10(found.resolved_above) + 0.4)
    error = np.abs(found.density - exact)[is_resolved]
    assert is_resolved.mean() > 0.5
    assert (error <= 2 * np.array(found.density_errors)[is_resolved] + 0.05 * exact.max()).all()


def test_a_stored_kernel_is_sampled_in_the_passes_that_are_asked_for(tmp_path, sampled):
    K = gram(60)
    matrix = store_of(tmp_path / "k.zarr", K)
    result = density(matrix, DensitySettings(passes=3, bandwidth=0.3))
    assert (result.method, result.passes) == ("lanczos", 1)  # 60 vectors are everything
    axis = np.array(result.log10_eigenvalues)
    np.testing.assert_allclose(result.density, smooth(np.linalg.eigvalsh(K), axis, 0.3), atol=1e-9)
    rule, probes = sampled_rule(matrix, DensitySettings(passes=3))
    assert (len(rule.nodes), probes, rule.num_known) == (60, 60, 60)
    assert density(matrix, DensitySettings(passes=3, bandwidth=0.3)).remembered


def test_fewer_probes_take_more_passes(tmp_path, sampled, monkeypatch):
    monkeypatch.setattr(densities, "MAX_PROBES", 8)
    matrix = store_of(tmp_path / "k.zarr", gram(60))
    result = density(matrix, DensitySettings(passes=3, bandwidth=0.3))
    assert (result.passes, result.probes) == (3, 8)
    assert max(result.density_errors) > 0
    assert np.trapezoid(result.density, result.log10_eigenvalues) == pytest.approx(1, abs=1e-2)
    assert density(matrix, DensitySettings(passes=2, bandwidth=0.3)).passes == 2


def test_a_rule_of_all_eigenvalues():
    rule = exact_rule(np.array([3.0, 1.0]))
    assert (rule.num_known, rule.weights.tolist()) == (2, [[1.0], [1.0]])


def test_probes_fill_the_memory_and_no_more(monkeypatch):
    matrix = type("Fake", (), {"num_rows": 100_000, "side": 1000, "name": "k.zarr"})()
    monkeypatch.setattr(densities, "memory_left", lambda limit: limit)
    for limit, probes in ((8 * 10**9, 64), (400 * 10**6, 15)):
        sizes = plan_probes(matrix, DensitySettings(memory_bytes=limit + 10**10))
        assert sizes.block == 64
        monkeypatch.setattr(densities, "require_space", lambda *_: None)
        sizes = plan_probes(matrix, DensitySettings(memory_bytes=limit))
        assert space_bytes(matrix, sizes) <= limit
        assert sizes.block == pytest.approx(probes, abs=4)


def test_too_little_memory_names_what_is_needed(tmp_path, sampled):
    import psutil

    matrix = store_of(tmp_path / "k.zarr", gram(60))
    with pytest.raises(
        BudgetError, match=r"is too small: expected .* for .* vectors of 60 rows and 6 tiles \(fewer `passes`"
    ):
        density(matrix, DensitySettings(memory_bytes=psutil.Process().memory_info().rss + 20_000))


@pytest.mark.parametrize("wrong", [("--bandwidth", "0"), ("--bandwidth", "nan"), ("--passes", "1")])
def test_what_makes_no_sense_is_one_line(tmp_path, capsys, wrong):
    path = store_of(tmp_path / "k.zarr", gram(6)).name
    assert run_command(["analyze", "density", path, *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line(tmp_path):
    matrix = store_of(tmp_path / "k.zarr", np.diag([500.0, 50.0, 20.0, 3.0, 0.02, -1.0]))
    done = CliRunner().invoke(cli, ["analyze", "density", matrix.name, "--json"])
    assert done.exit_code == 0, done.output
    assert {"log10_eigenvalues", "density", "store", "seconds", "peak_bytes"} <= set(json.loads(done.stdout))
    shown = CliRunner().invoke(cli, ["analyze", "density", matrix.name]).output
    assert "16.7 % are negative or may be zero" in shown
    for decade in ("10^2    to 10^3      16.667 %", "10^1    to 10^2      33.333 %", "10^-2   to 10^-1     16.667 %"):
        assert decade in shown, shown
