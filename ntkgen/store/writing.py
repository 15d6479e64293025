"""Writing of whole chunks in place, and of several tiles at the same time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import zarr

from ntkgen.plan.tiles import Tile
from ntkgen.progress import Step
from ntkgen.store.schema import writable

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

# A part of an array: a slice for each axis, or `...` for all axes that are not listed.
Index = tuple[slice | EllipsisType, ...]

# Number of tiles read and written at the same time where nothing is computed. Each is held in memory twice.
THREADS = 2
# Zarr setting for writing. The Rust pipeline, which a user may have chosen, does not write atomically.
WRITING = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}


class Writer:
    """Writes regions of arrays. Each array is opened once, because its metadata costs one file access or request."""

    def __init__(self, find: "Callable[[str], ZarrArray]") -> None:
        self._find = find
        self._opened: dict[str, ZarrArray] = {}

    def write(self, name: str, region: Index, values: npt.NDArray[Any]) -> None:
        """Write a region of an array."""
        with zarr.config.set(WRITING):
            if name not in self._opened:
                self._opened[name] = writable(self._find(name))
            self._opened[name][region] = values


def write_each(write: Callable[[Tile], None], tiles: Iterable[Tile], step: Step) -> None:
    """Call a function that commits or mirrors one tile for each tile, in a few threads, and count the tiles."""
    # The setting is global. Each thread sets and resets it, and this outer setting makes both values equal.
    with zarr.config.set(WRITING), ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(write, tiles):
            step()
