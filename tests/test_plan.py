"""Plans are integers: they fit the budget, survive JSON, and count what the engine then computes."""

import dataclasses
import json
import re

import pytest
from cases import CASES, CPU, chosen, cut, in_turn, make_job
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, rates, rectangles

from ntkgen.engine import run as running
from ntkgen.errors import BudgetError
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.cost import ORDERS, SIZES, LayerShape, NetworkProfile, factor_macs, product_macs, sizes_for
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import POLICIES, exact_arithmetic, policy
from ntkgen.plan.order import bands_of, count_factor_samples, projected_flops
from ntkgen.plan.plan import Budget, Choices, Environment, Plan, make_plan
from ntkgen.plan.tiles import Tile, TileGrid, make_grid

HERE = Environment("cpu", "x86_64 AVX512", "2.15.0", threads=2)
# A network of the size of a ResNet: what it needs is counted in gigabytes.
LAYERS = (
    LayerShape("stem", positions=1024, inputs=27, channels=64),
    LayerShape("middle", positions=256, inputs=1152, channels=128, taps=9, pixels=256),
    LayerShape("late", positions=16, inputs=4608, channels=512),
    LayerShape("head", positions=1, inputs=512, channels=10),
)
LARGE = NetworkProfile(
    10, 2_519_616, LAYERS, dense_params=2000, fallback=(), activation_numbers=10**6, input_numbers=3072, num_logits=10
)
FLOAT32 = Choices()
GRID = TileGrid(num_samples=1000, num_outputs=10, tile_samples=125)


def planned(planned_bytes, *, grid=GRID, profile=LARGE, choices=FLOAT32, available=None, device="cpu"):
    budget = Budget(planned_bytes, planned_bytes if available is None else available)
    return make_plan(profile, grid, choices, budget=budget, environment=dataclasses.replace(HERE, device_type=device))


def read_back(plan):
    return Plan.from_json(json.loads(json.dumps(plan.to_json())))


@in_turn(
    "precision name order", POLICIES, ["mlp", "conv_groups", "transformer", "only_bare_parameters"], [None, *ORDERS]
)
def test_a_plan_survives_json(name, order, precision):
    case = CASES[name]()
    profile = prepare(case.module, case.x, policy("float64")).profile
    orders = (order,) * len(profile.layers) if order else ()
    plan = planned(
        1 << 30, grid=TileGrid(50, profile.num_outputs, 7), profile=profile, choices=Choices(precision, orders=orders)
    )
    read = read_back(plan)
    assert read == plan
    assert hash(read) == hash(plan)  # tuples all the way down, no lists
    assert read.jacobian.pair_macs == plan.jacobian.pair_macs
    assert (read.minimum_bytes, read.precision) == (plan.minimum_bytes, precision)


@given(rates, grids | rectangles, st.sampled_from(["none", "trace", "diagonal"]))
def test_a_plan_of_any_rates_grid_and_reduction_survives_json(speed, grid, reduction):
    plan = planned(10**10, grid=grid, choices=Choices(rates=speed, reduction=reduction))
    assert read_back(plan) == plan
    assert plan.jacobian.rates == speed
    assert plan.jacobian.reduction == reduction


# the budget -----------------------------------------------------------------------------------------------------------

budgets = st.integers(10**8, 10**11)


@given(budgets, st.sampled_from(list(POLICIES)), st.sampled_from(["cpu", "cuda", "mps"]), rates)
def test_what_is_projected_fits_the_budget(planned_bytes, precision, device, speed):
    try:
        plan = planned(planned_bytes, choices=Choices(precision, speed), device=device)
    except BudgetError:
        return
    assert plan.minimum_bytes <= planned_bytes
    cached = plan.cached_blocks(Budget(planned_bytes, planned_bytes))
    assert plan.projected_bytes(cached) <= planned_bytes
    num_blocks = sum(len(plan.blocks(index)) for index in range(GRID.num_blocks))
    assert cached == num_blocks or plan.projected_bytes(cached + 1) > planned_bytes


@given(budgets)
def test_the_blocks_and_then_the_batches_are_the_largest_that_fit(planned_bytes):
    """A plan is refused, or is the first that fits of all parts of a tile and all halvings of a batch."""
    parts = [1, 2, 3, *sorted(base << shift for shift in range(1, 8) for base in (2, 3))]
    blocks = list(dict.fromkeys(-(-GRID.tile_samples // count) for count in parts))
    candidates = []
    for block in blocks:
        batch = min(SIZES["cpu"].batch_size, block)
        while batch:
            sizes = sizes_for("cpu", block, batch, planned_bytes // 64)
            candidates.append(Plan(GRID, plan_jacobian(LARGE, sizes, precision="float32"), LARGE, HERE))
            batch //= 2
    fitting = [plan for plan in candidates if plan.minimum_bytes <= planned_bytes]
    if fitting:
        assert planned(planned_bytes) == fitting[0]
    else:
        with pytest.raises(BudgetError):
            planned(planned_bytes)


def test_a_plan_does_not_depend_on_what_is_free_at_the_moment():
    assert planned(10**9, available=10**7) == planned(10**9, available=10**12)


def bytes_in(message):
    """The two amounts that a message of a budget begins with: needed, allowed."""
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    needed, allowed = re.search(r"(?:needs|takes) (\S+ \w+) of memory and (\S+ \w+) are allowed", message).groups()
    return [float(number) * units[unit] for number, unit in (amount.split() for amount in (needed, allowed))]


def test_no_plan_is_made_where_one_sample_at_a_time_does_not_fit():
    with pytest.raises(BudgetError) as raised:
        planned(10_000_000)
    needed, allowed = bytes_in(str(raised.value))
    assert needed > allowed == 10_000_000
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, MemoryError)


def test_a_network_that_cannot_be_made_ready_is_refused_for_that():
    """As small as blocks may be: a copy in float64 is made whatever the plan."""
    plan = planned(10**10)
    assert plan.projected_bytes(0) >= plan.preparing_bytes > 8 * LARGE.num_params
    with pytest.raises(BudgetError, match="Making the network ready"):
        plan.cached_blocks(Budget(10**10, plan.preparing_bytes - 1))


def test_no_run_starts_where_too_little_is_free_at_the_moment():
    plan = planned(10**10)
    with pytest.raises(BudgetError, match="`memory_bytes`") as raised:
        plan.cached_blocks(Budget(10**10, plan.minimum_bytes - 1))
    assert "\n" not in str(raised.value)
    assert bytes_in(str(raised.value)) == pytest.approx([plan.minimum_bytes] * 2, rel=0.05)
    assert plan.cached_blocks(Budget(10**10, plan.minimum_bytes)) == 2


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_a_kernel_of_one_block_has_a_cache_that_the_engine_takes(num_samples):
    job = make_job(num_samples, side=9)
    cached = job.plan.cached_blocks(Budget(1 << 30, 1 << 30))
    cache = cache_of(job, cached)
    assert len(cache(job.plan.blocks(0)[0])) == num_samples


def test_a_requested_budget_is_taken_as_it_is_and_another_does_not_change_between_runs():
    assert Budget.of(123, total_bytes=1000, free_bytes=10) == Budget(123, 123)
    first, second = (Budget.of(None, total_bytes=1000, free_bytes=free) for free in (900, 100))
    assert first.planned_bytes == second.planned_bytes <= 1000
    assert (first.available_bytes, second.available_bytes) < (900, 100)


# bands ----------------------------------------------------------------------------------------------------------------


def cache_of(job, capacity):
    """The cache that the engine makes for a run."""
    return BlockCache(
        lambda b: running.compute_factors(job.network, job.plan.jacobian, job.x[b.start : b.stop]), capacity
    )


def plan_of(grid, block):
    return cut(planned(10**10, grid=grid), block)


@st.composite
def unfinished(draw):
    """A plan, its missing tiles, and the maximum number of blocks in memory."""
    plan = plan_of(draw(grids | rectangles), draw(st.integers(1, 12)))
    tiles = list(plan.grid.tiles())
    done = draw(st.sets(st.sampled_from(tiles))) if draw(st.booleans()) else set()
    return plan, [tile for tile in tiles if tile not in done], draw(st.integers(2, 40))


@given(unfinished())
def test_bands_have_every_missing_tile_once(drawn):
    plan, missing, capacity = drawn
    found = [tile for band in bands_of(plan, missing, capacity) for tile in band.tiles]
    assert len(found) == len(missing)
    assert set(found) == set(missing)


@given(unfinished())
def test_the_rows_of_a_band_are_held_and_come_before_those_of_the_next(drawn):
    plan, missing, capacity = drawn
    last = -1
    for band in bands_of(plan, missing, capacity):
        rows = sorted({tile.row for tile in band.tiles})
        assert rows[0] > last
        last = rows[-1]
        assert list(band.held) in ([], [block for row in rows for block in plan.blocks(row)])


class Counter:
    """The value of a block. Its instances in memory are counted."""

    alive = 0
    peak = 0

    def __init__(self, _block):
        type(self).alive += 1
        type(self).peak = max(self.peak, self.alive)

    def __del__(self):
        type(self).alive -= 1


@given(unfinished())
def test_what_is_held_and_what_streams_past_are_never_more_than_fit(drawn):
    plan, missing, capacity = drawn
    Counter.alive = Counter.peak = 0
    cache = BlockCache(Counter, capacity)
    for band in bands_of(plan, missing, capacity):
        cache.hold(band.held)
        for tile in band.tiles:
            for row, column in plan.pairs(tile):
                both = cache(row), cache(column)  # as a product has them
                del both
    assert Counter.peak <= capacity


# counting -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """The number of samples in every block of factors that the engine computes."""
    samples = []

    def compute(network, plan, x):
        samples.append(len(x))
        return compute_factors(network, plan, x)

    monkeypatch.setattr(running, "compute_factors", compute)
    return samples


@in_turn("capacity block_samples", [2, 3, 5, 11], [1, 2, 3])
def test_as_many_factors_are_computed_as_counted(block_samples, capacity, computed):
    job = make_job(block_samples=block_samples)
    cache = cache_of(job, capacity)
    tiles = list(job.plan.grid.tiles())
    with exact_arithmetic(CPU):
        for band in bands_of(job.plan, tiles, capacity):
            cache.hold(band.held)
            for tile in band.tiles:
                running.compute_tile(job.plan, tile, cache)
    assert sum(computed) == count_factor_samples(job.plan, tiles, capacity)


@in_turn("capacity block_samples", chosen([2, 3, 4, 5, 8], [2, 5]), [1, 2, 3])
def test_a_whole_run_computes_as_many_factors_as_counted(block_samples, capacity, computed, tmp_path):
    job = make_job(block_samples=block_samples)
    job.run(job.create(tmp_path / "k.zarr"), cached_blocks=capacity)
    blocks = range(job.plan.grid.num_sides)[::-1]
    assert sum(computed) == count_factor_samples(job.plan, job.plan.grid.tiles(), capacity, blocks)


@in_turn("done capacity", chosen([0, 1, 5, 9], [1, 9]), [2, 4])
def test_a_resumed_run_computes_as_many_factors_as_counted(done, capacity, computed, tmp_path):
    job = make_job()
    store = job.create(tmp_path / "k.zarr")
    with pytest.raises(InterruptedError):
        job.run(store, report=stop_before("tiles", done))
    missing = store.missing_tiles()
    assert len(missing) == 10 - done
    computed.clear()
    job.run(store, capacity)
    assert sum(computed) == count_factor_samples(job.plan, missing, capacity)


def stop_before(stage, count):
    """Return a report that stops the run when ``count`` items of a stage are done."""

    def report(what, done, _total):
        if (what, done) == (stage, count):
            raise InterruptedError

    return report


@given(unfinished())
def test_every_sample_is_computed_once_where_all_blocks_fit_and_never_less(drawn):
    plan, _, capacity = drawn
    tiles = list(plan.grid.tiles())
    counted = count_factor_samples(plan, tiles, capacity)
    assert counted >= plan.num_samples
    assert count_factor_samples(plan, tiles, 10**6) == plan.num_samples


@given(unfinished())
def test_the_diagonal_leaves_what_the_first_tiles_need(drawn):
    """With the diagonal before them, the tiles of a whole kernel need no more than another pass over all blocks."""
    plan, _, capacity = drawn
    tiles, sides = list(plan.grid.tiles()), range(plan.grid.num_sides)[::-1]
    alone = count_factor_samples(plan, tiles, capacity)
    together = count_factor_samples(plan, tiles, capacity, sides)
    assert alone <= together <= alone + plan.num_samples
    assert count_factor_samples(plan, tiles, 10**6, sides) == plan.num_samples


@given(grids, st.integers(1, 12), st.integers(2, 40))
def test_more_room_saves_factors(grid, block, capacity):
    """One more block in memory never needs more factors, and neither do twice as many blocks."""
    plan, tiles = plan_of(grid, block), list(grid.tiles())
    capacities = [capacity, capacity + 1, *(capacity << shift for shift in range(1, 8))]
    counts = [count_factor_samples(plan, tiles, capacity) for capacity in capacities]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == plan.num_samples


@given(st.integers(1, 30), st.integers(1, 6), st.integers(2, 40))
def test_held_rows_leave_one_pass_over_the_columns_per_band(num_blocks, per_tile, capacity):
    """Fewer factors than without bands: not all pairs of blocks, but all columns once per band of rows that fit."""
    plan = plan_of(TileGrid(num_blocks * per_tile, 1, per_tile), 1)
    counted = count_factor_samples(plan, plan.grid.tiles(), capacity)
    height = capacity // per_tile - 1 if capacity < num_blocks * per_tile else num_blocks
    if height <= 0 and capacity > per_tile:
        height = 1
    if height > 0:
        bands = -(-num_blocks // height)
        assert counted <= bands * num_blocks * per_tile


@given(unfinished())
def test_flops_are_two_for_every_multiply_add_of_every_pair_and_sample(drawn):
    plan, missing, capacity = drawn
    factors = count_factor_samples(plan, missing, capacity) * factor_macs(LARGE, plan.jacobian)
    products = sum(
        product_macs(plan.jacobian, len(row), len(column), is_diagonal=row == column)
        for tile in missing
        for row, column in plan.pairs(tile)
    )
    assert projected_flops(plan, missing, capacity) == 2 * (factors + products)


@given(grids, st.integers(1, 12))
def test_flops_of_a_kernel_whose_panels_are_its_blocks_are_those_of_every_pair(grid, block):
    """The expected FLOPs are counted sample by sample: each pair of blocks once, and rows built for each product."""
    plan = plan_of(grid, block)
    sizes = dataclasses.replace(plan.jacobian.sizes, panel_samples=block)
    plan = dataclasses.replace(plan, jacobian=dataclasses.replace(plan.jacobian, sizes=sizes))
    pairs = built = 0
    blocks = [piece for index in range(grid.num_blocks) for piece in plan.blocks(index)]
    for number, row in enumerate(blocks):
        for column in blocks[number:]:
            pairs += len(row) * len(column)
            built += len(row) + (len(column) if row != column else 0)
    factors_of_all = grid.num_samples * factor_macs(LARGE, plan.jacobian)
    expected = 2 * (factors_of_all + pairs * plan.jacobian.pair_macs + built * plan.jacobian.built_macs)
    assert projected_flops(plan, list(grid.tiles()), 10**6) == expected


@given(rectangles, st.integers(1, 12))
def test_the_columns_of_a_rectangle_are_numbered_after_its_rows(grid, block):
    plan = plan_of(grid, block)
    sides = [piece for index in range(plan.grid.num_sides) for piece in plan.side_blocks(index)]
    assert [sample for piece in sides for sample in range(piece.start, piece.stop)] == list(range(plan.num_samples))
    for side, pieces in ((grid.side_block(index), plan.side_blocks(index)) for index in range(grid.num_sides)):
        first = side.axis * grid.num_samples
        assert (pieces[0].start, pieces[-1].stop) == (first + side.block.start, first + side.block.stop)
    assert plan.num_samples == grid.num_samples + grid.num_col_samples
    tile = Tile(grid.num_blocks - 1, grid.num_col_blocks - 1)
    for row, column in plan.pairs(tile):
        assert row.stop <= grid.num_samples <= column.start


# the environment ------------------------------------------------------------------------------------------------------


def test_environments_name_what_differs_with_both_values():
    there = HERE
    assert there.differences(HERE) == []
    here = dataclasses.replace(HERE, device_name="aarch64 NEON", threads=8)
    assert there.differences(here) == ["device name x86_64 AVX512 there, aarch64 NEON here", "threads 2 there, 8 here"]


def test_a_depthwise_layer_whose_rows_are_kept_needs_no_gram_matrices():
    """Its Gram matrices, one per channel, would be larger than everything else together."""
    depthwise = LayerShape("depthwise", positions=1024, inputs=9, channels=1, groups=96)
    profile = NetworkProfile(10, depthwise.num_params, (depthwise,), 0, (), 1000, 3072, num_logits=10)
    plan = planned(10**10, grid=make_grid(16, 10), profile=profile)
    assert plan.jacobian.layers[0].keeps_rows
    assert plan.minimum_bytes < 8 * depthwise.groups * depthwise.positions**2
