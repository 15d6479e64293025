"""The streaming learners: each against its formula in NumPy, for one network and for a stack of networks."""

import numpy as np
import pytest
import torch
from learner_oracles import ORACLES

from ntkgen.continual.optim import LEARNERS, NAMES, make_optimizer

pytestmark = pytest.mark.numeric

SHAPES = [(2, 3, 3, 2), (2,), (4, 5), (4,), ()]
STEPS = 3
# Hyper-parameters of the networks of a stack. Those of the first one are also those of a single network.
VALUES = {
    "lr": [0.1, 0.02, 0.05],
    "weight_decay": [0.3, 0.0, 0.1],
    "decay": [0.3, 0.0, 0.1],
    "sigma": [0.2, 0.4, 0.0],
    "beta_utility": [0.9, 0.999, 0.0],
    "beta_weight": [0.9, 0.5, 0.99],
    "beta_fisher": [0.8, 0.99, 0.9],
    "beta_importance": [0.9, 0.999, 0.6],
    "beta1": [0.9, 0.0, 0.5],
    "beta2": [0.999, 0.9, 0.99],
    "eps": [1e-3, 1e-8, 0.1],
    "kappa": [10.0, 0.0, 0.5],
    "step_scale": [1.0, 2.0, 0.5],
    "mixture": [0.2, 1.0, 0.0],
}
WEIGHT_LEARNERS = [name for name, learner in LEARNERS.items() if not learner.has_gates]
CHOICES = {
    "order": "first", "normalisation": "global", "largest": "corrected", "protecting": True, "gate_noise": True,
    "noise_scale": "none", "utility_shape": "element", "mixture": 0.2,
}  # fmt: skip


def numbers(seed, *, members=None):
    """Draw an array per parameter: (members, *shape), or (*shape)."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape if members is None else (members, *shape)) for shape in SHAPES]


def parameters(arrays):
    return [torch.nn.Parameter(torch.tensor(array, dtype=torch.float64)) for array in arrays]


def take_step(optimizer, params, grads, curvature=None):
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer.step(curvature=None if curvature is None else [torch.tensor(each) for each in curvature])


def numbers_of(name):
    """The options of a learner that are numbers."""
    return [option for option in NAMES[name].defaults if option in VALUES]


def oracle_of(name, weights, member, seed, *, compat=False):
    names = NAMES[name]
    options = {option: VALUES[option][member] for option in numbers_of(name)}
    words = {option: value for option, value in names.defaults.items() if option not in VALUES}
    quirks = names.quirks if compat else {}
    return ORACLES[names.optimizer](weights, {**CHOICES, **words, **options, **names.fixed, **quirks}, seed)


def require_close(params, weights):
    for param, weight in zip(params, weights, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), weight, rtol=1e-7, atol=1e-9)


# the formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", WEIGHT_LEARNERS)
def test_a_learner_equals_its_formula(name, compat):
    """U05 to U16: three steps of one network, with noise."""
    params = parameters(numbers(0))
    options = {
        option: VALUES[option][0] for option in numbers_of(name) if not (compat and option in NAMES[name].quirks)
    }
    optimizer = make_optimizer(name, params, generators=[torch.Generator().manual_seed(7)], compat=compat, **options)
    oracle = oracle_of(name, numbers(0), 0, 7, compat=compat)
    for step in range(STEPS):
        grads, curvature = numbers(10 + step), numbers(20 + step)
        take_step(optimizer, params, grads, curvature)
        oracle.step(grads, curvature)
        require_close(params, oracle.weights)


@pytest.mark.parametrize("name", WEIGHT_LEARNERS)
def test_a_stack_equals_networks_of_their_own(name, monkeypatch):
    """Three networks with different hyper-parameters, two of them in one block and one in the next."""
    monkeypatch.setattr("ntkgen.continual.optim.segments.BLOCK", 150)
    start = numbers(0, members=3)
    params = parameters(start)
    options = {option: torch.tensor(VALUES[option], dtype=torch.float64) for option in numbers_of(name)}
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    optimizer = make_optimizer(name, params, members=3, generators=generators, **options)
    oracles = [oracle_of(name, [array[k] for array in start], k, 7 + k) for k in range(3)]
    for step in range(STEPS):
        grads, curvature = numbers(10 + step, members=3), numbers(20 + step, members=3)
        take_step(optimizer, params, grads, curvature)
        for k, oracle in enumerate(oracles):
            oracle.step([array[k] for array in grads], [array[k] for array in curvature])
            require_close([param[k] for param in params], oracle.weights)
