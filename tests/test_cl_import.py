"""Imported metrics of the predecessor: the same numbers in the format of a run, and no pickle runs anything."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from ntkgen.cli import run as command
from ntkgen.continual import pickles
from ntkgen.continual.comparison import compare
from ntkgen.continual.importing import ACCURACIES, TEST, TRAIN, read_published
from ntkgen.continual.metrics.accuracy import AccuracyMatrix
from ntkgen.continual.presets import preset_of
from ntkgen.continual.reading import open_run
from ntkgen.errors import InputError

TASKS, EPOCHS, SAMPLES = 5, 2, 10


def published(seed=0):
    """A run in the layout of the published files."""
    rng = np.random.default_rng(seed)

    def kernel():
        J = rng.standard_normal((SAMPLES, 30)).astype(np.float32)
        return J @ J.T

    lengths = [EPOCHS * (TASKS - task) for task in range(TASKS)]
    return {
        TRAIN: [[kernel() for _ in range(length)] for length in lengths],
        TEST: [[kernel() for _ in range(length)] for length in lengths],
        ACCURACIES: [[float(value) for value in rng.uniform(0, 1, length)] for length in lengths],
    }


def metrics_of(*widths, model="MLP", dataset="CIFAR10", split="2-2-10"):
    runs = {str(width): published(width if isinstance(width, int) else 0) for width in widths}
    others = {"RNN": None, "CNN": {"CIFAR100": {"10-10-10": {"1000_32": None}}}}
    return others | {model: {"CIFAR100": None, dataset: {"10-10-10": None, split: runs | {"5000": None}}}}


def written(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    file = written(folder / "mlp_cifar10_2_2_10epo_cuda.pkl", metrics_of(100, 500))
    assert command(["cl-import", str(file), "--out", str(folder / "runs"), "--json"]) == 0
    return folder / "runs"


def exported(run):
    """Write a run in the layout of the published files."""
    evaluations, kernels = run.evaluations, run.kernels
    is_validation = evaluations.probe_is_validation.values
    accuracy, tasks = evaluations.accuracy.values, kernels.row_task.values
    trained = kernels.task.values
    found = {TRAIN: [], TEST: [], ACCURACIES: []}
    for task in range(run.num_tasks):
        for name, part in ((TRAIN, False), (TEST, True)):
            rows = np.flatnonzero((tasks == task) & (is_validation == part))
            found[name].append(list(kernels.kernel.values[np.ix_(np.flatnonzero(trained >= task), rows, rows)]))
        found[ACCURACIES].append(accuracy[trained >= task, task].tolist())
    return found


# what is imported -----------------------------------------------------------------------------------------------------


def test_an_export_gives_what_was_imported(imported):
    for width in (100, 500):
        run = open_run(imported / f"cifar10-mlp-finetune/width{width}/seed0")
        found, expected = exported(run), published(width)
        for name in (TRAIN, TEST):
            for task in range(TASKS):
                assert np.array_equal(found[name][task], expected[name][task])
        assert found[ACCURACIES] == expected[ACCURACIES]


def test_the_settings_are_those_of_the_published_code(imported):
    run = open_run(imported / "cifar10-mlp-finetune/width100/seed0")
    settings = run.settings
    assert (settings.dataset, settings.split, settings.width, settings.epochs) == ("cifar10", "2/2", 100, EPOCHS)
    assert (settings.output, settings.evaluate_on, settings.normalise) == ("sum", "validation", "dataset")
    found = compare(preset_of("eth-cifar10"), run)
    assert found.differences == (f"epochs {EPOCHS}, published 10",)
    assert found.numbers["norm_first"] == pytest.approx(np.linalg.norm(published(100)[TRAIN][0][0]))
    facts = json.loads((imported / "cifar10-mlp-finetune/width100/seed0/config.json").read_text())["facts"]
    assert facts["imported"] == "mlp_cifar10_2_2_10epo_cuda.pkl"


def test_metrics_of_accuracy(imported):
    run, accuracies = open_run(imported / "cifar10-mlp-finetune/width100/seed0"), published(100)[ACCURACIES]
    R = np.full((TASKS, TASKS), np.nan)
    for end in range(TASKS):
        for task in range(end + 1):
            R[end, task] = accuracies[task][EPOCHS * (end - task + 1) - 1]
    expected, found = AccuracyMatrix(R), run.metrics()
    assert set(found) == {"class_incremental"}
    for name in ("average_accuracy", "average_incremental_accuracy", "backward_transfer", "forgetting"):
        assert found["class_incremental"][name] == pytest.approx(getattr(expected, name))
        assert np.isfinite(found["class_incremental"][name])
    lowest = np.mean([min(accuracies[task][EPOCHS:]) for task in range(TASKS - 1)])
    assert found["class_incremental"]["minimum_accuracy"] == pytest.approx(lowest)


def test_metrics_of_kernels_leave_out_what_was_not_recorded(imported):
    run, kernels = open_run(imported / "cifar10-mlp-finetune/width100/seed0"), published(100)[TRAIN]
    found = run.kernel_metrics()
    assert found.iteration.values.tolist() == list(range(1, TASKS * EPOCHS + 1))
    for task in range(TASKS):
        norms = [float(np.linalg.norm(K.astype(float))) for K in kernels[task]]
        assert found.task_frobenius_norm.values[EPOCHS * task :, task] == pytest.approx(norms, rel=1e-6)
        smallest = [float(np.linalg.eigvalsh(K.astype(float))[0]) for K in kernels[task]]
        assert found.task_smallest.values[EPOCHS * task :, task] == pytest.approx(smallest, rel=1e-5)
        assert np.isnan(found.task_frobenius_norm.values[: EPOCHS * task, task]).all()
    K, L = kernels[0][0].astype(float), kernels[0][-1].astype(float)
    cosine = (K * L).sum() / np.linalg.norm(K) / np.linalg.norm(L)
    assert found.distance.values[-1] == pytest.approx(1 - cosine, rel=1e-5)
    assert np.isfinite(found.velocity.values).all()
    last = found.interference.values[-1]
    assert np.diagonal(last) == pytest.approx(1)
    assert np.isnan(last[~np.eye(TASKS, dtype=bool)]).all()
    assert np.isnan(found.alignment.values).all()  # labels were not recorded
    assert np.isfinite(found.frobenius_norm.values[:EPOCHS]).all()
    assert np.isnan(found.frobenius_norm.values[EPOCHS:]).all()


def test_the_commands_read_imported_runs(imported, capsys):
    place = str(imported / "cifar10-mlp-finetune/width100/seed0")
    assert command(["cl-analyze", place]) == 0
    page = capsys.readouterr().out
    assert "class-incremental" in page
    assert "task-incremental" not in page  # which was not recorded


@pytest.mark.slow
def test_several_widths_are_read_together(imported, capsys):
    assert command(["cl-analyze", str(imported / "cifar10-mlp-finetune")]) == 0
    page = capsys.readouterr().out
    assert "100" in page
    assert "500" in page
    assert "task-incremental" not in page


@pytest.mark.slow
def test_pictures_of_imported_runs(imported, tmp_path, capsys):
    place = str(imported / "cifar10-mlp-finetune/width100/seed0")
    assert command(["cl-plot", place, "-o", str(tmp_path), "--json"]) == 0
    files = [made["file"] for made in json.loads(capsys.readouterr().out)["pictures"]]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files)
    drawn = " ".join(files)
    assert all(kind in drawn for kind in ("accuracy", "norm", "validation-eigenvalues", "velocity", "matrix"))
    assert "loss" not in drawn
    assert "interference" not in drawn
    assert command(["cl-plot", str(imported / "cifar10-mlp-finetune"), "-o", str(tmp_path)]) == 0


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_all_protocols_are_read(tmp_path, protocol):
    arrays = [np.arange(6, dtype=dtype).reshape(2, 3) for dtype in ("<f4", ">f8", "i8", "u1")]
    arrays += [np.asfortranarray(arrays[0]), np.zeros((0, 3)), np.float32(2.5), np.array([True, False])]
    value = {"a": arrays, "b": [1, 2.0, "c", None, (True,)]}
    with written(tmp_path / "file.pkl", value, protocol).open("rb") as file:
        found = pickles.read_pickle(file, "file")
    for array, expected in zip(found["a"], arrays, strict=True):
        assert np.array_equal(array, expected)
        assert np.asarray(array).shape == expected.shape
    assert found["b"] == [1, 2.0, "c", None, [True]]


def test_names_of_other_versions_of_numpy_are_read():
    assert {name for name in pickles._KNOWN if name[0].startswith("numpy.core")}
    data = pickle.dumps(np.arange(3.0), 4)
    other = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    if other != data:  # the length stands before the name, in a pickle of protocol 4
        other = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        other = other[:3] + (len(other) - 11).to_bytes(8, "little") + other[11:]
    import io

    assert pickles.read_pickle(io.BytesIO(other), "file").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "model", "dataset", "tasks", "expected"),
    [
        ("cnn_cifar10_replay_10_10_10epo_cuda.pkl", "CNN", "CIFAR10", 5, ("cnn", "2/2", "replay-mixed")),
        ("rnn_cifar100_10_10_10epo_cuda.pkl", "RNN", "CIFAR100", 10, ("ntk-rnn", "10/10", "finetune")),
        ("cnn_cifar100_replay.pkl", "CNN", "CIFAR100", 10, ("cnn", "10/10", "replay-two-pass")),
    ],
)
def test_a_wrong_name_of_the_split_does_not_matter(tmp_path, monkeypatch, name, model, dataset, tasks, expected):
    monkeypatch.setattr(sys.modules[__name__], "TASKS", tasks)
    file = written(tmp_path / name, metrics_of(1000, model=model, dataset=dataset, split="10-10-10"))
    (run,) = read_published(file)
    assert (run.settings.model, run.settings.split, run.settings.method) == expected


# what is refused ------------------------------------------------------------------------------------------------------


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def malicious(target):
    line = f"open({str(target)!r}, 'w').close()"
    return [
        Runs(os.system, f"touch {target}"),
        Runs(eval, line),
        Runs(exec, line),
        Runs(getattr, Runs(__import__, "os"), "system"),
        Runs(open, str(target), "w"),
        Runs(np.load, str(target)),
        Runs(np.dtype, "O"),
        Runs(np.dtype, [("a", "O")]),
        Runs(np.zeros, 10**12),
        np.array([Runs(os.system, f"touch {target}")], dtype=object),
        np.array([("a", 1.0)], dtype=[("name", "O"), ("value", "f8")]),
        {"MLP": {"CIFAR10": {"2-2-10": {"100": Runs(os.system, f"touch {target}")}}}},
    ]


@pytest.mark.parametrize("which", range(12))
def test_what_a_pickle_calls_is_refused_and_not_run(tmp_path, capsys, which):
    target = tmp_path / "target"
    file = written(tmp_path / "file.pkl", malicious(target)[which])
    assert command(["cl-import", str(file), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing in it was run" in error
    assert not target.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nndarray\n}S'_call'\ncos\nsystem\nsb.",  # a name in the state of a function
        b"cnumpy\nndarray\n}S'_call'\nI1\nsb.",  # a change of a function
        b"cnumpy.core.multiarray\n_reconstruct\n(t}(S'values'\nI1\nsbR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\ntRS'abc'\ntR.",  # three bytes of eight
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'O'\nNNNtb.",
        b"Pelsewhere\n.",
        b"]2a.",  # a list that contains itself
        b"",
        b"version https://git-lfs.github.com/spec/v1",
    ],
)
def test_crafted_pickles_are_refused(tmp_path, capsys, data):
    (tmp_path / "file.pkl").write_bytes(data)
    before = {name: function._call for name, function in pickles._KNOWN.items()}
    assert command(["cl-import", str(tmp_path / "file.pkl"), "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {name: function._call for name, function in pickles._KNOWN.items()} == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_truncated_pickles_are_refused(tmp_path, part):
    data = pickle.dumps(metrics_of(100))
    (tmp_path / "file.pkl").write_bytes(data[: int(part * len(data))])
    with pytest.raises(InputError, match="cannot be read"):
        read_published(tmp_path / "file.pkl")


def changed(**change):
    metrics = metrics_of(100)
    metrics["MLP"]["CIFAR10"]["2-2-10"]["100"] |= change
    return metrics


def twice():
    """The same width under the names of two splits."""
    metrics = metrics_of(100)
    metrics["MLP"]["CIFAR10"]["10-10-10"] = {"100": published()}
    return metrics


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([1, 2], "expected a dictionary at metrics, found list"),
        ({}, "expected a run, found none"),
        ({"MLP": {"CIFAR10": {"2-2-10": {"100": {"losses": []}}}}}, "expected the lists train_ntk_matrices"),
        (metrics_of(100, model="GPT"), "expected a model of mlp, nn, rnn, cnn, found GPT"),
        (metrics_of(100, dataset="SVHN"), "expected a data set of cifar10, cifar100, found SVHN"),
        (metrics_of("wide"), "expected a positive width, found wide"),
        (metrics_of("0"), "expected a positive width, found 0"),
        (twice(), "expected one run of each network, data set and width, found several that would be cifar10-mlp-fine"),
        (changed(task_accuracies=[[50.0]]), "expected fractions from 0 to 1 at MLP"),
        (changed(task_accuracies=[[-0.5]]), "expected fractions from 0 to 1 at MLP"),
        (changed(task_accuracies=[[0.5, 0.5]]), r"expected E \(T − t\) values"),
        (changed(task_accuracies=[]), r"expected E \(T − t\) values"),
        (changed(train_ntk_matrices=published()[TRAIN][:-1]), r"expected E \(T − t\) values"),
        (changed(test_ntk_matrices=[[np.zeros((3, 4))] * 2]), "expected square matrices"),
        (changed(test_ntk_matrices=[[np.full((3, 3), np.nan)]]), "expected finite numbers of 3 axes"),
        (changed(task_accuracies=[["a"]]), "expected finite numbers of 1 axes"),
    ],
)
def test_other_contents_are_refused(tmp_path, value, match):
    with pytest.raises(InputError, match=match):
        read_published(written(tmp_path / "file.pkl", value))


@pytest.mark.parametrize(("name", "found"), [("file.pkl", "found nothing"), ("", "found a folder")])
def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys, name, found):
    assert command(["cl-import", str(tmp_path / name), "--out", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: There is no file")
    assert found in error
    assert error.count("\n") == 1


def test_nothing_is_overwritten(imported, tmp_path, capsys):
    file = written(tmp_path / "again.pkl", metrics_of(50, 100))
    before = (imported / "cifar10-mlp-finetune/width100/seed0/config.json").read_bytes()
    assert command(["cl-import", str(file), "--out", str(imported)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert not (imported / "cifar10-mlp-finetune/width50").exists()
    assert (imported / "cifar10-mlp-finetune/width100/seed0/config.json").read_bytes() == before
