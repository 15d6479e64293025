"""Costs as integers: the quickest order is chosen, sums add up, pieces fit, and nothing does less than the minimum."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import ROOMS, layer_shapes, pieces, pieces_of, rates

from ntkgen.blocks import Block, block_pairs
from ntkgen.errors import InputError
from ntkgen.jacobian.choice import choose_layer, minimal_macs, plan_jacobian
from ntkgen.jacobian.cost import (
    ORDERS,
    PRECISION_BYTES,
    SIZES,
    LayerPlan,
    LayerShape,
    NetworkProfile,
    Rates,
    building_macs,
    factor_macs,
    factor_numbers,
    ordered_pieces,
    pair_macs,
    product_macs,
    sizes_for,
    slices,
)
from ntkgen.jacobian.precision import POLICIES

shapes = layer_shapes(2000)
outputs = st.integers(1, 1000)
blocks = st.integers(1, 4096)
reductions = st.sampled_from(["none", "trace", "diagonal"])
ROOM = pieces_of(block=8, batch=4, panel=3, numbers=99)


def profile_of(*layers: LayerShape, num_outputs: int = 10, dense_params: int = 7) -> NetworkProfile:
    num_params = dense_params + sum(layer.num_params for layer in layers)
    return NetworkProfile(num_outputs, num_params, layers, dense_params, (), 1, 1, num_logits=num_outputs)


# the choice -----------------------------------------------------------------------------------------------------------


def input_gram(shape: LayerShape, pixels: bool) -> int:
    """Multiply-adds of A for a pair of samples, written once more: T² k, or P² k / w."""
    side = shape.pixels if pixels else shape.positions
    return shape.groups * side**2 * shape.inputs // (shape.taps if pixels else 1)


def nanoseconds(shape: LayerShape, m: int, block: int, speed: Rates, reduction: str, way: tuple[str, bool]) -> float:
    """The time of a pair of samples, written once more: work by work, each at the speed of its kind."""
    t, k, c, q = shape.positions, shape.inputs, shape.channels, shape.groups
    order, pixels = way
    products = m * m if reduction == "none" else m
    calls = 100 * q / block**2 if q > 1 else 0  # each group is multiplied for itself, unless rows are kept
    if order == "explicit":  # both sides build their rows once per block, unless those are kept
        built = 0.0 if may_keep_rows(shape, m) else 2 * m * q * t * c * k / block / speed.building + calls
        return 1000 * (products * q * c * k / speed.product + built)
    time = input_gram(shape, pixels) / speed.product + q * t * t * (5 if pixels else 1) / speed.touching
    if order == "gram":
        outer = t * t * (1 if reduction == "trace" else products)
        time += q * products * t * t * c / speed.product + 3 * q * outer / speed.touching
    else:
        time += q * m * t * t * c / speed.carrying + q * m * t * c / speed.touching
        time += q * m * m * t * c / speed.finishing
    return 1000 * (time + calls)


def may_keep_rows(shape: LayerShape, m: int) -> bool:
    """Whether the rows are no larger than the factors, or, with several groups, no more than 16 times as large."""
    factors = shape.groups * shape.positions * (shape.inputs + m * shape.channels)
    return m * shape.num_params <= (factors if shape.groups == 1 else 16 * factors)


def ways(shape: LayerShape, reduction: str) -> list[tuple[str, bool]]:
    """Every order, with the inputs as they are or, of windows, as pixels."""
    orders = [order for order in ORDERS if order != "ordered" or reduction == "none"]
    with_pixels = [(order, True) for order in orders if order != "explicit" and shape.taps > 1]
    return [(order, False) for order in orders] + with_pixels


@given(shapes, outputs, blocks, rates, reductions)
def test_the_chosen_order_is_the_quickest_of_all(shape, m, block, speed, reduction):
    plan = choose_layer(shape, m, block, speed, reduction)
    assert plan.shape == shape
    times = {way: nanoseconds(shape, m, block, speed, reduction, way) for way in ways(shape, reduction)}
    assert times[plan.order, plan.uses_pixels] <= min(times.values()) + 12  # every term is rounded to a nanosecond


@given(shapes, outputs, blocks, rates, reductions)
def test_rows_are_kept_only_where_they_are_no_larger_than_the_factors(shape, m, block, speed, reduction):
    plan = choose_layer(shape, m, block, speed, reduction)
    assert plan.keeps_rows == (plan.order == "explicit" and may_keep_rows(shape, m))


@pytest.mark.parametrize(
    ("shape", "order", "uses_pixels"),
    [
        (LayerShape("stem", positions=1024, inputs=27, channels=64, taps=9, pixels=1024), "explicit", False),
        (LayerShape("late", positions=16, inputs=4608, channels=512, taps=9, pixels=16), "ordered", True),
        (LayerShape("strided", positions=16, inputs=4608, channels=512), "ordered", False),
        (LayerShape("dense", positions=1, inputs=512, channels=256), "gram", False),
    ],
)
def test_every_order_is_the_best_one_somewhere(shape, order, uses_pixels):
    plan = choose_layer(shape, 10, 64)
    assert (plan.order, plan.uses_pixels) == (order, uses_pixels)


@given(st.lists(shapes, max_size=4), outputs, st.integers(0, 1000), rates, reductions)
def test_the_plan_of_a_network_is_the_sum_of_its_layers(layers, m, dense, speed, reduction):
    profile = profile_of(*layers, num_outputs=m, dense_params=dense)
    plan = plan_jacobian(profile, ROOM, precision="float64-accumulate", rates=speed, reduction=reduction)
    products = m * m if reduction == "none" else m
    assert plan.pair_macs == products * dense + sum(pair_macs(p, m, reduction) for p in plan.layers)
    kept = sum(p.shape.num_params for p in plan.layers if p.keeps_rows)
    pairs = sum(factor_numbers(p, m) for p in plan.layers if not p.keeps_rows)
    assert plan.row_numbers == m * (dense + kept)
    assert plan.factor_numbers == m + m * (dense + kept) + pairs
    assert plan.factor_bytes == 4 * plan.factor_numbers
    assert list(plan.layers) == [choose_layer(shape, m, ROOM.block_samples, speed, reduction) for shape in layers]
    assert (plan.num_outputs, plan.batch_size, plan.sizes, plan.rates) == (m, 4, ROOM, speed)


@given(shapes, outputs, st.sampled_from(ORDERS), reductions, st.booleans())
def test_a_pair_costs_what_the_formulas_say(shape, m, order, reduction, pixels):
    assume((order, pixels) in ways(shape, reduction))
    t, k, c, q = shape.positions, shape.inputs, shape.channels, shape.groups
    products = m * m if reduction == "none" else m
    entries = 1 if reduction == "trace" else products
    expected = {
        "explicit": q * products * c * k,
        "gram": input_gram(shape, pixels) + q * (products * t * t * c + entries * t * t),
        "ordered": input_gram(shape, pixels) + q * (m * t * t * c + m * m * t * c),
    }
    assert pair_macs(LayerPlan(shape, order, keeps_rows=False, uses_pixels=pixels), m, reduction) == expected[order]


@given(st.lists(shapes, max_size=4), outputs, rates)
def test_factors_cost_a_pass_forward_one_back_per_output_and_the_rows_that_are_kept(layers, m, speed):
    profile = profile_of(*layers, num_outputs=m)
    plan = plan_jacobian(profile, ROOM, precision="float32", rates=speed)
    passes = 0
    for shape in layers:
        one_pass = shape.positions * shape.groups * shape.channels * shape.inputs
        passes += one_pass * (1 + m if shape.passes_back else 1)
    kept = sum(building_macs(p.shape, m) for p in plan.layers if p.keeps_rows)
    assert factor_macs(profile, plan) == passes + kept
    built = [p.shape for p in plan.layers if p.order == "explicit" and not p.keeps_rows]
    assert plan.built_macs == sum(building_macs(shape, m) for shape in built)


def test_every_policy_has_its_bytes_counted():
    assert set(PRECISION_BYTES) == set(POLICIES)
    for name, policy in POLICIES.items():
        assert PRECISION_BYTES[name] == (policy.factor_dtype.itemsize, policy.accumulate_dtype.itemsize)


# forced orders --------------------------------------------------------------------------------------------------------

LAYERS = (
    LayerShape("stem", 1024, 27, 64, taps=9, pixels=1156),
    LayerShape("late", 16, 4608, 512, taps=9, pixels=64),
    LayerShape("dense", 1, 512, 256),
)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_can_be_forced(order):
    profile = profile_of(*LAYERS)
    free = plan_jacobian(profile, ROOM, precision="float32")
    forced = plan_jacobian(profile, ROOM, precision="float32", orders=[order] * 3)
    assert {plan.order for plan in forced.layers} == {order}
    for chosen, plan in zip(free.layers, forced.layers, strict=True):
        assert plan == chosen if chosen.order == order else not plan.keeps_rows


@pytest.mark.parametrize("order", ["gram", "ordered"])
def test_a_forced_order_takes_the_inputs_as_pixels_where_that_is_less_work(order):
    less = LayerShape("late", 16, 4608, 512, taps=9, pixels=16)
    more = dataclasses.replace(less, pixels=100)  # 100² / 9 > 16²
    plans = [plan_jacobian(profile_of(s), ROOM, precision="float32", orders=[order]).layers[0] for s in (less, more)]
    assert [plan.uses_pixels for plan in plans] == [True, False]


@pytest.mark.parametrize("reduction", ["trace", "diagonal"])
def test_the_order_of_whole_blocks_cannot_be_forced_on_reduced_ones(reduction):
    profile = profile_of(*LAYERS)
    with pytest.raises(InputError, match=f"'ordered' cannot be forced .*{reduction}.*explicit or gram") as raised:
        plan_jacobian(profile, ROOM, precision="float32", reduction=reduction, orders=["gram", "ordered", "gram"])
    assert "\n" not in str(raised.value)
    for order in ("explicit", "gram"):
        plan = plan_jacobian(profile, ROOM, precision="float32", reduction=reduction, orders=[order] * 3)
        assert {layer.order for layer in plan.layers} == {order}


def test_as_many_orders_are_expected_as_there_are_layers():
    with pytest.raises(InputError, match=r"^2 orders were given for 3 layers .*stem, late, dense") as raised:
        plan_jacobian(profile_of(*LAYERS), ROOM, precision="float32", orders=["gram"] * 2)
    assert "\n" not in str(raised.value)


# products of blocks ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_panels_cover_a_product_once_and_on_the_diagonal_the_upper_triangle(rows, cols, panel, is_diagonal):
    cols = rows if is_diagonal else cols
    plan = plan_jacobian(profile_of(), dataclasses.replace(ROOM, panel_samples=panel), precision="float32")
    covered = {(i, j): 0 for i in range(rows) for j in range(cols)}
    for above, beside in plan.panels(rows, cols, is_diagonal=is_diagonal):
        assert len(above) <= panel
        for i in range(above.start, above.stop):
            for j in range(beside.start, beside.stop):
                covered[i, j] += 1
    assert max(covered.values()) == 1
    assert all(count for (i, j), count in covered.items() if not is_diagonal or i <= j)
    assert sum(covered.values()) == plan.computed_pairs(rows, cols, is_diagonal=is_diagonal)
    if is_diagonal:  # no more than the panels stick out of the triangle
        assert sum(covered.values()) <= rows * (rows + 1) // 2 + rows * (panel - 1) // 2


small = layer_shapes(12, groups=3)


@given(st.lists(small, max_size=3), st.integers(1, 4), pieces(9, 400), rates, st.integers(1, 20), st.data())
def test_no_plan_does_less_than_the_minimum(layers, m, sizes, speed, num_samples, data):
    profile = profile_of(*layers, num_outputs=m)
    orders = data.draw(st.just(()) | st.tuples(*(st.sampled_from(ORDERS) for _ in layers)))
    plan = plan_jacobian(profile, sizes, precision="float32", rates=speed, orders=orders)
    cut = Block(0, num_samples).pieces(sizes.block_samples)
    products = sum(product_macs(plan, len(i), len(j), is_diagonal=i == j) for i, j in block_pairs(cut, cut))
    assert minimal_macs(profile, num_samples) <= num_samples * factor_macs(profile, plan) + products


def test_the_minimum_is_reached_where_the_panels_are_single_samples():
    """One block, each layer in its order of fewest multiply-adds: nothing is left to save."""
    layers = [LayerShape("late", 16, 4608, 512, taps=9, pixels=16), LayerShape("dense", 1, 512, 256)]
    profile = profile_of(*layers)
    plan = plan_jacobian(profile, pieces_of(50, 50, 1, 10**6), precision="float32", orders=["ordered", "gram"])
    macs = 50 * factor_macs(profile, plan) + product_macs(plan, 50, 50, is_diagonal=True)
    assert minimal_macs(profile, 50) == macs


# pieces ---------------------------------------------------------------------------------------------------------------


@given(shapes, outputs, st.integers(1, 600), st.integers(1, 10**8), st.integers(1, 10**8))
def test_pieces_of_the_ordered_contraction_fit_wherever_single_ones_do_and_are_the_largest(
    shape, m, panel, workspace, carried
):
    sizes = dataclasses.replace(pieces_of(panel, 1, panel, workspace), carried_numbers=carried)
    layer = LayerPlan(shape, "ordered", keeps_rows=False, uses_pixels=shape.taps > 1)
    plan = dataclasses.replace(plan_jacobian(profile_of(num_outputs=m), sizes, precision="float32"), layers=(layer,))
    height, width, at_once = ordered_pieces(plan, layer)
    one, gram = shape.positions * shape.channels, max(shape.positions, shape.pixels) ** 2
    assert (1 <= height <= panel, 1 <= width <= panel, 1 <= at_once <= m) == (True, True, True)
    assert height * at_once * one <= carried or (height, at_once) == (1, 1)
    assert height * width * gram <= workspace or width == 1
    # the heads of more samples are worth more than more outputs of one
    assert height == panel or (height + 1) * m * one > carried
    assert at_once == m or (height == 1 and (at_once + 1) * one > carried)
    assert width == panel or height * (width + 1) * gram > workspace


@given(st.integers(0, 50), st.integers(0, 60))
def test_slices_follow_one_another(length, step):
    found = list(slices(length, step))
    assert [index for part in found for index in range(length)[part]] == list(range(length))
    assert all(0 < part.stop - part.start <= max(1, step) for part in found)


@given(st.sampled_from([*SIZES, "xpu"]), st.integers(1, 5000), st.integers(1, 500), st.none() | st.integers(1, 10**9))
def test_the_work_on_a_block_is_cut_no_wider_than_the_block_and_the_room(device, block, batch, room):
    sizes, usual = sizes_for(device, block, batch, room), SIZES.get(device, SIZES["cpu"])
    assert sizes.block_samples == block
    assert sizes.batch_size == min(block, batch)
    assert sizes.panel_samples == min(block, usual.panel_samples)
    for name in ROOMS:
        assert getattr(sizes, name) == min(getattr(usual, name), room or getattr(usual, name))
