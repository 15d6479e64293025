"""Training: to the target or an explicit failure, and bit-identical after an interruption."""

import dataclasses

import pytest
import torch
from torch import nn

from ntkgen.data.augment import Augmentation
from ntkgen.data.dataset import Dataset
from ntkgen.errors import DivergedError, FingerprintError, NotConvergedError
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training import fit as training
from ntkgen.training import loop
from ntkgen.training.recipe import LEARNING_RATE, Recipe


def make_data(num_samples=96):
    """Two easy classes in noise, augmented, so that every source of chance is used."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(num_samples) % 2
    images = torch.rand(num_samples, 1, 8, 8, generator=generator) * 0.5 + labels[:, None, None, None] * 0.4
    return Dataset("two", images, labels, 2, augmentation=Augmentation(crop_padding=1, rotation_degrees=5))


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 36, 2)
    )


RECIPE = Recipe(model="tiny", dataset="two", data_fingerprint="x", num_epochs=5, batch_size=20, learning_rate=0.05)


def train(path, *, recipe=RECIPE, target=101.0, report=lambda *_: None, model=None):
    return training.train(model or make_model(), make_data(), recipe, path, target_accuracy=target, report=report)


def test_it_stops_at_the_first_epoch_that_reaches_the_target(tmp_path):
    accuracies = []

    def report(epoch, step, steps, accuracy):
        accuracies.append(accuracy)

    found = train(tmp_path / "a.pt", target=80.0, report=report)
    measured = [accuracy for accuracy in accuracies if accuracy is not None]
    assert found.train_accuracy == measured[-1] >= 80
    assert all(accuracy < 80 for accuracy in measured[:-1])
    assert found.epoch == len(measured) < RECIPE.num_epochs
    training.require_convergence(tmp_path / "a.pt", found, 80.0)


class StoppedError(Exception):
    """An interruption at a chosen step."""


@pytest.mark.parametrize(("epoch", "step"), [(0, 2), (2, 1), (3, 5)])
def test_an_interrupted_training_ends_bit_identical(tmp_path, epoch, step):
    def interrupt(e, s, steps, accuracy):
        if (e, s) == (epoch, step) and accuracy is None:
            raise StoppedError

    straight = train(tmp_path / "straight.pt")
    with pytest.raises(StoppedError):
        train(tmp_path / "resumed.pt", report=interrupt)
    assert checkpoints.load(tmp_path / "resumed.pt").epoch == epoch
    resumed = train(tmp_path / "resumed.pt")
    assert straight.train_loss == resumed.train_loss
    assert all(torch.equal(value, resumed.state[name]) for name, value in straight.state.items())


def test_a_finished_training_is_final(tmp_path):
    """Kernels may have been made of it: neither the same target nor a higher one trains it on."""
    path = tmp_path / "a.pt"
    first = train(path, target=60.0)
    before, steps = path.read_bytes(), []
    for target in (60.0, 101.0):
        found = train(path, target=target, report=lambda *step: steps.append(step))
        assert (found.epoch, steps) == (first.epoch, [])
    assert path.read_bytes() == before
    with pytest.raises(NotConvergedError, match=r"expected 101 %"):
        training.require_convergence(path, found, 101.0)


def test_a_last_sample_on_its_own_joins_the_batch_before(tmp_path):
    recipe = dataclasses.replace(RECIPE, batch_size=19, num_epochs=1)  # 96 = 5 · 19 + 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    steps = []
    train(tmp_path / "a.pt", recipe=recipe, model=model, report=lambda *step: steps.append(step))
    assert steps[-1][1:3] == (5, 5)


def test_resuming_uses_the_threads_it_began_with(tmp_path, monkeypatch):
    def interrupt(epoch, step, steps, accuracy):
        if epoch == 1:
            raise StoppedError

    before = torch.get_num_threads()
    with pytest.raises(StoppedError):
        train(tmp_path / "a.pt", report=interrupt)
    torch.set_num_threads(before + 1)
    try:
        used = set()
        train(tmp_path / "a.pt", report=lambda *_: used.add(torch.get_num_threads()))
        assert used == {before}
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_missed_target_is_an_error_that_keeps_the_checkpoint_and_says_what_to_do(tmp_path):
    path = tmp_path / "a.pt"
    found = train(path)
    with pytest.raises(NotConvergedError, match="`allow_unconverged`") as caught:
        training.require_convergence(path, found, 101.0)
    assert str(path) in str(caught.value)
    assert f"{found.train_accuracy:.2f} %" in str(caught.value)
    assert checkpoints.load(path).epoch == RECIPE.num_epochs


def test_a_loss_that_is_not_finite_stops_at_once(tmp_path):
    steps = []
    wild = dataclasses.replace(RECIPE, learning_rate=1e30)
    with pytest.raises(DivergedError, match="lower `learning_rate`"):
        train(tmp_path / "a.pt", recipe=wild, report=lambda *step: steps.append(step))
    assert len(steps) < 4
    assert checkpoints.load(tmp_path / "a.pt").epoch == 0


def test_no_epochs_take_the_network_as_it_is_built(tmp_path):
    model = make_model()
    found = train(tmp_path / "a.pt", recipe=dataclasses.replace(RECIPE, num_epochs=0), model=model)
    assert found.epoch == 0
    assert found.train_accuracy is None
    assert all(torch.equal(found.state[name], value) for name, value in make_model().state_dict().items())
    training.require_convergence(tmp_path / "a.pt", found, 99.5)


def test_another_recipe_does_not_continue_a_checkpoint(tmp_path):
    train(tmp_path / "a.pt", recipe=dataclasses.replace(RECIPE, num_epochs=1))
    with pytest.raises(FingerprintError, match="num_epochs 1, now 5"):
        train(tmp_path / "a.pt")


def test_seeds_matter_and_the_process_is_left_as_it_was(tmp_path):
    torch.manual_seed(11)
    torch.set_flush_denormal(False)
    before = torch.get_rng_state()
    one = train(tmp_path / "a.pt", model=(model := make_model()))
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), before)
    other = train(tmp_path / "b.pt", recipe=dataclasses.replace(RECIPE, seed=1))
    assert not torch.equal(one.state["0.weight"], other.state["0.weight"])
    assert torch.tensor([torch.finfo(torch.float32).tiny]).mul(0.5).item() > 0  # denormals are back
    assert model.training


def test_training_leaves_the_random_state_of_the_process_alone(tmp_path):
    model = make_model()
    before = torch.get_rng_state()
    train(tmp_path / "a.pt", model=model)
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_is_measured_without_augmentation_and_dropout():
    model, data = make_model(), make_data()
    model.eval()
    expected = 100 * (model(data.inputs()).argmax(1) == data.labels).double().mean()
    model.train()
    assert loop.accuracy(model, data) == pytest.approx(float(expected))
    assert model.training


def test_the_default_learning_rate_depends_on_batch_norm():
    assert LEARNING_RATE[training.has_batch_norm(make_model())] == 0.1
    assert LEARNING_RATE[training.has_batch_norm(nn.Linear(2, 2))] == 0.02
