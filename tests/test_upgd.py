"""UPGD: hand-computed steps, its options, utilities of units, and the table of learners."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from learner_oracles import draw, feature_step, sigmoid
from torch import nn

from ntkgen.continual.optim import (
    LEARNERS,
    NAMES,
    OPTIONS,
    PGD,
    SGD,
    UPGD,
    Adam,
    FeatureUPGD,
    OnlineEWC,
    checked_options,
    gated,
    make_optimizer,
)
from ntkgen.errors import InputError, ModelError

# The keys of the learners in the two published programs.
UPGD_KEYS = {
    "sgd", "sgd_with_hesscale", "pgd", "adam", "shrink_and_perturb", "ewc", "mas", "si", "rwalk",
    *(
        f"{feature}upgd_{protecting}{order}_{scope}"
        for feature in ("", "feature_") for protecting in ("", "nonprotecting_")
        for order in ("fo", "so") for scope in ("local", "global")
    ),
}  # fmt: skip
NOISE_KEYS = {
    "baseline", "weight_norm", "grad_norm", "ratio_norm", "usgd", "upgd_dynamicclippedgradient", "entire_kernel",
    "column_kernel", "KernelConvexCombi",
}  # fmt: skip


def params_of(*arrays):
    return [nn.Parameter(torch.tensor(array, dtype=torch.float64)) for array in arrays]


def stepped(make, arrays, grads, steps=1):
    """Train copies of some parameters with the same gradients in each step."""
    params = params_of(*arrays)
    optimizer = make(params)
    for _ in range(steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    return [param.detach().numpy() for param in params]


# hand-computed steps --------------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """U05: utilities 2, −1 and 4; the largest is 4, so s = φ(½), φ(−¼) and φ(1)."""
    w, b = stepped(
        lambda p: UPGD(p, lr=0.1, sigma=0.0, weight_decay=0.5), [[[2.0, 1.0]], [4.0]], [[[-1.0, 1.0]], [-1.0]]
    )
    shrunk = 1 - 0.1 * 0.5
    expected = [
        shrunk * 2 + 0.1 * (1 - sigmoid(0.5)),
        shrunk * 1 - 0.1 * (1 - sigmoid(-0.25)),
        shrunk * 4 + 0.1 * (1 - sigmoid(1.0)),
    ]
    np.testing.assert_allclose([*w[0], *b], expected, rtol=1e-14)


def test_the_raw_maximum_makes_the_first_utilities_larger():
    """U07: û / η is 1 / (1 − β) at the first step; here 10 for the most useful weight."""
    make = lambda p: UPGD(p, lr=1.0, sigma=0.0, beta_utility=0.9, largest="raw")  # noqa: E731
    (w,) = stepped(make, [[2.0, -1.0]], [[-1.0, -1.0]])
    np.testing.assert_allclose(w, [2 + 1 - sigmoid(10.0), -1 + 1 - sigmoid(-5.0)], rtol=1e-12)


@pytest.mark.parametrize("largest", ["raw", "corrected"])
@pytest.mark.parametrize(("weights", "grads"), [([1.0, 2.0], [0.0, 0.0]), ([1.0, -2.0], [3.0, -1.0])])
def test_without_a_positive_utility_every_weight_gets_half_a_step(weights, grads, largest):
    """U07, trap T18: no gradient, or negative utilities alone: s = ½, no NaN and no change of sign."""
    (w,) = stepped(lambda p: UPGD(p, lr=0.1, sigma=0.0, largest=largest), [weights], [grads])
    np.testing.assert_allclose(w, np.array(weights) - 0.05 * np.array(grads), rtol=1e-14)


def test_a_tiny_largest_utility_gives_no_nan():
    tiny = 1e-43
    params = [nn.Parameter(torch.tensor([1.0, 0.0, 1.0]))]
    params[0].grad = torch.tensor([-tiny, -1.0, 1.0])
    UPGD(params, lr=0.1, sigma=0.0, beta_utility=0.0).step()
    torch.testing.assert_close(params[0].detach(), torch.tensor([1.0, 0.05, 0.9]), atol=0.051, rtol=0)
    assert params[0].isfinite().all()


def test_a_network_without_utility_does_not_change_the_others_of_its_stack():
    params = [nn.Parameter(torch.ones(2, 2))]
    params[0].grad = torch.tensor([[0.0, 0.0], [-1.0, -0.5]])
    UPGD(params, lr=1.0, sigma=0.0, members=2).step()
    expected = [[1.0, 1.0], [2 - sigmoid(1.0), 1.5 - 0.5 * sigmoid(0.5)]]
    np.testing.assert_allclose(params[0].detach(), expected, rtol=1e-6)


# options --------------------------------------------------------------------------------------------------------------

START, SLOPE = [[[1.0, 2.0], [-1.0, 0.5]], [0.3]], [[[-1.0, 0.2], [0.4, 1.0]], [-0.7]]


def test_twice_the_step_is_the_step_of_twice_the_learning_rate():
    """U08: without weight decay. This is also the stand-alone form of the authors, w − 2 α (g + ξ)(1 − s)."""
    twice = stepped(lambda p: UPGD(p, lr=0.05, sigma=0.0, step_scale=2.0), START, SLOPE, 3)
    once = stepped(lambda p: UPGD(p, lr=0.1, sigma=0.0), START, SLOPE, 3)
    for one, other in zip(twice, once, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14)


@pytest.mark.parametrize(
    ("noise_scale", "power"), [("none", (0, 0)), ("weight", (1, 0)), ("grad", (0, 1)), ("ratio", (-1, 1))]
)
def test_noise_is_scaled_by_the_norms_of_each_tensor(noise_scale, power):
    """U09: what is left of a step beside the gradient, over the numbers drawn, is the norm plus 1e-8."""
    options = {"lr": 1.0, "gate_noise": False, "noise_scale": noise_scale}
    quiet = stepped(lambda p: UPGD(p, sigma=0.0, **options), START, SLOPE)
    source = [torch.Generator().manual_seed(3)]
    noisy = stepped(lambda p: UPGD(p, sigma=1.0, generators=source, **options), START, SLOPE)
    normal = draw(torch.Generator().manual_seed(3), [(2, 2), (1,)])
    for start, slope, with_noise, without, drawn in zip(START, SLOPE, noisy, quiet, normal, strict=True):
        weight, grad = np.linalg.norm(start) + 1e-8, np.linalg.norm(slope) + 1e-8
        np.testing.assert_allclose((without - with_noise) / drawn, weight ** power[0] * grad ** power[1], rtol=1e-9)


def test_noise_of_usgd_reaches_weights_that_are_protected():
    """U10: β near 1 and the raw maximum protect useful weights fully; they move by the noise alone."""
    options = {"lr": 1.0, "sigma": 0.5, "beta_utility": 0.999, "largest": "raw"}
    found = []
    for gate_noise in (False, True):
        source = [torch.Generator().manual_seed(3)]
        make = lambda p, g=gate_noise, s=source: UPGD(p, generators=s, gate_noise=g, **options)  # noqa: E731
        found.append(stepped(make, [[1.0, 1.0]], [[-1.0, -1.0]])[0])
    (normal,) = draw(torch.Generator().manual_seed(3), [(2,)])
    np.testing.assert_allclose(found[0], 1 - 0.5 * normal, rtol=1e-12)
    np.testing.assert_allclose(found[1], [1.0, 1.0], rtol=1e-12)


@pytest.mark.parametrize(("shape", "axes"), [("kernel", (2, 3)), ("column", (2,))])
def test_weights_of_a_kernel_share_their_utility(shape, axes):
    """U11: the share of the step, 1 − s, is constant in a kernel or in its columns; other tensors keep theirs."""
    rng = np.random.default_rng(0)
    start, slope = (
        [rng.standard_normal((2, 3, 4, 2)), rng.standard_normal((3, 2))],
        [np.ones((2, 3, 4, 2)), np.ones((3, 2))],
    )
    own = stepped(lambda p: UPGD(p, lr=1.0, sigma=0.0), start, slope)
    shared = stepped(lambda p: UPGD(p, lr=1.0, sigma=0.0, utility_shape=shape), start, slope)
    mean = np.broadcast_to((start[0] - own[0]).mean(axes, keepdims=True), start[0].shape)
    np.testing.assert_allclose(start[0] - shared[0], mean, rtol=1e-9)
    assert np.array_equal(shared[1], own[1])
    ends = {0.0: own, 1.0: stepped(lambda p: UPGD(p, lr=1.0, sigma=0.0, utility_shape="kernel"), start, slope)}
    for mixture, expected in ends.items():
        make = lambda p, m=mixture: UPGD(p, lr=1.0, sigma=0.0, utility_shape="convex", mixture=m)  # noqa: E731
        assert np.array_equal(stepped(make, start, slope)[0], expected[0])


def test_weight_decay_is_decoupled_from_the_gradient():
    """U12: without gradient and noise, w ← (1 − αλ) w."""
    (w,) = stepped(lambda p: UPGD(p, lr=0.1, sigma=0.0, weight_decay=0.5, step_scale=2.0), [[1.0, -3.0]], [[0.0, 0.0]])
    np.testing.assert_allclose(w, [0.95, -2.85], rtol=1e-14)


def test_limits_of_the_other_learners():
    """U15: without a penalty EWC is SGD, without noise PGD is SGD, and Adam is that of torch."""
    plain = stepped(lambda p: SGD(p, lr=0.1), START, SLOPE, 3)
    options = {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-3}
    pairs = [
        (plain, stepped(lambda p: OnlineEWC(p, lr=0.1, kappa=0.0), START, SLOPE, 3)),
        (plain, stepped(lambda p: PGD(p, lr=0.1, sigma=0.0), START, SLOPE, 3)),
        (
            stepped(lambda p: torch.optim.AdamW(p, betas=(0.8, 0.99), **options), START, SLOPE, 3),
            stepped(lambda p: Adam(p, beta1=0.8, beta2=0.99, **options), START, SLOPE, 3),
        ),
    ]
    for one, other in pairs:
        for left, right in zip(one, other, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-12)


# utilities of units ---------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Sequential(nn.Linear(12, 4), nn.Tanh()), nn.Linear(4, 2),
    ).double()  # fmt: skip


def test_a_network_with_gates_has_the_same_outputs():
    """U13: gates are 1, they stand behind activations, and they share no unit."""
    model = network()
    net, x = gated(model), torch.randn(5, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(x), model(x))
    gates = {name: param.shape for name, param in net.named_parameters() if name.endswith("gate")}
    assert gates == {"2_gate.gate": (3,), "4.1_gate.gate": (4,)}
    assert [param for name, param in net.named_parameters() if "gate" not in name] == [*model.parameters()]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(4, 4), nn.Flatten(), nn.ReLU()], r"The activation 2 \(ReLU\)"),
        ([nn.Sequential(nn.Tanh())], r"The activation 0 \(Tanh\)"),
        ([nn.Linear(2, 2), nn.TransformerEncoderLayer(2, 1)], None),
    ],
)
def test_gates_stand_behind_layers_alone(layers, message):
    model = nn.Sequential(*layers)
    if message is None:
        assert not [name for name, _ in gated(model).named_parameters() if name.endswith("gate")]
        return
    with pytest.raises(ModelError, match=message):
        gated(model)


def test_a_network_that_is_not_sequential_gets_no_gates():
    with pytest.raises(ModelError, match="Bilinear cannot get gates"):
        gated(nn.Bilinear(1, 1, 1))


@pytest.mark.parametrize("name", [name for name, learner in LEARNERS.items() if learner.has_gates])
@pytest.mark.parametrize("compat", [False, True])
def test_feature_upgd_equals_its_formula(name, compat):
    """U13: three steps, for one network and for a stack of two with different hyper-parameters."""
    names = [key for key, _ in gated(network()).named_parameters()]
    shapes = [param.shape for param in gated(network()).parameters()]
    rng = np.random.default_rng(1)
    options = {"lr": [0.1, 0.2], "sigma": [0.3, 0.1], "beta_utility": [0.9, 0.5], "weight_decay": [0.2, 0.0]}
    for members in (None, 2):
        rows = members or 1
        weights = [
            [
                np.ones(shape) if "gate" in key else rng.standard_normal(shape)
                for key, shape in zip(names, shapes, strict=True)
            ]
            for _ in range(rows)
        ]
        params = params_of(*([np.stack(each) for each in zip(*weights, strict=True)] if members else weights[0]))
        chosen = {
            key: torch.tensor(value, dtype=torch.float64) if members else value[0] for key, value in options.items()
        }
        optimizer = make_optimizer(
            name,
            zip(names, params, strict=True),
            members,
            [torch.Generator().manual_seed(seed) for seed in range(rows)],
            compat=compat,
            **chosen,
        )
        states = [({}, torch.Generator().manual_seed(seed)) for seed in range(rows)]
        for t in (1, 2, 3):
            lead = (rows,) if members else ()
            grads, curvature = ([rng.standard_normal((*lead, *shape)) for shape in shapes] for _ in range(2))
            for param, grad in zip(params, grads, strict=True):
                param.grad = torch.tensor(grad)
            optimizer.step(curvature=[torch.tensor(each) for each in curvature])
            for k in range(rows):
                own = {key: value[k] for key, value in options.items()}
                fixed = {**NAMES[name].fixed, "largest": "raw" if compat else "corrected"}
                g, h = ([each[k] if members else each for each in arrays] for arrays in (grads, curvature))
                weights[k] = feature_step(names, weights[k], g, h, t, states[k], {**own, **fixed})
                for param, weight in zip(params, weights[k], strict=True):
                    np.testing.assert_allclose(
                        param.detach()[k] if members else param.detach(), weight, rtol=1e-7, atol=1e-9
                    )


@pytest.mark.parametrize("params", [lambda: network().parameters(), lambda: network().named_parameters()])
def test_feature_upgd_needs_gates(params):
    with pytest.raises(InputError, match="has no gates"):
        FeatureUPGD(params())


# the table ------------------------------------------------------------------------------------------------------------


def test_the_published_names_are_there():
    """U16: 25 of one program and 9 of the other."""
    assert (len(UPGD_KEYS), len(NOISE_KEYS)) == (25, 9)
    assert LEARNERS.keys() == UPGD_KEYS | NOISE_KEYS | {"upgd", "adaptive_upgd"}
    assert all(learner.source and learner.name == name for name, learner in LEARNERS.items())


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_takes_its_options_as_words(name):
    """U16: two steps with numbers written as text, and finite parameters."""
    learner = LEARNERS[name]
    model = gated(network()) if learner.has_gates else network()
    words = {option: str(value) for option, value in learner.defaults.items()}
    optimizer = make_optimizer(name, model.named_parameters(), **words)
    assert {option: optimizer.defaults[option] for option in words} == dict(learner.defaults)
    x = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step(curvature=[torch.ones_like(param) for param in model.parameters()])
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("name", LEARNERS)
def test_the_defaults_of_a_name_are_those_of_its_class(name):
    learner = LEARNERS[name]
    made = learner.make([("gate", nn.Parameter(torch.ones(2)))])
    assert {option: made.defaults[option] for option in learner.defaults} == dict(learner.defaults)


def test_compat_changes_the_step_of_utilities_per_kernel_and_the_maximum():
    """Trap T11: the published variants per kernel take twice the step; a given option wins."""
    params = params_of([1.0])
    assert make_optimizer("entire_kernel", params).defaults["step_scale"] == 1.0
    published = make_optimizer("entire_kernel", params, compat=True).defaults
    assert (published["step_scale"], published["largest"]) == (2.0, "raw")
    assert make_optimizer("entire_kernel", params, compat=True, step_scale=1.5).defaults["step_scale"] == 1.5
    assert make_optimizer("baseline", params, compat=True).defaults["step_scale"] == 1.0


def test_the_table_is_read_without_torch():
    code = "import sys, ntkgen.continual.optim.names as n; assert len(n.NAMES) > 34; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert checked_options("upgd", {"protecting": "false", "lr": "1e-3"}) == {"protecting": False, "lr": 1e-3}
    assert math.isinf(OPTIONS["lr"].most)


@pytest.mark.parametrize("normalisation", ["global", "local"])
def test_scaled_utilities_are_those_of_the_last_step(normalisation):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (4,))]
    optimizer = UPGD(params, beta_utility=0.5, sigma=0.0, normalisation=normalisation, members=3)
    assert optimizer.scaled_utilities() == {}
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    found = optimizer.scaled_utilities()
    corrected = [optimizer.state[param]["utility"].numpy() / (1 - 0.5**2) for param in params]
    largest = np.max([each.reshape(3, -1).max(1) for each in corrected], 0)
    for position, utility in enumerate(corrected):
        if normalisation == "global":
            scaled = utility / largest.reshape(-1, *[1] * (utility.ndim - 1))
        else:
            scaled = utility / np.linalg.norm(utility, axis=-1, keepdims=True)
        np.testing.assert_allclose(found[position].numpy(), 1 / (1 + np.exp(-scaled)), rtol=1e-12)
    other = UPGD(params, beta_utility=0.5, sigma=0.0, normalisation=normalisation, members=3)
    other.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(other.scaled_utilities()[position], each) for position, each in found.items())
