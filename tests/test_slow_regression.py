"""Stacks of small networks: gradients, optimizers and replacement against slow oracles; each network as if alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from ntkgen.continual.chance import generator_of
from ntkgen.continual.slow_regression.activations import ACTIVATIONS
from ntkgen.continual.slow_regression.network import Network
from ntkgen.continual.slow_regression.optimizers import make_optimizer
from ntkgen.continual.slow_regression.replacement import Replacement
from ntkgen.continual.slow_regression.settings import ALGORITHMS, RegressionSettings
from ntkgen.continual.slow_regression.stack import Stack
from ntkgen.continual.streams.regression import BLOCK, SlowRegression
from ntkgen.continual.surgery import Subject, SurgeryOptions
from ntkgen.continual.surgery.continual_backprop import ContinualBackprop
from ntkgen.continual.units import hidden_layers, recorded
from ntkgen.errors import InputError, UnknownNameError

pytestmark = pytest.mark.numeric

TORCH = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky-relu": torch.nn.functional.leaky_relu,
    "elu": torch.nn.functional.elu,
    "selu": torch.nn.functional.selu,
    "swish": torch.nn.functional.silu,
}
# Replacements are frequent, and the slow bits change often.
QUICK = {"period": 150, "replacement_rate": 5e-3, "maturity": 20, "noise_std": 1e-2, "weight_decay": 1e-2}


def settings_of(**changes):
    return RegressionSettings(**{**QUICK, "seeds": (0, 1, 2), **changes})


def learnt(settings, stop=400):
    """Learn some samples in two parts."""
    stack = Stack(settings)
    errors = [stack.learn(start, end).errors for start, end in ((0, 70), (70, stop))]
    return stack, np.concatenate(errors)


def random_network(activation, rows=4, inputs=7, units=3):
    network = Network(inputs, units, activation, rows)
    rng = np.random.default_rng(0)
    network.parameters[...] = rng.standard_normal(network.parameters.shape)
    x = rng.standard_normal((inputs, 1, rows)).astype(np.float32)
    return network, x, rng.standard_normal(rows).astype(np.float32)


# gradients and activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_autograd(activation):
    network, x, y = random_network(activation)
    error, slope = np.empty(4, np.float32), np.empty((3, 4), np.float32)
    network.differentiate(x, y, error, slope)

    W, v = (torch.from_numpy(part).double().requires_grad_() for part in (network.incoming, network.outgoing))
    z = (W * torch.from_numpy(x)).sum(0)
    output = (v[:-1] * TORCH[activation](z)).sum(0) + v[-1]
    expected = (output - torch.from_numpy(y)).square().sum()
    expected.backward()
    # float32 against float64: sums of ten numbers of size 1, each rounded by 6e-8
    np.testing.assert_allclose(error, (output.detach() - torch.from_numpy(y)).numpy(), atol=1e-5)
    for found, wanted in zip(network.parts(network.gradient), (W.grad, v.grad), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation):
    z = np.array([-200, -50, -1, -1e-3, 0, 1e-3, 1, 50, 200], np.float32)
    value, slope = np.empty_like(z), np.empty_like(z)
    ACTIVATIONS[activation].evaluate(z, value, slope)
    points = torch.from_numpy(z).double().requires_grad_()
    expected = TORCH[activation](points)
    expected.sum().backward()
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, points.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_first_weights_are_those_of_he_and_of_lecun():
    network = Network(21, 500, "relu", 1)
    network.initialise([0])
    bounds = np.abs(network.incoming[:-1]).max(), np.abs(network.outgoing[:-1]).max()
    # the largest of 10,000 and of 500 uniform numbers
    assert bounds == (pytest.approx(math.sqrt(6 / 20), rel=1e-3), pytest.approx(math.sqrt(3 / 500), rel=0.02))
    assert not network.incoming[-1].any()
    assert not network.outgoing[-1].any()


# optimizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "algorithm"), [("sgd", "base"), ("sgd", "l2"), ("adam", "base"), ("adam", "l2")])
def test_training_is_that_of_the_optimizer_of_torch(name, algorithm):
    settings = settings_of(algorithms=(algorithm,), seeds=(3,), optimizer=name, activation="tanh", units=4)
    stack, errors = learnt(settings, 200)

    first = Stack(settings).network
    W, v = (
        torch.from_numpy(part[..., 0].copy()).double().requires_grad_() for part in (first.incoming, first.outgoing)
    )
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    optimizer = make([W, v], lr=0.01, weight_decay=1e-2 * (algorithm == "l2"))
    inputs, targets = (
        torch.from_numpy(values).double() for values in SlowRegression(settings.stream, 3).samples(0, 200)
    )
    for x, y, error in zip(inputs, targets, errors[:, 0], strict=True):
        output = torch.tanh(x @ W) @ v[:-1] + v[-1]
        assert float(error) == pytest.approx(float(output.detach() - y), abs=1e-4)
        optimizer.zero_grad()
        (output - y).square().backward()
        optimizer.step()
    # float32 against float64 over 200 steps. Measured: 2e-7 to 6e-7.
    np.testing.assert_allclose(stack.network.incoming[..., 0], W.detach().numpy(), atol=2e-5)
    np.testing.assert_allclose(stack.network.outgoing[..., 0], v.detach().numpy(), atol=2e-5)


def test_adam_begins_anew_for_the_weights_of_a_replaced_unit():
    """Only these weights take the first step of Adam, whose size is the learning rate."""
    network, x, y = random_network("tanh")
    adam = make_optimizer("adam", network, 0.01)
    error, slope = np.empty(4, np.float32), np.empty((3, 4), np.float32)
    for _ in range(30):
        network.differentiate(x, y, error, slope)
        adam.step()
    adam.forget(unit=1, row=2)
    before = network.parameters.copy()
    network.differentiate(x, 1 - y, error, slope)
    gradient = network.gradient.copy()
    adam.step()
    steps, signs = (network.parts(values) for values in (before - network.parameters, np.sign(gradient)))
    is_first = [np.abs(step - 0.01 * sign) < 1e-5 for step, sign in zip(steps, signs, strict=True)]
    assert is_first[0][:, 1, 2].all()
    assert is_first[1][1, 2]
    assert sum(int(each.sum()) for each in is_first) == 7 + 1


# algorithms -----------------------------------------------------------------------------------------------------------


def rows_of(stack, algorithm):
    return stack.network.parameters[:, stack.rows(algorithm)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_algorithm_without_its_effect_is_backpropagation_bitwise(optimizer):
    off = {"replacement_rate": 0.0, "noise_std": 0.0, "weight_decay": 0.0}
    stack, errors = learnt(settings_of(**off, optimizer=optimizer))
    for algorithm in ALGORITHMS:
        np.testing.assert_array_equal(rows_of(stack, algorithm), rows_of(stack, "base"))
        np.testing.assert_array_equal(errors[:, stack.rows(algorithm)], errors[:, stack.rows("base")])


def test_algorithms_differ():
    stack, _ = learnt(settings_of())
    parameters = [rows_of(stack, algorithm) for algorithm in ALGORITHMS]
    for index, one in enumerate(parameters):
        assert all(np.abs(one - other).max(0).min() > 1e-3 for other in parameters[:index])
    assert (stack.replacement.replaced > 0).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("activation", ["relu", "leaky-relu"])
def test_a_network_of_a_stack_has_the_bits_of_the_network_alone(optimizer, activation):
    common = {"optimizer": optimizer, "activation": activation}
    stack, errors = learnt(settings_of(**common))
    for algorithm in ALGORITHMS:
        for index, seed in enumerate((0, 1, 2)):
            alone, errors_alone = learnt(settings_of(**common, algorithms=(algorithm,), seeds=(seed,)))
            row = stack.rows(algorithm).start + index
            np.testing.assert_array_equal(alone.network.parameters[:, 0], stack.network.parameters[:, row])
            np.testing.assert_array_equal(errors_alone[:, 0], errors[:, row])


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"relu", "leaky-relu"}))
def test_a_network_of_a_stack_is_the_network_alone(activation):
    """NumPy's exponential functions may round differently in an array of another length: 200 steps, 1e-7 each."""
    stack, _ = learnt(settings_of(activation=activation), 200)
    for index, algorithm in enumerate(ALGORITHMS):
        alone, _ = learnt(settings_of(activation=activation, algorithms=(algorithm,), seeds=(2,)), 200)
        np.testing.assert_allclose(
            alone.network.parameters[:, 0], stack.network.parameters[:, 3 * index + 2], atol=1e-5
        )


def test_samples_may_be_learnt_in_any_parts():
    stack = Stack(settings_of())
    for start, stop in ((0, 1), (1, 700), (700, BLOCK), (BLOCK, BLOCK + 50)):
        stack.learn(start, stop)
    whole = Stack(settings_of())
    whole.learn(0, BLOCK)
    whole.learn(BLOCK, BLOCK + 50)
    np.testing.assert_array_equal(stack.network.parameters, whole.network.parameters)


def test_noise_has_its_standard_deviation_in_every_parameter():
    off = {"learning_rate": 1e-30, "weight_decay": 0.0, "noise_std": 0.5, "algorithms": ("shrink-and-perturb",)}
    stack = Stack(settings_of(**off, seeds=(0, 1)))
    before = stack.network.parameters.copy()
    stack.learn(0, BLOCK)
    moved = (stack.network.parameters - before) / math.sqrt(BLOCK)
    assert moved.std() == pytest.approx(0.5, rel=0.15)  # of 222 numbers: three standard deviations
    assert len(np.unique(moved)) == moved.size


# continual backpropagation --------------------------------------------------------------------------------------------


def plain_continual_backpropagation(settings, seed, num_samples):
    """Learn with lists of units and plain loops in float64; return the units, the bias, and the number of new ones."""
    first = Stack(settings).network
    row = settings.seeds.index(seed)
    units = [
        {
            "in": first.incoming[:, unit, row].astype(float),
            "out": float(first.outgoing[unit, row]),
            "age": 0,
            "u": 0.0,
            "h": 0.0,
        }
        for unit in range(settings.units)
    ]
    bias, budget, new = 0.0, 0.0, 0
    for x, y in zip(*SlowRegression(settings.stream, seed).samples(0, num_samples), strict=True):
        h = [max(float(unit["in"] @ x), 0.0) for unit in units]
        g = 2 * (sum(unit["out"] * value for unit, value in zip(units, h, strict=True)) + bias - float(y))
        for unit, value in zip(units, h, strict=True):
            of_in = g * unit["out"] * (value > 0) * x
            unit["out"] -= settings.learning_rate * g * value
            unit["in"] = unit["in"] - settings.learning_rate * of_in
        bias -= settings.learning_rate * g
        for unit, value in zip(units, h, strict=True):
            unit["age"] += 1
            unit["u"] = 0.99 * unit["u"] + 0.01 * abs(value * unit["out"])
            unit["h"] = 0.99 * unit["h"] + 0.01 * value
        mature = [unit for unit in units if unit["age"] > settings.maturity]
        budget += len(mature)
        for unit in sorted(mature, key=lambda unit: unit["u"] / (1 - 0.99 ** unit["age"])):
            if settings.replacement_rate * budget < new + 1:
                break
            new += 1
            bias += unit["out"] * unit["h"] / (1 - 0.99 ** unit["age"])
            bound = math.sqrt(6 / settings.num_inputs)
            drawn = generator_of(seed, "init", new).uniform(-bound, bound, settings.num_inputs)
            unit.update({"in": np.append(drawn, 0), "out": 0.0, "age": 0, "u": 0.0, "h": 0.0})
    return units, bias, new


def trained_by_the_surgery(settings, seed, num_samples, monkeypatch):
    """Learn with torch in float64 and the surgery of runs, which draws the incoming weights of the stack."""
    first, row = Stack(settings).network, settings.seeds.index(seed)
    model = nn.Sequential(nn.Linear(first.num_inputs - 1, settings.units), nn.Tanh(), nn.Linear(settings.units, 1))
    parts = (first.incoming[:-1, :, row].T, first.incoming[-1, :, row], first.outgoing[None, :-1, row],
             first.outgoing[-1:, row])  # fmt: skip
    with torch.no_grad():
        for param, values in zip(model.double().parameters(), parts, strict=True):
            param.copy_(torch.from_numpy(values.copy()))
    numbers = itertools.count(1)

    def draw_weights(count, *_):
        drawn = [first.draw_incoming(generator_of(seed, "init", next(numbers)))[:-1] for _ in range(count)]
        return torch.from_numpy(np.array(drawn, np.float64))

    monkeypatch.setattr("ntkgen.continual.surgery.replacement.draw_weights", draw_weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    options = SurgeryOptions(replacement_rate=settings.replacement_rate, maturity=settings.maturity)
    surgery = ContinualBackprop(Subject(model, optimizer, hidden_layers(model), options=options))
    errors, replaced = [], []
    samples = SlowRegression(settings.stream, seed).samples(0, num_samples)
    for x, y in zip(*(torch.from_numpy(values).double() for values in samples), strict=True):
        optimizer.zero_grad()
        with recorded(model, surgery.subject.layers) as features:
            error = model(x[None, :-1])[0, 0] - y  # the last input is the constant one
        error.square().backward()
        optimizer.step()
        errors.append(float(error.detach()))
        replaced.append(surgery.after_step(features))
    return surgery, errors, sum(replaced)


def test_continual_backpropagation_is_that_of_the_surgery_of_runs(monkeypatch):
    # the multiples of this rate add up without rounding
    settings = settings_of(algorithms=("continual-backprop",), activation="tanh", replacement_rate=2**-6, maturity=5)
    stack, errors = learnt(settings, 100)
    for row, seed in enumerate(settings.seeds):
        surgery, expected, new = trained_by_the_surgery(settings, seed, 100, monkeypatch)
        assert new == stack.replacement.replaced[row] >= 6
        np.testing.assert_allclose(errors[:, row], expected, atol=2e-5)
        weight, bias, outgoing, last = (param.detach().numpy() for param in surgery.subject.model.parameters())
        np.testing.assert_allclose(stack.network.incoming[:-1, :, row], weight.T, atol=2e-5)
        np.testing.assert_allclose(stack.network.incoming[-1, :, row], bias, atol=2e-5)
        np.testing.assert_allclose(stack.network.outgoing[:, row], [*outgoing[0], *last], atol=2e-5)
        assert stack.replacement.age[:, row].tolist() == surgery.age.tolist()
        np.testing.assert_allclose(stack.replacement.averages[0, :, row], surgery.trace.numpy(), atol=1e-5)
        np.testing.assert_allclose(stack.replacement.averages[1, :, row], surgery.mean.numpy(), atol=1e-5)


@pytest.mark.parametrize("rate", [1e-3, 2e-2])
def test_continual_backpropagation_is_that_of_plain_loops(rate):
    settings = settings_of(algorithms=("base", "continual-backprop"), replacement_rate=rate, units=6)
    stack, _ = learnt(settings, 600)
    for index, seed in enumerate(settings.seeds):
        units, bias, new = plain_continual_backpropagation(settings, seed, 600)
        row = stack.rows("continual-backprop").start + index
        assert stack.replacement.replaced[index] == new > 0
        assert stack.replacement.age[:, index].tolist() == [unit["age"] for unit in units]
        # float32 against float64 over 600 steps. Measured: 2e-7 to 8e-7.
        found = stack.network.incoming[:, :, row].T
        np.testing.assert_allclose(found, [unit["in"] for unit in units], atol=1e-4)
        outgoing = [unit["out"] for unit in units] + [bias]
        np.testing.assert_allclose(stack.network.outgoing[:, row], outgoing, atol=1e-4)


def replacement_of(network, **changes):
    settings = settings_of(algorithms=("continual-backprop",), seeds=tuple(range(network.hidden.shape[1])), **changes)
    optimizer = make_optimizer("sgd", network, settings.learning_rate)
    return Replacement(network, optimizer, slice(0, len(settings.seeds)), settings)


@pytest.mark.parametrize(("rate", "first", "count"), [(1e-3, 220, 1), (1e-2, 40, 1), (0.5, 21, 2)])
def test_units_are_replaced_when_the_mature_units_of_all_steps_add_up_to_one(rate, first, count):
    """Five units are mature after 20 steps: ⌊ρ · 5 (t − 20)⌋ have been replaced after t."""
    network, _, _ = random_network("relu", rows=2, units=5)
    replacement = replacement_of(network, replacement_rate=rate)
    for _ in range(first - 1):
        replacement.after_step()
    assert replacement.replaced.tolist() == [0, 0]
    replacement.after_step()
    assert replacement.replaced.tolist() == [count, count]
    assert (replacement.age == 0).sum(0).tolist() == [count, count]


def test_the_unit_of_least_corrected_utility_is_replaced_and_no_other():
    """At age 101 an average of 1.0 is not yet complete, and looks smaller than 0.9 at age 700."""
    network, _, _ = random_network("relu", rows=1)
    replacement = replacement_of(network, replacement_rate=0.4, maturity=100, units=3)
    replacement.age[:, 0] = 101, 700, 60
    true = np.array([1.0, 0.9, 0.1])
    replacement.averages[0, :, 0] = true * (1 - 0.99 ** replacement.age[:, 0])
    assert replacement.averages[0, 0, 0] < replacement.averages[0, 1, 0]
    network.hidden[:-1, 0] = true / np.abs(network.outgoing[:-1, 0])  # the utilities stay what they are
    before = network.parameters.copy()
    replacement.after_step()
    assert replacement.replaced.tolist() == [0]  # 0.8 of a unit
    replacement.after_step()
    assert replacement.age[:, 0].tolist() == [103, 0, 62]
    incoming, outgoing = network.parts(network.parameters - before)
    assert (np.abs(incoming).sum(0) > 0)[:, 0].tolist() == [False, True, False]
    assert (outgoing != 0)[:, 0].tolist() == [False, True, False, True]
    assert network.incoming[-1, 1, 0] == network.outgoing[1, 0] == 0
    assert not replacement.averages[:, 1].any()


def test_replacing_a_unit_of_constant_activation_changes_no_output():
    network, _, _ = random_network("relu", rows=1)
    replacement = replacement_of(network, replacement_rate=0.3, maturity=40, units=3)
    network.hidden[:-1, 0] = 5, 0.1, 7  # the second is of least use

    def output():
        return float((network.outgoing * network.hidden).sum())

    before = output()
    while not replacement.replaced[0]:
        replacement.after_step()
    assert network.outgoing[1, 0] == 0
    assert output() == pytest.approx(before, abs=1e-6)


def test_adam_keeps_its_averages_unless_they_are_reset():
    for reset in (True, False):
        settings = settings_of(algorithms=("continual-backprop",), optimizer="adam", reset_unit_optimizer=reset)
        stack, _ = learnt(settings, 300)
        steps = np.log(1 - stack.optimizer.corrections[1, :-1]) / math.log(0.999)
        assert (stack.replacement.replaced > 0).all()
        expected = stack.replacement.age if reset else np.full((5, 3), 300)
        np.testing.assert_allclose(steps, expected, atol=1e-6)


# settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"unit": 5}, "Did you mean units"),
        ({"units": "5"}, "`?units`? has a value of the wrong kind"),
        ({"units": 0}, "`units` is 0: expected a number above 0"),
        ({"noise_std": -1.0}, "`noise_std` is -1: expected 0 or more"),
        ({"seeds": [0, 0]}, "found 0 more than once"),
        ({"seeds": []}, "`seeds` has no value: expected each value once, found none"),
        ({"seeds": [-1]}, "`seeds` has -1"),
        ({"num_samples": 50_000}, "Choose 40000 samples"),
        ({"num_samples": 5_000}, "Choose 20000 samples"),
        ({"replacement_rate": 1}, "`replacement_rate` 1, expected a part"),
        ({"slow_bits": 30}, "`slow_bits` 30 of `num_inputs` 20"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong, match):
    with pytest.raises(InputError, match=match):
        RegressionSettings.from_json(wrong)


@pytest.mark.parametrize("wrong", [{"algorithms": ["sgd"]}, {"activation": "gelu"}, {"optimizer": "adamw"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(UnknownNameError, match=next(iter(wrong))):
        RegressionSettings.from_json(wrong)


def test_settings_survive_json():
    settings = settings_of(algorithms=("l2",), change="redraw")
    assert RegressionSettings.from_json(settings.to_json()) == settings
    assert settings.stream.change == "redraw"
