"""Run a plan: for each missing tile, compute and commit."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from ntkgen.errors import InputError, PlanError
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.contract import exact_diagonal, fill_kernel
from ntkgen.jacobian.factors import BlockFactors, compute_factors
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.kernel.plan import Budget, Environment, Plan
from ntkgen.kernel.store import KernelStore
from ntkgen.kernel.tiles import Block, Tile

# Called with what is being made ("diagonal" or "tiles"), how much of it is done, and how much there is.
Report = Callable[[str, int, int], None]


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
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_budget(device: torch.device, requested: int | None) -> Budget:
    """Say how many bytes a computation on a device may take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return Budget.of(requested, total_bytes=total, free_bytes=free)


def check_environment(plan: Plan, device: torch.device) -> None:
    """Refuse to continue a plan whose bytes this machine would not repeat. Threads are set as planned.

    Raises:
        PlanError: If device, its type or torch differ; the message names what does.
    """
    if differences := plan.environment.differences(environment(device, plan.environment.threads)):
        raise PlanError(
            f"The store's plan cannot be repeated here ({'; '.join(differences)}): the tiles still missing would "
            "differ from the others in their last bits. Use a machine like the first, or add --replan to accept that."
        )


def run(
    network: Network,
    samples: Tensor,  # (n, …), in the store's order
    store: KernelStore,
    *,
    cached_blocks: int,
    report: Report = lambda *_: None,
) -> None:
    """Compute and commit what a store is missing: first the diagonal, from which the scales follow, then the tiles."""
    plan = store.manifest.plan
    _check_network(network, plan)

    def compute(block: Block) -> BlockFactors:
        return compute_factors(network, plan.jacobian, samples[block.start : block.stop])

    factors = BlockCache(compute, cached_blocks)
    with exact_arithmetic(network.device, plan.environment.threads):
        # from the end, so that the blocks at hand afterwards are those that the first band holds
        for done, total, index in _counted(store.missing_blocks()[::-1], plan.num_sides):
            report("diagonal", done, total)
            store.commit_block(index, *_diagonal_and_logits(plan, index, factors))
        report("diagonal", plan.num_sides, plan.num_sides)
        store.create_kernels()
        missing, done = store.missing_tiles(), 0
        with _writer(store) as commit:
            for band in plan.bands(missing, cached_blocks):
                factors.hold(band.held)
                for tile in band.tiles:
                    report("tiles", plan.grid.num_tiles - len(missing) + done, plan.grid.num_tiles)
                    commit(tile, compute_tile(plan, tile, factors))
                    done += 1
        report("tiles", plan.grid.num_tiles, plan.grid.num_tiles)
    store.finalize()


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


def _counted(missing: list[Any], total: int) -> list[tuple[int, int, Any]]:
    """Number what is missing from what is there: (done before it, total, it)."""
    there = total - len(missing)
    return [(there + position, total, item) for position, item in enumerate(missing)]


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


def free_disk_bytes(path: str | os.PathLike[str]) -> int:
    """Say how much room there is where a path lies or would lie."""
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return int(psutil.disk_usage(folder).free)
