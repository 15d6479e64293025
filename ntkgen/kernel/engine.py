"""Run a plan: for each missing tile, compute and commit."""

import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from ntkgen.errors import InputError, PlanError
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import exact_diagonal, fill_kernel
from ntkgen.jacobian.cost import Rates
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.measure import rates_of
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.precision import exact_arithmetic, fixed_threads
from ntkgen.kernel.plan import Band, Budget, Environment, Plan
from ntkgen.kernel.store import KernelStore
from ntkgen.kernel.tiles import Block, Tile
from ntkgen.progress import Report, Step, counter, ignore_report, ignore_step


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device of this machine.

    Raises:
        InputError: If there is no such device here.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(":")
    is_written_well = re.fullmatch(r"\w+(:\d+)?", name) is not None
    if not is_written_well or kind not in here or int(index or 0) >= here[kind]:
        found = ", ".join(f"{kind} ({count})" for kind, count in here.items() if count)
        raise InputError(f"There is no device {name!r} here: expected auto or one of those found, {found}.")
    return torch.device(name)


def environment(device: torch.device, threads: int | None = None) -> Environment:
    """Describe what the bits of a computation on this machine depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    return Environment(device.type, name, torch.__version__, threads or torch.get_num_threads())


def _cpu_model() -> str:
    """Name the processor: matrix libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Machine:
    """What there is to compute with: what bits depend on, the memory, and how fast each product is."""

    environment: Environment
    budget: Budget
    rates: Rates


def machine(device: torch.device, precision: str, memory_bytes: int | None, *, threads: int | None = None) -> Machine:
    """Describe the machine at hand, as it is with some threads."""
    budget = memory_budget(device, memory_bytes)
    with fixed_threads(threads or torch.get_num_threads()):
        return Machine(environment(device), budget, rates_of(device, precision))


def memory_budget(device: torch.device, requested: int | None, *, sharers: int = 1, limit: int | None = None) -> Budget:
    """Say how many bytes a computation on a device may take: as requested, or its share, or its process's limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    most = limit or total
    return Budget.of(requested, total_bytes=min(total // sharers, most), free_bytes=min(free // sharers, most))


def check_environment(plan: Plan, device: torch.device) -> None:
    """Refuse to continue a plan whose bytes this machine would not repeat."""
    check_plan(plan, environment(device))


def check_plan(plan: Plan, found: Environment) -> None:
    """Refuse to continue a plan whose bytes a machine would not repeat. Threads are set as planned.

    Raises:
        PlanError: If device, its type or torch differ; the message names what does.
    """
    if differences := plan.environment.differences(replace(found, threads=plan.environment.threads)):
        raise PlanError(
            f"The store's plan cannot be repeated here ({'; '.join(differences)}): the tiles still missing would "
            "differ from the others in their last bits. Use a machine like the first, or add --replan to accept that."
        )


class Bench:
    """What computes tiles and commits them: a network, its samples, a store, and the factors at hand.

    The whole run in this process, a part of it and a worker of a cluster all use one, so that there is one way in which
    a tile comes about.
    """

    def __init__(
        self,
        network: Network,
        samples: Tensor,  # (n, …), in the store's order
        store: KernelStore,
        *,
        cached_blocks: int,
    ) -> None:
        self.store = store
        self.cached_blocks = cached_blocks
        self._plan = store.manifest.plan
        self._network = network
        _check_network(network, self._plan)

        def compute(block: Block) -> BlockFactors:
            return compute_factors(network, self._plan.jacobian, samples[block.start : block.stop])

        self._factors = BlockCache(compute, cached_blocks)

    def commit_diagonal(self, indices: Iterable[int], step: Step = ignore_step) -> None:
        """Compute and commit the diagonal and the logits of some blocks that the store has named missing."""
        with self._arithmetic():
            for index in indices:
                self.store.commit_block(index, *_diagonal_and_logits(self._plan, index, self._factors))
                step()

    def commit_tiles(self, bands: Iterable[Band], step: Step = ignore_step) -> None:
        """Compute and commit some tiles, band by band."""
        with self._arithmetic(), _writer(self.store) as commit:
            for band in bands:
                self._factors.hold(band.held)
                for tile in band.tiles:
                    commit(tile, compute_tile(self._plan, tile, self._factors))
                    step()

    def _arithmetic(self) -> AbstractContextManager[None]:
        return exact_arithmetic(self._network.device, self._plan.environment.threads)


def run(
    network: Network,
    samples: Tensor,  # (n, …), in the store's order
    store: KernelStore,
    *,
    cached_blocks: int,
    report: Report = ignore_report,
) -> None:
    """Compute and commit what a store is missing: first the diagonal, from which the scales follow, then the tiles."""
    bench = Bench(network, samples, store, cached_blocks=cached_blocks)
    run_diagonal(bench, report)
    run_tiles(bench, store.missing_tiles(), cached_blocks, report)
    store.finalize()


def run_diagonal(bench: Bench, report: Report = ignore_report) -> None:
    """Compute the exact diagonal where it is missing, and make the arrays whose scales follow from it.

    From the end, so that the blocks at hand afterwards are those that the first band of tiles holds.
    """
    store, total = bench.store, bench.store.manifest.plan.num_sides
    missing = store.missing_blocks()[::-1]
    bench.commit_diagonal(missing, counter(report, "diagonal", total - len(missing), total))
    store.create_kernels()


def run_tiles(bench: Bench, tiles: Sequence[Tile], cached_blocks: int, report: Report = ignore_report) -> None:
    """Compute some tiles of a store that are missing."""
    plan = bench.store.manifest.plan
    step = counter(report, "tiles", plan.grid.num_tiles - len(tiles), plan.grid.num_tiles)
    bench.commit_tiles(plan.bands(tiles, cached_blocks), step)


@contextmanager
def _writer(store: KernelStore) -> Iterator[Callable[[Tile, npt.NDArray[Any]], None]]:
    """Write a tile while the next one is computed. One at a time: the second waits until the first is on disk."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ntkgen-writer") as thread:
        pending: list[Future[None]] = []

        def commit(tile: Tile, values: npt.NDArray[Any]) -> None:
            wait()
            pending.append(thread.submit(store.commit, tile, values))

        def wait() -> None:
            while pending:
                pending.pop().result()

        yield commit
        wait()


def _check_network(network: Network, plan: Plan) -> None:
    """Refuse a network whose parameters are not treated as the plan says.

    Raises:
        PlanError: If layers, or the parameters without a rule, differ.
    """
    mine, theirs = network.profile, plan.profile
    if (mine.layers, mine.dense_params, mine.fallback) != (theirs.layers, theirs.dense_params, theirs.fallback):
        raise PlanError(
            f"The network does not fit the store's plan: {len(theirs.layers)} layers with a rule and "
            f"{len(theirs.fallback)} parameters without one were planned, {len(mine.layers)} and {len(mine.fallback)} "
            "are found. Was ntkgen or the network's code changed since? Use what made the store, or add --replan."
        )


def compute_tile(plan: Plan, tile: Tile, factors: Callable[..., BlockFactors]) -> npt.NDArray[Any]:
    """Compute one tile; on the diagonal, its upper blocks and their mirror."""
    rows, columns = plan.blocks(tile.row), plan.col_blocks(tile.col)
    kernel: npt.NDArray[Any] = fill_kernel(rows, columns, factors, plan.jacobian).cpu().numpy()
    return kernel


def _diagonal_and_logits(
    plan: Plan, index: int, factors: Callable[..., BlockFactors]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    diagonals, logits = [], []
    for piece in plan.side_blocks(index):
        block = factors(piece)
        diagonals.append(exact_diagonal(block).cpu())
        logits.append(block.logits.cpu().double())
    found = torch.cat(diagonals)  # (samples, outputs)
    reduced = {"none": found.flatten(), "trace": found.sum(1), "diagonal": found.mT}[plan.jacobian.reduction]
    return reduced.contiguous().numpy(), torch.cat(logits).numpy()
