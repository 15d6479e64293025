"""Runs of streams that go wrong: diverged networks, missing and damaged files, interruptions, too few test samples."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import xarray

from ntkgen.cli import run as command
from ntkgen.continual.metrics.series import kernel_metrics
from ntkgen.continual.metrics.streaming import scores
from ntkgen.continual.snapshots import Snapshots
from ntkgen.continual.streaming.comparing import notes_on
from ntkgen.continual.streaming.learner import Learner
from ntkgen.continual.streaming.record import read_stream
from ntkgen.continual.streaming.run import StreamData, run_stream
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.continual.streaming.summary import Row, rows_of
from ntkgen.continual.streaming.utilities import read_utilities
from ntkgen.data.dataset import Dataset
from ntkgen.errors import DivergedError, InputError, StoreError
from ntkgen.files.place import folder_of

RNG = torch.Generator().manual_seed(0)
SPLIT = Dataset("noise", torch.randn(24, 1, 3, 3, generator=RNG), torch.arange(24) % 3, 3)
DATA = StreamData(SPLIT, SPLIT)


def small(num_classes=3):
    """A network for images of 3 × 3 pixels."""
    layers = (torch.nn.Linear(9, 6), torch.nn.ReLU(), torch.nn.Linear(6, num_classes))
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


def settings_of(**values):
    usual = {"dataset": "noise", "model": f"{__name__}:small", "num_samples": 20, "samples_per_task": 5}
    return StreamingSettings(**{**usual, "stats_every": 3, **values})


def learnt(settings, place, data=DATA):
    return run_stream(settings, data, folder_of(str(place), fsync=False), torch.device("cpu"))


def files_of(place):
    paths = (path for path in sorted(place.rglob("*")) if path.is_file() and path.suffix not in {".pt", ".lock"})
    return {str(path.relative_to(place)): path.read_bytes() for path in paths}


FULL = settings_of(method="baseline", sigma=0.01, seeds=(0, 1), kernels_every=1, held_out=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with everything that a run can have."""
    place = tmp_path_factory.mktemp("finished") / "run"
    learnt(FULL, place)
    return place


def test_a_diverged_network_has_nan_kernels_and_the_others_go_on(tmp_path):
    shared = {"kernels_every": 1, "held_out": 4, "num_samples": 15}
    found = learnt(settings_of(learning_rate=(0.01, 1e30), **shared), tmp_path / "both")
    learnt(settings_of(learning_rate=0.01, **shared), tmp_path / "alone")
    kernels = [xarray.open_zarr(tmp_path / "both" / f"combination{each}" / "seed0" / "kernels.zarr") for each in (0, 1)]
    alone = xarray.open_zarr(tmp_path / "alone" / "seed0" / "kernels.zarr")
    assert [each.iteration.values.tolist() for each in kernels] == [[0, 5, 10, 15]] * 2
    np.testing.assert_allclose(kernels[0].kernel.values, alone.kernel.values, rtol=1e-4)
    assert np.isfinite(kernels[1].kernel.values[0]).all()
    assert np.isnan(kernels[1].kernel.values[1:]).all()
    assert np.isnan(kernels[1].logits.values[1:]).all()
    measured = kernel_metrics(kernels[1])
    for name in ("effective_rank", "distance", "alignment", "centred_alignment", "leave_one_out_accuracy", "velocity"):
        assert np.isnan(measured[name].values[1:]).all(), name
    for name in ("loss", "accuracy", "plasticity", "inactive_units", "weight_l2", "grad_l0", "held_out_accuracy"):
        assert np.isnan(found[name].values[1:, 1]).all(), name
        assert np.isfinite(found[name].values[:, 0]).all(), name
    for path in (tmp_path / "both" / "logs").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_snapshots_refuse_a_diverged_network_unless_it_is_allowed(tmp_path):
    model, diverged = small(), small()
    with torch.no_grad():
        diverged[1].weight.fill_(torch.inf)
    x = torch.randn(4, 1, 3, 3)
    strict = Snapshots(tmp_path / "strict", model, x)
    with pytest.raises(DivergedError, match="training diverged"):
        strict(diverged, iteration=1)
    lenient = Snapshots(tmp_path / "lenient", model, x, per_layer=True, allow_diverged=True)
    before = lenient(model, iteration=1)
    assert lenient(diverged, iteration=2).isnan().all()
    torch.testing.assert_close(lenient(model, iteration=3), before)
    assert np.isnan(lenient.series.read("kernel_by_layer", 1)).all()


@pytest.mark.parametrize(
    "missing",
    [
        "run.zarr",
        "run.zarr/zarr.json",
        "run.zarr/loss",
        "run.zarr/loss/c.0.0.0",
        "seed0/kernels.zarr/kernel/c.0.0.0",
        "seed1",
        "seed0/kernels.zarr/zarr.json",
        "checkpoint.pt",
        "config.json",
    ],
)
def test_a_run_with_missing_files_is_refused_and_left_as_it_is(missing, finished, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    path = place / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(place)
    with pytest.raises(StoreError, match=r"expected .* found"):
        learnt(FULL, place)
    assert files_of(place) == before


def test_missing_and_damaged_parameters_are_refused(tmp_path):
    place, settings = tmp_path / "run", settings_of(save_every=10)
    learnt(settings, place)
    undisturbed = files_of(place)
    os.truncate(place / "models" / "sample20.pt", 20)
    learnt(settings, place)
    assert torch.load(place / "models" / "sample20.pt", weights_only=True)  # written anew
    path = place / "models" / "sample10.pt"
    os.truncate(path, 20)
    with pytest.raises(StoreError, match=r"expected models/sample10.pt, found 20 bytes"):
        learnt(settings, place)
    path.unlink()
    with pytest.raises(StoreError, match=r"expected models/sample10.pt, found none"):
        learnt(settings, place)
    assert files_of(place) == undisturbed


@pytest.mark.parametrize(
    ("file", "size", "said"),
    [
        ("run.zarr/accuracy/c.0.0.0", None, "missing"),
        ("run.zarr/loss/c.0.0.0", 20, "damaged"),
        ("run.zarr/zarr.json", 20, "cannot be read"),
        ("seed0/kernels.zarr/kernel/c.0.0.0", None, "missing"),
        ("seed0/kernels.zarr/kernel/c.0.0.0", 20, "damaged"),
    ],
)
def test_missing_and_damaged_arrays_are_refused_in_one_line(file, size, said, finished, tmp_path, capsys):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    if size is None:
        (place / file).unlink()
    else:
        os.truncate(place / file, size)
    before = files_of(place)
    with pytest.raises(StoreError, match=f"{said}.*: expected .* found"):
        learnt(FULL, place)
    assert files_of(place) == before
    plots, tables = tmp_path / "plots", tmp_path / "tables"
    for line in (["cl-plot", str(place), "-o", str(plots)], ["cl-analyze", str(place), "--csv", str(tables)]):
        assert command(line) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert len(shown.strip().splitlines()) == 1
    assert not plots.exists()
    assert not tables.exists()


def test_damaged_utilities_are_named_and_written_anew(finished, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    path = place / "utilities.npz"
    for data in (path.read_bytes()[:100], b"", path.read_bytes()[:-30]):
        path.write_bytes(data)
        with pytest.raises(StoreError, match="utilities"):
            read_utilities(folder_of(str(place)))
    learnt(FULL, place)
    assert files_of(place) == files_of(finished)


def test_a_damaged_group_is_named(finished, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    (place / "run.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node')
    with pytest.raises(StoreError, match="cannot be read"):
        read_stream(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_everything_up_to_the_sample_in_progress(number, finished, tmp_path, monkeypatch):
    place, steps = tmp_path / "run", []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def step(self, *given, plain=Learner._step):
        steps.append(None)
        if len(steps) == 8:
            signal.raise_signal(number)
        return plain(self, *given)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "_step", step)
            with pytest.raises(KeyboardInterrupt):
                learnt(FULL, place)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(steps) == 8
    assert torch.load(place / "checkpoint.pt", weights_only=True)["position"] == {"sample": 8}
    (note,) = notes_on([read_stream(place).assign_attrs(place=str(place))]).hindering
    assert note == f"{place} is not finished: 8 of 20 samples are learnt, and scores are of the first 5"
    learnt(FULL, place)
    assert files_of(place) == files_of(finished)


def test_every_bin_has_norms_however_rare_they_are(tmp_path):
    found = learnt(settings_of(stats_every=100, save_every=5), tmp_path / "tasks").weight_l2.values[:, 0, 0]
    for bin_, sample in ((1, 10), (2, 15), (3, 20)):  # measured after the last sample; of the first bin after sample 0
        parameters = torch.load(tmp_path / "tasks" / "models" / f"sample{sample}.pt", weights_only=True)
        weights = [values.flatten() for name, values in parameters.items() if name.endswith("weight")]
        assert found[bin_] == pytest.approx(float(torch.cat(weights).norm()), rel=1e-6)
    assert np.isfinite(learnt(settings_of(stats_every=100, bins="published"), tmp_path / "p").weight_l2.values).all()


def test_held_out_results_are_recorded_by_task(finished):
    found = read_stream(finished).held_out_accuracy
    assert found.dims == ("task", "combination", "seed")
    assert found.shape == (4, 1, 2)


def test_too_few_test_samples_are_refused_before_anything_is_written(tmp_path, capsys):
    for data in (DATA, StreamData(SPLIT)):
        with pytest.raises(InputError, match=r"held_out.* is 25.*expected at most .*found (24|0)"):
            learnt(settings_of(held_out=25), tmp_path / "run", data)
    line = ["cl-run", "--stream", "label-permuted", "--held-out", "5", "-q", "--out", str(tmp_path / "run")]
    for more in ([], ["--dry-run"]):
        assert command([*line, *more]) == 2
        shown = capsys.readouterr().err
        assert "--held-out needs test samples" in shown
        assert "split 'train'" not in shown
        assert len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_scores_count_whole_tasks_alone(tmp_path, capsys):
    found = learnt(settings_of(num_samples=13, held_out=4), tmp_path / "run")
    assert found.samples.values.tolist() == [5, 10, 13]
    assert found.counted.values.tolist() == [True, True, False]
    (row,) = rows_of(found)
    assert row.mean("average_accuracy") == pytest.approx(float(found.accuracy[:2].mean()))
    assert row.mean("forgetting") == pytest.approx(float(found.accuracy[0, 0, 0] - found.accuracy[1, 0, 0]))
    assert row.mean("held_out_accuracy") == pytest.approx(float(found.held_out_accuracy[:2].mean()))
    assert command(["cl-analyze", str(tmp_path / "run")]) == 0
    assert "the last task has 3 of 5 samples; it is recorded, but scores leave it out" in capsys.readouterr().out
    short = learnt(settings_of(num_samples=3), tmp_path / "short")
    assert rows_of(short)[0].mean("average_accuracy") == pytest.approx(float(short.accuracy.mean()))
    published = learnt(settings_of(num_samples=13, bins="published"), tmp_path / "published")
    assert published.counted.values.tolist() == [True] * 3
    assert notes_on([published]).all == [
        "the first bin is a single sample, as published; no bin has the last 2 samples"
    ]
    assert [note[:3] for note in notes_on([short, published]).others[:2]] == ["sgd", "sgd"]


def test_tables_as_json_have_no_infinity():
    losses, others = np.array([[1.0, 2.0], [np.inf, 3.0], [np.inf, np.inf]]), np.full((3, 2), 0.5)
    text = json.dumps(Row("sgd", scores(losses, others, others)).to_json())
    json.loads(text, parse_constant=pytest.fail)


def test_a_checkpoint_that_cannot_be_read_leaves_open_how_far_a_run_is(finished, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    run = read_stream(place).isel(bin=slice(2)).assign_attrs(place=str(place))
    assert "20 of 20 samples are learnt, and scores are of the first 10" in notes_on([run]).hindering[0]
    os.truncate(place / "checkpoint.pt", 20)
    assert "scores are of 10 of 20 samples; the run itself may be further" in notes_on([run]).hindering[0]


EPOCHS = ["cl-run", "--dataset", "digits", "--model", "mlp", "--tasks", "2", "--epochs", "1", "--quiet"]


def test_a_stream_and_runs_of_epochs_do_not_share_a_folder(finished, tmp_path, capsys):
    place = tmp_path / "stream"
    shutil.copytree(finished, place)
    before = files_of(place)
    assert command([*EPOCHS, "--out", str(place)]) == 2
    shown = capsys.readouterr().err
    assert "found a run of a permuted stream" in shown
    assert len(shown.strip().splitlines()) == 1
    assert files_of(place) == before
    seed = tmp_path / "epochs" / "seed0"
    seed.mkdir(parents=True)
    (seed / "config.json").write_text(json.dumps({"settings": {"seed": 0}, "facts": {}}))
    with pytest.raises(InputError, match=r"expected .* found a run that trains on tasks for epochs at seed0"):
        learnt(FULL, tmp_path / "epochs")
    assert list(files_of(tmp_path / "epochs")) == ["seed0/config.json"]
