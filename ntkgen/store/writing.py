"""How chunks are written: whole, in place, and several tiles at a time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import zarr

from ntkgen.plan.tiles import Tile
from ntkgen.progress import Step
from ntkgen.store.schema import writable

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

# Tiles that are read and written at a time where nothing is computed; each is held twice.
THREADS = 2
# The Rust pipeline, if the user has chosen it, does not write atomically.
WRITING = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}


class Writer:
    """Writes regions of arrays, each of which is opened once: its metadata is a file, or a request, of its own."""

    def __init__(self, find: "Callable[[str], ZarrArray]") -> None:
        self._find = find
        self._opened: dict[str, ZarrArray] = {}

    def write(self, name: str, region: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        """Write a region of an array."""
        with zarr.config.set(WRITING):
            if name not in self._opened:
                self._opened[name] = writable(self._find(name))
            self._opened[name][region] = values


def write_each(write: Callable[[Tile], None], tiles: Iterable[Tile], step: Step) -> None:
    """Write some tiles in a few threads, by a function that commits or mirrors one; count each."""
    # around all threads: what each of them sets, and sets back, is then the same
    with zarr.config.set(WRITING), ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(write, tiles):
            step()
