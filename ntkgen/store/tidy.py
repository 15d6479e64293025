"""Repair of what an interrupted write or a damaged disk has left in a store, before the store is continued."""

import json
from typing import Any

from ntkgen.plan.tiles import Tile
from ntkgen.store.schema import Samples, create_first, sides_of
from ntkgen.store.store import KernelStore


def tidy(store: KernelStore, samples: Samples) -> None:
    """Repair what an interrupted write or a damaged disk has left in a store.

    Partial files are removed. Metadata and coordinates that are damaged or missing are written again. Chunks of the
    diagonal and of the logits that do not match their checksums are removed, so that they are computed again. The tiles
    are not read. The caller must hold the lock of the store, and no other process may write tiles.
    """
    store.folder.sweep()
    _remove_old_transposes(store)
    for name in [f"{array.name}/zarr.json" for array in store.arrays()]:
        if not _is_json(store.folder.read(name)):
            store.folder.remove(name)
    create_first(store.group, store.manifest, samples)
    for side in sides_of(store.grid):
        regions = (..., side.block.rows(store.grid.num_outputs)), (slice(side.block.start, side.block.stop), ...)
        for (name, key), region in zip(side.chunks(store.grid.num_planes), regions, strict=True):
            _remove_damaged(store, f"{name}/c/{'/'.join(map(str, key))}", region)
    if not store.missing_blocks():
        store.create_kernels()


def _remove_old_transposes(store: KernelStore) -> None:
    """Remove the transposes that an interrupted mirroring has written of tiles that are missing now.

    These tiles will be computed again. On another machine they can differ in their last bits, and the kernel would not
    be symmetric.
    """
    if store.manifest.layout != "upper":
        return
    missing = [Tile(tile.col, tile.row) for tile in store.missing_tiles() if tile.row != tile.col]
    for array in [array for array in store.arrays() if array.role == "kernel"]:
        files = store.folder.sizes(f"{array.name}/c")
        for chunk in (array.file(key) for tile in missing for key in store.chunks_of(array, tile)):
            if chunk in files:
                store.folder.remove(chunk)


def _remove_damaged(store: KernelStore, chunk: str, region: Any) -> None:
    """Remove a chunk that does not match its checksum, so that it is computed again."""
    try:
        _ = store.zarr_array(chunk.partition("/")[0])[region] if store.folder.has(chunk) else None
    except (ValueError, RuntimeError):
        store.folder.remove(chunk)


def _is_json(data: bytes | None) -> bool:
    try:
        json.loads(data or b"")
    except ValueError:
        return False
    return True
