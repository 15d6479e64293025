"""Continual backpropagation: which units it replaces and when, against an oracle in NumPy; and how it is resumed."""

import math
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from cases import chosen, in_turn
from torch import nn
from unit_training import NETS, PUBLISHED, RATE, Training, require_equal

from ntkgen.continual.checkpoint import saved
from ntkgen.continual.surgery import SURGERIES, SURGERY_NAMES, Subject, SurgeryOptions, make_surgeries
from ntkgen.continual.surgery.options import SURGERY_CHOICES
from ntkgen.continual.surgery.turnover import Turnover
from ntkgen.continual.surgery.utilities import UTILITIES
from ntkgen.continual.units import hidden_layers, recorded
from ntkgen.errors import InputError, ModelError, UnknownNameError

pytestmark = pytest.mark.numeric

# how many units are replaced ------------------------------------------------------------------------------------------


FIRST_AND_TOTAL = {64: (2563, 671), 128: (1782, 1342), 256: (1391, 2685), 512: (1196, 5370)}


@pytest.mark.parametrize("channels", chosen(FIRST_AND_TOTAL, [512]))
def test_first_replacements_and_totals_of_the_published_run(channels):
    """L14, without training: the steps at which units are replaced in 1,050,000 steps follow from integers alone."""
    turnover = Turnover(channels, SurgeryOptions(replacement_rate=1e-5, maturity=1000, replacement_count="all"))
    counts = [turnover.advance() for _ in range(1_050_000)]
    assert max(counts) == 1
    assert (counts.index(1) + 1, sum(counts)) == FIRST_AND_TOTAL[channels]


@pytest.mark.parametrize("rule", ["eligible", "all"])
@pytest.mark.parametrize(("rate", "maturity"), [(0.013, 5), (0.3, 2), (1.0, 0), (0.05, 0)])
def test_counts_are_those_of_units_with_ages(rule, rate, maturity):
    """Whichever eligible units are replaced: here random ones, whose ages are counted one by one."""
    turnover = Turnover(11, SurgeryOptions(replacement_rate=rate, maturity=maturity, replacement_count=rule))
    rng, ages, accumulated = np.random.default_rng(0), np.zeros(11, int), 0.0
    total = 0
    for _ in range(300):
        ages += 1
        eligible = np.flatnonzero(ages > maturity)
        count = 0
        if len(eligible):
            accumulated += rate * (len(eligible) if rule == "eligible" else 11)
            count = min(math.floor(accumulated), len(eligible))
            accumulated -= count
        assert turnover.advance() == count
        ages[rng.permutation(eligible)[:count]] = 0
        total += count
        if rng.random() < 0.1:  # as if resumed
            turnover = Turnover(11, SurgeryOptions(replacement_rate=rate, maturity=maturity, replacement_count=rule))
            turnover.begin(ages.tolist(), accumulated)
    assert total > 10


def test_no_unit_is_replaced_before_its_age_exceeds_the_maturity():
    for maturity in (0, 1, 7):
        turnover = Turnover(3, SurgeryOptions(replacement_rate=1.0, maturity=maturity))
        counts = [turnover.advance() for _ in range(3 * (maturity + 1))]
        assert counts == ([0] * maturity + [3]) * 3


def test_a_fraction_of_a_unit_may_be_drawn():
    rng = np.random.default_rng(0)
    for rate in (0.02, 0.25):  # of 10 units: 0.2 and 2.5
        options = SurgeryOptions(replacement_rate=rate, maturity=0, replacement_draw="bernoulli")
        turnover = Turnover(10, options, rng.random)
        counts = [turnover.advance() for _ in range(4000)]
        assert set(counts) == {math.floor(10 * rate), math.floor(10 * rate) + 1}
        # Five standard errors of the mean of 4000 draws, which is at most 0.5 / √4000 = 0.008.
        assert np.mean(counts) == pytest.approx(10 * rate, abs=0.04)
        assert turnover.accumulated == 0


# the whole of continual backpropagation against an oracle -------------------------------------------------------------


class Oracle:
    """Continual backpropagation in NumPy and float64, by the formulas of the paper, unit by unit."""

    def __init__(self, training, options):
        self.options, self.layers = options, training.layers
        sizes = [len(training.model.get_submodule(layer.incoming).weight) for layer in self.layers]
        self.age, self.trace, self.mean = (
            {layer.incoming: np.zeros(size) for layer, size in zip(self.layers, sizes, strict=True)} for _ in range(3)
        )
        self.accumulated = dict.fromkeys(self.age, 0.0)

    def by_unit(self, layer, tensors, features):
        """Activations (samples, units, positions), incoming (units, …) and outgoing weights (outputs, units, …)."""
        incoming, outgoing = (tensors[f"{name}.weight"].numpy() for name in (layer.incoming, layer.outgoing))
        units, h = len(incoming), features[layer.activation].numpy()
        return h.reshape(len(h), units, -1), incoming.reshape(units, -1), outgoing.reshape(len(outgoing), units, -1)

    def utility(self, layer, h, incoming, outgoing, center):
        w_out, w_in = np.abs(outgoing).mean((0, 2)), np.abs(incoming).mean(1)
        deviation = np.array([np.abs(h[:, i] - center[i]).mean() for i in range(len(w_in))])
        return {
            "weight": w_out,
            "contribution": w_out * np.abs(h).mean((0, 2)),
            "adaptation": 1 / w_in,
            "zero-contribution": w_out * deviation,
            "adaptable-contribution": w_out * deviation / w_in,
        }[self.options.unit_utility]

    def chosen(self, tensors, features):
        """Replaced units by layer, and their mean activations."""
        found, eta = {}, self.options.utility_decay
        for layer in self.layers:
            name = layer.incoming
            h, incoming, outgoing = self.by_unit(layer, tensors, features)
            self.age[name] += 1
            correction = 1 - eta ** self.age[name]
            self.mean[name] = eta * self.mean[name] + (1 - eta) * h.mean((0, 2))
            if self.options.activation_mean == "sum":
                self.trace[name] += (1 - eta) * np.abs(h).mean((0, 2))
                scores = np.abs(outgoing).mean((0, 2)) * (
                    self.trace[name] if self.options.unit_utility == "contribution" else 1
                )
            else:
                instant = self.utility(layer, h, incoming, outgoing, self.mean[name] / correction)
                self.trace[name] = eta * self.trace[name] + (1 - eta) * instant
                scores = self.trace[name] / correction
            eligible = [i for i in range(len(scores)) if self.age[name][i] > self.options.maturity]
            if eligible:
                size = len(eligible) if self.options.replacement_count == "eligible" else len(scores)
                self.accumulated[name] += self.options.replacement_rate * size
            count = math.floor(self.accumulated[name])
            self.accumulated[name] -= count
            units = sorted(eligible, key=lambda i: scores[i])[:count]
            found[name] = (units, self.mean[name][units] / correction[units])
            self.age[name][units] = self.mean[name][units] = 0
            if self.options.activation_mean != "sum":
                self.trace[name][units] = 0
        return found

    def operate(self, tensors, found, drawn):
        """Change the parameters, given the new incoming weights."""
        normed = {layer.incoming for layer in self.layers if layer.norm}
        for layer in self.layers:
            units, means = found[layer.incoming]
            weight, bias, outgoing = (
                tensors[f"{layer.incoming}.weight"].numpy(),
                tensors[f"{layer.incoming}.bias"].numpy(),
                tensors[f"{layer.outgoing}.weight"].numpy(),
            )
            block = outgoing.shape[1] // len(weight)
            if self.options.transfer_bias and not {layer.incoming, layer.outgoing} & normed:
                for i, mean in zip(units, means, strict=True):
                    lost = outgoing[:, i * block : (i + 1) * block].reshape(len(outgoing), -1).sum(1) * mean
                    tensors[f"{layer.outgoing}.bias"].numpy()[...] += lost
            for i in units:
                weight[i] = drawn[f"{layer.incoming}.weight"][i].numpy()
                bias[i] = 0
                outgoing[:, i * block : (i + 1) * block] = 0
                if layer.norm:
                    for part, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
                        tensors[f"{layer.norm}.{part}"][i] = value


@in_turn(
    "options kind",
    [
        *({"unit_utility": name} for name in UTILITIES),
        {"replacement_count": "all"},
        {"transfer_bias": False, "utility_decay": 0.0},
        PUBLISHED,
        {**PUBLISHED, "unit_utility": "weight"},
    ],
    list(NETS),
)
def test_every_step_is_that_of_the_oracle(kind, options):
    """L14 to L16, L18 and L19 together, and the published form of the traps: 60 steps of a network in training."""
    training = Training(kind, "continual-backprop", **{**RATE, **options})
    oracle, total = Oracle(training, training.subject.options), Counter()
    for _ in range(60):
        features = training.learn()
        expected = training.tensors
        found = oracle.chosen(expected, features)
        count = training.surgeries["continual-backprop"].after_step(features)
        assert count == sum(len(units) for units, _ in found.values())
        oracle.operate(expected, found, training.tensors)
        for name, value in training.tensors.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
        total.update({name: len(units) for name, (units, _) in found.items()})
    state = training.surgeries["continual-backprop"].state_dict()["layers"]
    for layer in training.layers:
        assert total[layer.incoming] >= 5
        assert state[layer.incoming]["age"].tolist() == oracle.age[layer.incoming].tolist()
        np.testing.assert_allclose(state[layer.incoming]["trace"], oracle.trace[layer.incoming], rtol=1e-9)


@pytest.mark.parametrize("kind", NETS)
def test_new_weights_are_new(kind):
    """What the oracle takes from the network is drawn: in every row another one, and none that was there."""
    training = Training(kind, "continual-backprop", **{**RATE, "replacement_rate": 1.0})
    for _ in range(4):
        training.step()
    features = training.learn()
    before = training.tensors
    assert training.surgeries["continual-backprop"].after_step(features) == sum(
        len(before[f"{layer.incoming}.weight"]) for layer in training.layers
    )
    for layer in training.layers:
        rows = torch.cat([each[f"{layer.incoming}.weight"].flatten(1) for each in (before, training.tensors)])
        assert len(rows.unique(dim=0)) == len(rows)


# which units are replaced ---------------------------------------------------------------------------------------------


def test_the_young_unit_with_the_larger_true_utility_is_safe():
    """L15: ages 101 and 700, true utilities 1.0 and 0.9, η = 0.99. The raw running means have the other order."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 0.9]]))
    layers = hidden_layers(model)
    options = SurgeryOptions(replacement_rate=0.5, maturity=100, utility_decay=0.99)
    subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), layers, options=options)
    surgery = make_surgeries(["continual-backprop"], subject)["continual-backprop"]
    state = surgery.state_dict()
    ages, utilities = np.array([100, 699]), np.array([1.0, 0.9])  # before the step
    state["layers"]["0"]["age"] = torch.from_numpy(ages)
    state["layers"]["0"]["trace"] = torch.from_numpy(utilities * (1 - 0.99**ages))
    surgery.load_state_dict(state)
    with recorded(model, layers) as features:
        model(torch.zeros(4, 1).double())
    assert surgery.after_step(features) == 1
    assert surgery.age.tolist() == [101, 0]
    raw = utilities * (1 - 0.99 ** (ages + 1))
    assert raw[0] < raw[1]
    assert surgery.trace[0].item() == pytest.approx(raw[0], rel=1e-12)
    assert model[2].weight.tolist() == [[1.0, 0.0]]


def test_a_unit_that_is_not_mature_is_not_replaced_whatever_its_utility():
    training = Training("mlp", "continual-backprop", **{**RATE, "replacement_rate": 1.0, "replacement_count": "all"})
    surgery = training.surgeries["continual-backprop"]
    state = surgery.state_dict()
    state["layers"]["0"]["age"] = torch.tensor([3, 3, 3, 4, 3, 4, 3])
    surgery.load_state_dict(state)
    features = {name: torch.zeros_like(h) for name, h in training.learn().items()}  # no unit has any utility
    assert surgery.after_step(features) == 2
    assert surgery.state_dict()["layers"]["0"]["age"].tolist() == [4, 4, 4, 0, 4, 0, 4]


def test_random_units_are_drawn_from_the_eligible_ones():
    training = Training("mlp", "continual-backprop", **{**RATE, "unit_utility": "random", "maturity": 0})
    surgery, counts = training.surgeries["continual-backprop"], Counter()
    features = training.learn()
    for _ in range(1500):
        before = surgery.state_dict()["layers"]["0"]["age"]
        surgery.after_step(features)
        after = surgery.state_dict()["layers"]["0"]["age"]
        counts.update((after < before).nonzero().flatten().tolist())
    # About 315 units are replaced, 45 of each of the 7: five standard deviations are 5 · √39.
    assert sum(counts.values()) > 250
    assert all(abs(counts[unit] - sum(counts.values()) / 7) < 32 for unit in range(7))


@pytest.mark.parametrize("kind", NETS)
def test_age_utility_and_mean_of_a_replaced_unit_begin_anew(kind):
    training = Training(kind, "continual-backprop", **{**RATE, "unit_utility": "zero-contribution"})
    while not training.step():
        pass
    state = training.surgeries["continual-backprop"].state_dict()["layers"]
    ages = torch.cat([each["age"] for each in state.values()])
    assert 0 < (ages == 0).sum() < len(ages)
    for name in ("trace", "mean"):
        values = torch.cat([each[name] for each in state.values()])
        assert torch.equal(values == 0, ages == 0)


@in_turn("kind optimizer", NETS, ["sgd", "adam"])
def test_a_rate_of_zero_is_the_plain_optimizer(kind, optimizer):
    """L19: to the last bit, after 20 steps; and so are surgeries that find nothing to do."""
    names = ("continual-backprop", "redo", "perturb")
    idle = {"replacement_rate": 0.0, "noise_std": 0.0, "redo_period": 21}
    plain, other = Training(kind, optimizer=optimizer), Training(kind, *names, optimizer=optimizer, **idle)
    for _ in range(20):
        plain.learn()
        assert other.step() == 0
    require_equal(other.tensors, plain.tensors)
    changed = Training(kind, *names, optimizer=optimizer, **{**idle, **RATE})
    for _ in range(20):
        changed.step()
    assert not torch.equal(changed.tensors["0.weight"], plain.tensors["0.weight"])


# resuming -------------------------------------------------------------------------------------------------------------


@in_turn(
    "options kind",
    [
        {},
        {"replacement_draw": "bernoulli"},
        {"unit_utility": "random"},
        {"unit_utility": "zero-contribution"},
        PUBLISHED,
    ],
    list(NETS),
)
def test_a_resumed_training_is_the_straight_one(kind, options, tmp_path):
    """T1: after 17 of 40 steps everything is loaded into another network, and ends with the same bits."""
    names = ("continual-backprop", "redo", "perturb")
    always = {"replacement_rate": 0.1, "redo_period": 7, "redo_threshold": 0.5, "noise_std": 1e-4}
    options = {**RATE, **always, **options}
    straight, first, second = (Training(kind, *names, dtype=torch.float32, seed=seed, **options) for seed in (0, 0, 5))
    total = sum(straight.step() for _ in range(40))
    counts = [first.step() for _ in range(17)]
    parts = {"model": first.model, "optimizer": first.optimizer, **first.surgeries}
    (tmp_path / "state.pt").write_bytes(saved({name: part.state_dict() for name, part in parts.items()}))
    for _ in range(3):  # what is saved does not change any more
        first.step()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, part in {"model": second.model, "optimizer": second.optimizer, **second.surgeries}.items():
        part.load_state_dict(state[name])
    second.count = 17
    counts += [second.step() for _ in range(23)]
    assert sum(counts) == total > 20
    require_equal(second.tensors, straight.tensors)
    for name, surgery in second.surgeries.items():
        assert saved(surgery.state_dict()) == saved(straight.surgeries[name].state_dict())


def test_the_state_is_by_the_name_of_the_layer_and_has_no_modules():
    training = Training("normed", "continual-backprop", **RATE)
    training.step()
    state = training.surgeries["continual-backprop"].state_dict()
    assert set(state) == {"layers", "generator"}
    assert list(state["layers"]) == ["0", "3"]
    assert all(set(each) == {"age", "trace", "mean", "accumulated"} for each in state["layers"].values())
    before = state["layers"]["0"]["age"].tolist()
    training.step()
    assert state["layers"]["0"]["age"].tolist() == before


# on a device ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    """Also not one that replaces units: torch raises an error where the host waits."""
    training = Training("normed", "continual-backprop", dtype=torch.float32)
    model = training.model.cuda()
    subject = Subject(model, training.optimizer, training.layers, options=SurgeryOptions(**RATE))
    surgery = make_surgeries(["continual-backprop"], subject)["continual-backprop"]
    with recorded(model, training.layers) as features:
        model(training.batch()[0].cuda())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not find every place
        torch.cuda.set_sync_debug_mode("error")
    try:
        counts = [surgery.after_step(features) for _ in range(30)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(counts) > 5


# making them ----------------------------------------------------------------------------------------------------------


def test_surgeries_act_in_their_order_whatever_the_order_of_their_names():
    training = Training("mlp", "reset-network", "perturb", "redo", "continual-backprop", "reset-head")
    assert list(training.surgeries) == list(SURGERIES) == list(SURGERY_NAMES)
    assert SURGERY_CHOICES["unit_utility"] == (*UTILITIES, "random")
    assert make_surgeries([], training.subject) == {}
    with pytest.raises(UnknownNameError, match="Did you mean redo"):
        make_surgeries(["perturb", "reedo"], training.subject)


def test_surgeries_on_units_need_hidden_units():
    model = nn.Linear(4, 2)
    for name in ("continual-backprop", "redo"):
        assert SURGERIES[name].needs_features
        with pytest.raises(ModelError, match="Linear has no hidden units to replace"):
            make_surgeries([name], Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), hidden_layers(model)))
    assert not SURGERIES["perturb"].needs_features


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"replacement_rate": 1.5}, InputError, "`replacement_rate` 1.5, expected a number from 0 to 1"),
        ({"maturity": -1}, InputError, "`maturity` -1"),
        ({"utility_decay": 1.0}, InputError, "less than 1"),
        ({"redo_period": 0}, InputError, "1 or more"),
        ({"redo_threshold": -0.1}, InputError, "`redo_threshold`"),
        ({"noise_std": float("nan")}, InputError, "`noise_std` nan"),
        ({"unit_utility": "contributon"}, UnknownNameError, "Did you mean contribution"),
        ({"activation_mean": "sum", "unit_utility": "adaptation"}, InputError, "no utility adaptation of a sum"),
    ],
)
def test_wrong_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        SurgeryOptions(**options)


def test_options_are_read_without_torch():
    lines = "import sys; from ntkgen.continual.surgery.options import SurgeryOptions; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], check=True)
