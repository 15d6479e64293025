"""The oracle of a utility, rank correlations, and how utilities of first and second order compare."""

import numpy as np
import scipy.stats
import torch

from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.continual.streaming.utility_study import StudySettings, _network, oracle, spearman, study


def test_ranks_are_those_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (4, 30)), rng.normal(size=(4, 30))
    expected = [scipy.stats.spearmanr(*pair).statistic for pair in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-12)
    assert spearman(np.ones((1, 4)), b[:1, :4]).tolist() == [0.0]


def test_the_oracle_sets_each_parameter_to_0():
    networks = [_network(StudySettings(hidden=4), seed).double() for seed in range(2)]
    stack = StackedNetwork(networks)
    x, y = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    found = oracle(stack.module(0), stack.parameters, x, y, list(stack.parameters))
    for member, network in enumerate(networks):
        loss = (network(x[member])[0] - y[member]).square()
        for name, values in network.named_parameters():
            for index in np.ndindex(*values.shape):
                with torch.no_grad():
                    kept = values[index].clone()
                    values[index] = 0
                    change = (network(x[member])[0] - y[member]).square() - loss
                    values[index] = kept
                torch.testing.assert_close(found[name][(member, *index)], change.detach())


def test_second_order_agrees_better_than_first_and_chance_not_at_all():
    found = study(StudySettings(num_seeds=6, num_steps=50, every=5, hidden=8)).correlation.mean("seed")
    value = {name: found.sel(utility=name) for name in found.utility.values.tolist()}
    for scope in ("global", "layer"):
        assert float(value["second_order"].sel(scope=scope)) >= float(value["first_order"].sel(scope=scope))
        assert abs(float(value["random"].sel(scope=scope))) < 0.2
    assert float(value["first_order"].sel(scope="global")) > 0.3


def test_the_oracle_of_a_unit_sets_its_output_to_0():
    network = _network(StudySettings(hidden=4, of="units"), 0).double()
    stack = StackedNetwork([network])
    x, y = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    (name,) = [each for each in stack.parameters if each.endswith("gate")]
    found = oracle(stack.module(0), stack.parameters, x, y, [name])
    assert list(found) == [name]
    with torch.no_grad():
        hidden = torch.relu(network[0](x[0]))
        for unit in range(4):
            kept = torch.where(torch.arange(4) == unit, 0.0, hidden)
            losses = [(network[-1](each)[0] - y[0]).square() for each in (kept, hidden)]
            torch.testing.assert_close(found[name][0, unit], losses[0] - losses[1])
    units = study(StudySettings(num_seeds=4, num_steps=20, every=5, hidden=8, of="units")).correlation.mean("seed")
    assert float(units.sel(utility="second_order", scope="global")) > 0.5
