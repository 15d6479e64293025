"""Run of a plan in one process: compute and commit each missing tile."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ntkgen.blocks import Block
from ntkgen.engine.identity import OTHER_BATCH, KnownOutputs
from ntkgen.errors import PlanError
from ntkgen.jacobian.cache import BlockCache
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import exact_diagonal, fill_kernel, fill_kernels, reduced_diagonal
from ntkgen.jacobian.factors import BlockFactors, FactorGroup
from ntkgen.jacobian.groups import ParameterGroup, factor_groups
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.plan.order import Band, bands_of
from ntkgen.plan.plan import Plan
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, Step, counter, ignore_report, ignore_step
from ntkgen.store.store import KernelStore, TileValues


class TileComputer:
    """Computes and commits tiles. It holds a network, its samples, a store, and the factors in memory.

    A run in one process, a run of one part and a worker of a cluster use the same class, so that a tile is always
    computed by the same code.
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
        groups = [ParameterGroup(name, params) for name, params in store.manifest.layers.items()]
        self._groups = factor_groups(network, self._plan.jacobian, groups)

        known = KnownOutputs(store, network)  # outputs stored by an earlier run

        def compute(block: Block) -> BlockFactors:
            factors = compute_factors(network, self._plan.jacobian, samples[block.start : block.stop])
            known.require(torch.arange(block.start, block.stop), factors.logits, OTHER_BATCH)
            return factors

        self._factors = BlockCache(compute, cached_blocks)

    def commit_diagonal(self, indices: Iterable[int], step: Step = ignore_step) -> None:
        """Compute and commit the diagonal and the logits of the side blocks with the given indices."""
        with self._arithmetic():
            for index in indices:
                self.store.commit_block(index, *_diagonal_and_logits(self._plan, index, self._factors))
                step()

    def commit_tiles(self, bands: Iterable[Band], step: Step = ignore_step) -> None:
        """Compute and commit tiles, band by band."""
        with self._arithmetic(), _writer(self.store) as commit:
            for band in bands:
                self._factors.hold(band.held)
                for tile in band.tiles:
                    commit(tile, self._compute(tile))
                    step()

    def _compute(self, tile: Tile) -> TileValues:
        if self._groups:
            return compute_layers(self._plan, tile, self._factors, self._groups)
        return compute_tile(self._plan, tile, self._factors)

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
    """Compute and commit the missing parts of a store: first the diagonal, which gives the scales, then the tiles."""
    computer = TileComputer(network, samples, store, cached_blocks=cached_blocks)
    run_diagonal(computer, report)
    run_tiles(computer, store.missing_tiles(), report)
    store.finalize()


def run_diagonal(computer: TileComputer, report: Report = ignore_report) -> None:
    """Compute the missing blocks of the exact diagonal, and create the kernel arrays with their scales.

    The blocks are computed in reverse order. Afterwards the memory holds the factors of the first band of tiles.
    """
    store, total = computer.store, computer.store.grid.num_sides
    missing = store.missing_blocks()[::-1]
    computer.commit_diagonal(missing, counter(report, "diagonal", total - len(missing), total))
    store.create_kernels()


def run_tiles(computer: TileComputer, tiles: Sequence[Tile], report: Report = ignore_report) -> None:
    """Compute the given missing tiles of a store."""
    plan = computer.store.manifest.plan
    step = counter(report, "tiles", plan.grid.num_tiles - len(tiles), plan.grid.num_tiles)
    computer.commit_tiles(bands_of(plan, tiles, computer.cached_blocks), step)


@contextmanager
def _writer(store: KernelStore) -> Iterator[Callable[[Tile, TileValues], None]]:
    """Write a tile while the next one is computed. At most one tile is written at a time."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ntkgen-writer") as thread:
        pending: list[Future[None]] = []

        def commit(tile: Tile, values: TileValues) -> None:
            wait()
            pending.append(thread.submit(store.commit, tile, values))

        def wait() -> None:
            while pending:
                pending.pop().result()

        yield commit
        wait()


def _check_network(network: Network, plan: Plan) -> None:
    """Require that a network has the layers and the fallback parameters of a plan.

    Raises:
        PlanError: If layers, or the parameters without a rule, differ.
    """
    given, planned = network.profile, plan.profile
    if not network.follows(planned):
        raise PlanError(
            f"The network does not fit the store's plan: expected {len(planned.layers)} layers with a rule and "
            f"{len(planned.fallback)} parameters without a rule, found {len(given.layers)} and {len(given.fallback)}. "
            "Was ntkgen or the network's code changed since? Use the versions that the store was made with, or set "
            "`replan`."
        )


def compute_tile(plan: Plan, tile: Tile, factors: Callable[..., BlockFactors]) -> npt.NDArray[Any]:
    """Compute one tile. For a tile on the diagonal, its upper blocks are computed and mirrored."""
    rows, columns = plan.blocks(tile.row), plan.col_blocks(tile.col)
    kernel: npt.NDArray[Any] = fill_kernel(rows, columns, factors, plan.jacobian).cpu().numpy()
    return kernel


def compute_layers(
    plan: Plan, tile: Tile, factors: Callable[..., BlockFactors], groups: Sequence[FactorGroup]
) -> list[npt.NDArray[Any]]:
    """Compute one tile of the kernel of each group of parameters. Their sum is the tile of the kernel."""
    rows, columns = plan.blocks(tile.row), plan.col_blocks(tile.col)
    return [kernel.cpu().numpy() for kernel in fill_kernels(rows, columns, factors, plan.jacobian, groups)]


def _diagonal_and_logits(
    plan: Plan, index: int, factors: Callable[..., BlockFactors]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    diagonals, logits = [], []
    for piece in plan.side_blocks(index):
        block = factors(piece)
        diagonals.append(exact_diagonal(block).cpu())
        logits.append(block.logits.cpu().double())
    diagonal = torch.cat(diagonals)  # (samples, outputs)
    return reduced_diagonal(diagonal, plan.jacobian.reduction).numpy(), torch.cat(logits).numpy()
