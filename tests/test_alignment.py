"""Targets of the rows of a kernel, and alignment with them, against NumPy on the dense matrix."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from filled import MEMORY, drawn, filled, one_hot, rectangle
from hypothesis import given
from hypothesis import strategies as st
from strategies import few

from ntkgen import cli
from ntkgen.analysis.alignment import AlignSettings, align, centered_product
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.targets import Problem, Readout, TestSamples, contrasts
from ntkgen.errors import BudgetError, FingerprintError, InputError, StoreError
from ntkgen.store.opening import open_store

SETTINGS = AlignSettings(memory_bytes=MEMORY)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


everywhere = given(
    n=st.integers(2, 9),
    m=st.integers(2, 4),
    tile=st.integers(1, 10),
    layout=st.sampled_from(["upper", "full"]),
    seed=st.integers(0, 99),
)


def dense_alignment(K, Y):
    """⟨K, Y Yᵀ⟩ / (‖K‖ ‖Y Yᵀ‖), by the definition."""
    L = Y @ Y.T
    return np.sum(K * L) / np.linalg.norm(K) / np.linalg.norm(L)


def dense_centered_alignment(K, Y):
    H = np.eye(len(K)) - 1 / len(K)
    K, L = H @ K @ H, H @ Y @ Y.T @ H
    if np.linalg.norm(L) < 1e-12:
        return None
    return np.sum(K * L) / np.linalg.norm(K) / np.linalg.norm(L)


def agree(found, expected, tolerance=1e-10):
    if expected is None or found is None:
        assert found is expected
    else:
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@everywhere
@few
def test_alignment_is_that_of_the_dense_matrix(n, m, tile, layout, seed):
    content = drawn(n, m, seed=seed, tile_samples=tile, layout=layout)
    with tempfile.TemporaryDirectory() as folder:
        found = align(open_matrix(filled(Path(folder) / "k.zarr", content)), SETTINGS)
    K, Y = content.kernel, one_hot(content)
    agree(found.alignment, dense_alignment(K, Y.reshape(-1, 1)))
    agree(found.centered_alignment, dense_centered_alignment(K, Y.reshape(-1, 1)))
    for a in range(m):
        part, y = K[a::m, a::m], Y[:, [a]]
        agree(found.output_alignment[a], dense_alignment(part, y) if y.any() else None)
        agree(found.output_centered_alignment[a], dense_centered_alignment(part, y))
    assert found.passes == 1


@pytest.mark.parametrize("output", ["centered", "index:1", "trace", "diagonal"])
def test_alignment_of_every_output_map(folder, output):
    content = drawn(8, 3, output)
    plane = 1 if output == "diagonal" else None
    found = align(open_matrix(filled(folder / "k.zarr", content), output=plane), SETTINGS)
    K = content.kernel if plane is None else content.kernel[plane]
    scores = one_hot(content)
    Y = {"centered": (scores @ contrasts(3).T).reshape(-1, 1), "trace": scores}.get(output, scores[:, [1]])
    agree(found.alignment, dense_alignment(K, Y))
    agree(found.centered_alignment, dense_centered_alignment(K, Y))
    assert len(found.output_alignment) == {"centered": 2, "trace": 3}.get(output, 1)
    if output == "trace":
        for a in range(3):
            agree(found.output_alignment[a], dense_alignment(K, Y[:, [a]]))
            agree(found.output_centered_alignment[a], dense_centered_alignment(K, Y[:, [a]]))


def test_a_kernel_of_the_labels_alone_is_aligned_with_them(folder):
    content = drawn(6, 2)
    y = one_hot(content).reshape(-1, 1)
    found = align(open_matrix(filled(folder / "k.zarr", dataclasses.replace(content, kernel=5 * y @ y.T))), SETTINGS)
    agree(found.alignment, 1.0)
    agree(found.centered_alignment, 1.0)


def test_what_is_constant_has_no_centered_alignment(folder):
    content = dataclasses.replace(drawn(6, 2), kernel=np.full((12, 12), 0.1))
    found = align(open_matrix(filled(folder / "k.zarr", content)), SETTINGS)
    assert found.centered_alignment is None
    assert found.alignment > 0
    one_class = dataclasses.replace(drawn(6, 2, "index:0"), labels=np.zeros(6, int))
    assert align(open_matrix(filled(folder / "j.zarr", one_class)), SETTINGS).centered_alignment is None


def test_a_leading_part_is_aligned_with_its_labels(folder):
    content = drawn(9, 2)
    store = filled(folder / "k.zarr", content, skip={(1, 2)})
    with pytest.raises(StoreError, match="not complete"):
        open_matrix(store)
    found = align(open_matrix(store, allow_partial=True), SETTINGS)
    y = one_hot(content)[:6].reshape(-1, 1)
    agree(found.alignment, dense_alignment(content.kernel[:12, :12], y))
    assert found.rows == 12


def test_a_result_is_remembered_and_not_that_of_other_rows(folder):
    store = filled(folder / "k.zarr", drawn(9, 2))
    first = align(open_matrix(store), SETTINGS)
    again = open_matrix(store)
    second = align(again, SETTINGS)
    assert (first.remembered, second.remembered, again.tiles_read) == (False, True, 0)
    assert dataclasses.replace(first, remembered=True) == second


@given(st.integers(1, 30), st.integers(0, 99))
@few
def test_centering_an_inner_product(rows, seed):
    rng = np.random.default_rng([seed, rows])
    K, L = (part + part.T for part in rng.normal(size=(2, rows, rows)) + 1)
    H = np.eye(rows) - 1 / rows
    expected = np.sum((H @ K @ H) * (H @ L @ H))
    assert centered_product(np.sum(K * L), K.mean(1), L.mean(1)) == pytest.approx(expected, abs=1e-10 * rows**2)


@pytest.mark.parametrize("m", [2, 3, 10])
def test_the_contrasts_are_those_of_the_output_map(m):
    from ntkgen.jacobian.outputs import contrast_matrix

    assert np.array_equal(contrasts(m), contrast_matrix(m).numpy())


@pytest.mark.parametrize("output", ["full", "centered", "index:2", "trace"])
def test_scores_come_back_from_the_rows(output):
    readout = Readout(output, 4, None, "k.zarr")
    scores = np.random.default_rng(0).normal(size=(5, 4))
    back = readout.scores(readout.mapped(scores))
    expected = {"centered": scores - scores.mean(1, keepdims=True), "index:2": scores[:, [2]]}.get(output, scores)
    np.testing.assert_allclose(back, expected, atol=1e-14)
    labels = scores.argmax(1)
    assert readout.accuracy(readout.targets(labels), labels) == 1
    assert readout.accuracy(readout.targets((labels + 1) % 4), labels) < 1


# what cannot be meant -------------------------------------------------------------------------------------------------


def wrong_labels(value):
    content = drawn(6, 3)
    return dataclasses.replace(content, labels=np.where(np.arange(6) == 4, value, content.labels))


@pytest.mark.parametrize(("label", "match"), [(3, "expected 0 to 2.*found 3"), (-1, "has no labels")])
@pytest.mark.parametrize("command", ["align", "regress", "flow"])
def test_labels_that_do_not_fit_are_one_line(folder, capsys, label, match, command):
    filled(folder / "k.zarr", wrong_labels(label))
    assert cli.run(["analyze", command, str(folder / "k.zarr")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(InputError, match=match):
        Problem.of(open_matrix(open_store(folder / "k.zarr")), "zero")


def test_a_damaged_tile_is_one_line_and_a_failure(folder, capsys):
    filled(folder / "k.zarr", drawn())
    chunk = folder / "k.zarr/ntk_float64/c/0/1"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert cli.run(["analyze", "align", str(folder / "k.zarr")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "verify --repair" in error
    assert not set("{}\\") & set(error)


def test_the_sum_of_outputs_has_no_targets(folder):
    store = filled(folder / "k.zarr", drawn(6, 1, "sum"))
    with pytest.raises(InputError, match="Σ f"):
        align(open_matrix(store), SETTINGS)


def test_too_little_memory_is_refused(folder):
    with pytest.raises((BudgetError, InputError), match="memory limit"):
        align(open_matrix(filled(folder / "k.zarr", drawn())), AlignSettings(memory_bytes=1 << 20))


def changed(values):
    return np.where(np.arange(len(values)) == 2, (values + 1) % 3, values)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("parameters", lambda c: {"parameters": "other"}),
        ("output", lambda c: {"output": "centered2"}),
        ("row_label", lambda c: {"labels": changed(c.labels)}),
        ("logits", lambda c: {"logits": c.logits + 1}),
    ],
)
def test_a_test_kernel_of_other_rows_is_refused(folder, what, change):
    content = drawn()
    problem = Problem.of(open_matrix(filled(folder / "k.zarr", content)), "zero")
    TestSamples.of(filled(folder / "good.zarr", rectangle(content, logits=content.logits + 1e-4)), problem, "zero")
    other = filled(folder / "t.zarr", rectangle(content, **change(content)))
    with pytest.raises(FingerprintError, match=f"the same {what}"):
        TestSamples.of(other, problem, "zero")


def test_a_test_kernel_must_be_rectangular_complete_and_labelled(folder):
    content = drawn()
    store = filled(folder / "k.zarr", content)
    problem = Problem.of(open_matrix(store), "zero")
    with pytest.raises(InputError, match="of samples with themselves"):
        TestSamples.of(store, problem, "zero")
    with pytest.raises(StoreError, match="not complete"):
        TestSamples.of(filled(folder / "t.zarr", rectangle(content), skip={(0, 1)}), problem, "zero")
    unlabelled = rectangle(content)
    unlabelled = dataclasses.replace(unlabelled, against=(np.full(5, -1), unlabelled.against[1]))
    with pytest.raises(InputError, match="no labels of its columns"):
        TestSamples.of(filled(folder / "u.zarr", unlabelled), problem, "zero")


# the command ----------------------------------------------------------------------------------------------------------


def test_the_command_prints_an_object_per_store(folder, capsys):
    stores = [str(folder / f"{name}.zarr") for name in "ab"]
    for seed, store in enumerate(stores):
        filled(Path(store), drawn(seed=seed))
    assert cli.run(["analyze", "align", *stores, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["store"] for result in found] == stores
    for result in found:
        assert {"alignment", "centered_alignment", "seconds", "peak_bytes"} <= set(result)
        assert 0 < result["alignment"] < 1
    assert cli.run(["analyze", "align", stores[0]]) == 0
    page = capsys.readouterr().out
    assert page.startswith(stores[0])
    assert f"{found[0]['alignment']:.4f}" in page
    assert not math.isnan(found[1]["centered_alignment"])
