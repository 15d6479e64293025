"""Running a plan: the same bytes whatever the cache and the order, the process left as it was, refusals."""

import dataclasses
import errno
import random
import threading

import numpy as np
import pytest
import torch
from cases import CASES, CPU, TOLERANCES, Job, chosen, cut, files_of, in_turn, make_job, relative_error
from torch import nn

from ntkgen.engine import run as running
from ntkgen.engine.machine import check_environment, choose_device, environment, memory_budget
from ntkgen.errors import DivergedError, InputError, PlanError
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.plan.plan import Budget, Choices, make_plan
from ntkgen.plan.tiles import Tile, make_grid
from ntkgen.store.manifest import Manifest
from ntkgen.store.opening import create_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore


@pytest.fixture(scope="module")
def double():
    """The same kernel in float64."""
    return make_job(precision="float64")


def test_the_exact_diagonal_is_the_references(double, tmp_path):
    store = double.run(double.create(tmp_path / "k.zarr", ("float64",)))
    diagonal = store.read("diagonal")
    assert diagonal.dtype == np.float64
    np.testing.assert_allclose(diagonal, np.diag(double.reference), rtol=1e-12)
    np.testing.assert_allclose(np.diag(store.array[:]), diagonal, rtol=1e-12)


def test_logits_are_the_outputs_in_evaluation_mode(double, tmp_path):
    store = double.run(double.create(tmp_path / "k.zarr", ("float64",)))
    expected = double.network.module(double.x.double()).detach().numpy()
    np.testing.assert_allclose(store.read("logits"), expected, rtol=1e-13, atol=1e-13)
    plain = double.module.eval()(double.x).detach().numpy()
    np.testing.assert_allclose(store.read("logits"), plain, rtol=1e-5, atol=1e-5)


def plan_a_case(name: str, num_samples: int = 5, tile_samples: int = 2) -> Job:
    """Plan the kernel of one of the networks."""
    case = CASES[name]()
    x = case.x[torch.arange(num_samples) % len(case.x)]
    network = prepare(case.module, x, policy("float32"))
    m = network.profile.num_outputs
    grid, budget = make_grid(num_samples, m, tile_samples * m), Budget(1 << 30, 1 << 30)
    plan = make_plan(network.profile, grid, Choices(), budget=budget, environment=environment(CPU, 1))
    return Job(case.module, x, network, plan)


@pytest.mark.parametrize(
    "name", ["one_output", "many_outputs", "residual_in_place", "reused_at_two_sizes", "embedding", "transformer"]
)
def test_the_store_of_any_network_is_the_reference(name, tmp_path):
    job = plan_a_case(name)
    store = job.run(job.create(tmp_path / "k.zarr", ("float32",)))
    assert relative_error(store.array[:], job.reference) < TOLERANCES["float32"]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 6, 7])
def test_any_number_of_samples_is_a_kernel(num_samples, tmp_path):
    job = make_job(num_samples)
    cached = job.plan.cached_blocks(Budget(1 << 30, 1 << 30))
    store = job.run(job.create(tmp_path / "k.zarr"), cached)
    assert store.is_complete
    assert relative_error(store.array[:], job.reference) < TOLERANCES["float32"]


# bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_samples", chosen([1, 2, 3], [2]))
def test_bytes_do_not_depend_on_how_much_is_cached(block_samples, tmp_path):
    job = make_job(block_samples=block_samples)
    found = []
    for cached in (2, 3, 5, 14):
        job.run(job.create(tmp_path / f"{cached}.zarr"), cached)
        found.append(files_of(tmp_path / f"{cached}.zarr"))
    assert all(files == found[0] for files in found)


@pytest.mark.slow
@pytest.mark.parametrize("precision", chosen(["float64", "float64-accumulate", "bfloat16"], ["bfloat16"]))
def test_neither_do_they_in_another_precision(precision, tmp_path):
    job = make_job(precision=precision, block_samples=2)
    found = []
    for cached in (2, 4, 10):
        store = job.run(job.create(tmp_path / f"{cached}.zarr", ("float32", "float64")), cached)
        found.append(files_of(store.path))
        assert np.array_equal(store.array[:], store.array[:].T)
        assert relative_error(store.array[:], job.reference) < (2e-2 if precision == "bfloat16" else 1e-5)
    assert all(files == found[0] for files in found)


def cache_of(job, capacity):
    def compute(block):
        return compute_factors(job.network, job.plan.jacobian, job.x[block.start : block.stop])

    return BlockCache(compute, capacity)


def test_a_tile_does_not_depend_on_what_was_computed_before(job):
    tiles = list(job.plan.grid.tiles())
    with exact_arithmetic(CPU, threads=1):
        cache = cache_of(job, 3)
        in_order = {tile: running.compute_tile(job.plan, tile, cache).tobytes() for tile in tiles}
        cache = cache_of(job, 2)
        backwards = {tile: running.compute_tile(job.plan, tile, cache).tobytes() for tile in reversed(tiles)}
        alone = {tile: running.compute_tile(job.plan, tile, cache_of(job, 2)).tobytes() for tile in tiles}
    assert in_order == backwards == alone


@pytest.mark.slow
@pytest.mark.parametrize("block_samples", chosen([2, 3], [2]))
def test_a_store_whose_tiles_are_made_in_any_order_has_the_same_bytes(block_samples, tmp_path):
    """The set of tiles that exist already, and the size of the cache, do not matter."""
    job = make_job(block_samples=block_samples)
    path = tmp_path / "k.zarr"
    job.run(job.create(path))
    expected = files_of(path)
    chunks = [name for name in expected if "/c/" in name and name.startswith(("ntk_", "diagonal", "logits"))]
    generator = random.Random(0)
    for cached in (2, 3, 4, 5, 7, 10):
        for name in generator.sample(chunks, len(chunks) // 2):
            (path / name).unlink()
        job.run(open_store(path, mode="r+"), cached)
        assert files_of(path) == expected


@pytest.mark.parametrize("block_samples", chosen([1, 2], [2]))
@pytest.mark.numeric
def test_smaller_blocks_give_the_same_kernel_to_rounding(job, block_samples, tmp_path):
    whole = job.run(job.create(tmp_path / "whole.zarr")).array[:]
    pieces = dataclasses.replace(job, plan=cut(job.plan, block_samples))
    store = pieces.run(pieces.create(tmp_path / "pieces.zarr"))
    assert np.abs(store.array[:] - whole).max() <= 1e-6 * np.diag(whole).max()
    assert np.array_equal(store.array[:], store.array[:].T)


@pytest.mark.parametrize("side", chosen([3, 6, 21, 33], [6]))
@pytest.mark.numeric
def test_other_tiles_give_the_same_kernel_to_rounding(job, side, tmp_path):
    expected = job.run(job.create(tmp_path / "k.zarr")).array[:]
    other = make_job(side=side)
    store = other.run(other.create(tmp_path / "other.zarr"))
    assert np.abs(store.array[:] - expected).max() <= 1e-6 * np.diag(expected).max()


def test_every_forced_order_gives_the_same_kernel(tmp_path, double):
    for order in ("explicit", "gram", "ordered"):
        orders = [order] * len(double.network.profile.layers)
        plan = make_plan(
            double.network.profile,
            double.plan.grid,
            Choices("float64", orders=tuple(orders)),
            budget=Budget(1 << 30, 1 << 30),
            environment=double.plan.environment,
        )
        forced = dataclasses.replace(double, plan=plan)
        store = forced.run(forced.create(tmp_path / f"{order}.zarr", ("float64",)))
        assert relative_error(store.array[:], double.reference) < TOLERANCES["float64"]


# other outputs, other columns ---------------------------------------------------------------------------------------


def reduced_job(reduction, num_rows, num_columns):
    """A kernel whose blocks are reduced, and whose columns may be other samples: make_job has neither."""
    job = make_job(num_rows + (num_columns or 0), precision="float64")
    rows, planes = {"none": (3, 1), "trace": (1, 1), "diagonal": (1, 3)}[reduction]
    grid = make_grid(num_rows, rows, 3 * rows, num_col_samples=num_columns, num_planes=planes)
    choices = Choices("float64", reduction=reduction)
    plan = make_plan(
        job.network.profile, grid, choices, budget=Budget(1 << 30, 1 << 30), environment=job.plan.environment
    )
    return dataclasses.replace(job, plan=plan)


def create(job, path):
    def samples(count, against=None):
        return Samples(np.arange(count), np.zeros(count, np.int64), against)

    grid = job.plan.grid
    columns = None if grid.is_symmetric else samples(grid.num_col_samples)
    manifest = Manifest(
        {"network": "3f2a"}, Provenance(), job.plan, ("float64",), "upper" if columns is None else "full"
    )
    return create_store(path, manifest, samples(grid.num_samples, columns))


@in_turn(
    "reduction size block_samples",
    chosen(["none", "trace", "diagonal"], ["none", "diagonal"]),
    [(8, None), (8, 5), (2, 7)],
    [3, 2],
    always=[((8, 5), 3)],
)
@pytest.mark.numeric
def test_reduced_and_rectangular_kernels_are_those_of_the_reference(reduction, size, block_samples, tmp_path):
    num_rows, num_columns = size
    job = reduced_job(reduction, num_rows, num_columns)
    job = dataclasses.replace(job, plan=cut(job.plan, block_samples))
    whole = job.reference.reshape(len(job.x), 3, len(job.x), 3)
    block = whole[:num_rows, :, :num_rows] if num_columns is None else whole[:num_rows, :, num_rows:]
    expected = {
        "none": block.reshape(block.shape[0] * 3, -1)[None],
        "trace": np.einsum("iojo->ij", block)[None],
        "diagonal": np.einsum("iojo->oij", block),
    }[reduction]
    found = []
    for cached in (2, 4, 20):
        store = job.run(create(job, tmp_path / f"{cached}.zarr"), cached)
        found.append(files_of(store.path))
        outputs = range(3) if reduction == "diagonal" else [None]
        for output, plane in zip(outputs, expected, strict=True):
            assert relative_error(store.kernel(output=output)[:], plane) < TOLERANCES["float64"]
    assert all(files == found[0] for files in found)


# the writer in the background ---------------------------------------------------------------------------------------


def test_a_tile_is_written_while_the_next_is_computed(job, tmp_path, monkeypatch):
    commit, compute_tile, writing = KernelStore.commit, running.compute_tile, threading.Event()

    def slow(self, tile, values):
        assert threading.current_thread() is not threading.main_thread()
        if tile == Tile(0, 0):
            assert writing.wait(timeout=60)  # until the next one is being computed
        commit(self, tile, values)

    def computed(plan, tile, factors):
        if tile != Tile(0, 0):
            writing.set()
        return compute_tile(plan, tile, factors)

    monkeypatch.setattr(KernelStore, "commit", slow)
    monkeypatch.setattr(running, "compute_tile", computed)
    assert job.run(job.create(tmp_path / "k.zarr")).is_complete


def test_one_tile_is_written_at_a_time_and_in_the_order_of_computation(job, tmp_path, monkeypatch):
    commit, computed, written, at_once = KernelStore.commit, [], [], []

    def watched(self, tile, values):
        at_once.append(tile)
        assert len(at_once) == 1
        assert len(computed) - len(written) <= 2  # one is on its way, one is being computed or waits
        commit(self, tile, values)
        written.append(at_once.pop())

    compute_tile = running.compute_tile

    def counted(plan, tile, factors):
        computed.append(tile)
        return compute_tile(plan, tile, factors)

    monkeypatch.setattr(KernelStore, "commit", watched)
    monkeypatch.setattr(running, "compute_tile", counted)
    job.run(job.create(tmp_path / "k.zarr"))
    assert written == computed
    assert len(written) == 10


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory):
    """The files of a run that nothing stops."""
    path = tmp_path_factory.mktemp("straight") / "k.zarr"
    job.run(job.create(path))
    return files_of(path)


FAILURES = {
    "diverged": DivergedError("an entry is not finite"),
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "interrupted": KeyboardInterrupt(),
}


@in_turn("what count", chosen(FAILURES, ["disk full", "interrupted"]), [0, 5, 9, 1])
def test_an_error_of_the_writer_reaches_the_caller_and_the_store_is_continued(
    job, straight, what, count, tmp_path, monkeypatch
):
    """Of the first tile, of one among others, and of the last, after which nothing is committed any more."""
    store, commit, written = job.create(tmp_path / "k.zarr"), KernelStore.commit, []

    def failing(self, tile, values):
        if len(written) == count:
            raise FAILURES[what]
        commit(self, tile, values)
        written.append(tile)

    with monkeypatch.context() as patch:
        patch.setattr(KernelStore, "commit", failing)
        with pytest.raises(type(FAILURES[what])) as raised:
            job.run(store)
    assert raised.value is FAILURES[what]
    reopened = open_store(store.path)
    assert not reopened.is_complete
    assert len(reopened.missing_tiles()) == 10 - count
    assert not any(thread.name.startswith("ntkgen-writer") for thread in threading.enumerate())
    job.resume(store.path)
    assert files_of(store.path) == straight


@pytest.mark.slow
@in_turn("error count", [KeyboardInterrupt, MemoryError, DivergedError], [5, 0, 9, 1])
def test_what_was_computed_before_an_interruption_is_committed(job, straight, error, count, tmp_path, monkeypatch):
    """Ctrl-C comes while a tile is computed: those before it are on disk, and the store is continued."""
    store, compute_tile, computed = job.create(tmp_path / "k.zarr"), running.compute_tile, []

    def interrupted(plan, tile, factors):
        if len(computed) == count:
            raise error
        computed.append(tile)
        return compute_tile(plan, tile, factors)

    with monkeypatch.context() as patch:
        patch.setattr(running, "compute_tile", interrupted)
        with pytest.raises(error):
            job.run(store)
    reopened = open_store(store.path)
    assert set(reopened.missing_tiles()) == set(job.plan.grid.tiles()) - set(computed)
    assert not list(store.path.rglob("*.partial"))
    job.resume(store.path)
    assert files_of(store.path) == straight


def test_a_kernel_that_does_not_fit_a_store_dtype_diverges_in_the_callers_hands(tmp_path, monkeypatch):
    """An entry that is not finite is found by the writer; nothing of its tile is written."""
    job, compute_tile = make_job(), running.compute_tile

    def broken(plan, tile, factors):
        values = compute_tile(plan, tile, factors)
        if tile == Tile(1, 2):
            values[0, 0] = np.inf
        return values

    store = job.create(tmp_path / "k.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(running, "compute_tile", broken)
        with pytest.raises(DivergedError, match="finite"):
            job.run(store)
    assert Tile(1, 2) in store.missing_tiles()
    job.resume(store.path)
    assert open_store(store.path).is_complete


# the process and the user ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_planned_within_and_as_before_without(threads, tmp_path, monkeypatch):
    job, seen, before = make_job(threads=threads), [], torch.get_num_threads()
    compute_tile = running.compute_tile

    def watched(*asked):
        seen.append(torch.get_num_threads())
        return compute_tile(*asked)

    monkeypatch.setattr(running, "compute_tile", watched)
    job.run(job.create(tmp_path / "k.zarr"))
    assert (set(seen), len(seen)) == ({threads}, 10)
    assert torch.get_num_threads() == before


def test_the_process_is_as_before_after_an_error(tmp_path):
    job, before = make_job(threads=2), (torch.get_num_threads(), torch.is_grad_enabled())

    def report(*_):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        job.run(job.create(tmp_path / "k.zarr"), report=report)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before


MODES = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]


@pytest.mark.parametrize("mode", chosen(MODES, MODES[1:2]))
def test_bytes_do_not_depend_on_the_mode_of_the_process(job, mode, tmp_path):
    job.run(job.create(tmp_path / "plain.zarr"))
    with mode():
        job.run(job.create(tmp_path / "mode.zarr"))
    assert files_of(tmp_path / "mode.zarr") == files_of(tmp_path / "plain.zarr")


def test_the_report_counts_what_is_done_of_how_much(job, tmp_path):
    seen = []
    store = job.create(tmp_path / "k.zarr")
    job.run(store, report=lambda *what: seen.append(what))
    assert seen == [("diagonal", n, 4) for n in range(5)] + [("tiles", n, 10) for n in range(11)]
    for name in ("ntk_float16/c/0/1", "ntk_float32/c/3/3", "diagonal/c/0"):
        (store.path / name).unlink()
    seen.clear()
    job.run(store, report=lambda *what: seen.append(what))
    assert seen == [("diagonal", 3, 4), ("diagonal", 4, 4), ("tiles", 8, 10), ("tiles", 9, 10), ("tiles", 10, 10)]


def test_a_network_that_diverged_is_refused_before_any_tile(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    job = make_job(module=module)
    x = job.x.clone()
    x[7] = torch.nan
    broken = dataclasses.replace(job, x=x)
    store = broken.create(tmp_path / "k.zarr")
    with pytest.raises(DivergedError, match="not finite"):
        broken.run(store)
    assert store.missing_blocks() == [0, 1, 2]  # sample 7 is in block 2, and the last block is computed first
    assert not (store.path / "ntk_float32").exists()


# refusals -------------------------------------------------------------------------------------------------------------

OTHERS = {
    "device_type": ("cuda", "device type cuda there, cpu here"),
    "device_name": ("Z80", "device name Z80 there"),
    "torch_version": ("1.0", "torch version 1.0 there"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_plan_of_another_machine_is_refused(job, field):
    value, message = OTHERS[field]
    plan = dataclasses.replace(job.plan, environment=dataclasses.replace(job.plan.environment, **{field: value}))
    with pytest.raises(PlanError, match=rf"{message}.*`replan`") as raised:
        check_environment(plan, CPU)
    assert "\n" not in str(raised.value)


def test_a_network_that_does_not_fit_the_plan_is_refused_before_anything_is_written(job, tmp_path):
    store = job.create(tmp_path / "k.zarr")
    before = files_of(store.path)
    with torch.random.fork_rng(devices=[]):
        other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    network = prepare(other, job.x, policy("float32"))
    with pytest.raises(PlanError, match=r"does not fit the store's plan.*`replan`") as raised:
        dataclasses.replace(job, network=network).run(store)
    assert "\n" not in str(raised.value)
    assert files_of(store.path) == before


def test_the_planned_number_of_threads_is_set_not_refused(job):
    environment = dataclasses.replace(job.plan.environment, threads=64)
    check_environment(dataclasses.replace(job.plan, environment=environment), CPU)


def test_the_environment_is_this_machine():
    found = environment(CPU)
    assert (found.device_type, found.torch_version) == ("cpu", torch.__version__)
    assert found.threads == torch.get_num_threads()
    assert environment(CPU, threads=7).threads == 7


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_device_is_found_by_name(name):
    assert choose_device(name).type == "cpu"


def test_auto_is_a_device_that_computes():
    assert torch.ones(2, device=choose_device("auto")).sum() == 2


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:99", "cuda:x", "", "cpu:-1", "mps:3"])
def test_a_device_that_is_not_here_is_refused_and_those_here_are_named(name):
    with pytest.raises(InputError, match=r"There is no device .*expected auto.*cpu \(1\)") as raised:
        choose_device(name)
    assert "\n" not in str(raised.value)


def test_a_budget_is_what_was_asked_for_or_a_part_of_the_memory():
    assert memory_budget(CPU, 12345) == Budget(12345, 12345)
    first, second = memory_budget(CPU, None), memory_budget(CPU, None)
    assert first.planned_bytes == second.planned_bytes
    assert first.available_bytes > 0


def test_the_reference_of_a_job_is_the_kernel_of_its_samples(job):
    assert relative_error(job.reference, reference_ntk(job.module, job.x)) == 0
