"""Gradient flow against the exponential of the dense matrix, and against another integrator."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
from cases import chosen, in_turn
from filled import MEMORY, drawn, filled, one_hot, rectangle
from hypothesis import given
from hypothesis import strategies as st
from strategies import few
from test_regression import problem_of

from ntkgen import cli
from ntkgen.analysis import flow_courses
from ntkgen.analysis import gradient_flow as flowing
from ntkgen.analysis.gradient_flow import FlowSettings, flow
from ntkgen.analysis.matrix import open_matrix
from ntkgen.analysis.targets import contrasts
from ntkgen.errors import BudgetError

TIMES = (0.0, 0.02, 0.3, 5.0)
Asked = functools.partial(FlowSettings, memory_bytes=MEMORY)


def flowed(content, asked, time, f0=None):
    """f_t, by the exponential of the dense matrix."""
    K, y, start = problem_of(content, asked.offset)
    start = start if f0 is None else f0
    c = asked.normalisation or len(content.labels)
    return y + scipy.linalg.expm(-asked.rate * K * time / c) @ (start - y), y, c


@given(
    n=st.integers(2, 8),
    m=st.integers(2, 4),
    tile=st.integers(1, 9),
    layout=st.sampled_from(["upper", "full"]),
    output=st.sampled_from(["full", "centered", "index:1", "trace"]),
    offset=st.sampled_from(["zero", "logits"]),
    seed=st.integers(0, 99),
)
@few
@pytest.mark.parametrize("is_small", chosen([True, False], [False]))
def test_the_flow_of_the_squared_loss(n, m, tile, layout, output, offset, seed, is_small):
    content = drawn(n, m, output, seed=seed, tile_samples=tile, layout=layout)
    asked = Asked(rate=0.7, times=TIMES, offset=offset)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not is_small:
            patch.setattr(flowing, "_method", lambda *_: "krylov")
        found = flow(open_matrix(filled(Path(folder) / "k.zarr", content)), asked)
    assert found.method == ("eigh" if is_small else "krylov")
    for at, time in enumerate(TIMES):
        values, y, c = flowed(content, asked, time)
        np.testing.assert_allclose(found.train_loss[at], np.sum((y - values) ** 2) / (2 * c), rtol=1e-8, atol=1e-12)
    assert found.normalisation == n


def test_modes_have_learning_times_and_the_energy_of_the_labels(tmp_path):
    content = drawn(8, 3)
    asked = Asked(rate=0.5, normalisation=11.0, num_modes=5, offset="logits")
    found = flow(open_matrix(filled(tmp_path / "k.zarr", content)), asked)
    K, y, f0 = problem_of(content, "logits")
    values, vectors = (part[..., ::-1] for part in np.linalg.eigh(K))
    energies = (vectors.T @ (y - f0)).ravel() ** 2 / np.sum((y - f0) ** 2)
    np.testing.assert_allclose(found.eigenvalues, values[:5], rtol=1e-12)
    np.testing.assert_allclose(found.learning_times, 11 / (0.5 * values[:5]), rtol=1e-12)
    np.testing.assert_allclose(found.energies, energies[:5], rtol=1e-9)
    np.testing.assert_allclose(found.energy_of_others, energies[5:].sum(), rtol=1e-9)


def test_a_mode_without_an_eigenvalue_is_never_learned(tmp_path):
    content = drawn(6, 2)
    J = np.random.default_rng(0).normal(size=(12, 4))
    singular = dataclasses.replace(content, kernel=J @ J.T)
    found = flow(open_matrix(filled(tmp_path / "k.zarr", singular)), Asked())
    assert [time is None for time in found.learning_times] == [False] * 4 + [True] * 8
    y = one_hot(content).reshape(-1, 1)
    rest = y - J @ np.linalg.lstsq(J, y, rcond=None)[0]
    assert found.train_loss[-1] == pytest.approx(np.sum(rest**2) / 12, rel=1e-3)


@pytest.mark.parametrize("is_small", [True, False])
def test_where_nothing_is_to_be_learned_nothing_moves(tmp_path, monkeypatch, is_small):
    if not is_small:
        monkeypatch.setattr(flowing, "_method", lambda *_: "krylov")
    content = drawn(6, 2)
    known = dataclasses.replace(content, logits=one_hot(content))
    found = flow(open_matrix(filled(tmp_path / "k.zarr", known)), Asked(offset="logits", times=TIMES))
    assert found.train_loss == [0.0] * 4
    assert found.error_bounds == [0.0] * 4


def test_the_default_times_go_from_the_first_mode_to_the_last(tmp_path):
    content = drawn(6, 2)
    found = flow(open_matrix(filled(tmp_path / "k.zarr", content)), Asked())
    assert found.times[0] == pytest.approx(found.learning_times[0] / 10)
    assert found.times[-1] == pytest.approx(found.learning_times[-1] * 10)
    assert found.train_loss[-1] < 1e-6 * found.train_loss[0]


@pytest.mark.slow
def test_the_bound_of_a_small_space_holds(tmp_path, monkeypatch):
    content = drawn(40, 3, tile_samples=9)
    asked = Asked(times=(0.003, 0.03, 0.3))
    matrix = open_matrix(filled(tmp_path / "k.zarr", content))
    for most in (2, 5, 9):
        monkeypatch.setattr(flow_courses, "MAX_STEPS", most)
        problem = flowing.Problem.of(matrix, "zero")
        course = flow_courses.by_krylov(flowing.clock_of(problem, asked), lambda *_: None)
        for at, time in enumerate(asked.times):
            values, y, _ = flowed(content, asked, time)
            error = np.linalg.norm(course.values[at] - values) / np.linalg.norm(y)
            assert error <= course.bounds[at] * 1.01 + 1e-12
            assert course.bounds[at] <= 1e4 * error + 1e-10  # not of no use either
    assert course.bounds[0] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("output", ["full", "trace"])
@pytest.mark.parametrize("is_small", [True, False])
def test_predictions_for_test_samples(tmp_path, monkeypatch, output, is_small):
    if not is_small:
        monkeypatch.setattr(flowing, "_method", lambda *_: "krylov")
    content = drawn(8, 3, output)
    other = rectangle(content, 6)
    asked = Asked(times=TIMES, offset="logits", test=filled(tmp_path / "t.zarr", other))
    found = flow(open_matrix(filled(tmp_path / "k.zarr", content)), asked)
    K, _, f0 = problem_of(content, "logits")
    cross = other.kernel / (3 if output == "trace" else 1)
    columns = dataclasses.replace(content, labels=other.against[0], logits=other.against[1])
    _, y_test, f0_test = problem_of(columns, "logits")
    for at, time in enumerate(TIMES):
        learned = np.linalg.solve(K, flowed(content, asked, time)[0] - f0)
        values = f0_test + cross.T @ learned
        np.testing.assert_allclose(found.test_error[at], np.mean((values - y_test) ** 2), rtol=1e-7)
        assert found.test_accuracy[at] == np.mean(values.reshape(6, 3).argmax(1) == columns.labels)


# cross-entropy --------------------------------------------------------------------------------------------------------


def integrated(content, times, offset):
    """Outputs at some times by an implicit integrator, and the change of A f from that of f."""
    K, _, start = problem_of(content, offset)
    n, m = content.logits.shape
    A = contrasts(m) if content.output == "centered" else np.eye(m)

    def change(_time, f):
        pull = (one_hot(content) - scipy.special.softmax(f.reshape(n, len(A)) @ A, axis=1)) @ A.T
        pull = pull if content.output == "trace" else pull.reshape(-1, 1)
        return (K @ pull).ravel() / n

    found = scipy.integrate.solve_ivp(
        change, (0, max(times)), start.ravel(), method="Radau", rtol=1e-10, atol=1e-12, t_eval=times
    )
    return [scipy.special.log_softmax(f.reshape(n, len(A)) @ A, axis=1) for f in found.y.T]


@in_turn("output offset", chosen(["full", "centered", "trace"], ["centered"]), ["zero", "logits"])
def test_the_flow_of_the_cross_entropy(tmp_path, output, offset):
    content = drawn(6, 3, output)
    asked = Asked("cross-entropy", times=TIMES, offset=offset)
    found = flow(open_matrix(filled(tmp_path / "k.zarr", content)), asked)
    for at, scores in enumerate(integrated(content, TIMES, offset)):
        expected = -scores[np.arange(6), content.labels].mean()
        assert found.train_loss[at] == pytest.approx(expected, rel=1e-7)
        assert found.train_accuracy[at] == np.mean(scores.argmax(1) == content.labels)
    assert found.train_loss[0] > 2 * found.train_loss[-1]
    assert found.energies is None


def test_cross_entropy_predicts_through_what_was_learned(tmp_path):
    """With the training samples as test samples, the predictions are the training outputs."""
    content = drawn(6, 3)
    same = rectangle(content, 6, kernel=content.kernel, against=(content.labels, content.logits))
    asked = Asked("cross-entropy", offset="logits", test=filled(tmp_path / "t.zarr", same))
    found = flow(open_matrix(filled(tmp_path / "k.zarr", content)), asked)
    assert found.test_accuracy == found.train_accuracy
    assert len(set(found.train_accuracy)) > 1


# refusals and the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "0"], "--rate 0"),
        (["--normalisation=-1"], "--normalisation -1"),
        (["--normalisation", "0"], "--normalisation 0"),
        (["--times=-1"], "--times -1"),
        (["--times", "inf"], "--times inf"),
        (["--modes", "0"], "--modes 0"),
        (["--loss", "cross-entropy"], "no cross-entropy"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, says):
    path = str(tmp_path / "k.zarr")
    filled(path, drawn(6, 3, "index:1"))
    assert cli.run(["analyze", "flow", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_too_little_memory_is_refused(tmp_path, monkeypatch):
    matrix = open_matrix(filled(tmp_path / "k.zarr", drawn()))
    monkeypatch.setattr("ntkgen.analysis.matrix.memory_left", lambda _: 100)
    monkeypatch.setattr(flowing, "memory_left", lambda _: 100)
    monkeypatch.setattr(flow_courses, "memory_left", lambda _: 100)
    for asked in (Asked(), Asked("cross-entropy")):
        with pytest.raises(BudgetError, match="too small"):
            flow(matrix, asked)


def test_the_command(tmp_path, capsys):
    content = drawn(8, 3)
    path, test = str(tmp_path / "k.zarr"), str(tmp_path / "t.zarr")
    filled(path, content)
    filled(test, rectangle(content))
    assert cli.run(["analyze", "flow", path, "--times", "0.1", "1", "--test", test, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times"] == [0.1, 1.0]
    assert {"learning_times", "energies", "test_accuracy", "store", "seconds", "peak_bytes"} <= set(found)
    for arguments in ([], ["--loss", "cross-entropy", "--test", test]):
        assert cli.run(["analyze", "flow", path, *arguments]) == 0
        page = capsys.readouterr().out.splitlines()
        assert page[0] == path
        assert len(page) >= 2 + flow_courses.NUM_TIMES
