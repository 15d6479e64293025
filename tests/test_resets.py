"""Shrink and perturb, and resets of the head and of the network."""

import numpy as np
import pytest
import torch
from torch import nn
from unit_training import Training, filled, normed, require_equal

from ntkgen.continual.chance import seed_of
from ntkgen.continual.streams.tasks import Task
from ntkgen.continual.surgery import Subject, SurgeryOptions, make_surgeries
from ntkgen.errors import InputError, ShapeError

pytestmark = pytest.mark.numeric

NONE = np.zeros(0, np.int64)
FULL, PARTIAL = SurgeryOptions(), SurgeryOptions(full_reset=False)


def task(number):
    return Task(number, (0,), NONE, NONE, NONE)


# shrink and perturb ---------------------------------------------------------------------------------------------------


def perturbed(model, std, seed=0):
    options = SurgeryOptions(noise_std=std)
    subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed, options=options)
    return make_surgeries(["perturb"], subject)["perturb"]


def test_the_noise_has_its_standard_deviation_on_every_parameter():
    """L13: within 1 % over 100,000 numbers, whose standard error is 0.2 %; batch norm and biases have it too."""
    model = nn.Sequential(nn.Conv2d(3, 1000, 3), nn.BatchNorm2d(1000), nn.Linear(1000, 80)).double()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert perturbed(model, 0.03).after_step({}) == 0
    noise = {name: (param - before[name]).detach().flatten() for name, param in model.named_parameters()}
    assert len(noise) == 6
    for each in noise.values():
        assert each.all()
    every = torch.cat(list(noise.values()))
    assert len(every) > 100_000
    assert every.std().item() == pytest.approx(0.03, rel=0.01)
    assert every.mean().item() == pytest.approx(0, abs=0.03 * 0.02)
    assert len(every.unique()) == len(every)


def test_buffers_and_frozen_parameters_have_no_noise():
    model = filled(normed())
    model[0].weight.requires_grad_(requires_grad=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    perturbed(model, 0.1).after_step({})
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, _ in model.named_parameters()} - {"0.weight"}


def test_the_noise_is_that_of_the_seed_and_differs_from_step_to_step():
    def noise(seed):
        model = nn.Linear(4, 3)
        surgery, found = perturbed(model, 1.0, seed), []
        for _ in range(2):
            before = model.weight.detach().clone()
            surgery.after_step({})
            found.append(model.weight.detach() - before)
        return found

    first, same, other = noise(0), noise(0), noise(1)
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[0], other[0])


def test_momentum_weight_decay_and_noise_are_the_recursion():
    """L10: v ← μ v + g + λ w, w ← w − α v + σ ξ with two parameters, by hand; replacements come before the noise."""
    model = nn.Linear(1, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    subject = Subject(model, optimizer, seed=3, options=SurgeryOptions(noise_std=0.5))
    perturb = make_surgeries(["perturb"], subject)["perturb"]
    assert list(make_surgeries(["perturb", "redo", "continual-backprop"], Training("mlp").subject)) == [
        "continual-backprop",
        "redo",
        "perturb",
    ]
    noise = torch.Generator().manual_seed(seed_of(3, "perturbation"))
    w, b = model.weight.item(), model.bias.item()
    v = np.zeros(2)
    for x, y in ((1.0, 2.0), (-0.5, 1.0), (3.0, 0.0)):
        optimizer.zero_grad()
        (model(torch.tensor([[x]]).double()) - y).square().sum().backward()
        optimizer.step()
        perturb.after_step({})
        error = 2 * (w * x + b - y)
        v = 0.9 * v + np.array([error * x + 0.01 * w, error + 0.01 * b])
        xi = [torch.empty(shape).double().normal_(generator=noise).item() for shape in ((1, 1), (1,))]
        w, b = w - 0.1 * v[0] + 0.5 * xi[0], b - 0.1 * v[1] + 0.5 * xi[1]
        assert [model.weight.item(), model.bias.item()] == pytest.approx([w, b], rel=1e-12)


# resets ---------------------------------------------------------------------------------------------------------------


def fresh(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return normed()


def trained(*names, options=FULL, optimizer="sgd"):
    """A network after three steps, with resets."""
    training = Training("normed", optimizer=optimizer, dtype=torch.float32)
    for _ in range(3):
        training.learn()
    subject = Subject(
        training.model, training.optimizer, training.layers, head="8", seed=7, options=options, fresh=fresh
    )
    return training, make_surgeries(names, subject)


def test_the_reset_of_the_head_changes_the_head_alone():
    """L12: its parameters, and what the optimizer keeps of them."""
    training, surgeries = trained("reset-head")
    before, momenta = training.tensors, momentum_of(training)
    surgeries["reset-head"].at_boundary(task(4))
    new = fresh(seed_of(7, "init", 4)).state_dict()
    require_equal(training.tensors, {**before, "8.weight": new["8.weight"], "8.bias": new["8.bias"]})
    assert not torch.equal(before["8.weight"], new["8.weight"])
    after = momentum_of(training)
    assert all((after[name] == 0).all() for name in ("8.weight", "8.bias"))
    kept = momenta.keys() - {"8.weight", "8.bias"}
    require_equal({name: after[name] for name in kept}, {name: momenta[name] for name in kept})


def momentum_of(training):
    state = training.optimizer.state
    return {name: state[p]["momentum_buffer"].clone() for name, p in training.model.named_parameters() if p in state}


def test_the_reset_of_the_network_is_complete():
    """L12: parameters and statistics of batch norm are those of a new network, and the optimizer keeps nothing."""
    training, surgeries = trained("reset-network")
    before = training.tensors
    surgeries["reset-network"].at_boundary(task(2))
    new = fresh(seed_of(7, "init", 2)).state_dict()
    require_equal(training.tensors, new)
    assert training.tensors["1.num_batches_tracked"] == 0
    assert not torch.equal(before["1.running_mean"], new["1.running_mean"])
    momenta = momentum_of(training)
    assert momenta.keys() == dict(training.model.named_parameters()).keys()
    assert all((momentum == 0).all() for momentum in momenta.values())


@pytest.mark.parametrize("name", ["reset-head", "reset-network"])
def test_in_the_published_code_statistics_and_momentum_survive(name):
    """L12, in its compatible form."""
    training, surgeries = trained(name, options=PARTIAL)
    before, momenta = training.tensors, momentum_of(training)
    surgeries[name].at_boundary(task(2))
    new = dict(fresh(seed_of(7, "init", 2)).named_parameters())
    drawn = {key: value for key, value in new.items() if name == "reset-network" or key.startswith("8.")}
    require_equal(training.tensors, {**before, **drawn})
    require_equal(momentum_of(training), momenta)
    assert len(momenta) == len(new)


def test_every_boundary_draws_other_numbers():
    training, surgeries = trained("reset-network")
    found = []
    for number in (1, 2, 1):
        surgeries["reset-network"].at_boundary(task(number))
        found.append(training.tensors)
    require_equal(found[0], found[2])
    assert not torch.equal(found[0]["0.weight"], found[1]["0.weight"])


@pytest.mark.parametrize("options", [FULL, PARTIAL])
def test_other_surgeries_forget_the_units_of_the_old_network(options):
    training, surgeries = trained("continual-backprop", "redo", "reset-network", options=options)
    new = surgeries["continual-backprop"].state_dict()["layers"]
    features = training.learn()
    for name in ("continual-backprop", "redo"):
        surgeries[name].after_step(features)
    surgeries["reset-network"].at_boundary(task(1))
    found = surgeries["continual-backprop"].state_dict()["layers"]
    for name, each in found.items():
        for part in ("age", "trace"):
            assert torch.equal(each[part], new[name][part]) == options.full_reset
    assert surgeries["redo"].steps == (0 if options.full_reset else 1)


def test_training_goes_on_after_a_reset():
    training, surgeries = trained("reset-network", optimizer="adam")
    surgeries["reset-network"].at_boundary(task(1))
    before = training.tensors
    training.learn()
    assert all(state["step"] == 1 for state in training.optimizer.state.values())
    assert not torch.equal(training.tensors["0.weight"], before["0.weight"])


def test_a_reset_needs_to_know_how_the_network_is_built():
    model = nn.Linear(4, 3)
    subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), head="")
    for name in ("reset-head", "reset-network"):
        with pytest.raises(
            InputError, match="expected `fresh`, a function that builds it anew from a seed, found none"
        ):
            make_surgeries([name], subject)


@pytest.mark.parametrize(
    ("build", "found"), [(lambda: nn.Linear(4, 5), r"\(5, 4\)"), (lambda: nn.Sequential(nn.Linear(4, 3)), "none")]
)
def test_a_new_network_of_another_shape_is_refused(build, found):
    model = nn.Linear(4, 3)
    subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), fresh=lambda _: build())
    with pytest.raises(ShapeError, match=rf"expected weight of shape \(3, 4\) in the new network, found {found}"):
        make_surgeries(["reset-network"], subject)["reset-network"].at_boundary(task(1))
