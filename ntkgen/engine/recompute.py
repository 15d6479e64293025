"""Recomputation of stored tiles from the network and its samples, and comparison with the stored files.

The tiles are committed to an empty copy of the store in memory, and the files of both stores are compared. Thus
recomputation uses the same code as the first computation, including rounding, mirroring and counts of underflow.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from zarr.storage import MemoryStore

import ntkgen
from ntkgen.checks.certify import require_model
from ntkgen.engine.identity import network_of
from ntkgen.engine.machine import check_environment
from ntkgen.engine.run import TileComputer
from ntkgen.errors import PlanError
from ntkgen.files.bucket import StoreFolder
from ntkgen.inputs import Inputs
from ntkgen.plan.order import Band
from ntkgen.plan.plan import Budget
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.certificate import HALF_SUBNORMAL, POLICY_ROUNDOFF, UNIT_ROUNDOFF
from ntkgen.store.opening import ROOT, open_store
from ntkgen.store.schema import BY_LAYER, CHECKSUM_BYTES, UNDERFLOW, side_arrays
from ntkgen.store.store import KernelStore

# Maximum difference between two machines, in units of one rounding error. Machines add numbers in different orders, and
# a deep network amplifies the rounding errors of its first layers. In tf32 and bfloat16 the rounding of the operands is
# most of the error, and the ratio is smaller.
MACHINE_RATIO = {"float64": 128, "float64-accumulate": 128, "float32": 128, "tf32": 16, "bfloat16": 16}

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recomputed:
    """The comparison of one tile in one store dtype with its recomputation.

    Attributes:
        tile: Tile that was computed again.
        dtype: Store dtype.
        equal: Whether all files of the tile have the same bytes.
        max_error: Largest difference of an entry, divided by the largest √(K_rr K_cc) of the tile.
        tolerance: Largest allowed ``max_error``. It is 0 if this machine must give the same bytes.
        different: Files whose difference exceeds the tolerance.
    """

    tile: Tile
    dtype: str
    equal: bool
    max_error: float
    tolerance: float
    different: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values. The list of different files is replaced by whether there are any."""
        kept = {name: value for name, value in vars(self).items() if name != "different"}
        return {**kept, "tile": list(self.tile), "is_different": bool(self.different)}


def draw_tiles(tiles: Sequence[Tile], count: int, seed: int) -> list[Tile]:
    """Draw ``count`` of the tiles without replacement, or all of them if there are fewer.

    >>> len(draw_tiles([Tile(0, 0), Tile(0, 1)], 3, seed=0))
    2
    """
    drawn = np.random.default_rng([seed, 2]).choice(len(tiles), size=min(count, len(tiles)), replace=False)
    return [tiles[position] for position in sorted(drawn.tolist())]


@dataclass(frozen=True)
class Resources:
    """The device and the memory of a computation."""

    device: torch.device
    budget: Budget


def recompute(
    store: KernelStore,
    model: nn.Module,
    inputs: Inputs,
    tiles: Sequence[Tile],
    resources: Resources,
    report: Report = ignore_report,
) -> list[Recomputed]:
    """Compute some stored tiles again, and compare each in every store dtype. The store is not changed.

    On a machine that can repeat the plan of the store, each file must have the same bytes. On another machine, or for a
    store that was continued on another machine, entries may differ by the ``tolerance``.

    Args:
        store: Store with its diagonal and the given tiles.
        model: Network of the kernel.
        inputs: Samples of the kernel, in the store's order.
        tiles: Tiles to compute again.
        resources: Device and memory of the computation.
        report: Function that is called as the stage ``recomputed`` proceeds.

    Raises:
        FingerprintError: If the parameters of the network differ from those of the store.
        PlanError: If the layers of the network differ from those of the plan.
        BudgetError: If the memory is too small for a tile.
    """
    plan = store.manifest.plan
    require_model(store, model)
    cached_blocks = plan.cached_blocks(resources.budget)
    copy = _empty_copy(store)
    computer = TileComputer(
        network_of(store, model, inputs, resources.device), inputs.all, copy, cached_blocks=cached_blocks
    )
    is_exact, comparisons = must_be_equal(store, resources.device), []
    step = counter(report, "recomputed", 0, len(tiles))
    for tile in tiles:
        computer.commit_tiles([Band((), (tile,))])
        comparisons += [_compared(store, copy, tile, dtype, is_exact=is_exact) for dtype in store.manifest.dtypes]
        _remove_chunks(copy)
        step()
    return comparisons


def must_be_equal(store: KernelStore, device: torch.device) -> bool:
    """Tell whether all tiles were computed by this version of the program on this kind of machine."""
    try:
        check_environment(store.manifest.plan, device)
    except PlanError:
        return False
    return not store.manifest.replanned and store.attributes.get("source") == f"ntkgen {ntkgen.__version__}"


def tolerance_of(dtype: str, precision: str) -> float:
    """Bound the difference of an entry between two machines, relative to √(K_rr K_cc).

    Each machine has the rounding errors of its computation, and rounds its result to the store dtype.

    >>> f"{tolerance_of('float32', 'float32'):.2g}", f"{tolerance_of('float64', 'float64'):.2g}"
    ('7.7e-06', '1.4e-14')
    """
    return 2 * UNIT_ROUNDOFF[dtype] + MACHINE_RATIO[precision] * POLICY_ROUNDOFF[precision]


def _empty_copy(store: KernelStore) -> KernelStore:
    """Make a store in memory with the arrays and the scales of another store, but without chunks."""
    folder = StoreFolder(MemoryStore(), "memory")
    for name in (ROOT, *(f"{array.name}/{ROOT}" for array in store.arrays())):
        if (data := store.folder.read(name)) is not None:
            folder.write(name, data)
    return open_store(folder, mode="r+")


def _chunks(store: KernelStore) -> list[str]:
    return sorted(name for name in store.folder.sizes() if "/c/" in name)


def _remove_chunks(store: KernelStore) -> None:
    """Remove all chunks of a copy, so that it never holds more than one tile."""
    for name in _chunks(store):
        store.folder.remove(name)


def _compared(store: KernelStore, copy: KernelStore, tile: Tile, dtype: str, *, is_exact: bool) -> Recomputed:
    """Compare the files of a tile in one store dtype. The counts of underflow are compared with float16."""
    names = [name for name in _chunks(copy) if name.startswith((f"ntk_{dtype}/", f"{BY_LAYER}_{dtype}/"))]
    counts = [name for name in _chunks(copy) if dtype == "float16" and name.startswith(f"{UNDERFLOW}/")]
    unequal = [name for name in names + counts if store.folder.read(name) != copy.folder.read(name)]
    errors = {name: _error(store, copy, tile, name) for name in names if name in unequal}
    tolerance = 0.0 if is_exact else tolerance_of(dtype, store.manifest.plan.precision)
    different = unequal if is_exact else [name for name in errors if errors[name] > tolerance]
    largest = max(errors.values(), default=0.0)
    return Recomputed(tile, dtype, not unequal, largest, tolerance, tuple(different))


def _error(store: KernelStore, copy: KernelStore, tile: Tile, file: str) -> float:
    """Compute the largest difference of an entry in a file, without the underflow error of the store dtype."""
    name = file.partition("/")[0]
    dtype, scale = name.rpartition("_")[2], store.scale_factor(name)
    stored, computed = (_values(source, file, dtype) for source in (store, copy))
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.nanmax(np.abs(stored - computed))) * scale  # outside of the array both are NaN
    unit = _unit(store, tile)
    return min(max(0.0, largest - 2 * HALF_SUBNORMAL[dtype] * scale) / unit, sys.float_info.max)


def _values(store: KernelStore, file: str, dtype: str) -> FloatArray:
    data = store.folder.read(file) or b""
    return np.frombuffer(data[:-CHECKSUM_BYTES], np.dtype(dtype).newbyteorder("<")).astype(np.float64)


def _unit(store: KernelStore, tile: Tile) -> float:
    """Return the largest √(K_rr K_cc) of a tile, or 1 if it is zero, so that the error is absolute."""
    m, sides = store.grid.num_outputs, side_arrays(store.grid)
    rows, cols = store.grid.block(tile.row).rows(m), store.grid.col_block(tile.col).rows(m)
    largest = (store.read(sides[at][0])[..., part].max() for at, part in ((0, rows), (-1, cols)))
    return float(np.sqrt(np.prod(list(largest)))) or 1.0
