"""Settings of the training: learning rates, new optimizers, augmentation, and batches that are not full."""

import dataclasses

import numpy as np
import pytest
import torch
from killing import Killed
from test_learner import SETTINGS, done, nets, require_equal  # noqa: F401 - nets is a fixture

from ntkgen.cli import run as command
from ntkgen.continual import run as at_work
from ntkgen.continual.batches import cut, training_inputs
from ntkgen.continual.configuration import CHOICES, RunSettings
from ntkgen.continual.plan import normalised
from ntkgen.data.augment import Augmentation
from ntkgen.data.dataset import Dataset
from ntkgen.errors import InputError
from ntkgen.files.folder import LocalFolder

STEPS = 4  # iterations of an epoch
QUICK = dataclasses.replace(SETTINGS, kernels="1it", evaluations="task", dense=None, model="nets:small", num_tasks=2)


def optimizer_of(place):
    return torch.load(place / "checkpoint.pt", weights_only=True)["optimizer"]


def test_learning_rates_of_icarl():
    settings = RunSettings(optimizer="sgd", learning_rate=2.0, lr_milestones=(49, 63), lr_factor=0.2, epochs=70)
    rates = [settings.step_size_at(epoch) for epoch in (0, 48, 49, 62, 63, 69)]
    assert rates == pytest.approx([2, 2, 0.4, 0.4, 0.08, 0.08], rel=1e-12)


def test_the_learning_rate_falls_within_each_task(tmp_path):
    settings = dataclasses.replace(QUICK, epochs=3, lr_milestones=(1, 2), lr_factor=0.5)
    kernels = done(tmp_path / "seed0", settings).kernels
    expected = [0.01 * factor for factor in (1, 0.5, 0.25) for _ in range(STEPS)]
    assert kernels.step_size.values[1:].tolist() == pytest.approx(2 * expected)  # the first is before any iteration


@pytest.mark.parametrize("wrong", [{"lr_milestones": [0]}, {"lr_factor": 0}])
def test_learning_rates_that_cannot_be_meant(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        RunSettings.from_json(wrong)


def test_milestones_are_separated_by_commas(capsys, tmp_path):
    line = ["cl-run", "--model", "logistic", "--dry-run", "--json", "--out", str(tmp_path), "--lr-milestones"]
    assert command([*line, "49,63"]) == 0
    assert '"lr_milestones": [49, 63]' in capsys.readouterr().out
    assert command([*line, "49;63"]) == 2
    assert "is not a list of integers" in capsys.readouterr().err


def test_each_task_may_begin_with_a_new_optimizer(tmp_path):
    for reset, steps in ((False, 8), (True, 4)):
        settings = dataclasses.replace(QUICK, reset_optimizer=reset, kernels="task", epochs=1)
        done(tmp_path / str(reset), settings)
        assert {int(state["step"]) for state in optimizer_of(tmp_path / str(reset))["state"].values()} == {steps}


def test_normalisations_by_hand():
    labels = torch.zeros(5).long()
    train, test = (Dataset("x", torch.rand(5, 3, 4, 4), labels, 1, mean=(0.4,), std=(0.2,)) for _ in range(2))
    found = {how: [split.inputs() for split in normalised([train, test], how)] for how in CHOICES["normalise"]}
    for i, split in enumerate((train, test)):
        assert torch.equal(found["dataset"][i], split.inputs())
        assert torch.equal(found["none"][i], split.images)
        assert torch.allclose(found["symmetric"][i], 2 * split.images - 1)
        assert torch.equal(found["pixel-mean"][i], split.images - train.images.mean(0))
    assert set(found) == {"dataset", "none", "symmetric", "pixel-mean"}


def test_the_last_batch_may_be_left_out():
    ids = np.arange(11)
    settings = RunSettings(batch_size=4, drop_last=True)
    assert [part.tolist() for part in cut(ids, settings)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [part.tolist() for part in cut(ids[:9], settings)] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # not merged to five
    assert [part.tolist() for part in cut(ids[:3], settings)] == [[0, 1, 2]]
    assert [len(part) for part in cut(ids, RunSettings(batch_size=4))] == [4, 4, 3]


def test_augmentation_depends_on_seed_task_and_iteration_alone():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data, ids = Dataset("x", images, torch.zeros(6).long(), 1), np.arange(6)
    plain, augmented = RunSettings(), RunSettings(augment=True)
    assert torch.equal(training_inputs(data, ids, plain, 0, 0), images)
    found = training_inputs(data, ids, augmented, 1, 5)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(found, training_inputs(data, ids, augmented, 1, 5))
    for other in ((augmented, 1, 6), (augmented, 2, 5), (dataclasses.replace(augmented, seed=1), 1, 5)):
        assert not torch.equal(found, training_inputs(data, ids, *other))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    windows = [padded[:, :, top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
    windows += [window.flip(3) for window in windows]
    for sample in range(6):
        assert any(torch.equal(found[sample], window[sample]) for window in windows)
    flipped = training_inputs(dataclasses.replace(data, augmentation=Augmentation(flip=True)), ids, augmented, 0, 0)
    assert {torch.equal(flipped[sample], images[sample]) for sample in range(6)} == {True, False}  # and no crop


def test_a_killed_run_with_all_of_it_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    settings = dataclasses.replace(
        SETTINGS, num_tasks=2, kernels="task", evaluations="1ep", dense=None, optimizer="sgd", lr_milestones=(1,),
        reset_optimizer=True, augment=True, drop_last=True,
    )  # fmt: skip
    monkeypatch.setattr(at_work, "COMMIT_SECONDS", 0.0)  # a checkpoint after each iteration
    done(tmp_path / "undisturbed", settings)
    with monkeypatch.context() as patch:
        count = iter(range(1, 100))

        def write(self, key, data, plain=LocalFolder.write):
            plain(self, key, data)
            if key == "checkpoint.pt" and next(count) == 8:  # six in the first task, two in the second
                raise Killed

        patch.setattr(LocalFolder, "write", write)
        with pytest.raises(Killed):
            done(tmp_path / "seed0", settings)
    position = torch.load(tmp_path / "seed0/checkpoint.pt", weights_only=True)["position"]
    assert (position["task"], position["step"]) == (1, 2)
    done(tmp_path / "seed0", settings)
    require_equal(tmp_path / "seed0", tmp_path / "undisturbed")
