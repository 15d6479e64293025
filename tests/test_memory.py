"""The memory that a run takes, store and all: no more than was projected, on every network of the zoo.

Each in a process of its own, which is `drive`: the diagonal of as many samples as fill the cache, if time allows, and
the first tiles. The peak is the kernel's own record of resident memory (`VmHWM`), set
back once the process is loaded; where that cannot be done, it is looked at every other millisecond.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from cases import CPU, Job, make_job
from torch import nn

from models import MODELS
from ntkgen.engine.machine import environment
from ntkgen.errors import BudgetError
from ntkgen.jacobian.cost import factor_macs
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.precision import policy
from ntkgen.plan.order import count_factor_samples, projected_flops
from ntkgen.plan.plan import Budget, Choices, Plan, make_plan
from ntkgen.plan.tiles import make_grid

BUDGETS = {"2 GB": 2 * 10**9, "8 GB": 8 * 10**9}
# How far the peak may be above the projection: allocators round, and libraries keep buffers of their own.
TOLERANCE = 1.1
# A run may take about twice so long, at speeds that two busy cores reach: half of it in passes, half in products.
SECONDS = 20
PASS_FLOPS, PRODUCT_FLOPS = 25e9, 60e9
TILE_SAMPLES = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 400]
NUM_TILES = 3  # two on the diagonal and one beside it
DTYPES = ("float16", "float32", "float64")


# the child ------------------------------------------------------------------------------------------------------------


class Peak:
    """The most resident bytes since it was made, above those that were there."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self._start = self._highest = psutil.Process().memory_info().rss
        self._stop = threading.Event()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, process.memory_info().rss)

    def read(self) -> int:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            self._highest = max(
                self._highest, next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
            )
        return self._highest - self._start


def pass_seconds(plan: Plan) -> float:
    """Estimate how long the factors of all samples take, once for the diagonal and once for tiles."""
    return 4 * plan.num_samples * factor_macs(plan.profile, plan.jacobian) / PASS_FLOPS


def product_seconds(plan: Plan) -> float:
    """Estimate how long the products of the first tiles take."""
    tiles = list(itertools.islice(plan.grid.tiles(), NUM_TILES))
    passes = 2 * count_factor_samples(plan, tiles, 2) * factor_macs(plan.profile, plan.jacobian)
    return (projected_flops(plan, tiles, 2) - passes) / PRODUCT_FLOPS


def plan_run(network: Network, budget: Budget, precision: str) -> Plan:
    """Plan tiles as large as can be done in time, and of these as many as fill the cache, or as there is time for.

    Raises:
        BudgetError: If not even the smallest fits.
    """
    m, place = network.profile.num_outputs, environment(CPU)

    def planned(tile_samples: int, tiles: int) -> Plan:
        grid = make_grid(tiles * tile_samples, m, tile_samples * m)
        return make_plan(network.profile, grid, Choices(precision), budget=budget, environment=place)

    best, tile_samples = planned(TILE_SAMPLES[0], 2), TILE_SAMPLES[0]
    for size in TILE_SAMPLES[1:]:
        with contextlib.suppress(BudgetError):
            plan = planned(size, 2)
            if max(product_seconds(plan), pass_seconds(plan)) > SECONDS:
                break
            best, tile_samples = plan, size
    for tiles in range(3, 200):
        plan = planned(tile_samples, tiles)
        if pass_seconds(plan) > SECONDS or is_filled(best, budget):
            break
        best = plan
    return best


def is_filled(plan: Plan, budget: Budget) -> bool:
    """Say whether a plan has more blocks than can be held."""
    return plan.cached_blocks(budget) < sum(len(plan.side_blocks(index)) for index in range(plan.grid.num_sides))


def stop(what: str, done: int, _total: int) -> None:
    """End a run after its first tiles."""
    if (what, done) == ("tiles", NUM_TILES):
        raise InterruptedError


def warm_up(folder: str) -> None:
    """Load what any run loads: the libraries' own code and buffers are no part of what is projected."""
    job = make_job()
    job.run(job.create(Path(folder) / "warm.zarr", DTYPES, "full"))
    x = torch.randn(8, 3, 32, 32)
    layers = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(57600, 10))
    layers(x).sum().backward()


def drive(name: str, requested: int, precision: str) -> dict[str, object]:
    """Run the kernel of one network within a budget, and tell what it took."""
    budget = Budget(requested, requested)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        warm_up(folder)
        module, probe = MODELS[name](num_classes=10), torch.randn(2, 3, 32, 32)
        started, peak = time.monotonic(), Peak()
        network = prepare(module, probe, policy(precision))
        preparing = peak.read()
        try:
            plan = plan_run(network, budget, precision)
            cached = plan.cached_blocks(budget)
        except BudgetError as error:
            return {"refused": str(error), "preparing": preparing}
        x = torch.randn(plan.num_samples, 3, 32, 32)
        job = Job(module, x, network, plan)
        with contextlib.suppress(InterruptedError):
            job.run(job.create(Path(folder) / "k.zarr", DTYPES, "full"), cached, stop)
        return {
            "preparing": preparing,
            "measured": peak.read(),
            "projected": plan.projected_bytes(cached),
            "fixed": plan.fixed_bytes,
            "samples": plan.num_samples,
            "tile": plan.grid.tile_samples,
            "block": plan.block_samples,
            "batch": plan.jacobian.batch_size,
            "cached": cached,
            "filled": is_filled(plan, budget),
            "seconds": round(time.monotonic() - started, 1),
        }


# the tests ------------------------------------------------------------------------------------------------------------


def run_apart(name: str, requested: int, precision: str) -> dict[str, object]:
    """Run `drive` in a process of its own."""
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_memory; "
        "print(json.dumps(test_memory.drive(sys.argv[2], int(sys.argv[3]), sys.argv[4])))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), name, str(requested), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def described(found: dict[str, object]) -> Iterator[str]:
    for key, value in found.items():
        is_bytes = key in {"preparing", "measured", "projected", "fixed"}
        yield f"{key} {value / 1e6:.0f} MB" if is_bytes else f"{key} {value}"


def check(name: str, requested: int, precision: str) -> None:
    found = run_apart(name, requested, precision)
    told = f"{name}, {precision}, {requested / 1e9:.0f} GB: {', '.join(described(found))}"
    print(told)
    if "refused" in found:
        assert "are allowed" in found["refused"], told
        assert "\n" not in found["refused"], told
        return
    told += f"; measured / projected {found['measured'] / found['projected']:.2f}"
    print(f"measured / projected {found['measured'] / found['projected']:.2f}")
    assert found["measured"] <= TOLERANCE * found["projected"], told
    assert found["projected"] <= requested, told  # a plan is never above, so that the peak is at most 1.1 × the budget


def too_small(requested: int) -> bool:
    """Say whether this machine has not the memory that is to be used up."""
    return psutil.virtual_memory().total < 1.3 * requested


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", MODELS)
def test_a_run_takes_no_more_memory_than_projected_and_allowed(name, budget):
    if too_small(BUDGETS[budget]):
        pytest.skip("there is not so much memory here")
    check(name, BUDGETS[budget], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float64", "float64-accumulate", "bfloat16"])
@pytest.mark.parametrize("name", ["lenet", "resnet9", "mobilenetv2"])
def test_neither_does_it_in_another_precision(name, precision):
    check(name, BUDGETS["2 GB"], precision)


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [100, 200, 400, 800])
@pytest.mark.parametrize("name", ["lenet", "resnet9"])
def test_a_small_budget_is_kept_or_refused(name, megabytes):
    check(name, megabytes * 10**6, "float32")


def test_what_is_looked_at_is_what_was_taken():
    """A hundred megabytes that are written and given back leave their mark on the peak."""
    peak, size = Peak(), 100 << 20
    block = torch.ones(size // 4)
    del block
    assert 0.98 * size <= peak.read() < 2 * size
