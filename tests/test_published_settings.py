"""Settings that reproduce published runs: the first samples as probe, frozen statistics, lazy rates."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from ntkgen.continual import learner, plan
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.learner import learn
from ntkgen.continual.plan import Plan
from ntkgen.continual.probe import choose_probe
from ntkgen.continual.reading import open_run
from ntkgen.continual.streams.incremental import make_stream
from ntkgen.data.dataset import Dataset
from ntkgen.errors import InputError, UnknownNameError
from ntkgen.files.folder import LocalFolder

SETTINGS = RunSettings(dataset="digits", split="5/5", width=8, epochs=2, probe_per_class=2, kernels="1ep", dense=None)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(0).permutation(np.repeat(np.arange(6), 40))


def chosen(labels, **changes):
    settings = dataclasses.replace(SETTINGS, split="2/2", **changes)
    stream = make_stream(settings.stream_settings, labels, np.zeros(0, np.int64), 6, settings.seed)
    return stream, choose_probe(stream, labels, settings)


def test_a_probe_of_both_parts_has_as_many_validation_samples_of_every_class(labels):
    stream, probe = chosen(labels, probe_parts="both")
    for task in stream.tasks:
        for ids, is_validation in ((task.train, False), (task.validation, True)):
            found = probe.ids[(probe.tasks == task.number) & (probe.is_validation == is_validation)]
            assert np.isin(found, ids).all()
            assert sorted(np.bincount(labels[found], minlength=6)[list(task.classes)]) == [2, 2]
    assert len(np.unique(probe.ids)) == len(probe.ids) == 24


def test_the_rule_first_takes_the_first_samples_of_the_split_of_continuum(labels):
    _, probe = chosen(labels, probe_parts="both", probe_rule="first", compatible_split=True)
    members = np.flatnonzero(labels < 2)
    order = np.arange(80)
    np.random.RandomState(1).shuffle(order)  # the literal algorithm: shuffle, hold out the first tenth
    expected = np.concatenate([members[order[8:12]], members[order[:4]]])
    assert probe.ids[probe.tasks == 0].tolist() == expected.tolist()
    assert probe.is_validation[probe.tasks == 0].tolist() == [False] * 4 + [True] * 4


def test_a_probe_larger_than_the_validation_samples_is_refused(labels):
    with pytest.raises(InputError, match=r"expected 5 validation samples of class 0, found 4"):
        chosen(labels, probe_parts="both", probe_per_class=5)


@pytest.mark.parametrize("name", ["optimizer", "normalise", "evaluate_on", "regime", "probe_rule", "probe_parts"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(UnknownNameError, match=f"`{name}` 'nonsense'"):
        dataclasses.replace(SETTINGS, **{name: "nonsense"})


def test_the_lazy_regime_divides_the_learning_rate_by_the_width():
    rates = [dataclasses.replace(SETTINGS, width=width, regime="lazy").step_size for width in (64, 128)]
    assert rates == [SETTINGS.learning_rate, SETTINGS.learning_rate / 2]
    assert SETTINGS.step_size == SETTINGS.learning_rate
    with pytest.raises(InputError, match="expected a `width`, found none"):
        dataclasses.replace(SETTINGS, width=None, regime="lazy")


def test_images_may_stay_as_they_are_and_tasks_may_be_evaluated_on_validation_samples(monkeypatch):
    def loaded(name, *, data_dir=None, split="train"):
        images = torch.full((3, 1, 2, 2), 255 if split == "train" else 0, dtype=torch.uint8)
        return Dataset(name, images, torch.arange(3), num_classes=3, mean=(0.5,), std=(0.25,))

    monkeypatch.setattr(plan.dataset, "load", loaded)
    settings = dataclasses.replace(SETTINGS, dataset="mnist")
    data = plan.load_data(settings)
    assert [float(split.inputs().unique()) for split in (data.train, data.test)] == [2.0, -2.0]
    plain = plan.load_data(dataclasses.replace(settings, normalise="none", evaluate_on="validation"))
    assert float(plain.train.inputs().unique()) == 1.0
    assert plain.test is None
    monkeypatch.setattr(plan.dataset, "load", lambda *_, **__: rgb)
    rgb = Dataset("rgb", torch.tensor([[[[0]], [[255]], [[51]]]], dtype=torch.uint8), torch.zeros(1).long(), 1)
    symmetric = plan.load_data(dataclasses.replace(settings, normalise="symmetric", evaluate_on="validation"))
    torch.testing.assert_close(symmetric.train.inputs().flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory):
    """A run with batch norm whose statistics are kept from the second epoch of each task on."""
    place = tmp_path_factory.mktemp("run") / "seed0"
    settings = dataclasses.replace(
        SETTINGS, model="resnet9", width=4, freeze_batch_norm=True, batch_size=256, output="trace", num_tasks=1
    )
    seen = []

    class Watched(learner.Run):
        def train_on(self, ids, *, frozen=False):
            found = super().train_on(ids, frozen=frozen)
            seen.append((frozen, [buffer.clone() for buffer in self.model.buffers()]))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "Run", Watched)
        learn(Plan.of(settings, plan.load_data(settings)), LocalFolder(place, fsync=False), torch.device("cpu"))
    return seen


def test_statistics_of_batch_norm_change_in_the_first_epoch_of_a_task_alone(frozen_run):
    modes = [frozen for frozen, _ in frozen_run]
    half = len(modes) // 2
    assert modes == [False] * half + [True] * half
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for (_, before), (_, after) in itertools.pairwise(frozen_run)
    ]
    assert moved == [True] * (half - 1) + [False] * half


def test_kernels_of_the_two_parts_of_a_probe_are_measured_apart(tmp_path):
    settings = dataclasses.replace(SETTINGS, probe_parts="both", kernels="task", evaluations="task", epochs=1)
    learn(Plan.of(settings, plan.load_data(settings)), LocalFolder(tmp_path, fsync=False), torch.device("cpu"))
    run = open_run(tmp_path)
    whole = np.asarray(run.kernels.kernel[0].values, np.float64)
    is_validation = run.evaluations.probe_is_validation.values
    for part, rows in (("train", ~is_validation), ("validation", is_validation), ("all", is_validation | True)):
        norm = float(run.kernel_metrics(part=part).frobenius_norm[0])
        assert norm == pytest.approx(np.linalg.norm(whole[np.ix_(rows, rows)]), rel=1e-12)
    with pytest.raises(UnknownNameError, match="part of the probe 'test'"):
        run.kernels_of("test")
