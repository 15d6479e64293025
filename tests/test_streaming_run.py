"""Runs that learn a stream: seeds, resuming, stacking, kernels, records and the command line."""

import json
import random

import numpy as np
import pytest
import torch
import xarray
from cases import chosen
from killing import was_killed

from ntkgen.analysis.plots.style import render
from ntkgen.cli import run as command
from ntkgen.continual.plots.streaming import curves_of, draw_streams
from ntkgen.continual.streaming import run as streaming
from ntkgen.continual.streaming.aliases import MODEL_ALIASES, STREAM_ALIASES, without_aliases
from ntkgen.continual.streaming.logs import KEYS, read_published_log
from ntkgen.continual.streaming.record import read_stream
from ntkgen.continual.streaming.run import StreamData, StreamingRun, run_stream
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.data.dataset import Dataset
from ntkgen.errors import FingerprintError, InputError, UnknownNameError
from ntkgen.files.place import folder_of

CPU = torch.device("cpu")
LINE = ("cl-run", "--stream", "label-permuted", "--dataset", "digits", "--model", "mlp-stream", "-q")


def templates(count=60, num_classes=3, size=4, seed=0):
    """Images of a few patterns with noise, which are learnt in a few hundred samples."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % num_classes
    patterns = torch.randn(num_classes, 1, size, size, generator=rng)
    images = patterns[labels] + 0.3 * torch.randn(count, 1, size, size, generator=rng)
    return Dataset("templates", images, labels, num_classes)


DATA = StreamData(templates(), templates(seed=0))


def small(num_classes=3):
    """A network of two hidden layers for images of 4 × 4 pixels."""
    return torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(16, 20),
        torch.nn.ReLU(),
        torch.nn.Linear(20, 10),
        torch.nn.ReLU(),
        torch.nn.Linear(10, num_classes),
    )


def settings_of(**values):
    usual = {
        "dataset": "templates",
        "model": f"{__name__}:small",
        "num_samples": 90,
        "samples_per_task": 30,
        "stats_every": 7,
    }
    return StreamingSettings(**{**usual, **values})


def learnt(settings, place, data=DATA):
    return run_stream(settings, data, folder_of(str(place), fsync=False), CPU)


def final_parameters(place):
    return torch.load(place / "checkpoint.pt", weights_only=True)["model"]


def files_of(place):
    """The bytes of every file, without the checkpoint, whose pickle may hold other storages."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.suffix not in {".pt", ".lock"}
    }


METHODS = {
    "sgd": {},
    "baseline": {"sigma": 0.01},
    "usgd": {"sigma": 0.01},
    "ewc": {},
    "upgd_so_global": {"sigma": 0.01},
    "feature_upgd_fo_global": {"sigma": 0.01},
    "adam": {},
}


@pytest.mark.parametrize("method", chosen(METHODS, ["ewc", "upgd_so_global", "adam"]))
def test_a_run_stopped_at_any_sample_ends_with_the_same_bytes(method, tmp_path, monkeypatch):
    settings = settings_of(method=method, seeds=(0, 3), kernels_every=1, **METHODS[method])
    learnt(settings, tmp_path / "straight")
    monkeypatch.setattr(streaming, "FETCHED", 14)  # blocks end at other samples
    folder = folder_of(str(tmp_path / "stopped"), fsync=False)
    for samples in (13, 48, 60):
        run = StreamingRun(settings, DATA, folder, CPU)
        data = folder.read("checkpoint.pt")
        run.resume(None if data is None else torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True))
        committed = run.sample
        while run.sample < samples:
            run.learn_block()
            if run.sample == committed + 7:
                run.commit()  # what comes after it is lost
    learnt(settings, tmp_path / "stopped")
    straight, stopped = final_parameters(tmp_path / "straight"), final_parameters(tmp_path / "stopped")
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    assert files_of(tmp_path / "straight") == files_of(tmp_path / "stopped")


@pytest.mark.parametrize("method", chosen(METHODS, ["baseline"]))
def test_a_run_killed_at_random_writes_ends_with_the_same_bytes(method, tmp_path, monkeypatch):
    settings = settings_of(method=method, seeds=(0, 3), held_out=10, save_every=40, **METHODS[method])
    learnt(settings, tmp_path / "undisturbed")
    monkeypatch.setattr(streaming, "FETCHED", 14)
    monkeypatch.setattr(streaming, "COMMIT_SECONDS", 0.0)
    rng, kills = random.Random(0), 0
    while was_killed(lambda: learnt(settings, tmp_path / "killed"), rng.randint(1, 40), monkeypatch):
        kills += 1
    assert kills > 3
    one, other = final_parameters(tmp_path / "undisturbed"), final_parameters(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert files_of(tmp_path / "undisturbed") == files_of(tmp_path / "killed")


@pytest.mark.parametrize("method", chosen(METHODS, ["sgd", "usgd", "feature_upgd_fo_global"]))
def test_seeds_and_settings_in_a_stack_equal_separate_runs(method, tmp_path):
    rates, options = (0.02, 0.005), {"method": method, "num_samples": 40, "samples_per_task": 20, **METHODS[method]}
    learnt(settings_of(seeds=(0, 3), learning_rate=rates, **options), tmp_path / "stack")
    stack, bins = final_parameters(tmp_path / "stack"), read_stream(tmp_path / "stack")
    for member, (rate, seed) in enumerate((rate, seed) for rate in rates for seed in (0, 3)):
        place = tmp_path / f"{rate}-{seed}"
        learnt(settings_of(seeds=(seed,), learning_rate=rate, **options), place)
        for name, values in final_parameters(place).items():
            torch.testing.assert_close(values[0], stack[name][member], rtol=1e-4, atol=1e-6)
        own = read_stream(place).loss.values[:, 0, 0]
        np.testing.assert_allclose(bins.loss.values[:, member // 2, member % 2], own, rtol=1e-5)


def test_norms_are_those_of_weights_after_the_step_and_of_gradients_before_it(tmp_path):
    run = StreamingRun(settings_of(method="usgd"), DATA, folder_of(str(tmp_path), fsync=False), CPU)
    x, targets = run._samples(0, 1)
    before = run.learner.network.module(0)
    torch.nn.functional.cross_entropy(before(x[0]), targets[0]).backward()
    gradients = [values.grad for name, values in before.named_parameters() if name.endswith("weight")]
    found = run.learner.learn(x, targets, measured=[0])
    after = run.learner.network.module(0)
    weights = [values.detach() for name, values in after.named_parameters() if name.endswith("weight")]
    for name, values in (("grad_l2", gradients), ("weight_l2", weights)):
        norm = float(sum(each.square().sum() for each in values)) ** 0.5
        assert found[name][0, 0] == pytest.approx(norm, rel=1e-6), name


def test_the_order_of_the_utility_is_an_option_of_upgd(tmp_path):
    learnt(settings_of(method="upgd", order="second", num_samples=9), tmp_path / "option")
    learnt(settings_of(method="upgd_so_global", num_samples=9), tmp_path / "name")
    option, name = final_parameters(tmp_path / "option"), final_parameters(tmp_path / "name")
    assert all(torch.equal(option[each], name[each]) for each in name)


def test_measures_are_means_over_whole_tasks(tmp_path):
    settings = settings_of(method="sgd", learning_rate=0.0, num_samples=70)  # nothing is learnt
    found = learnt(settings, tmp_path / "run").isel(combination=0, seed=0)
    assert found.samples.values.tolist() == [30, 60, 70]
    assert found.plasticity.values.tolist() == [0.0, 0.0, 0.0]
    run = StreamingRun(settings, DATA, folder_of(str(tmp_path / "other")), CPU)
    stream, network = run.streams[0], run.learner.network.module(0)
    for bin_, (start, stop) in enumerate(((0, 30), (30, 60), (60, 70))):
        (segment,) = stream.segments(start, stop)
        outputs = network(DATA.train.inputs(torch.from_numpy(segment.ids)))
        targets = torch.from_numpy(stream.targets(segment.ids, bin_))
        loss = torch.nn.functional.cross_entropy(outputs, targets).detach()
        assert float(found.loss[bin_]) == pytest.approx(float(loss), rel=1e-5)
        assert float(found.accuracy[bin_]) == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))
    weights = [each for name, each in network.named_parameters() if name.endswith("weight")]
    norm = float(torch.cat([each.detach().flatten() for each in weights]).norm())
    np.testing.assert_allclose(found.weight_l2.values, norm, rtol=1e-5)


def test_the_first_bin_of_published_bins_is_one_sample(tmp_path):
    found = learnt(settings_of(bins="published"), tmp_path)
    assert found.samples.values.tolist() == [1, 31, 61]
    assert float(found.accuracy[0, 0, 0]) in {0.0, 1.0}


def test_a_network_learns_and_begins_anew_with_restarts(tmp_path):
    options = {"num_samples": 600, "samples_per_task": 300, "held_out": 30, "method": "sgd", "learning_rate": 0.05}
    usual = learnt(settings_of(**options), tmp_path / "usual")
    assert usual.accuracy.values.min() > 0.6
    assert usual.held_out_accuracy.values.min() > 0.9  # under the permutation of each task
    restarted = learnt(settings_of(restarts=True, **options), tmp_path / "restarts")
    first = [each.loss.values[0, 0, 0] for each in (usual, restarted)]
    assert first[0] == first[1]
    assert usual.loss.values[1, 0, 0] != restarted.loss.values[1, 0, 0]


def test_a_diverged_network_leaves_the_others_alone(tmp_path):
    found = learnt(settings_of(method="sgd", learning_rate=(0.01, 1e30)), tmp_path / "both")
    alone = learnt(settings_of(method="sgd", learning_rate=0.01), tmp_path / "alone")
    assert np.isnan(found.loss.values[-1, 1, 0])
    np.testing.assert_allclose(found.loss.values[:, 0], alone.loss.values[:, 0], rtol=1e-5)


def test_kernels_are_those_of_the_parameters(tmp_path):
    import ntkgen

    settings = settings_of(seeds=(2,), kernels_every=2, num_samples=120, save_every=60, precision="float64")
    learnt(settings, tmp_path)
    found = xarray.open_zarr(tmp_path / "seed2" / "kernels.zarr")
    assert found.iteration.values.tolist() == [0, 60, 120]
    network = StreamingRun(settings, DATA, folder_of(str(tmp_path.parent / "other")), CPU).learner.network
    network.load(torch.load(tmp_path / "models" / "sample60.pt", weights_only=True))
    ids = torch.from_numpy(np.unique(found.row_sample_id.values))
    kernel = ntkgen.ntk(network.module(0), DATA.train.inputs(ids), output="trace", precision="float64")
    np.testing.assert_allclose(found.kernel.values[1], np.asarray(kernel), rtol=1e-10, atol=1e-12)


def test_records_have_the_published_keys(tmp_path):
    settings = settings_of(method="usgd", seeds=(0, 1))
    found = learnt(settings, tmp_path)
    logs = sorted((tmp_path / "logs").rglob("*.json"))
    assert [path.name for path in logs] == ["0.json", "1.json"]
    values = json.loads(logs[1].read_text())
    facts = {"task", "learner", "network", "optimizer_hps", "n_samples", "samples", "seed", "config_hash", "version"}
    assert set(values) == {*KEYS, *facts}
    assert (values["learner"], values["seed"], values["n_samples"]) == ("usgd", 1, 90)
    np.testing.assert_array_equal(values["losses"], found.loss.sel(seed=1).values[:, 0])
    own = read_published_log(logs[1])
    assert own.plasticity.dims == found.plasticity.dims
    for name in (*KEYS.values(), "samples"):
        np.testing.assert_array_equal(own[name], found[name].sel(seed=[1]) if name != "samples" else found.samples)
    assert own.seed.values.tolist() == [1]
    other = learnt(settings_of(method="entire_kernel", seeds=(0, 1)), tmp_path / "other")
    assert other.attrs["settings"]["method"] == "entire_kernel"
    names = {path.relative_to(tmp_path / "other") for path in (tmp_path / "other" / "logs").rglob("*.json")}
    assert not names & {path.relative_to(tmp_path) for path in logs}


def test_records_are_written_although_parameters_cannot_be(tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(Exception, match="models"):
        learnt(settings_of(), tmp_path)
    assert len(list((tmp_path / "logs").rglob("*.json"))) == 1


def test_other_settings_are_refused(tmp_path):
    learnt(settings_of(), tmp_path)
    with pytest.raises(FingerprintError, match="sigma"):
        learnt(settings_of(method="pgd", sigma=0.5), tmp_path)
    with pytest.raises(UnknownNameError, match="sigma"):
        settings_of(method="sgd", sigma=0.1)
    with pytest.raises(InputError, match="beta_utility"):
        settings_of(method="usgd", beta_utility=1.0)
    with pytest.raises(UnknownNameError, match="usgd"):
        settings_of(method="usdg")
    with pytest.raises(InputError, match="seeds"):
        settings_of(seeds=(0, 0))


def test_published_names_are_aliases():
    for name, values in STREAM_ALIASES.items():
        found = without_aliases({"stream": name, "dataset": "digits"})
        assert found == {**values, "dataset": "digits"}
        assert (name in {f"{other}_stats" for other in STREAM_ALIASES}) == name.endswith("_stats")
    for name, network in MODEL_ALIASES.items():
        assert without_aliases({"model": name, "stream": "label-permuted"})["model"] == network


def test_the_command_line(tmp_path, capsys):
    place = str(tmp_path / "r")
    line = [*LINE, "--method", "ratio_norm", "--samples", "120", "--samples-per-task", "40", "--seeds", "0", "1"]
    assert command([*line, "--grid", "lr=0.01,0.001", "--kernels-every", "1", "--out", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["learning_rate"] == [0.01, 0.001]
    assert [each["name"] for each in found["learners"]] == ["ratio_norm, lr 0.01", "ratio_norm, lr 0.001"]
    assert command(["cl-analyze", place]) == 0
    assert "ratio_norm, lr 0.001" in capsys.readouterr().out
    assert command(["cl-plot", place, "--out", str(tmp_path / "plots")]) == 0
    kinds = {path.name.partition("-stream")[2] for path in (tmp_path / "plots").glob("*.png")}
    assert kinds == {".png", "-utilities.png", "-kernels.png"}
    capsys.readouterr()
    for wrong, message in (
        (["--method", "usdg"], "usgd"),
        (["--grid", "lr"], "NAME=VALUE"),
        (["--sigma", "-1"], "sigma"),
        (["--epochs", "3"], "epochs"),
        (["--model", "resnet9"], "single samples"),
        (["--model", "lenet-stream"], "16 × 16 pixels or more"),
        (["--model", f"{__name__}:small"], "brought to 3 × 32 × 32"),
        (["--workers", "2"], "--workers"),
        (["--preset", "bic"], "--preset"),
    ):
        other = tmp_path / "wrong"
        assert command([*line, *wrong, "--out", str(other)]) == 2, wrong
        shown = capsys.readouterr().err
        assert message in shown, wrong
        assert len(shown.strip().splitlines()) == 1, shown
        assert not other.exists(), wrong


def test_other_readers_say_what_a_stream_is(tmp_path, capsys):
    learnt(settings_of(), tmp_path / "run")
    place = str(tmp_path / "run")
    for line, message in (
        (["report", place], "single samples"),
        (["cl-analyze", place, "--units"], "--units does not apply"),
        (["cl-plot", place, "--metric", "x"], "--metric does not apply"),
    ):
        assert command(line) == 2, line
        shown = capsys.readouterr().err
        assert message in shown
        assert len(shown.strip().splitlines()) == 1


def test_pictures_show_the_recorded_numbers(tmp_path):
    found = learnt(settings_of(seeds=(0, 1, 2)), tmp_path)
    (curve,) = curves_of([found], "accuracy", last=2)
    np.testing.assert_array_equal(curve.values, found.accuracy.values[-2:, 0])
    assert curve.at.tolist() == [60, 90]
    np.testing.assert_allclose(curve.standard_error, curve.values.std(1, ddof=1) / 3**0.5)
    picture = draw_streams([found])
    assert "means over 3 seeds, bands or bars are ± one standard error" in picture.caption
    assert render(picture, "png").startswith(b"\x89PNG")


@pytest.mark.slow
def test_upgd_and_sgd_learn_a_stream_better_than_chance(tmp_path):
    """Ten tasks of templates with permuted labels: both are finite and above chance, 1/3."""
    for method, options in (("sgd", {}), ("upgd_fo_global", {"sigma": 0.001})):
        settings = settings_of(method=method, seeds=(0, 1), num_samples=3000, samples_per_task=300, **options)
        found = learnt(settings, tmp_path / method)
        for name in ("loss", "accuracy", "plasticity", "weight_rank"):
            assert np.isfinite(found[name].values).all()
        assert found.accuracy.values.mean() > 0.6
