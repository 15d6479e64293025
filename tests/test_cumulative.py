"""Cumulative streams, masked heads, the best epoch of each task, and what is logged of each epoch."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from cases import chosen
from torch import nn

from ntkgen.continual import run as at_work
from ntkgen.continual.batches import augmented, training_inputs
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.learner import learn
from ntkgen.continual.plan import Data, Plan, steps_per_epoch
from ntkgen.continual.reading import open_run
from ntkgen.continual.run import Run
from ntkgen.continual.schedule import Moment
from ntkgen.continual.selection import BestEpoch
from ntkgen.continual.streams.incremental import Split, StreamSettings, make_stream
from ntkgen.continual.streams.order import class_order
from ntkgen.continual.training_log import WINDOW, TrainingLog
from ntkgen.data.augment import Augmentation
from ntkgen.data.dataset import Dataset
from ntkgen.errors import InputError
from ntkgen.files.folder import LocalFolder

CPU = torch.device("cpu")
# Incremental CIFAR-100: 500 training and 100 test samples of each of 100 classes, which arrive five at a time.
INCREMENTAL = StreamSettings(
    Split(5, 5), order="numpy", stream="cumulative", validation_per_class=50, validation_rule="first"
)
SETTINGS = RunSettings(
    dataset="blobs", model="nets:small", stream="cumulative", split="2/2", head="masked", epochs=3, batch_size=16,
    learning_rate=0.01, optimizer="sgd", weight_decay=0.1, probe_per_class=2, kernels="task", evaluations="1ep",
    dense=None,
)  # fmt: skip


def labels_of(num_classes, each):
    return np.random.RandomState(0).permutation(np.repeat(np.arange(num_classes), each))


def incremental(seed=0, settings=INCREMENTAL):
    return make_stream(settings, labels_of(100, 500), labels_of(100, 100), 100, seed)


def small(num_classes):
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, num_classes),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nets(monkeypatch):
    """Make the network importable by a name."""
    import sys
    import types

    module = types.ModuleType("nets")
    module.small = small
    monkeypatch.setitem(sys.modules, "nets", module)


def blobs(per_class=40, classes=6):
    """Noisy classes of small images, with a test split."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((classes, 3, 2, 2))
    splits = []
    for each in (per_class, 10):
        labels = np.repeat(np.arange(classes), each)
        images = torch.from_numpy(means[labels] + rng.standard_normal((len(labels), 3, 2, 2))).float()
        splits.append(Dataset("blobs", images, torch.from_numpy(labels), classes))
    return Data(*splits)


def images():
    """Images that are large enough for a crop."""
    splits = []
    for split in (blobs().train, blobs().test):
        large = torch.nn.functional.interpolate(split.images, size=(8, 8))
        splits.append(dataclasses.replace(split, images=large))
    return Data(*splits)


def logged(place, event):
    lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


# the stream -----------------------------------------------------------------------------------------------------------


def test_the_class_order_is_that_of_the_seed():
    expected = np.random.RandomState(7).permutation(100).tolist()
    assert list(incremental(7).order) == expected
    assert incremental(8).order != incremental(7).order
    assert class_order("numpy", 4, 0) == (2, 3, 1, 0)


def test_classes_accumulate():
    stream, labels = incremental(), labels_of(100, 500)
    assert len(stream) == 20
    for number, task in enumerate(stream.tasks):
        seen = stream.order[: 5 * number + 5]
        assert task.classes == seen[-5:]
        assert stream.num_seen(number) == len(seen)
        assert np.bincount(labels[task.train], minlength=100)[list(seen)].tolist() == [450] * len(seen)
        assert len(task.train) == 450 * len(seen)
        assert (len(task.validation), len(task.test)) == (250, 500)


def test_the_first_samples_of_each_class_are_held_out():
    stream, labels = incremental(), labels_of(100, 500)
    held_out = np.concatenate([task.validation for task in stream.tasks])
    assert sorted(held_out) == sorted(sample for label in range(100) for sample in np.flatnonzero(labels == label)[:50])
    assert not np.intersect1d(held_out, stream.tasks[-1].train).size
    fewer = dataclasses.replace(INCREMENTAL, validation_per_class=3, validation_rule="random")
    drawn = np.concatenate([task.validation for task in incremental(0, fewer).tasks])
    assert np.bincount(labels[drawn]).tolist() == [3] * 100
    assert not set(drawn) <= set(held_out)


def test_the_number_of_steps_is_the_published_one():
    settings = RunSettings(
        dataset="cifar100", stream="cumulative", split="5/5", class_order="numpy", validation_per_class=50,
        validation_rule="first", batch_size=90, epochs=200,
    )  # fmt: skip
    train, test = (
        Dataset("cifar100", torch.zeros(len(labels), 1, 1, 1), torch.from_numpy(labels), 100)
        for labels in (labels_of(100, 500), labels_of(100, 100))
    )
    steps = steps_per_epoch(Plan.of(settings, Data(train, test)))
    assert steps == [25 * task for task in range(1, 21)]
    assert 200 * sum(steps) == 1_050_000
    assert 200 * sum(-(-each // WINDOW) for each in steps) == 42_000


def test_the_learning_rate_begins_anew_in_each_task():
    settings = RunSettings(learning_rate=0.1, lr_milestones=(60, 120, 160), lr_factor=0.2, epochs=200)
    rates = [round(settings.step_size_at(epoch), 5) for epoch in range(200)]
    assert rates == [0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"overlap": 0.5}, "cumulative stream has no `overlap`"),
        ({"blend_steps": 3}, "cumulative stream has no `blend_steps`"),
        ({"validation_per_class": 0}, "`validation_per_class` is 0: expected 1 or more"),
        ({"compatible_split": True}, "`compatible_split` says which samples"),
    ],
)
def test_streams_that_cannot_be_are_refused(change, match):
    with pytest.raises(InputError, match=match):
        dataclasses.replace(INCREMENTAL, **change)


def test_a_class_keeps_training_samples():
    with pytest.raises(InputError, match="do not fit class 2: expected fewer than its 500"):
        incremental(0, dataclasses.replace(INCREMENTAL, validation_per_class=500))


# the masked head ------------------------------------------------------------------------------------------------------


def test_outputs_of_classes_to_come_have_no_gradient(tmp_path):
    plan = Plan.of(dataclasses.replace(SETTINGS, weight_decay=0.0), blobs())
    run = Run(plan, LocalFolder(tmp_path), CPU)
    run.train_on(plan.stream.tasks[0].train[:16])
    grads = run.model[-1].weight.grad, run.model[-1].bias.grad
    assert all((grad[2:] == 0).all() and (grad[:2] != 0).any() for grad in grads)


@pytest.mark.parametrize("order", ["natural", (3, 0, 5, 1, 4, 2)])
def test_the_loss_is_the_cross_entropy_of_the_classes_seen_so_far(tmp_path, order):
    """L09: the columns are those of the classes in the order of their arrival."""
    plan = Plan.of(dataclasses.replace(SETTINGS, learning_rate=1e-9, class_order=order), blobs())
    run = Run(plan, LocalFolder(tmp_path), CPU)
    run.task = 1
    ids = np.concatenate([plan.stream.tasks[1].train[:8], plan.stream.tasks[0].train[:8]])
    x, labels = plan.data.train.inputs(torch.from_numpy(ids)), plan.data.train.labels[torch.from_numpy(ids)]
    columns = torch.tensor([plan.stream.order.index(label) for label in labels.tolist()])
    outputs = copy.deepcopy(run.model)(x)[:, :4].detach().double()
    expected = float(-outputs.log_softmax(1)[torch.arange(16), columns].mean())
    assert run.train_on(ids) == pytest.approx(expected, rel=1e-5)
    hits = float((outputs.argmax(1) == columns).double().mean())
    assert run.training.accuracies == [hits]


@pytest.mark.parametrize(
    "method",
    chosen(["finetune", "joint", "replay", "lwf", "lwf-mc", "icarl", "ewc"], ["replay", "lwf-mc", "icarl", "ewc"]),
)
def test_every_method_learns_with_a_masked_head(tmp_path, method):
    settings = dataclasses.replace(SETTINGS, method=method, epochs=1, buffer=12, evaluations="task")
    learn(Plan.of(settings, blobs()), LocalFolder(tmp_path / "seed0", fsync=False), CPU)
    run = open_run(tmp_path / "seed0")
    assert np.isnan(run.evaluations.loss.values[0]).tolist() == [False, True, True]  # the first task has two outputs
    assert run.accuracy.values[0, 1:].tolist() == [0, 0]
    assert not np.isnan(run.evaluations.loss.values[-1]).any()


# augmentation ---------------------------------------------------------------------------------------------------------


def inputs_at(run):
    """The inputs of the first evaluated samples."""
    ids = torch.arange(4)
    return run._held_out().inputs(ids)


@pytest.mark.parametrize("is_augmented", [False, True])
def test_held_out_samples_are_augmented_only_on_demand(tmp_path, is_augmented):
    settings = dataclasses.replace(SETTINGS, augment=True, augment_evaluation=is_augmented)
    run = Run(Plan.of(settings, images()), LocalFolder(tmp_path), CPU)
    plain = run.data.test.inputs(torch.arange(4))
    assert torch.equal(inputs_at(run), plain) != is_augmented
    assert torch.equal(inputs_at(run), inputs_at(run))  # the same again at the same iteration
    batches = [training_inputs(run.data.train, np.arange(4), settings, 0, step) for step in (0, 0, 1)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_validation_samples_are_never_augmented(tmp_path, monkeypatch):
    """L07: not even where the published code augments its test samples."""
    settings = dataclasses.replace(SETTINGS, augment=True, augment_evaluation=True, select="best", epochs=1)
    seen = []

    def evaluated(model, method, stream, held_out, num_used, real=at_work.evaluate):
        seen.append((held_out.data is run.data.train, held_out.inputs(torch.arange(4))))
        return real(model, method, stream, held_out, num_used)

    monkeypatch.setattr(at_work, "evaluate", evaluated)
    run = Run(Plan.of(settings, images()), LocalFolder(tmp_path), CPU)
    for step in (1, 2, 3):
        run.train_on(run.plan.stream.tasks[0].train[:16])
        run.end_epoch(Moment(0, step, 1, 3))
    assert [is_training_split for is_training_split, _ in seen] == [True] * 3
    plain = run.data.train.inputs(torch.arange(4))
    assert all(torch.equal(inputs, plain) for _, inputs in seen)


def test_the_augmentation_of_incremental_cifar(tmp_path):
    settings = dataclasses.replace(SETTINGS, augment=True, augmentation="crop-flip-rotation")
    found = augmented(blobs().train, settings).augmentation
    assert found == Augmentation(4, flip=True, rotation_degrees=15, reflect=True, one_direction=True)


# the best epoch -------------------------------------------------------------------------------------------------------


def test_the_first_of_the_best_epochs_is_restored():
    model, best = nn.Linear(1, 1), BestEpoch()
    for epoch, accuracy in enumerate((0.2, 0.6, 0.6, 0.3), 1):
        with torch.no_grad():
            model.weight.fill_(epoch)
        best.offer(epoch, accuracy, model)
    assert best.restore(model) == 2
    assert model.weight.item() == 2
    best.offer(1, 0.1, model)  # a worse epoch of the next task
    assert best.restore(model) == 1


def test_a_task_ends_with_its_best_epoch(tmp_path, monkeypatch):
    settings, scripted = dataclasses.replace(SETTINGS, select="best", epochs=4, num_tasks=1), [0.2, 0.6, 0.6, 0.3]
    kept, plain = [], Run.end_epoch

    def end_epoch(run, moment):
        kept.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
        plain(run, moment)

    def evaluated(model, method, stream, held_out, num_used, real=at_work.evaluate):
        found = real(model, method, stream, held_out, num_used)
        is_validation = held_out.data is not data.test
        return dataclasses.replace(found, accuracy=np.array([scripted[len(kept) - 1]])) if is_validation else found

    data = blobs()
    monkeypatch.setattr(Run, "end_epoch", end_epoch)
    monkeypatch.setattr(Data, "to", lambda self, _: self)
    monkeypatch.setattr(at_work, "evaluate", evaluated)
    learn(Plan.of(settings, data), LocalFolder(tmp_path, fsync=False), CPU)
    found, last = (torch.load(tmp_path / f"models/{name}.pt", weights_only=True) for name in ("task0", "task0-last"))
    assert all(torch.equal(found[name], kept[1][name]) for name in found)
    assert all(torch.equal(last[name], kept[3][name]) for name in last)
    assert [line["epoch"] for line in logged(tmp_path, "epoch selected")] == [2]
    assert [line["validation_accuracy"] for line in logged(tmp_path, "epoch")] == scripted


def test_the_validation_accuracy_is_that_of_the_classes_so_far(tmp_path):
    settings = dataclasses.replace(SETTINGS, select="best", epochs=1, validation_per_class=5)
    learn(Plan.of(settings, blobs()), LocalFolder(tmp_path, fsync=False), CPU)
    run, data, model = open_run(tmp_path), blobs().train, small(6).eval()
    for task, line in enumerate(logged(tmp_path, "epoch")):
        model.load_state_dict(torch.load(tmp_path / f"models/task{task}.pt", weights_only=True))
        parts = [run.evaluations[f"validation_{each}"].values for each in range(task + 1)]
        ids = torch.from_numpy(np.concatenate(parts))
        with torch.no_grad():
            outputs = model(data.inputs(ids))[:, : 2 * task + 2]
        assert line["validation_accuracy"] == pytest.approx(
            float((outputs.argmax(1) == data.labels[ids]).double().mean()), abs=1e-12
        )
        assert line["validation_loss"] == pytest.approx(
            float(nn.functional.cross_entropy(outputs.double(), data.labels[ids])), rel=1e-5
        )


# the log --------------------------------------------------------------------------------------------------------------


def test_means_over_windows_by_hand():
    log = TrainingLog()
    for step in range(WINDOW + 5):
        log.add(float(step), float(step < WINDOW))
    found = log.finish()
    assert found["loss"] == (WINDOW + 4) / 2
    assert found["window_loss"] == [(WINDOW - 1) / 2, WINDOW + 2.0]
    assert found["window_accuracy"] == [1.0, 0.0]
    log.add(1.0, 1.0)
    assert log.finish()["window_loss"] == [1.0]


def test_the_accuracy_of_every_window_is_announced(tmp_path):
    """L01: what --verbose prints."""
    lines = []
    run = Run(Plan.of(SETTINGS, blobs()), LocalFolder(tmp_path), CPU, lines.append)
    for _ in range(2 * WINDOW + 3):
        run.train_on(run.plan.stream.tasks[0].train[:16])
        run.iteration += 1
    found = [float(line.split("training accuracy ")[1]) for line in lines]
    windows = np.array(run.training.accuracies[: 2 * WINDOW]).reshape(2, WINDOW).mean(1)
    assert found == pytest.approx(windows.tolist(), abs=5e-4)
    assert [line.split(":")[0] for line in lines] == ["task 1, iteration 25", "task 1, iteration 50"]


def test_every_epoch_is_logged(tmp_path):
    learn(Plan.of(SETTINGS, blobs()), LocalFolder(tmp_path, fsync=False), CPU)
    lines = logged(tmp_path, "epoch")
    assert [(line["task"], line["epoch"]) for line in lines] == [(epoch // 3, epoch + 1.0) for epoch in range(9)]
    assert [line["loss"] for line in lines[:3]] == sorted((line["loss"] for line in lines[:3]), reverse=True)
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
