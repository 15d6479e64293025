"""The explained plan: parts that add up."""

import pytest
import torch
from cases import CASES, CPU

from ntkgen.engine.machine import environment
from ntkgen.jacobian.cost import ORDERS
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.plan.explain import WorkCount, explain
from ntkgen.plan.order import projected_flops
from ntkgen.plan.plan import Budget, Choices, make_plan
from ntkgen.plan.tiles import make_grid


def plan_of(name, order=None, memory=1 << 30):
    case = CASES[name]()
    network = prepare(case.module, case.x, policy("float32"))
    orders = (order,) * len(network.profile.layers) if order else ()
    grid = make_grid(11, network.profile.num_outputs, 4 * network.profile.num_outputs)
    budget = Budget(memory, memory)
    return make_plan(network.profile, grid, Choices(orders=orders), budget=budget, environment=environment(CPU, 1))


@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("name", ["residual_with_shortcut", "transformer", "conv_depthwise"])
def test_the_flops_of_the_parts_add_up_to_what_the_plan_projects(name, order):
    plan = plan_of(name, order)
    tiles = list(plan.grid.tiles())[1:]
    for cached_blocks in (1, 2, 9):
        parts = explain(plan, WorkCount.of(plan, tiles, cached_blocks, diagonal=[0, 2]))
        assert sum(part.flops for part in parts) == projected_flops(plan, tiles, cached_blocks, [0, 2])


def test_what_is_kept_of_a_sample_adds_up():
    plan = plan_of("residual_with_shortcut")
    parts = explain(plan, WorkCount.of(plan, list(plan.grid.tiles()), 2))
    kept = plan.jacobian.factor_bytes - plan.jacobian.num_outputs * 4  # the logits
    assert sum(part.factor_bytes for part in parts) == kept


def test_structure_saves_where_positions_are_few():
    with torch.random.fork_rng():
        plan = plan_of("residual_with_shortcut")
    parts = explain(plan, WorkCount.of(plan, list(plan.grid.tiles()), 9))
    assert {part.order.split(",")[0] for part in parts} >= {"explicit"}
    assert all(part.explicit_flops >= 0 for part in parts)
