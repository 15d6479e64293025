"""Plasticity of a finished run from its stored parameters, against a computation by hand."""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from test_learner import SETTINGS, blobs, done, small

from ntkgen.continual.metrics.confusion import class_accuracy
from ntkgen.continual.metrics.definitions import OF_PLASTICITY
from ntkgen.continual.metrics.ranks import Ranks
from ntkgen.continual.reading import open_run
from ntkgen.continual.streams.tasks import Stream, Task
from ntkgen.continual.streams.views import NEXT, PREVIOUS, classes_of, samples_of
from ntkgen.errors import DivergedError, FingerprintError, InputError, ModelError, StoreError, UnknownNameError

UNITS = "ntkgen.continual.units"
if importlib.util.find_spec(UNITS) is None:  # a stand-in for chains with one hidden layer, until the module is there

    def _hidden_layers(model):
        return (types.SimpleNamespace(activation="4"),)

    @contextlib.contextmanager
    def _recorded(model, layers):
        found = {}
        handle = model[4].register_forward_hook(lambda *args: found.update({"4": args[2].detach()}))
        yield found
        handle.remove()

    sys.modules[UNITS] = types.ModuleType(UNITS)
    sys.modules[UNITS].hidden_layers, sys.modules[UNITS].recorded = _hidden_layers, _recorded

from ntkgen.continual import plasticity  # noqa: E402 - after the stand-in
from ntkgen.continual.plasticity import PlasticitySettings, measure_plasticity  # noqa: E402

# The split ``train`` has 180 samples: with 50, a view is a part of its classes. About half of the units of batch norm
# with a ReLU are active on less than half of the samples.
FEW = PlasticitySettings(num_samples=50, threshold=0.51)
RARELY = dataclasses.replace(SETTINGS, kernels="task", dense=None, evaluations="task", class_order=(3, 0, 5, 1, 4, 2))


@pytest.fixture(scope="module", autouse=True)
def nets():
    sys.modules["nets"] = types.SimpleNamespace(small=small)
    yield
    del sys.modules["nets"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three tasks."""
    return done(tmp_path_factory.mktemp("run") / "seed0", RARELY)


def network_after(run, task):
    net = small(6)
    net.load_state_dict(torch.load(run.folder.path / f"models/task{task}.pt", weights_only=True))
    return net


# views ----------------------------------------------------------------------------------------------------------------


def stream_of(*groups):
    nothing = np.zeros(0, np.int64)
    order = tuple(dict.fromkeys(label for classes in groups for label in classes))
    return Stream(tuple(Task(k, classes, nothing, nothing, nothing) for k, classes in enumerate(groups)), order)


@pytest.mark.parametrize(
    ("groups", "following", "previous"),
    [
        (((3, 0), (5, 1), (4, 2)), [(3, 0), (5, 1), (4, 2), ()], [(), (3, 0), (3, 0, 5, 1), (3, 0, 5, 1, 4, 2)]),
        (((3, 0), (3, 0, 5), (3, 0, 5, 1)), [(3, 0), (5,), (1,), ()], [(), (3, 0), (3, 0, 5), (3, 0, 5, 1)]),
        (((3, 0), (3, 1)), [(3, 0), (3, 1), ()], [(), (3, 0), (3, 0, 1)]),
        (((0, 1), (0, 1)), [(0, 1), (0, 1), ()], [(), (0, 1), (0, 1)]),
    ],
    ids=["disjoint", "cumulative", "overlapping", "same classes"],
)
def test_classes_of_the_views(groups, following, previous):
    stream = stream_of(*groups)
    assert [classes_of(NEXT, stream, boundary) for boundary in range(len(groups) + 1)] == following
    assert [classes_of(PREVIOUS, stream, boundary) for boundary in range(len(groups) + 1)] == previous


def test_samples_of_a_view_are_drawn_from_all_of_its_classes():
    labels, stream = np.arange(60) % 6, stream_of((3, 0), (5, 1), (4, 2))
    found = samples_of(NEXT, stream, labels, 1, 12, seed=0)
    assert len(set(found.tolist())) == 12
    assert set(labels[found].tolist()) == {5, 1}
    assert np.array_equal(found, samples_of(NEXT, stream, labels, 1, 12, seed=0))
    assert not np.array_equal(found, samples_of(NEXT, stream, labels, 1, 12, seed=1))
    everything = samples_of(PREVIOUS, stream, labels, 2, 1000, seed=0)
    assert np.array_equal(everything, np.flatnonzero(np.isin(labels, (3, 0, 5, 1))))
    assert len(samples_of(PREVIOUS, stream, labels, 0, 1000, seed=0)) == 0


# a finished run -------------------------------------------------------------------------------------------------------


def test_a_run_has_every_array(run):
    found = measure_plasticity(run, blobs(), FEW).arrays()
    names = {name.removeprefix(f"{NEXT}_").removeprefix(f"{PREVIOUS}_") for name in found}
    assert names | {"relative_accuracy"} == set(OF_PLASTICITY)
    for name, values in found.items():
        assert values.shape == ((6,) if name == "class_accuracy" else (4,)), name
        missing = [3] * name.startswith(NEXT) + [0] * name.startswith(PREVIOUS)
        assert np.flatnonzero(np.isnan(values)).tolist() == missing, name
    assert found["class_accuracy"].tolist() == class_accuracy(run.confusion[-1]).tolist()
    assert found["weight_magnitude"].std() > 0


@pytest.mark.numeric
@pytest.mark.parametrize("batch_norm", ["running", "batch"])
@pytest.mark.parametrize("view", [NEXT, PREVIOUS])
def test_measures_are_those_of_the_stored_network(run, view, batch_norm):
    """The activations of the second boundary, computed layer by layer."""
    data, settings = blobs(), dataclasses.replace(FEW, batch_norm=batch_norm)
    found = measure_plasticity(run, data, settings).arrays()
    net, stream = network_after(run, 1), stream_of((3, 0), (5, 1), (4, 2))
    ids = samples_of(view, stream, data.labels, 2, 50, RARELY.seed)
    with torch.no_grad():
        h = data.train.inputs(torch.from_numpy(ids)).flatten(1) @ net[1].weight.T + net[1].bias
        norm = net[2]
        mean, variance = norm.running_mean, norm.running_var
        if batch_norm == "batch":
            mean, variance = h.mean(0), h.var(0, correction=0)
        h = torch.relu((h - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias).double().numpy()
    expected = Ranks.of(h, tolerance=50 * 2.0**-23)
    dormant = float(np.mean((h != 0).mean(0) < FEW.threshold))
    assert 0 < dormant < 1
    assert found[f"{view}_dormant_units"][2] == pytest.approx(dormant)
    for name in ("effective_rank", "stable_rank"):  # float32 activations of 24 units
        assert found[f"{view}_{name}"][2] == pytest.approx(getattr(expected, name), rel=1e-4)
    assert found[f"{view}_rank_99"][2] == expected.rank_99
    assert found[f"{view}_numerical_rank"][2] == expected.numerical_rank


def test_statistics_of_the_batch_change_what_is_found(run):
    running, batch = (
        measure_plasticity(run, blobs(), dataclasses.replace(FEW, batch_norm=each)) for each in plasticity.BATCH_NORM
    )
    assert not np.array_equal(running.next_task["effective_rank"][1:3], batch.next_task["effective_rank"][1:3])
    assert np.array_equal(running.weight_magnitude, batch.weight_magnitude)


@pytest.mark.numeric
def test_the_accuracy_of_classes_may_have_the_statistics_of_batches_too(run):
    """As in the published analysis, which does not leave the training mode."""
    settings = PlasticitySettings(num_samples=1000, batch_norm="batch")
    found = measure_plasticity(run, blobs(), settings).class_accuracy
    net, stream, data = network_after(run, 2).eval(), stream_of((3, 0), (5, 1), (4, 2)), blobs()
    net[2].train()  # batch norm
    ids = np.concatenate([run.evaluations[f"validation_{task}"].values for task in range(3)])
    with torch.no_grad():  # all samples are one batch, and their order does not matter
        predictions = net(data.train.inputs(torch.from_numpy(ids))).argmax(1).numpy()
    targets = stream.targets(data.labels[ids])
    assert found.tolist() == [float((predictions[targets == each] == each).mean()) for each in range(6)]
    few = measure_plasticity(run, blobs(), dataclasses.replace(settings, num_samples=4)).class_accuracy
    assert few.tolist() != found.tolist()
    assert measure_plasticity(run, blobs(), FEW).class_accuracy.tolist() == class_accuracy(run.confusion[-1]).tolist()


@pytest.mark.numeric
def test_the_magnitude_is_that_of_parameters_and_not_of_buffers(run):
    found = measure_plasticity(run, blobs(), FEW).weight_magnitude
    net = network_after(run, 2)
    values = torch.cat([param.detach().double().abs().flatten() for param in net.parameters()])
    assert found[3] == pytest.approx(float(values.mean()), rel=1e-12)
    assert any("running" in name for name in net.state_dict())


def test_the_size_of_the_batches_changes_nothing(run, monkeypatch):
    whole = measure_plasticity(run, blobs(), FEW).arrays()
    monkeypatch.setattr(plasticity, "BATCH", 7)
    parts = measure_plasticity(run, blobs(), FEW).arrays()
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, rtol=1e-4, err_msg=name)


def test_an_unfinished_run_has_its_finished_boundaries(run, tmp_path):
    shutil.copytree(run.folder.path, tmp_path / "seed0")
    (tmp_path / "seed0/models/task2.pt").unlink()
    found = measure_plasticity(open_run(tmp_path / "seed0"), blobs(), FEW)
    whole = measure_plasticity(run, blobs(), FEW)
    for view in (NEXT, PREVIOUS):
        assert np.array_equal(getattr(found, view)["rank_99"], getattr(whole, view)["rank_99"][:3], equal_nan=True)


def test_a_growing_head_is_built_as_large_as_it_was(tmp_path):
    grown = done(tmp_path / "seed0", dataclasses.replace(RARELY, head="growing"))
    found = measure_plasticity(grown, blobs(), FEW)
    assert np.isfinite(found.previous_tasks["effective_rank"][1:]).all()
    sizes = [torch.load(tmp_path / f"seed0/models/task{k}.pt", weights_only=True)["5.bias"].shape[0] for k in range(3)]
    assert sizes == [2, 4, 6]


def test_settings_are_the_published_ones():
    """L24 and L27: threshold 0.01, and at most 1000 samples; but the network is in evaluation mode."""
    assert PlasticitySettings() == PlasticitySettings(threshold=0.01, num_samples=1000, batch_norm="running")


# what is refused ------------------------------------------------------------------------------------------------------


def test_other_data_are_refused(run):
    with pytest.raises(FingerprintError, match="other data"):
        measure_plasticity(run, blobs(spread=0.4), FEW)


@pytest.mark.parametrize("damage", [bytes(9), b""])
def test_damaged_parameters_are_refused(run, tmp_path, damage):
    shutil.copytree(run.folder.path, tmp_path / "seed0")
    (tmp_path / "seed0/models/task1.pt").write_bytes(damage)
    with pytest.raises(StoreError, match=r"models/task1\.pt"):
        measure_plasticity(open_run(tmp_path / "seed0"), blobs(), FEW)


def test_an_imported_run_has_no_parameters(run, tmp_path):
    shutil.copytree(run.folder.path, tmp_path / "seed0")
    config = json.loads((tmp_path / "seed0/config.json").read_text())
    (tmp_path / "seed0/config.json").write_text(json.dumps({**config, "facts": {"imported": "log.pkl"}}))
    with pytest.raises(StoreError, match="imported"):
        measure_plasticity(open_run(tmp_path / "seed0"), blobs(), FEW)


def test_activations_that_are_not_finite_are_refused(run, tmp_path):
    shutil.copytree(run.folder.path, tmp_path / "seed0")
    file = tmp_path / "seed0/models/task0.pt"
    state = torch.load(file, weights_only=True)
    state["1.bias"][0] = float("inf")
    torch.save(state, file)
    with pytest.raises(DivergedError, match="not finite"):
        measure_plasticity(open_run(tmp_path / "seed0"), blobs(), FEW)


def test_a_network_without_hidden_units_is_refused(run, monkeypatch):
    monkeypatch.setattr(plasticity, "hidden_layers", lambda model: ())
    with pytest.raises(ModelError, match="at least one hidden layer"):
        measure_plasticity(run, blobs(), FEW)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_norm": "train"}, UnknownNameError),
        ({"num_samples": 0}, InputError),
        ({"threshold": 1.5}, InputError),
        ({"threshold": float("nan")}, InputError),
    ],
)
def test_settings_that_are_not_possible_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        PlasticitySettings(**options)
