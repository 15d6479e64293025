"""Two kernels of the same samples against NumPy and SciPy on the dense matrices."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from filled import MEMORY, drawn, filled
from hypothesis import given
from hypothesis import strategies as st
from strategies import few

from ntkgen import cli
from ntkgen.analysis import comparison as comparing
from ntkgen.analysis.comparison import CompareSettings, compare
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.pairs import PairMoments
from ntkgen.errors import BudgetError, FingerprintError, InputError

asked = functools.partial(CompareSettings, memory_bytes=MEMORY)
tiles = st.integers(1, 9)
layouts = st.sampled_from(["upper", "full"])


def pair_of(n=6, m=2, seed=0, **options):
    """Two kernels of the same samples, of two networks."""
    content = drawn(n, m, seed=seed)
    return content, dataclasses.replace(
        content, kernel=drawn(n, m, seed=seed + 1).kernel * 3, parameters="4a", **options
    )


def matrices(folder, first, second):
    return [open_matrix(filled(Path(folder) / f"{name}.zarr", c)) for name, c in (("a", first), ("b", second))]


def dense_distance(K, L):
    return 1 - np.sum(K * L) / np.linalg.norm(K) / np.linalg.norm(L)


def centered(K):
    H = np.eye(len(K)) - 1 / len(K)
    return H @ K @ H


@given(n=st.integers(2, 9), m=st.integers(1, 3), tile=tiles, other=tiles, one=layouts, two=layouts, seed=tiles)
@few
def test_numbers_are_those_of_the_dense_matrices(n, m, tile, other, one, two, seed):
    first, second = pair_of(n, m, seed, tile_samples=other, layout=two)
    first = dataclasses.replace(first, tile_samples=tile, layout=one)
    top = max(1, n * m // 2)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(*matrices(folder, first, second), asked(top))
    K, L = first.kernel, second.kernel
    assert found.distance == pytest.approx(dense_distance(K, L), abs=1e-10)
    assert found.centered_alignment == pytest.approx(1 - dense_distance(centered(K), centered(L)), abs=1e-10)
    values, vectors = zip(*(np.linalg.eigh(M) for M in (K, L)), strict=True)
    angles = scipy.linalg.subspace_angles(*(v[:, -top:] for v in vectors))
    np.testing.assert_allclose(found.principal_angles, angles, atol=1e-10)
    np.testing.assert_allclose(found.eigenvalue_ratios, (values[1] / values[0])[::-1][:top], rtol=1e-10)
    assert found.cost is None


def test_each_tile_is_read_once_where_sides_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "_top_space", lambda *_: comparing.Space(np.ones(1), np.eye(18)[:, :1], None))
    first, second = pair_of(9)
    assert compare(*matrices(tmp_path, first, second), asked(1)).passes == [1, 1]
    other = dataclasses.replace(second, tile_samples=4, samples="91bc")
    passes = compare(*matrices(tmp_path / "x", first, other), asked(1)).passes
    assert passes[1] == 1
    assert 1 < passes[0] <= 4


@given(st.floats(1e-12, 0.3), st.floats(0.1, 100), st.integers(0, 99))
def test_a_small_distance_keeps_its_digits(size, scale, seed):
    """K and (K + size · E) scale with E orthogonal to K: 1 − 1/√(1 + size²)."""
    rng = np.random.default_rng(seed)
    K, E = (part + part.T for part in rng.normal(size=(2, 8, 8)))
    E = E - K * np.sum(K * E) / np.sum(K * K)
    K, E = K / np.linalg.norm(K), E / np.linalg.norm(E)
    moments = PairMoments(np.zeros((2, 8)), np.zeros(2))
    moments.add(slice(0, 8), slice(0, 8), K, K + size * E)
    assert moments.distance == pytest.approx(-np.expm1(-np.log1p(size**2) / 2), rel=1e-3, abs=1e-28)
    scaled = PairMoments(np.zeros((2, 8)), np.zeros(2))
    scaled.add(slice(0, 8), slice(0, 8), K, scale * (K + size * E))
    assert scaled.distance == pytest.approx(-np.expm1(-np.log1p(size**2) / 2), abs=1e-13)


def test_a_kernel_is_no_way_from_itself_and_its_multiples(tmp_path):
    content = drawn(8, 2)
    same = dataclasses.replace(content, kernel=2 * content.kernel, parameters="4a")
    first, second = matrices(tmp_path, content, same)
    itself = compare(first, open_matrix(first.store), asked(3))
    assert (itself.distance, itself.eigenvalue_ratios) == (0.0, [1.0] * 3)
    found = compare(first, second, asked(3))
    assert found.distance == pytest.approx(0, abs=1e-14)
    assert found.centered_alignment == pytest.approx(1)
    assert max(found.principal_angles) < 1e-7
    np.testing.assert_allclose(found.eigenvalue_ratios, 2)


def test_a_constant_is_no_difference_to_the_centred_alignment(tmp_path):
    content = drawn(8, 2)
    other = dataclasses.replace(content, kernel=content.kernel + 7, parameters="4a")
    found = compare(*matrices(tmp_path, content, other), asked(1))
    assert found.centered_alignment == pytest.approx(1)
    assert found.distance > 0.01
    flat = dataclasses.replace(content, kernel=np.full((16, 16), 0.1), parameters="5b")
    assert compare(*matrices(tmp_path / "x", content, flat), asked(1)).centered_alignment is None


@pytest.mark.slow
def test_the_space_of_a_large_kernel_is_found_by_products(tmp_path, monkeypatch):
    first, second = pair_of(30, 4)
    spectrum = 0.8 ** np.arange(120)
    kernels = []
    for seed in (0, 1):
        Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(120, 120)))[0]
        kernels.append((Q * spectrum) @ Q.T)
    first, second = (dataclasses.replace(c, kernel=K) for c, K in zip((first, second), kernels, strict=True))
    pair = matrices(tmp_path, first, second)
    exact = compare(*pair, asked(4))
    monkeypatch.setattr(comparing, "_dense_bytes", lambda *_: 2 * MEMORY)
    found = compare(*pair, asked(4))
    assert found.remembered is False
    np.testing.assert_allclose(found.eigenvalues, exact.eigenvalues, rtol=1e-10)
    np.testing.assert_allclose(found.principal_angles, exact.principal_angles, atol=found.angle_error + 1e-7)
    assert found.angle_error < 1e-3
    assert exact.angle_error == 0
    assert found.gaps == pytest.approx([0.2, 0.2])


# precisions -----------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_lower_precision(tmp_path):
    content = dataclasses.replace(drawn(8, 3), dtypes=("float16", "float32", "float64"))
    store = filled(tmp_path / "k.zarr", content)
    first, second = open_matrix(store), open_matrix(store, dtype="float16")
    found = compare(first, second, asked(2)).cost
    K, L = first.dense(), second.dense()
    values, others = np.linalg.eigvalsh(K), np.linalg.eigvalsh(L)
    assert found.frobenius_error == pytest.approx(np.linalg.norm(K - L) / np.linalg.norm(K), rel=1e-9)
    assert found.eigenvalue_error == pytest.approx(np.abs(values - others).max() / values[-1], rel=1e-6)
    assert found.relative_eigenvalue_error == pytest.approx(np.abs(others / values - 1).max(), rel=1e-6)
    assert found.logdet == pytest.approx(np.linalg.slogdet(K)[1], abs=1e-10)
    assert found.logdet_error == pytest.approx(np.linalg.slogdet(L)[1] - np.linalg.slogdet(K)[1], abs=1e-9)
    assert (found.lower_dtype, found.eigenvalues_compared, found.not_positive) == ("float16", 24, 0)
    back = compare(second, first, asked(2)).cost
    assert back.lower_dtype == "float16"
    assert back.frobenius_error == pytest.approx(found.frobenius_error)


def test_precisions_in_which_it_was_computed_are_told_apart(tmp_path):
    content = drawn(6, 2)
    other = dataclasses.replace(content, kernel=content.kernel * (1 + 1e-7), precision="float32")
    found = compare(*matrices(tmp_path, content, other), asked(2))
    assert found.cost.lower.endswith("b.zarr")
    assert found.cost.frobenius_error == pytest.approx(1e-7, rel=1e-3)


def test_a_kernel_that_lost_its_smallest_eigenvalues_has_no_determinant(tmp_path):
    content = drawn(6, 2)
    lost = dataclasses.replace(content, kernel=content.kernel - 300 * np.eye(12), precision="tf32")
    cost = compare(*matrices(tmp_path, content, lost), asked(2)).cost
    assert (cost.logdet_of_lower, cost.logdet_error) == (None, None)
    assert cost.not_positive > 0


# which samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": "other"}, "fingerprint"),
        ({"labels": np.array([1, 0, 1, 0, 1, 1])}, "row_label"),
        ({"output": "index:1"}, "output map"),
    ],
)
def test_kernels_of_other_samples_are_refused(tmp_path, capsys, change, says):
    first, second = pair_of()
    first = dataclasses.replace(first, labels=np.zeros(6, int))
    second = dataclasses.replace(second, **{"labels": first.labels, **change})
    with pytest.raises(FingerprintError, match=f"expected the same .*{says}"):
        compare(*matrices(tmp_path, first, second), asked(2))
    assert cli.run(["analyze", "compare", str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_kernels_of_another_size_are_refused(tmp_path):
    for other in (drawn(7, 2), drawn(6, 3)):
        folder = tmp_path / str(len(other.kernel))
        with pytest.raises(FingerprintError, match="expected the same number of"):
            compare(*matrices(folder, drawn(6, 2), other), asked(2))


def test_the_leading_part_of_one_is_compared_with_that_of_the_other(tmp_path):
    first, second = pair_of(9)
    whole = open_matrix(filled(tmp_path / "a.zarr", first))
    part = open_matrix(filled(tmp_path / "b.zarr", second, skip={(1, 2)}), allow_partial=True)
    found = compare(whole, part, asked(2))
    assert found.distance == pytest.approx(dense_distance(first.kernel[:12, :12], second.kernel[:12, :12]))
    back = compare(part, whole, asked(2))
    assert (back.distance, back.rows) == (pytest.approx(found.distance), 12)


@pytest.mark.parametrize("top", [0, 13])
def test_no_more_eigenvalues_than_rows(tmp_path, top):
    with pytest.raises(InputError, match=f"found `top` {top}"):
        compare(*matrices(tmp_path, *pair_of()), asked(top))


def test_two_tiles_must_fit(tmp_path, monkeypatch):
    pair = matrices(tmp_path, *pair_of())
    monkeypatch.setattr("ntkgen.analysis.matrix.memory_left", lambda _: 100)
    with pytest.raises(BudgetError, match="two tiles of each kernel"):
        compare(*pair, asked(2))


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_compares_each_with_the_first(tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.zarr") for name in "abc"]
    for seed, path in enumerate(paths):
        content = pair_of()[0]
        filled(path, dataclasses.replace(content, kernel=drawn(6, 2, seed=seed).kernel, parameters=str(seed)))
    assert cli.run(["analyze", "compare", *paths, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(result["reference"], result["store"]) for result in found] == [(paths[0], path) for path in paths[1:]]
    for result in found:
        assert {"distance", "centered_alignment", "seconds", "peak_bytes"} <= set(result)
        assert len(result["eigenvalue_ratios"]) == 10
    assert cli.run(["analyze", "compare", *paths]) == 0
    assert f"{found[1]['distance']:.6g}" in capsys.readouterr().out


def test_the_command_compares_the_dtypes_of_one_store(tmp_path, capsys):
    path = str(tmp_path / "k.zarr")
    filled(path, dataclasses.replace(drawn(6, 2), dtypes=("float16", "float32")))
    assert cli.run(["analyze", "compare", path]) == 0
    page = capsys.readouterr().out
    assert f"float16, against {path} (float32)" in page
    assert "log-determinant" in page
    filled(tmp_path / "one.zarr", drawn(6, 2))
    assert cli.run(["analyze", "compare", str(tmp_path / "one.zarr")]) == 2
    assert "holds only one kernel" in capsys.readouterr().err
