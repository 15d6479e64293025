"""Learners of streams as optimizers of the other runs, on batches."""

import dataclasses

import pytest
import torch
from test_learner import RARELY, SETTINGS, counted, done, killed_at, nets, require_equal  # noqa: F401 - a fixture

from ntkgen import cli
from ntkgen.cli.cl_preset import chosen_runs
from ntkgen.continual.configuration import OPTIMIZERS, RunSettings
from ntkgen.continual.optim import LEARNERS, UPGD
from ntkgen.continual.optim.options import BATCH_LEARNERS, LearnerOptions
from ntkgen.continual.optimizer import make_optimizer
from ntkgen.errors import InputError, UnknownNameError

NOISY = dataclasses.replace(
    SETTINGS, optimizer="upgd", sigma=0.05, beta_utility=0.9, head="growing", weight_decay=0.01, **RARELY
)


def test_a_killed_run_with_noise_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    """The source of the noise and the utilities are part of the checkpoint, also of a head that has grown."""
    writes = counted(tmp_path / "undisturbed", monkeypatch, NOISY)
    assert killed_at(tmp_path / "seed0", monkeypatch, writes * 2 // 3, NOISY)
    done(tmp_path / "seed0", NOISY)
    require_equal(tmp_path / "seed0", tmp_path / "undisturbed")
    state = torch.load(tmp_path / "seed0/checkpoint.pt", weights_only=True)["optimizer"]
    assert {key for each in state["state"].values() for key in each} == {"step", "utility"}


def test_the_options_reach_the_optimizer():
    model = torch.nn.Linear(3, 2)
    settings = RunSettings(optimizer="upgd", sigma=0.2, beta_utility=0.5, learning_rate=0.1, protecting=False)
    made = make_optimizer(settings, model)
    assert isinstance(made, UPGD)
    expected = {"sigma": 0.2, "beta_utility": 0.5, "lr": 0.1, "protecting": False, "weight_decay": 0.0}
    assert {name: made.defaults[name] for name in expected} == expected
    assert type(make_optimizer(RunSettings(optimizer="sgd"), model)) is torch.optim.SGD


@pytest.mark.parametrize("name", BATCH_LEARNERS)
def test_every_learner_without_a_hessian_and_gates_trains(name):
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(RunSettings(optimizer=name, learning_rate=0.1), model)
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_the_names_are_those_of_the_learners():
    assert set(OPTIMIZERS) <= LEARNERS.keys()
    options = {option for name in BATCH_LEARNERS for option in LEARNERS[name].options}
    assert {field.name for field in dataclasses.fields(LearnerOptions)} == options - {"lr", "weight_decay", "order"}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"optimizer": "pgd", "kappa": 1.0}, UnknownNameError, "Unknown option of pgd 'kappa'"),
        ({"optimizer": "pgd", "weight_decay": 0.1}, UnknownNameError, "Unknown option of pgd 'weight_decay'"),
        ({"sigma": 0.1}, UnknownNameError, "Unknown option of adam 'sigma'"),
        ({"optimizer": "upgd", "beta_utility": 1.0}, InputError, "from 0 to less than 1, found 1"),
        ({"optimizer": "upgd_so_global"}, UnknownNameError, "Unknown `optimizer` 'upgd_so_global'"),
    ],
)
def test_an_option_of_another_learner_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(SETTINGS, **change)


def test_the_command_takes_the_options(tmp_path, capsys):
    upgd = ["--optimizer", "upgd", "--sigma", "1e-3", "--beta-utility", "0.999", "--lr", "0.01", "--no-protecting"]
    parsed = cli.cl_run.make_context("cl-run", list(upgd)).params
    names = {field.name for field in dataclasses.fields(RunSettings)}
    chosen = chosen_runs(None, None, None, {name: value for name, value in parsed.items() if name in names})
    expected = {"lr": 0.01, "sigma": 1e-3, "beta_utility": 0.999, "protecting": False}
    assert chosen.sweep.settings.optimizer_options == expected
    assert cli.run(["cl-run", *upgd, "--kappa", "1", "--out", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert "Unknown option of upgd 'kappa'" in error
    assert error.count("\n") == 1
