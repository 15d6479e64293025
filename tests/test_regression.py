"""Kernel ridge regression against NumPy on the dense matrix, and against really leaving samples out."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cases import in_turn
from filled import MEMORY, drawn, filled, one_hot, rectangle
from hypothesis import given
from hypothesis import strategies as st
from strategies import few

from ntkgen import cli
from ntkgen.analysis import regression
from ntkgen.analysis.linalg import conjugate_gradients
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.regression import RegressSettings, bytes_of, choose_method, regress
from ntkgen.analysis.targets import contrasts
from ntkgen.errors import InputError
from ntkgen.progress import ignore_report

SHIFTS = (0.3, 2.0, 50.0)
Asked = functools.partial(RegressSettings, memory_bytes=MEMORY)
problems = given(
    n=st.integers(2, 8),
    m=st.integers(1, 4),
    tile=st.integers(1, 9),
    layout=st.sampled_from(["upper", "full"]),
    offset=st.sampled_from(["zero", "logits"]),
    seed=st.integers(0, 99),
)
close = {"rtol": 1e-10, "atol": 1e-12}


def problem_of(content, offset="zero"):
    """The dense kernel, targets and offset, by the definitions, with a column per kernel that is fitted."""
    m, scores = content.logits.shape[1], one_hot(content)
    start = content.logits if offset == "logits" else np.zeros_like(scores)
    if content.output == "trace":
        return content.kernel / m, scores, start
    maps = {"centered": lambda s: s @ contrasts(m).T, "index:1": lambda s: s[:, [1]]}
    seen = maps.get(content.output, lambda s: s)
    return content.kernel, seen(scores).reshape(-1, 1), seen(start).reshape(-1, 1)


def really_left_out(K, y, f0, shift, rows_per_sample):
    """The residuals on each sample of the fit to all others."""
    out = np.empty_like(y)
    for at in range(0, len(y), rows_per_sample):
        there = np.arange(at, at + rows_per_sample)
        others = np.setdiff1d(np.arange(len(y)), there)
        inner = K[np.ix_(others, others)] + shift * np.eye(len(others))
        alpha = np.linalg.solve(inner, (y - f0)[others])
        out[there] = y[there] - f0[there] - K[np.ix_(there, others)] @ alpha
    return out


def check(found, content, offset, shifts=SHIFTS, tolerance=close):
    K, y, f0 = problem_of(content, offset)
    for at, shift in enumerate(shifts):
        S = K @ np.linalg.inv(K + shift * np.eye(len(K)))
        residual = (y - f0) - S @ (y - f0)
        left = really_left_out(K, y, f0, shift, len(K) // len(content.labels))
        gcv = np.mean(residual**2) / (np.trace(np.eye(len(K)) - S) / len(K)) ** 2
        np.testing.assert_allclose(found.train_error[at], np.mean(residual**2), **tolerance)
        np.testing.assert_allclose(found.gcv[at], gcv, **tolerance)
        np.testing.assert_allclose(found.loo_error[at], np.mean(left**2), **tolerance)
    assert found.shifts == list(shifts)


@problems
@few
@pytest.mark.parametrize("method", ["eigh", "cholesky"])
def test_errors_are_those_of_the_dense_matrix(n, m, tile, layout, offset, seed, method):
    content = drawn(n, m, seed=seed, tile_samples=tile, layout=layout)
    with tempfile.TemporaryDirectory() as folder:
        matrix = open_matrix(filled(Path(folder) / "k.zarr", content))
        found = regress(matrix, Asked(SHIFTS, offset, None, method))
    check(found, content, offset)
    assert (found.offset, found.method) == (offset, method)


@in_turn(
    "output method offset",
    ["centered", "index:1", "trace"],
    ["eigh", "cholesky", "cg"],
    ["logits", "zero"],
    always=[("cg", "logits")],
)
def test_errors_of_every_output_map(tmp_path, output, method, offset):
    content = drawn(8, 3, output)
    found = regress(open_matrix(filled(tmp_path / "k.zarr", content)), Asked(SHIFTS, offset, None, method))
    if method == "cg":
        assert found.loo_error == [None] * 3
        exact = regress(open_matrix(filled(tmp_path / "e.zarr", content)), Asked(SHIFTS, offset))
        np.testing.assert_allclose(found.train_error, exact.train_error, rtol=1e-8)
    else:
        check(found, content, offset)


def test_a_matrix_of_one_output_is_fitted_by_itself(tmp_path):
    content = drawn(6, 3, "diagonal")
    found = regress(open_matrix(filled(tmp_path / "k.zarr", content), output=1), Asked(SHIFTS))
    check(found, dataclasses.replace(content, kernel=content.kernel[1], output="index:1"), "zero")


def test_leaving_rows_out_one_by_one_would_leak():
    content = drawn(6, 3)
    K, y, f0 = problem_of(content)
    by_row = really_left_out(K, y, f0, 0.3, 1)
    assert np.mean(by_row**2) != pytest.approx(np.mean(really_left_out(K, y, f0, 0.3, 3) ** 2), rel=0.05)


@pytest.mark.parametrize("method", ["eigh", "cholesky"])
def test_no_ridge_at_all_interpolates(tmp_path, method):
    content = drawn(6, 3)
    found = regress(open_matrix(filled(tmp_path / "k.zarr", content)), Asked((0.0,), "zero", None, method))
    K, y, f0 = problem_of(content)
    left, G = really_left_out(K, y, f0, 0.0, 3), np.linalg.inv(K)
    assert found.train_error == [0.0]
    assert found.train_accuracy == [1.0]
    np.testing.assert_allclose(found.loo_error, [np.mean(left**2)], rtol=1e-8)
    np.testing.assert_allclose(found.gcv, [np.mean((G @ y) ** 2) / np.mean(np.diag(G)) ** 2], rtol=1e-8)


def test_accuracies_are_those_of_the_predictions(tmp_path):
    content = drawn(9, 3)
    found = regress(open_matrix(filled(tmp_path / "k.zarr", content)), Asked((2.0,), "logits"))
    K, y, f0 = problem_of(content, "logits")
    fitted = f0 + K @ np.linalg.solve(K + 2 * np.eye(27), y - f0)
    left = y - really_left_out(K, y, f0, 2.0, 3)
    assert found.train_accuracy == [np.mean(fitted.reshape(9, 3).argmax(1) == content.labels)]
    assert found.loo_accuracy == [np.mean(left.reshape(9, 3).argmax(1) == content.labels)]


# test samples ---------------------------------------------------------------------------------------------------------


@in_turn("output offset method", ["full", "centered", "trace", "index:1"], ["zero", "logits"], ["eigh", "cg"])
def test_predictions_for_test_samples(tmp_path, output, offset, method):
    content = drawn(8, 3, output)
    other = rectangle(content, 6)
    test = filled(tmp_path / "t.zarr", other)
    matrix = open_matrix(filled(tmp_path / "k.zarr", content))
    found = regress(matrix, Asked(SHIFTS, offset, test, method))
    K, y, f0 = problem_of(content, offset)
    cross = other.kernel / (3 if output == "trace" else 1)
    columns = dataclasses.replace(content, labels=other.against[0], logits=other.against[1])
    _, y_test, f0_test = problem_of(columns, offset)
    for at, shift in enumerate(SHIFTS):
        values = f0_test + cross.T @ np.linalg.solve(K + shift * np.eye(len(K)), y - f0)
        np.testing.assert_allclose(found.test_error[at], np.mean((values - y_test) ** 2), rtol=1e-8)
        if output == "index:1":
            expected = (values[:, 0] > 0.5) == (columns.labels == 1)
        elif output == "centered":
            expected = (values.reshape(6, 2) @ contrasts(3)).argmax(1) == columns.labels
        else:
            expected = values.reshape(6, 3).argmax(1) == columns.labels
        assert found.test_accuracy[at] == np.mean(expected)


def test_a_leading_part_predicts_too(tmp_path):
    content = drawn(9, 2)
    other = rectangle(content, 4)
    matrix = open_matrix(filled(tmp_path / "k.zarr", content, skip={(0, 2)}), allow_partial=True)
    found = regress(matrix, Asked((1.0,), "zero", filled(tmp_path / "t.zarr", other)))
    K, y, _ = problem_of(content)
    values = other.kernel[:12].T @ np.linalg.solve(K[:12, :12] + np.eye(12), y[:12])
    np.testing.assert_allclose(found.test_error, [np.mean((values - np.eye(2)[other.against[0]].reshape(-1, 1)) ** 2)])


# conjugate gradients --------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), tile=st.integers(1, 9), layout=st.sampled_from(["upper", "full"]))
@few
def test_conjugate_gradients_find_what_the_decomposition_does(seed, tile, layout):
    content = drawn(9, 4, seed=seed, tile_samples=tile, layout=layout)
    with tempfile.TemporaryDirectory() as folder:
        store = filled(Path(folder) / "k.zarr", content)
        found = regress(open_matrix(store), Asked(SHIFTS, "zero", None, "cg"))
        exact = regress(open_matrix(store), Asked(SHIFTS, "zero", None, "eigh"))
    np.testing.assert_allclose(found.train_error, exact.train_error, rtol=1e-9)
    assert max(found.residual_bounds) <= 1e-10
    assert found.loo_error == [None] * 3
    for at in range(3):
        assert abs(found.gcv[at] - exact.gcv[at]) <= 6 * found.gcv_standard_error[at] + 1e-9


def test_the_residual_bound_is_the_true_residual(tmp_path, monkeypatch):
    monkeypatch.setattr(conjugate_gradients, "MAX_STEPS", 3)
    content = drawn(30, 4, tile_samples=9)
    problem = regression.Problem.of(open_matrix(filled(tmp_path / "k.zarr", content)), "zero")
    (fit,) = regression.fit_by_conjugate_gradients(problem, [1e-6], 0, ignore_report)
    K, y, _ = problem_of(content)
    true = np.linalg.norm(y - K @ fit.alpha - 1e-6 * fit.alpha) / np.linalg.norm(y)
    assert fit.bound == pytest.approx(true)
    assert fit.bound > 1e-3


@pytest.mark.slow
def test_the_preconditioner_saves_passes(tmp_path):
    content = drawn(40, 4, tile_samples=20)
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(160, 160)))[0]
    content = dataclasses.replace(content, kernel=(Q * 10.0 ** np.linspace(4, -4, 160)) @ Q.T)
    store, alphas, passes = filled(tmp_path / "k.zarr", content), [], []
    for rank in (0, 120):
        matrix = open_matrix(store)
        problem = regression.Problem.of(matrix, "zero")
        alphas.append(regression.fit_by_conjugate_gradients(problem, [1e-3], rank, ignore_report)[0].alpha)
        passes.append(matrix.passes)
    np.testing.assert_allclose(
        alphas[1],
        np.linalg.solve(content.kernel + 1e-3 * np.eye(160), one_hot(content).reshape(-1, 1)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert passes[1] < passes[0] / 2


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_conjugate_gradients_survive_what_is_dependent_or_zero(tmp_path, rank):
    content = drawn(6, 3, "trace")
    problem = regression.Problem.of(open_matrix(filled(tmp_path / "k.zarr", content)), "zero")
    same = np.repeat(problem.targets[:, :1], 3, axis=1) * [1, 2, 0]
    fits = regression.fit_by_conjugate_gradients(dataclasses.replace(problem, targets=same), [0.5], rank, ignore_report)
    expected = np.linalg.solve(content.kernel / 3 + 0.5 * np.eye(6), same)
    np.testing.assert_allclose(fits[0].alpha, expected, rtol=1e-8, atol=1e-10)


# choices and refusals -------------------------------------------------------------------------------------------------


def test_the_method_follows_from_the_memory(tmp_path, monkeypatch):
    matrix = open_matrix(filled(tmp_path / "k.zarr", drawn(30, 4)))

    def chosen(shifts, left):
        monkeypatch.setattr(regression, "memory_left", lambda _: left)
        return choose_method(matrix, shifts, 0)

    assert chosen(SHIFTS, bytes_of(matrix, "eigh")) == "eigh"
    assert chosen(SHIFTS, bytes_of(matrix, "eigh") - 1) == "cholesky"
    assert chosen(SHIFTS, bytes_of(matrix, "cholesky") - 1) == "cg"
    assert chosen((1.0,), MEMORY) == "cholesky"


def test_another_method_is_computed_and_the_same_remembered(tmp_path):
    store = filled(tmp_path / "k.zarr", drawn())
    for settings, is_new in [
        (Asked(SHIFTS, method="cg"), True),
        (Asked(SHIFTS), True),
        (Asked(SHIFTS), False),
        (Asked(SHIFTS, offset="logits"), True),
        (Asked(SHIFTS[:2]), True),
        (Asked(SHIFTS, test=filled(tmp_path / "t.zarr", rectangle(drawn()))), True),
    ]:
        assert regress(open_matrix(store), settings).remembered is not is_new


@pytest.mark.parametrize(("norm", "count"), [(None, 9), (1e-3, 6), (1e9, 1)])
def test_the_default_shifts_are_not_below_the_errors_of_the_kernel(tmp_path, monkeypatch, norm, count):
    content = drawn(8, 3)
    mean = content.kernel.trace() / 24
    errors = property(lambda _: norm and norm * mean)
    monkeypatch.setattr("ntkgen.analysis.matrix.Matrix.error_norm", errors)
    found = regress(open_matrix(filled(tmp_path / "k.zarr", content)), Asked())
    np.testing.assert_allclose(found.shifts, mean * 10.0 ** np.arange(-6, 3)[-count:])


def singular():
    content = drawn(6, 3)
    J = np.random.default_rng(0).normal(size=(18, 4))
    return dataclasses.replace(content, kernel=J @ J.T)


@pytest.mark.parametrize("method", ["eigh", "cholesky"])
@pytest.mark.parametrize("shift", [0.0, 1e-20])
def test_a_singular_kernel_needs_a_ridge(tmp_path, method, shift):
    store = filled(tmp_path / "k.zarr", singular())
    with pytest.raises(InputError, match="cannot be inverted with λ"):
        regress(open_matrix(store), Asked((shift,), method=method))
    check(regress(open_matrix(store), Asked(SHIFTS, method=method)), singular(), "zero")


@pytest.mark.parametrize("method", ["eigh", "cholesky", "cg"])
def test_an_indefinite_kernel_is_refused(tmp_path, method):
    content = singular()
    store = filled(tmp_path / "k.zarr", dataclasses.replace(content, kernel=content.kernel - np.eye(18)))
    with pytest.raises(InputError, match=r"cannot be inverted with λ = 0\.5"):
        regress(open_matrix(store), Asked((0.5,), method=method))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shifts", "1", "--shifts=-2"], "must not be negative"),
        (["--shifts", "nan"], "must not be negative"),
        (["--shifts", "0", "--method", "cg"], "must be positive"),
        (["--shifts", "0"], "cannot be inverted"),
        (["--test", "K"], "of samples with themselves"),
        (["--test", "nowhere"], "no kernel store"),
        (["K", "--test", "K"], "--test belongs to one kernel"),
        (["--dtype", "float16"], "float16"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, says):
    path = str(tmp_path / "k.zarr")
    filled(path, singular())
    arguments = [path if argument == "K" else argument for argument in arguments]
    assert cli.run(["analyze", "regress", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_an_imported_kernel_has_no_logits_to_start_from(tmp_path):
    content = drawn(6, 3)
    store = filled(tmp_path / "k.zarr", dataclasses.replace(content, logits=np.zeros((6, 0))))
    with pytest.raises(InputError, match="has no logits"):
        regress(open_matrix(store), Asked(SHIFTS, "logits"))
    check(regress(open_matrix(store), Asked(SHIFTS)), content, "zero")


def test_the_command(tmp_path, capsys):
    content = drawn(8, 3)
    path, test = str(tmp_path / "k.zarr"), str(tmp_path / "t.zarr")
    filled(path, content)
    filled(test, rectangle(content))
    assert cli.run(["analyze", "regress", path, "--shifts", "0.1", "1", "--test", test, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shifts"] == [0.1, 1.0]
    keys = {"train_error", "loo_error", "gcv", "test_accuracy", "store", "seconds", "peak_bytes", "offset"}
    assert keys <= set(found)
    for arguments in ([], ["--method", "cg"], ["--offset", "logits"]):
        assert cli.run(["analyze", "regress", path, "--test", test, *arguments]) == 0
        page = capsys.readouterr().out.splitlines()
        assert page[0] == path
        assert len(page) >= 3 + 9
