"""Plans are integers: they fit the budget, survive JSON, and count what the engine then computes."""

import dataclasses
import json
import re

import pytest
from cases import CASES, CPU, make_job
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids

from ntkgen.errors import BudgetError
from ntkgen.jacobian import factors
from ntkgen.jacobian.cost import LayerShape, NetworkProfile, factor_macs, plan_jacobian
from ntkgen.jacobian.factors import FactorCache
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.kernel import engine
from ntkgen.kernel.plan import BATCH_SIZE, WORKSPACE_NUMBERS, Budget, Environment, Plan, count_factor_samples, make_plan
from ntkgen.kernel.tiles import TileGrid, make_grid

HERE = Environment("cpu", "x86_64 AVX512", "2.15.0", threads=2)
# A network of the size of a ResNet: what it needs is counted in gigabytes.
LAYERS = (
    LayerShape("stem", positions=1024, inputs=27, channels=64),
    LayerShape("middle", positions=256, inputs=1152, channels=128),
    LayerShape("late", positions=16, inputs=4608, channels=512),
    LayerShape("head", positions=1, inputs=512, channels=10),
)
LARGE = NetworkProfile(
    10, 2_519_616, LAYERS, dense_params=2000, fallback=(), activation_numbers=10**6, input_numbers=3072
)
GRID = TileGrid(num_samples=1000, num_outputs=10, tile_samples=125)


def planned(planned_bytes, *, grid=GRID, profile=LARGE, precision="float32", available=None, device="cpu"):
    budget = Budget(planned_bytes, planned_bytes if available is None else available)
    place = dataclasses.replace(HERE, device_type=device)
    return make_plan(profile, grid, precision=precision, budget=budget, environment=place)


@pytest.mark.parametrize("name", ["mlp", "conv_groups", "transformer", "only_bare_parameters"])
@pytest.mark.parametrize("orders", ["cheapest", "gram"])
def test_a_plan_survives_json(name, orders):
    case = CASES[name]()
    profile = prepare(case.module, case.x, policy("float64")).profile
    forced = ["gram"] * len(profile.layers) if orders == "gram" else ()
    plan = make_plan(
        profile,
        TileGrid(50, profile.num_outputs, 7),
        precision="float64",
        budget=Budget(1 << 30, 1 << 30),
        environment=HERE,
        orders=forced,
    )
    read = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan
    assert hash(read) == hash(plan)  # tuples all the way down, no lists
    assert read.jacobian.pair_macs == plan.jacobian.pair_macs


# the budget -----------------------------------------------------------------------------------------------------------

budgets = st.integers(10**8, 10**11)


@given(budgets, st.sampled_from(["float32", "float64"]), st.sampled_from(["cpu", "cuda", "mps"]))
def test_what_is_projected_fits_the_budget(planned_bytes, precision, device):
    try:
        plan = planned(planned_bytes, precision=precision, device=device)
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
    workspace = min(WORKSPACE_NUMBERS["cpu"], planned_bytes // 64)
    parts = [1, 2, 3, *sorted(base << shift for shift in range(1, 8) for base in (2, 3))]
    blocks = list(dict.fromkeys(-(-GRID.tile_samples // count) for count in parts))
    candidates = []
    for block in blocks:
        batch = min(BATCH_SIZE["cpu"], block)
        while batch:
            jacobian = plan_jacobian(LARGE, block_samples=block, batch_size=batch, workspace_numbers=workspace)
            candidates.append(Plan(GRID, "float32", block, jacobian, LARGE, HERE))
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
    needed, allowed = re.match(r"One tile needs (\S+ \w+) of memory and (\S+ \w+) are allowed", message).groups()
    return [float(number) * units[unit] for number, unit in (amount.split() for amount in (needed, allowed))]


def test_no_plan_is_made_where_one_sample_at_a_time_does_not_fit():
    with pytest.raises(BudgetError) as raised:
        planned(10_000_000)
    needed, allowed = bytes_in(str(raised.value))
    assert needed > allowed == 10_000_000
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, MemoryError)


def test_no_run_starts_where_too_little_is_free_at_the_moment():
    plan = planned(10**10)
    with pytest.raises(BudgetError, match="--memory") as raised:
        plan.cached_blocks(Budget(10**10, plan.minimum_bytes - 1))
    assert "\n" not in str(raised.value)
    assert bytes_in(str(raised.value)) == pytest.approx([plan.minimum_bytes] * 2, rel=0.05)
    assert plan.cached_blocks(Budget(10**10, plan.minimum_bytes)) == 2


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_a_kernel_of_one_block_has_a_cache_that_the_engine_takes(num_samples):
    job = make_job(num_samples, side=9)
    cached = job.plan.cached_blocks(Budget(1 << 30, 1 << 30))
    cache = FactorCache(job.network, job.plan.jacobian, job.x, cached)
    assert len(cache(job.plan.blocks(0)[0])) == num_samples


def test_a_requested_budget_is_taken_as_it_is_and_another_does_not_change_between_runs():
    assert Budget.of(123, total_bytes=1000, free_bytes=10) == Budget(123, 123)
    first, second = (Budget.of(None, total_bytes=1000, free_bytes=free) for free in (900, 100))
    assert first.planned_bytes == second.planned_bytes <= 1000
    assert (first.available_bytes, second.available_bytes) < (900, 100)


# counting -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """The number of samples in every block of factors that is computed."""
    samples = []

    def compute_factors(network, plan, x):
        samples.append(len(x))
        return original(network, plan, x)

    original = factors.compute_factors
    monkeypatch.setattr(factors, "compute_factors", compute_factors)
    return samples


@pytest.mark.parametrize("block_samples", [1, 2, 3])
@pytest.mark.parametrize("capacity", [2, 3, 5, 14])
def test_as_many_factors_are_computed_as_counted(block_samples, capacity, computed):
    job = make_job(block_samples=block_samples)
    cache = FactorCache(job.network, job.plan.jacobian, job.x, capacity)
    tiles = list(job.plan.grid.tiles())
    with exact_arithmetic(CPU):
        for tile in tiles:
            engine.compute_tile(job.plan, tile, cache)
    assert sum(computed) == count_factor_samples(job.plan, tiles, capacity)


@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_a_whole_run_computes_as_many_factors_as_counted(capacity, computed, tmp_path):
    job = make_job()
    job.run(job.create(tmp_path / "k.zarr"), cached_blocks=capacity)
    blocks = range(job.plan.grid.num_blocks)
    assert sum(computed) == count_factor_samples(job.plan, job.plan.grid.tiles(), capacity, blocks)


@pytest.mark.parametrize("done", [0, 1, 7, 14])
def test_a_resumed_run_computes_as_many_factors_as_counted(done, computed, tmp_path):
    job = make_job()
    store = job.create(tmp_path / "k.zarr")
    with pytest.raises(InterruptedError):
        job.run(store, report=stop_before("tiles", done))
    missing = store.missing_tiles()
    assert len(missing) == 15 - done
    computed.clear()
    job.run(store)
    assert sum(computed) == count_factor_samples(job.plan, missing, 2)


def stop_before(stage, count):
    """A report that stops the run before so many are done."""

    def report(what, done, _total):
        if (what, done) == (stage, count):
            raise InterruptedError

    return report


@given(grids, st.integers(1, 12), st.integers(2, 40))
def test_every_sample_is_computed_once_where_all_blocks_fit_and_never_less(grid, block, capacity):
    plan = dataclasses.replace(planned(10**10, grid=grid), block_samples=block)
    tiles = list(grid.tiles())
    counted = count_factor_samples(plan, tiles, capacity)
    assert counted >= grid.num_samples
    assert count_factor_samples(plan, tiles, 10**6) == grid.num_samples
    assert count_factor_samples(plan, tiles, capacity + 1) <= counted


@given(grids, st.integers(1, 12))
def test_flops_are_two_for_every_multiply_add_of_every_pair_and_sample(grid, block):
    plan = dataclasses.replace(planned(10**10, grid=grid), block_samples=block)
    pairs = sum(
        (i // grid.tile_samples, i % grid.tile_samples // block)
        <= (j // grid.tile_samples, j % grid.tile_samples // block)
        for i in range(grid.num_samples)
        for j in range(grid.num_samples)
    )
    factors_of_all = grid.num_samples * factor_macs(LARGE, plan.jacobian)
    expected = 2 * (factors_of_all + pairs * plan.jacobian.pair_macs)
    assert plan.projected_flops(list(grid.tiles()), 10**6) == expected


# the environment ------------------------------------------------------------------------------------------------------


def test_environments_name_what_differs_with_both_values():
    there = HERE
    assert there.differences(HERE) == []
    here = dataclasses.replace(HERE, device_name="aarch64 NEON", threads=8)
    assert there.differences(here) == ["device name x86_64 AVX512 there, aarch64 NEON here", "threads 2 there, 8 here"]


def test_a_depthwise_layer_whose_rows_are_kept_needs_no_gram_matrices():
    """Its Gram matrices, one per channel, would be larger than everything else together."""
    depthwise = LayerShape("depthwise", positions=1024, inputs=9, channels=1, groups=96)
    profile = NetworkProfile(10, depthwise.num_params, (depthwise,), 0, (), 1000, 3072)
    here = Environment("cpu", "x", "2.15", 2)
    plan = make_plan(profile, make_grid(16, 10), precision="float32", budget=Budget(10**10, 10**10), environment=here)
    assert plan.jacobian.layers[0].keeps_rows
    assert plan.minimum_bytes < 8 * depthwise.groups * depthwise.positions**2
