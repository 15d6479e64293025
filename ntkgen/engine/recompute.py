"""Stored tiles computed again from the network and its samples, and compared with what is stored.

They are computed as the first time, and committed to an empty copy of the store in memory, whose files are compared.
Thus one code path makes a tile, with its rounding, its mirror and its counts.
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
from ntkgen.plan.plan import Band, Budget
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.certificate import HALF_SUBNORMAL, POLICY_ROUNDOFF, UNIT_ROUNDOFF
from ntkgen.store.opening import ROOT, open_store
from ntkgen.store.schema import CHECKSUM_BYTES, UNDERFLOW, side_arrays
from ntkgen.store.store import KernelStore

# Allowed difference of two machines, in units of one rounding: they add up in other orders, and a deep network
# multiplies the rounding of its first layers. Where operands are rounded (tf32, bfloat16), that is most of the error.
MACHINE_RATIO = {"float64": 128, "float64-accumulate": 128, "float32": 128, "tf32": 16, "bfloat16": 16}

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recomputed:
    """One tile in one dtype, computed again.

    Attributes:
        tile: The tile.
        dtype: The store dtype.
        equal: Whether all its files have the same bytes.
        max_error: The largest difference of an entry, over the largest √(K_rr K_cc) of the tile.
        tolerance: The largest allowed error; 0 where the same machine must give the same bytes.
        different: The files that differ by more.
    """

    tile: Tile
    dtype: str
    equal: bool
    max_error: float
    tolerance: float
    different: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values; for the files that differ, whether there are any."""
        kept = {name: value for name, value in vars(self).items() if name != "different"}
        return {**kept, "tile": self.tile.to_json(), "is_different": bool(self.different)}


def draw_tiles(tiles: Sequence[Tile], count: int, seed: int) -> list[Tile]:
    """Draw ``count`` of the tiles without replacement, or all of them if there are fewer.

    >>> len(draw_tiles([Tile(0, 0), Tile(0, 1)], 3, seed=0))
    2
    """
    drawn = np.random.default_rng([seed, 2]).choice(len(tiles), size=min(count, len(tiles)), replace=False)
    return [tiles[position] for position in sorted(drawn.tolist())]


@dataclass(frozen=True)
class Resources:
    """What a computation may use: a device, and memory."""

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
    """Compute some stored tiles again, and compare each in every dtype. Nothing is written.

    Where the machine is one on which the plan of the store can be repeated, each file must have the same bytes.
    Elsewhere, or in a store that was continued elsewhere, entries may differ by what `tolerance` allows.

    Args:
        store: The store; the diagonal, and the tiles, are there.
        model: The network that the kernel is of.
        inputs: Its samples, in the store's order.
        tiles: The tiles to compute again.
        resources: What the computation may use.
        report: Called as the stage ``recomputed`` proceeds.

    Raises:
        FingerprintError: If the store says that it was made of other parameters.
        PlanError: If the layers of the network are not those of the plan.
        BudgetError: If the memory is too small for a tile.
    """
    plan = store.manifest.plan
    require_model(store, model)
    cached_blocks = plan.cached_blocks(resources.budget)
    copy = _empty_copy(store)
    computer = TileComputer(
        network_of(store, model, inputs, resources.device), inputs.all, copy, cached_blocks=cached_blocks
    )
    is_exact, found = must_be_equal(store, resources.device), []
    step = counter(report, "recomputed", 0, len(tiles))
    for tile in tiles:
        computer.commit_tiles([Band((), (tile,))])
        found += [_compared(store, copy, tile, dtype, is_exact=is_exact) for dtype in store.manifest.dtypes]
        _forget(copy)
        step()
    return found


def must_be_equal(store: KernelStore, device: torch.device) -> bool:
    """Say whether every tile was made, and is computed again, by the same program on the same kind of machine."""
    try:
        check_environment(store.manifest.plan, device)
    except PlanError:
        return False
    return not store.manifest.replanned and store.attributes.get("source") == f"ntkgen {ntkgen.__version__}"


def tolerance_of(dtype: str, precision: str) -> float:
    """Bound the difference of two machines, in terms of √(K_rr K_cc): both round to what is stored, after computing.

    >>> f"{tolerance_of('float32', 'float32'):.2g}", f"{tolerance_of('float64', 'float64'):.2g}"
    ('7.7e-06', '1.4e-14')
    """
    return 2 * UNIT_ROUNDOFF[dtype] + MACHINE_RATIO[precision] * POLICY_ROUNDOFF[precision]


def _empty_copy(store: KernelStore) -> KernelStore:
    """Make a store in memory with the arrays and the scales of another, and nothing in them."""
    folder = StoreFolder(MemoryStore(), "memory")
    for name in (ROOT, *(f"{array.name}/{ROOT}" for array in store.arrays())):
        if (data := store.folder.read(name)) is not None:
            folder.write(name, data)
    return open_store(folder, mode="r+")


def _chunks(store: KernelStore) -> list[str]:
    return sorted(name for name in store.folder.sizes() if "/c/" in name)


def _forget(store: KernelStore) -> None:
    """Empty a copy, so that it never holds more than a tile."""
    for name in _chunks(store):
        store.folder.remove(name)


def _compared(store: KernelStore, copy: KernelStore, tile: Tile, dtype: str, *, is_exact: bool) -> Recomputed:
    """Compare the files of a tile in one dtype; the counts of a tile belong to its float16."""
    names = [name for name in _chunks(copy) if name.startswith(f"ntk_{dtype}/")]
    counts = [name for name in _chunks(copy) if dtype == "float16" and name.startswith(f"{UNDERFLOW}/")]
    unequal = [name for name in names + counts if store.folder.read(name) != copy.folder.read(name)]
    errors = {name: _error(store, copy, tile, name) for name in names if name in unequal}
    tolerance = 0.0 if is_exact else tolerance_of(dtype, store.manifest.plan.precision)
    different = unequal if is_exact else [name for name in errors if errors[name] > tolerance]
    largest = max(errors.values(), default=0.0)
    return Recomputed(tile, dtype, not unequal, largest, tolerance, tuple(different))


def _error(store: KernelStore, copy: KernelStore, tile: Tile, file: str) -> float:
    """Find the largest difference in a file, but for what the smallest numbers of a dtype cannot say."""
    name = file.partition("/")[0]
    dtype, scale = name.removeprefix("ntk_"), store.scale_factor(name)
    stored, computed = (_values(each, file, dtype) for each in (store, copy))
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.nanmax(np.abs(stored - computed))) * scale  # beyond the array both are NaN
    unit = _unit(store, tile)
    return min(max(0.0, largest - 2 * HALF_SUBNORMAL[dtype] * scale) / unit, sys.float_info.max)


def _values(store: KernelStore, file: str, dtype: str) -> FloatArray:
    data = store.folder.read(file) or b""
    return np.frombuffer(data[:-CHECKSUM_BYTES], np.dtype(dtype).newbyteorder("<")).astype(np.float64)


def _unit(store: KernelStore, tile: Tile) -> float:
    """Find the largest √(K_rr K_cc) of a tile; beside zeros errors are absolute."""
    m, sides = store.grid.num_outputs, side_arrays(store.grid)
    rows, cols = store.grid.block(tile.row).rows(m), store.grid.col_block(tile.col).rows(m)
    largest = (store.read(sides[at][0])[..., part].max() for at, part in ((0, rows), (-1, cols)))
    return float(np.sqrt(np.prod(list(largest)))) or 1.0
