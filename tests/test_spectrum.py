"""Eigenvalues of stored kernels, all of them and the largest, against NumPy on the dense matrix."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cases import chosen, in_turn
from click.testing import CliRunner
from filled import certificate_of, fill_store, gram
from hypothesis import given
from hypothesis import strategies as st
from strategies import few

from ntkgen.analysis import eigenvalues as spectra
from ntkgen.analysis.eigenvalues import SpectrumSettings, smallest_eigenvalue, spectrum
from ntkgen.analysis.linalg.krylov import Goal, Krylov, Sizes, householder_qr, measure, run, subtract_span, tall_qr
from ntkgen.analysis.linalg.quadrature import Moments, estimate_effective_rank, gauss_and_radau
from ntkgen.analysis.matrix import open_matrix
from ntkgen.cli import cli
from ntkgen.cli import run as run_command
from ntkgen.errors import BudgetError, InputError

ROWS = 60


def with_eigenvalues(values, seed=0):
    """A dense symmetric matrix of these eigenvalues."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    K = (Q * values) @ Q.T
    return (K + K.T) / 2


def sorted_eigenvalues(K):
    return np.linalg.eigvalsh(K)[::-1]


def store_of(path, K, *, num_outputs=1, **options):
    labels = np.zeros(len(K) // num_outputs, int)
    options.setdefault("tile_samples", -(-len(labels) // 5))
    return open_matrix(fill_store(path, K, labels=labels, num_outputs=num_outputs, **options)[0])


@pytest.fixture
def by_krylov(monkeypatch):
    """Have --top computed out of core however small the kernel."""
    monkeypatch.setattr(spectra, "FEW_ROWS", 0)


# numbers of a finished list -------------------------------------------------------------------------------------------


def assert_summed_up(result, K, rtol=1e-10):
    """Compare what needs no list of all eigenvalues."""
    values = sorted_eigenvalues(K)
    expected = {
        "trace": np.trace(K),
        "frobenius_norm": np.linalg.norm(K),
        "participation_ratio": values.sum() ** 2 / (values**2).sum(),
        "stable_rank": (values**2).sum() / np.abs(values).max() ** 2,
    }
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=rtol), name


def entropy_rank(values):
    p = values[values > 0] / values[values > 0].sum()
    return np.exp(-(p * np.log(p)).sum())


shapes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))  # samples, outputs, samples of a tile
kinds = st.sampled_from([(layout, dtype) for layout in ("upper", "full") for dtype in ("float32", "float64")])


@few
@given(shapes, kinds, st.integers(0, 5))
def test_all_eigenvalues_are_those_of_the_dense_matrix(shape, kind, seed):
    (n, m, tile), (layout, dtype) = shape, kind
    K = gram(n * m, seed)
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_outputs": m, "tile_samples": min(tile, n), "layout": layout, "dtypes": (dtype,)}
        result = spectrum(store_of(Path(folder) / "k.zarr", K, **options))
    K = K.astype(dtype).astype(np.float64)
    values = sorted_eigenvalues(K)
    np.testing.assert_allclose(result.eigenvalues, values, rtol=0, atol=1e-10 * values[0])
    assert (np.abs(result.eigenvalues - values) <= 2 * np.array(result.residual_bounds)).all()
    assert_summed_up(result, K)
    assert result.effective_rank == pytest.approx(entropy_rank(values), rel=1e-10)
    assert result.condition == pytest.approx(values[0] / values[-1], rel=1e-8)
    assert result.smallest == result.eigenvalues[-1]
    assert (result.passes, result.num_negative, result.method) == (1, 0, "all")


@few
@given(st.tuples(st.integers(12, 20), st.integers(1, 3), st.integers(2, 9)), kinds, st.integers(1, 5))
def test_the_largest_are_those_of_the_dense_matrix(shape, kind, top):
    (n, m, tile), (layout, dtype) = shape, kind
    K = gram(n * m, seed=top)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "FEW_ROWS", 0)
        options = {"num_outputs": m, "tile_samples": tile, "layout": layout, "dtypes": (dtype,)}
        matrix = store_of(Path(folder) / "k.zarr", K, **options)
        patch.setattr(spectra, "plan_sizes", lambda *_: Sizes(n * m, min(top + 3, n * m), 4))
        result = spectrum(matrix, SpectrumSettings(top=top, tolerance=1e-11))
    K = K.astype(dtype).astype(np.float64)
    values = sorted_eigenvalues(K)
    assert result.method == "largest"
    assert result.is_converged
    np.testing.assert_allclose(result.eigenvalues, values[:top], rtol=1e-10)
    assert_summed_up(result, K)
    assert result.effective_rank == pytest.approx(entropy_rank(values), abs=3 * result.effective_rank_error + 1e-9)
    assert (result.condition, result.num_negative) == (None, None)
    assert result.passes == int(result.passes) >= 1


def test_negative_eigenvalues_are_counted_and_have_no_weight(tmp_path):
    values = np.array([5.0, 3.0, 1.0, 1e-3, -1e-6, -2e-6])
    result = spectrum(store_of(tmp_path / "k.zarr", with_eigenvalues(values)))
    assert result.num_negative == 2
    assert result.effective_rank == pytest.approx(entropy_rank(values), rel=1e-9)
    assert result.condition is None
    assert result.smallest == pytest.approx(-2e-6, rel=1e-6)


def test_what_is_below_the_error_is_called_noise(tmp_path):
    certificate = certificate_of("float64", 0.5)
    K = with_eigenvalues(np.array([9.0, 4.0, 1.0, 0.4, 0.1, 0.01]))
    matrix = store_of(tmp_path / "k.zarr", K, certificate=certificate)
    result = spectrum(matrix)
    assert (result.error_norm, result.num_above_error) == (0.5, 3)
    shown = CliRunner().invoke(cli, ["analyze", "spectrum", matrix.name])
    assert "‖E‖ ≤ 0.5, which also bounds the error of each eigenvalue; only the first 3 are above it" in shown.output


def test_a_kernel_of_zeros(tmp_path, by_krylov):
    matrix = store_of(tmp_path / "k.zarr", np.zeros((6, 6)))
    for wanted in (SpectrumSettings(), SpectrumSettings(top=2)):
        result = spectrum(matrix, wanted)
        assert result.eigenvalues == [0.0] * (wanted.top or 6)
        assert [
            getattr(result, name) for name in ("trace", "effective_rank", "participation_ratio", "stable_rank")
        ] == [0.0] * 4
        assert result.condition is None
        json.dumps(result.to_json(), allow_nan=False)


def test_a_part_of_an_incomplete_kernel(tmp_path):
    K = gram(14)
    matrix = store_of(tmp_path / "k.zarr", K)
    (tmp_path / "k.zarr/ntk_float64/c/1/4").unlink()
    matrix = open_matrix(matrix.store, allow_partial=True)
    result = spectrum(matrix)
    assert result.rows == 12
    np.testing.assert_allclose(result.eigenvalues, sorted_eigenvalues(K[:12, :12]), atol=1e-10 * 100)


def test_a_result_is_computed_once(tmp_path, by_krylov):
    matrix = store_of(tmp_path / "k.zarr", gram(20))
    first, read = spectrum(matrix), matrix.tiles_read
    again = spectrum(matrix)
    assert (first.remembered, again.remembered) == (False, True)
    assert matrix.tiles_read == read
    assert again.eigenvalues == first.eigenvalues
    assert spectrum(matrix, SpectrumSettings(top=3)).eigenvalues == pytest.approx(first.eigenvalues[:3], rel=1e-9)
    assert matrix.tiles_read > read


# block Krylov ---------------------------------------------------------------------------------------------------------


def krylov_of(K, block, num_blocks, steps=0, seed=0):
    krylov = Krylov(lambda V: K @ V, Sizes(len(K), block, num_blocks), seed)
    for _ in range(steps):
        krylov.advance()
    return krylov


def assert_holds(krylov, K):
    """Check K Q = Q T + Q⁺ B Eᵀ, and that [Q, Q⁺] is orthonormal."""
    Q, added = krylov.basis, krylov._next
    joint = np.concatenate([Q, added], axis=1)
    np.testing.assert_allclose(joint.T @ joint, np.eye(joint.shape[1]), atol=1e-13)
    expected = Q @ krylov.projected
    expected[:, krylov.coupled] += added @ krylov.coupling
    np.testing.assert_allclose(K @ Q, expected, atol=1e-12 * np.linalg.norm(K, 2))


@pytest.mark.parametrize("values", [np.logspace(2, -3, ROWS), np.logspace(4, -14, ROWS), np.linspace(1, 2, ROWS)])
def test_the_identity_of_the_space_holds_before_and_after_a_restart(values):
    K = with_eigenvalues(values)
    krylov = krylov_of(K, 7, 4, steps=4)
    assert krylov.is_full
    assert_holds(krylov, K)
    krylov.restart(14)
    assert krylov.width == 14
    assert_holds(krylov, K)
    krylov.advance()
    assert_holds(krylov, K)


@pytest.mark.parametrize("num_blocks", [3, 4, 8])
@pytest.mark.parametrize("values", [np.arange(1, ROWS + 1) ** -0.8, 0.8 ** np.arange(ROWS)])
def test_bounds_hold_after_every_step(values, num_blocks):
    K = with_eigenvalues(values)
    krylov, goal, largest = krylov_of(K, 8, num_blocks), Goal(5, 1e-9, 40), sorted_eigenvalues(K)[:5]
    found = None
    while found is None or not found.is_converged:
        if krylov.is_full:
            krylov.restart(krylov.sizes.capacity - 8)
        krylov.advance()
        found = measure(krylov, goal, float((K**2).sum()))
        S = krylov.ritz(5)[1]
        Y = krylov.vectors(S)
        explicit = np.linalg.norm(K @ Y - Y * found.values, axis=0)
        assert (explicit <= found.residuals).all()
        np.testing.assert_allclose(found.residuals, explicit, atol=1e-12)
        assert (found.values <= largest + 1e-13).all()
        for value, bound in zip(found.values, found.residuals, strict=True):
            assert np.abs(value - sorted_eigenvalues(K)).min() <= bound + 1e-14
        if found.errors.max() < 1e-2 * largest[-1] or found.is_proven:
            assert (largest - found.values <= found.errors).all()
    np.testing.assert_allclose(found.values, largest, rtol=1e-9)


@pytest.mark.slow
def test_error_bounds_are_close_and_far_below_residuals():
    """The square of a residual over a gap that is extrapolated: within a factor of a few of the error."""
    values = np.arange(1, 601) ** -0.5
    krylov, goal = krylov_of(np.diag(values), 40, 8, steps=5), Goal(20, 1e-3, 40)
    found = measure(krylov, goal)
    error = values[:20] - found.values
    assert 1e-8 < error[-1] < 1e-3
    assert (error <= found.errors).all()
    assert found.errors[-1] < 3 * error[-1]
    assert found.errors[-1] < found.residuals[-1] / 10


def test_what_cannot_have_been_missed_is_proven():
    values = np.concatenate([np.arange(20, 10, -1.0), np.linspace(1e-3, 2e-3, 100)])
    krylov = krylov_of(np.diag(values), 14, 8, steps=3)
    assert measure(krylov, Goal(8, 1e-6, 9), float((values**2).sum())).is_proven
    assert not measure(krylov, Goal(8, 1e-6, 9)).is_proven
    # one that the space knows nothing of
    hidden = float((values**2).sum()) + 19.0**2
    assert not measure(krylov, Goal(8, 1e-6, 9), hidden).is_proven


def test_a_kernel_of_low_rank_is_exhausted():
    J = np.random.default_rng(0).normal(size=(80, 9))
    K = J @ J.T
    krylov = krylov_of(K, 12, 4)
    found = run(krylov, Goal(10, 1e-12, 20))
    assert krylov.steps == 2
    assert krylov.added == 0
    np.testing.assert_allclose(found.values, sorted_eigenvalues(K)[:10], atol=1e-11)
    rank, error = estimate_effective_rank(krylov, Moments(80, float(np.trace(K)), float((K**2).sum())))
    assert (rank, error) == (
        pytest.approx(entropy_rank(np.linalg.eigvalsh(J.T @ J)), rel=1e-10),
        pytest.approx(0, abs=1e-9),
    )


@pytest.mark.parametrize("count", [1, 4, 12])
def test_an_eigenvalue_that_many_vectors_share_is_found_as_often_as_it_is_asked_for(count):
    K = with_eigenvalues(np.r_[np.full(30, 3.0), np.full(10, 2.0), np.full(20, 0.5)])
    krylov = krylov_of(K, 12, 5)
    found = run(krylov, Goal(count, 1e-12, 20))
    np.testing.assert_allclose(found.values, np.full(count, 3.0), rtol=1e-13)
    rank, error = estimate_effective_rank(krylov, Moments(60, float(np.trace(K)), float((K**2).sum())))
    assert rank == pytest.approx(entropy_rank(np.linalg.eigvalsh(K)), abs=error + 1e-6)


def test_a_space_that_is_everything_needs_no_restart():
    K = gram(30)
    krylov = krylov_of(K, 7, 8)
    found = run(krylov, Goal(7, 1e-300, 40))
    assert krylov.width <= 30
    np.testing.assert_allclose(found.values, sorted_eigenvalues(K)[:7], rtol=1e-13)


def test_steps_end_where_they_are_to_end():
    K = with_eigenvalues(1 + np.arange(200) / 1e5)
    krylov = krylov_of(K, 6, 4)
    found = run(krylov, Goal(3, 1e-12, 9))
    assert (krylov.steps, found.is_converged) == (9, False)


@pytest.mark.slow
@pytest.mark.parametrize("power", chosen([0.3, 0.8, 1.2], [0.8]))
def test_eight_passes_do_where_the_spectrum_falls_by_15_percent_within_a_block(power):
    """On spectra that fall like a power, with a few large eigenvalues before: 50 eigenvalues to 10⁻⁶."""
    block = 80
    power = max(power, np.log(1.15) / np.log((block + 1) / 50))
    values = np.arange(1, 1501) ** -power
    values[:3] = [300.0, 20.0, 5.0]
    krylov = krylov_of(np.diag(values), block, 8)
    found = run(krylov, Goal(50, 1e-6, 8), squares=lambda: float((values**2).sum()))
    assert values[49] / values[block] >= 1.15 - 1e-9
    assert found.is_converged
    np.testing.assert_allclose(found.values, values[:50], rtol=1e-6)


@given(st.integers(1, 30), st.integers(1, 8), st.sampled_from([1.0, 1e-6, 1e-9, 1e-13, 0.0]), st.booleans())
def test_tall_factors(rows, cols, small, by_householder):
    cols = min(rows, cols)
    W = np.random.default_rng([rows, cols]).normal(size=(rows, cols))
    W[:, -1] = W[:, 0] + small * W[:, -1] if cols > 1 else small * W[:, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ntkgen.analysis.linalg.krylov.CHUNK_ROWS", 4)
        Q = W.copy()
        R = (householder_qr if by_householder else tall_qr)(Q)
        np.testing.assert_allclose(Q @ R, W, atol=1e-13)
        np.testing.assert_allclose(Q.T @ Q, np.eye(cols), atol=1e-12)
        V = np.random.default_rng(1).normal(size=(rows, 2))
        X = V.copy()
        np.testing.assert_allclose(subtract_span(Q, X), Q.T @ V)
        np.testing.assert_allclose(X, V - Q @ (Q.T @ V), atol=1e-13)


def test_graded_columns_are_made_orthonormal_by_products_alone(monkeypatch):
    monkeypatch.setattr("ntkgen.analysis.linalg.krylov.householder_qr", None)
    rng = np.random.default_rng(0)
    W = (
        np.linalg.qr(rng.normal(size=(300, 40)))[0]
        * np.logspace(0, -11, 40)
        @ np.linalg.qr(rng.normal(size=(40, 40)))[0]
    )
    Q = W.copy()
    R = tall_qr(Q)
    np.testing.assert_allclose(Q @ R, W, atol=1e-14)
    np.testing.assert_allclose(Q.T @ Q, np.eye(40), atol=1e-13)


def test_the_rules_of_gauss_and_radau_enclose_each_probe():
    values = np.arange(1, 201) ** -0.7
    krylov = krylov_of(np.diag(values), 5, 8, steps=4)
    omega = np.random.default_rng(0).standard_normal((200, 5))
    exact = (omega**2).T @ (-values * np.log(values))

    def entropy(x):
        return -np.maximum(x, 0) * np.log(np.where(x > 0, x, 1))

    above, below = (entropy(rule.nodes) @ rule.weights for rule in gauss_and_radau(krylov) if rule.num_known == 0)
    assert (below < exact).all()
    assert (exact < above).all()
    np.testing.assert_allclose(above, below, rtol=0.05)


@in_turn("power seed", [0.1, 0.5, 1.0, 2.0], range(4))
def test_the_effective_rank_is_within_its_error(power, seed):
    values = np.arange(1, 401) ** -power
    krylov = krylov_of(np.diag(values), 20, 8, steps=4, seed=seed)
    rank, error = estimate_effective_rank(krylov, Moments(400, values.sum(), (values**2).sum()))
    assert abs(rank - entropy_rank(values)) <= error
    assert error < 0.1 * rank


# the smallest eigenvalue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [1e-3, 1e-9])
def test_the_smallest_eigenvalue_by_solving(lowest):
    values = np.logspace(0, np.log10(lowest), ROWS)
    K = with_eigenvalues(values)
    value, error = smallest_eigenvalue(lambda V: np.linalg.solve(K, V), ROWS)
    expected = np.linalg.eigvalsh(K)[0]
    assert abs(value - expected) <= error + 1e-15
    assert value == pytest.approx(expected, rel=1e-6)


def test_the_condition_out_of_core(tmp_path, by_krylov):
    K = gram(40)
    matrix = store_of(tmp_path / "k.zarr", K)
    exact = np.linalg.cond(K)
    given_solve = spectrum(matrix, SpectrumSettings(top=2), solve=lambda V: np.linalg.solve(K, V))
    assert given_solve.condition == pytest.approx(exact, rel=1e-5)
    by_factor = spectrum(matrix, SpectrumSettings(top=3, condition=True))
    assert by_factor.condition == pytest.approx(exact, rel=1e-5)
    assert abs(by_factor.condition - exact) <= by_factor.condition_error + 1e-6 * exact
    assert by_factor.num_negative == 0
    assert not list(matrix.store.path.parent.glob("*.analysis/factor*"))


def test_the_condition_of_what_is_not_positive(tmp_path, by_krylov):
    matrix = store_of(tmp_path / "k.zarr", with_eigenvalues(np.linspace(5, -1, 12)))
    result = spectrum(matrix, SpectrumSettings(top=2, condition=True))
    assert result.condition is None
    assert "not positive definite" in result.not_positive


# memory ---------------------------------------------------------------------------------------------------------------


def with_left(monkeypatch, left):
    monkeypatch.setattr(spectra, "memory_left", lambda limit: left)


def fake_matrix(num_rows, side):
    return type("Fake", (), {"num_rows": num_rows, "side": side, "name": "k.zarr"})()


@pytest.mark.parametrize("left", [200e6, 400e6, 800e6, 3e9, 40e9])
@pytest.mark.parametrize("num_rows", [20_000, 100_000])
def test_the_plan_fills_the_memory_and_no_more(monkeypatch, left, num_rows):
    with_left(monkeypatch, left)
    matrix, wanted = fake_matrix(num_rows, 1000), SpectrumSettings(memory_bytes=1, top=50)
    if left < 1e9 and num_rows > 20_000:
        return
    sizes = spectra.plan_sizes(matrix, wanted)
    assert sizes.bytes + spectra.reading_bytes(matrix, sizes.block) <= left
    has_all = sizes.num_blocks == spectra.BLOCKS
    assert has_all or sizes.block == 50 + spectra.OVERSAMPLING
    larger = Sizes(num_rows, sizes.block + has_all, sizes.num_blocks + (not has_all))
    is_most = larger.bytes + spectra.reading_bytes(matrix, larger.block) > left
    assert is_most or sizes.block == spectra.MAX_BLOCK


def test_without_a_budget_blocks_stay_small(monkeypatch):
    with_left(monkeypatch, 40e9)
    assert spectra.plan_sizes(fake_matrix(20_000, 1000), SpectrumSettings(top=50)).block == spectra.UNASKED_BLOCK
    assert spectra.plan_sizes(fake_matrix(20_000, 1000), SpectrumSettings(top=400)).block == 408


def test_all_are_computed_where_they_fit_and_are_wanted(monkeypatch):
    with_left(monkeypatch, 4e9)
    assert spectra.is_dense(fake_matrix(20_000, 1000), SpectrumSettings())
    assert not spectra.is_dense(fake_matrix(20_000, 1000), SpectrumSettings(top=50))
    assert not spectra.is_dense(fake_matrix(30_000, 1000), SpectrumSettings())
    assert spectra.is_dense(fake_matrix(2_000, 1000), SpectrumSettings(top=50))


def test_too_little_memory_names_what_is_needed(tmp_path, by_krylov):
    matrix = store_of(tmp_path / "k.zarr", gram(60), tile_samples=60)
    import psutil

    limit = psutil.Process().memory_info().rss + 50_000
    with pytest.raises(
        BudgetError, match=r"is too small: expected .* for .* vectors of 60 rows and 6 tiles \(a lower `top`"
    ) as caught:
        spectrum(matrix, SpectrumSettings(memory_bytes=limit, top=50))
    assert "\n" not in str(caught.value)


# the command line -----------------------------------------------------------------------------------------------------

KEYS = {
    "eigenvalues", "residual_bounds", "trace", "frobenius_norm", "effective_rank", "participation_ratio", "stable_rank",
    "condition", "passes", "store", "seconds", "peak_bytes",
}  # fmt: skip


def test_one_object_per_store(tmp_path):
    paths = [store_of(tmp_path / f"{seed}.zarr", gram(12, seed)).name for seed in range(2)]
    done = CliRunner().invoke(cli, ["analyze", "spectrum", *paths, "--json", "--top", "4"])
    assert done.exit_code == 0, done.output
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["store"] for result in results] == paths
    for seed, result in enumerate(results):
        assert set(result) >= KEYS
        np.testing.assert_allclose(result["eigenvalues"], sorted_eigenvalues(gram(12, seed))[:4], rtol=1e-10)


@pytest.mark.parametrize("top", ["13", "0", "-3"])
def test_more_eigenvalues_than_there_are_is_one_line(tmp_path, capsys, top):
    path = store_of(tmp_path / "k.zarr", gram(12)).name
    assert run_command(["analyze", "spectrum", path, "--top", top]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"has no {top} eigenvalues: expected from 1 to its 12 rows" in error


def test_what_makes_no_sense_is_refused(tmp_path):
    matrix = store_of(tmp_path / "k.zarr", gram(6))
    for wrong in ({"tolerance": 0.0}, {"tolerance": 1.0}, {"max_passes": 0}):
        with pytest.raises(InputError):
            spectrum(matrix, SpectrumSettings(**wrong))


def test_the_page_says_what_was_done(tmp_path, by_krylov):
    path = store_of(tmp_path / "k.zarr", gram(60)).name
    shown = CliRunner().invoke(cli, ["analyze", "spectrum", path, "--top", "2"])
    assert shown.exit_code == 0, shown.output
    assert "2 of 60 eigenvalues" in shown.output
    assert "by block Krylov with blocks of " in shown.output
    assert "not computed, because the kernel does not fit" in shown.output
    shown = CliRunner().invoke(cli, ["analyze", "spectrum", path])
    assert "60 of 60 eigenvalues, 1 pass, by LAPACK" in shown.output
