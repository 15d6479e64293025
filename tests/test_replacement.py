"""What the replacement of a unit does, the utilities, and ReDo."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from unit_training import NETS, RATE, Training, filled, mlp, normed, require_equal

from models import MODELS
from ntkgen.continual.surgery import Subject, SurgeryOptions, make_surgeries
from ntkgen.continual.surgery.connections import Connections, gain_of
from ntkgen.continual.surgery.replacement import Replacement, draw_weights
from ntkgen.continual.surgery.utilities import UTILITIES, Observation
from ntkgen.continual.units import HiddenLayer, hidden_layers, recorded
from ntkgen.errors import ShapeError

pytestmark = pytest.mark.numeric

# what a replacement does ----------------------------------------------------------------------------------------------


def test_a_replaced_unit_is_new_and_all_others_keep_their_bits():
    """L16: incoming weights drawn, bias 0, outgoing weights 0, batch norm as new; in convolution and linear layer."""
    model = filled(normed())
    subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), hidden_layers(model))
    replace = Replacement(subject)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    replace(replace.layers[0], torch.tensor([2, 5]))
    replace(replace.layers[1], torch.tensor([3]))
    found = model.state_dict()
    for first, norm, second, units in (("0", "1", "3", [2, 5]), ("3", "4", "8", [3])):
        for unit in units:
            assert not torch.equal(found[f"{first}.weight"][unit], expected[f"{first}.weight"][unit])
            expected[f"{first}.weight"][unit] = found[f"{first}.weight"][unit]
            expected[f"{first}.bias"][unit] = 0
            expected[f"{second}.weight"][:, unit] = found[f"{second}.weight"][:, unit] if second == "3" else 0
            for part, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
                expected[f"{norm}.{part}"][unit] = value
    others = [0, 1, 2, 4, 5]  # units of the second convolution, whose incoming weights are not drawn anew
    assert not found["3.weight"][others][:, [2, 5]].any()
    require_equal(found, expected)


STDS = {
    # of a convolution of 3×3 pixels from 6 to 5 channels with ReLU: fan in 54, fan out 45
    "kaiming": math.sqrt(2 / 54),
    "xavier": math.sqrt(2) * math.sqrt(2 / (54 + 45)),
    "lecun": math.sqrt(1 / 54),
    "default": math.sqrt(1 / 54) / math.sqrt(3),
}


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("init", STDS)
def test_new_weights_have_the_standard_deviation_of_their_initialisation(init, distribution):
    model = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
    layer = Connections(model, hidden_layers(model)[0])
    options = SurgeryOptions(unit_init=init, unit_distribution=distribution)
    drawn = draw_weights(2000, layer, options, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000, 6, 3, 3)
    # The relative standard error of a standard deviation of 108,000 numbers is about 0.2 %.
    assert drawn.std().item() == pytest.approx(STDS[init], rel=0.01)
    assert drawn.mean().item() == pytest.approx(0, abs=0.02 * STDS[init])
    bound = math.sqrt(3) * STDS[init]
    assert (drawn.abs().max().item() <= bound * (1 + 1e-6)) == (distribution == "uniform")


def test_pytorchs_default_is_the_default():
    """Its uniform distribution has the bound √(1 / fan_in), whatever the activation function is."""
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 2))
    options = SurgeryOptions(unit_init="default", unit_distribution="uniform")
    drawn = draw_weights(400, Connections(model, hidden_layers(model)[0]), options, torch.Generator().manual_seed(0))
    for weights in (drawn, model[0].weight):
        assert weights.abs().max().item() == pytest.approx(math.sqrt(1 / 300), rel=1e-3)


@pytest.mark.parametrize(
    ("modules", "gain"),
    [
        ([nn.ReLU()], math.sqrt(2)),
        ([nn.Tanh()], 5 / 3),
        ([nn.LeakyReLU(0.5)], math.sqrt(2 / 1.25)),
        ([nn.SELU()], 0.75),
        ([nn.GELU()], math.sqrt(2)),
        ([nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2)], 5 / 3),
        ([nn.Tanh(), nn.BatchNorm2d(4)], 5 / 3),
        ([nn.MaxPool2d(2)], 1.0),
        ([], 1.0),
    ],
)
def test_the_gain_is_that_of_the_activation_function(modules, gain):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *modules, nn.Conv2d(4, 2, 3), nn.Sigmoid())
    assert gain_of(model, hidden_layers(model)[0]) == pytest.approx(gain)


def test_the_block_of_a_flattened_channel_is_the_channels():
    """L17: channel j of 2×2 pixels owns the columns 4j to 4j + 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    replace = Replacement(Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), hidden_layers(model)))
    before = model[3].weight.clone()
    replace(replace.layers[0], torch.tensor([1, 4]))
    columns = [4, 5, 6, 7, 16, 17, 18, 19]
    others = [column for column in range(20) if column not in columns]
    assert not model[3].weight[:, columns].any()
    assert torch.equal(model[3].weight[:, others], before[:, others])
    assert before.all()


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (MODELS["lenet"](), 32),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), 2),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)), 4),
    ],
    ids=["lenet", "mlp", "flattened"],
)
def test_a_unit_without_outgoing_weights_has_no_effect_and_others_have(model, size):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    for layer in hidden_layers(model):
        changed = copy.deepcopy(model).eval()
        connections = Connections(changed, layer)
        unit = torch.tensor([connections.num_units - 2])
        with torch.no_grad():
            connections.outgoing.weight.index_fill_(1, connections.columns(unit), 0.0)
            before = changed(x)
            connections.incoming.bias[unit] += 3.0
            assert torch.equal(changed(x), before)
            connections.incoming.bias[unit + 1] += 3.0
            assert not torch.equal(changed(x), before)


@pytest.mark.parametrize("kind", ["linear", "flattened"])
def test_the_bias_takes_over_what_a_constant_unit_has_contributed(kind):
    """L18: the outputs stay as they were to 1e-6."""
    torch.manual_seed(0)
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)
    else:
        conv = nn.Conv2d(2, 3, 3)
        model, x = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), torch.randn(8, 2, 4, 4)
    columns = [1] if kind == "linear" else [4, 5, 6, 7]
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.75
        model[-1].weight[:, columns] *= 1e-2  # the least useful one
    layers, found = hidden_layers(model), {}
    for transfers in (True, False):
        options = SurgeryOptions(replacement_rate=1 / 3, maturity=5, transfer_bias=transfers)
        subject = Subject(model, torch.optim.SGD(model.parameters(), lr=0.1), layers, options=options)
        surgery = make_surgeries(["continual-backprop"], subject)["continual-backprop"]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with recorded(model, layers) as features, torch.no_grad():
            before = model(x)
        assert [surgery.after_step(features) for _ in range(6)] == [0] * 5 + [1]
        assert not model[-1].weight[:, columns].any()
        assert model[0].weight[1].all()
        found[transfers] = (model(x) - before).abs().max().item()
        model.load_state_dict(state)
    assert found[True] < 1e-6 < 1e-4 < found[False]


# utilities ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_utilities_are_their_formulas(kind):
    """L19: with weights and activations in NumPy, layer after layer."""
    training = Training(kind)
    features = training.learn()
    layers = [Connections(training.model, layer) for layer in training.layers]
    total = sum(layer.num_units for layer in layers)
    center = torch.from_numpy(np.random.default_rng(0).standard_normal(total))
    seen = Observation(layers, features, torch.float64)
    expected = {name: [] for name in UTILITIES}
    for layer, own in zip(training.layers, center.split([layer.num_units for layer in layers]), strict=True):
        w = training.tensors[f"{layer.incoming}.weight"].numpy()
        v = training.tensors[f"{layer.outgoing}.weight"].numpy()
        for unit, mean in enumerate(own.tolist()):
            h, block = features[layer.activation].numpy(), v.shape[1] // len(w)
            size = h.shape[1] // len(w)
            h = h[:, unit * size : (unit + 1) * size]
            w_in, w_out = np.abs(w[unit]).mean(), np.abs(v[:, unit * block : (unit + 1) * block]).mean()
            deviation = np.abs(h - mean).mean()
            expected["contribution"].append(w_out * np.abs(h).mean())
            expected["weight"].append(w_out)
            expected["adaptation"].append(1 / w_in)
            expected["zero-contribution"].append(w_out * deviation)
            expected["adaptable-contribution"].append(w_out * deviation / w_in)
    for name, utility in UTILITIES.items():
        with torch.no_grad():
            found = utility(seen, center)
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=1e-12)


def test_a_unit_without_incoming_weights_has_a_finite_utility():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight[0] = 0
    layers = [Connections(model, layer) for layer in hidden_layers(model)]
    found = UTILITIES["adaptation"](Observation(layers, {}, torch.float32), torch.zeros(2))
    assert found.isfinite().all()
    assert found[0] > 1e30 > found[1]


def test_activations_of_another_shape_are_refused():
    model = mlp()
    layer = Connections(model, HiddenLayer("1", "0", None, "2"))
    with pytest.raises(ShapeError, match=r"expected \(samples, 7, …\).*found \(9, 4, 7\)"):
        layer.by_unit(torch.zeros(9, 4, 7))


# ReDo and the state of optimizers -------------------------------------------------------------------------------------


def planted(**options):
    """A network in training, in which unit 4 of the first layer is dead and unit 2 is nearly so."""
    training = Training("mlp", "redo", redo_period=3, **options)
    for _ in range(2):
        assert training.step() == 0
    features = training.learn()
    features["1"][:, 4] = 0
    features["1"][:, 2] *= 0.01 / features["1"][:, 2].abs().mean()
    return training, features


def test_exactly_the_dormant_units_are_reset():
    """L20: with the threshold 0 the dead one; with 0.1 also the one whose mean activation is 0.01."""
    for threshold, units in ((0.0, [4]), (0.1, [2, 4])):
        training, features = planted(redo_threshold=threshold)
        magnitude = features["1"].abs().mean(0).numpy()
        before = training.tensors
        assert training.surgeries["redo"].after_step(features) == len(units)
        assert np.flatnonzero(magnitude <= threshold * magnitude.mean()).tolist() == units
        after, others = training.tensors, [unit for unit in range(7) if unit not in units]
        for name in ("0.weight", "0.bias"):
            assert torch.equal(after[name][others], before[name][others])
        assert not any(torch.equal(after["0.weight"][unit], before["0.weight"][unit]) for unit in units)
        assert not after["0.bias"][units].any()
        assert torch.equal(after["2.weight"][:, others], before["2.weight"][:, others])
        assert not after["2.weight"][:, units].any()
        assert torch.equal(after["4.weight"], before["4.weight"])
        assert training.step() == 0  # its period is over


def test_a_layer_without_any_activation_is_reset_as_a_whole():
    training, features = planted(redo_threshold=0.1)
    features["3"].zero_()
    assert training.surgeries["redo"].after_step(features) == 2 + 6


@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize(("optimizer", "moments"), [("sgd", ["momentum_buffer"]), ("adam", ["exp_avg", "exp_avg_sq"])])
def test_the_state_of_the_optimizer_of_a_replaced_unit_is_zero_if_it_is_asked_for(optimizer, moments, resets):
    """L20: rows of the incoming weight and bias, columns of the outgoing weight; the step of Adam stays."""
    training, features = planted(redo_threshold=0.0, optimizer=optimizer, reset_unit_optimizer=resets)
    first, _, second, _, third = training.model
    assert training.surgeries["redo"].after_step(features) == 1
    for moment in moments:
        found = {param: training.optimizer.state[param][moment] for param in training.model.parameters()}
        own = [found[first.weight][4], found[first.bias][4], found[second.weight][:, 4]]
        assert all(bool(part.any()) != resets for part in own)
        assert found[first.weight][[0, 1, 2, 3, 5, 6]].any(1).all()
        assert found[second.weight][:, [0, 1, 2, 3, 5, 6]].any(0).all()
        assert found[second.bias].all()
        assert found[third.weight].any()
    if optimizer == "adam":
        assert training.optimizer.state[first.weight]["step"] == 3


def test_the_state_of_the_optimizer_of_batch_norm_is_reset_too():
    training = Training("normed", "continual-backprop", **{**RATE, "replacement_rate": 1.0})
    for _ in range(5):
        training.step()
    for module in (training.model[0], training.model[1]):
        for param in module.parameters():
            assert not training.optimizer.state[param]["momentum_buffer"].any()
