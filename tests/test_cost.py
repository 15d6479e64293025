"""Costs as integers: the cheapest order is chosen, sums add up, slices fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkgen.jacobian.cost import (
    ORDERS,
    TOUCH_MACS,
    LayerShape,
    NetworkProfile,
    building_macs,
    choose_layer,
    factor_macs,
    factor_numbers,
    intermediate_numbers,
    pair_macs,
    plan_jacobian,
    slice_samples,
)

sizes = st.integers(1, 2000)
shapes = st.builds(LayerShape, st.just("layer"), sizes, sizes, sizes, st.integers(1, 64))
outputs = st.integers(1, 1000)
blocks = st.integers(1, 4096)


def profile_of(*layers: LayerShape, num_outputs: int = 10, dense_params: int = 7) -> NetworkProfile:
    num_params = dense_params + sum(layer.num_params for layer in layers)
    return NetworkProfile(num_outputs, num_params, layers, dense_params, (), activation_numbers=1, input_numbers=1)


def cost_of(shape: LayerShape, m: int, block: int, order: str) -> int:
    """Multiply-adds of one pair of samples and what its intermediates and rows take, written once more."""
    t, k, c, q = shape.positions, shape.inputs, shape.channels, shape.groups
    rows_fit = m * q * c * k <= q * t * (k + m * c)
    if order == "explicit":  # both sides build their rows once per block, unless those are kept
        return q * m**2 * c * k + (0 if rows_fit else 2 * q * m * t * c * k // block)
    touched = TOUCH_MACS * q * intermediate_numbers(shape, m, order)
    if order == "gram":
        return q * (t**2 * k + m**2 * t**2 * c + m**2 * t**2) + touched
    return q * (t**2 * k + m * t**2 * c + m**2 * t * c) + touched


@given(shapes, outputs, blocks)
def test_the_chosen_order_is_the_cheapest_of_all(shape, m, block):
    costs = {order: cost_of(shape, m, block, order) for order in ORDERS}
    assert costs[choose_layer(shape, m, block).order] == min(costs.values())


@given(shapes, outputs, blocks)
def test_rows_are_kept_only_where_they_are_no_larger_than_the_factors(shape, m, block):
    plan = choose_layer(shape, m, block)
    rows, factors = m * shape.num_params, factor_numbers(shape, m)
    assert plan.keeps_rows == (plan.order == "explicit" and rows <= factors)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        (LayerShape("stem", positions=1024, inputs=27, channels=64), "explicit"),
        (LayerShape("late", positions=16, inputs=4608, channels=512), "ordered"),
        (LayerShape("dense", positions=1, inputs=512, channels=256), "gram"),
    ],
)
def test_every_order_is_the_best_one_somewhere(shape, order):
    assert choose_layer(shape, 10, 64).order == order


@given(st.lists(shapes, max_size=4), outputs, st.integers(0, 1000))
def test_the_plan_of_a_network_is_the_sum_of_its_layers(layers, m, dense):
    plan = plan_jacobian(
        profile_of(*layers, num_outputs=m, dense_params=dense), block_samples=8, batch_size=4, workspace_numbers=99
    )
    assert plan.pair_macs == m * m * dense + sum(pair_macs(p.shape, m, p.order) for p in plan.layers)
    kept = sum(p.shape.num_params for p in plan.layers if p.keeps_rows)
    pairs = sum(factor_numbers(p.shape, m) for p in plan.layers if not p.keeps_rows)
    assert plan.row_numbers == m * (dense + kept)
    assert plan.factor_numbers == m + m * (dense + kept) + pairs
    assert [p.shape for p in plan.layers] == layers
    assert (plan.num_outputs, plan.batch_size, plan.workspace_numbers) == (m, 4, 99)


@given(st.lists(shapes, max_size=4), outputs)
def test_factors_cost_a_pass_forward_one_back_per_output_and_the_rows_that_are_kept(layers, m):
    profile = profile_of(*layers, num_outputs=m)
    plan = plan_jacobian(profile, block_samples=8, batch_size=4, workspace_numbers=99)
    one_pass = sum(shape.positions * shape.groups * shape.channels * shape.inputs for shape in layers)
    kept = sum(building_macs(p.shape, m) for p in plan.layers if p.keeps_rows)
    assert factor_macs(profile, plan) == (1 + m) * one_pass + kept


@pytest.mark.parametrize("order", ORDERS)
def test_orders_can_be_forced(order):
    layers = [LayerShape("stem", 1024, 27, 64), LayerShape("late", 16, 4608, 512), LayerShape("dense", 1, 512, 256)]
    profile = profile_of(*layers)
    options = {"block_samples": 64, "batch_size": 4, "workspace_numbers": 99}
    free, forced = plan_jacobian(profile, **options), plan_jacobian(profile, **options, orders=[order] * 3)
    assert {plan.order for plan in forced.layers} == {order}
    for chosen, plan in zip(free.layers, forced.layers, strict=True):
        assert plan == chosen if chosen.order == order else not plan.keeps_rows


@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 300), st.integers(1, 300))
def test_a_slice_is_within_the_limit_wherever_one_pair_is(numbers, limit, rows, cols):
    height, width = slice_samples(numbers, limit, rows, cols)
    assert 1 <= height <= rows
    assert 1 <= width <= cols
    assert height * width * numbers <= limit or (height, width) == (1, 1)


@given(st.integers(1, 10**6), st.integers(1, 10**7), st.integers(1, 300), st.integers(1, 300))
def test_a_slice_is_as_large_as_the_limit_allows(numbers, limit, rows, cols):
    height, width = slice_samples(numbers, limit, rows, cols)
    assert height == rows or (height + 1) * width * numbers > limit
    assert width == cols or (height == 1 and (width + 1) * numbers > limit)


@given(shapes, outputs)
def test_intermediates_are_no_smaller_than_what_the_formulas_name(shape, m):
    t, c = shape.positions, shape.channels
    assert intermediate_numbers(shape, m, "explicit") == m * shape.num_params  # J
    assert intermediate_numbers(shape, m, "gram") >= t * t + m * m * t * t  # A and G
    assert intermediate_numbers(shape, m, "ordered") >= t * t + m * t * c  # A and H
