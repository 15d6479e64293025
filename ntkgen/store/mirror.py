"""The other triangle of a store that holds one, written beside it."""

from functools import partial

import numpy as np
import numpy.typing as npt

from ntkgen.errors import InputError, StoreError
from ntkgen.files.lock import require_no_tile_writers, write_lock
from ntkgen.files.room import require_room
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.opening import open_store
from ntkgen.store.remedy import Remedy
from ntkgen.store.store import KernelStore
from ntkgen.store.writing import write_each

# What to do where the disk is too small.
NO_ROOM = (
    "Is one triangle enough? `ntkgen.open` reads both from it. Otherwise free some, and run the same command again."
)


def mirror(store: KernelStore, report: Report = ignore_report) -> int:
    """Write the other triangle of a finished store of the layout `upper`, and say how many tiles were written.

    Each tile is read, compared with its checksum, and its transpose stored bit by bit, in every dtype. An interrupted
    mirroring goes on with the same call: a transpose is done when its chunk has its exact size. Until the last write
    the store has the layout `upper`, and readers do not look at what is below the diagonal; then it is, to the byte,
    what ``--layout full`` makes. Its certificate stays: it is of the same matrix. A store that is full is left alone.

    Args:
        store: What is to be mirrored; it is opened anew for writing, under its lock.
        report: Called as the stage ``mirrored`` proceeds.

    Raises:
        InputError: If the kernel is rectangular, and has no triangles.
        StoreError: If tiles are missing or damaged.
        DiskSpaceError: If the disk has no room for the other triangle.
        StoreLockedError: If another process is writing the store.
    """
    _require_square(store)
    with write_lock(store.folder):
        require_no_tile_writers(store.folder)
        store = open_store(store.folder, mode="r+")
        if store.manifest.layout == "full":
            return 0
        _require_finished(store)
        store.folder.sweep()
        missing = store.missing_tiles("full")
        require_room(store.folder, len(missing) * store.tile_bytes, "the other triangle", NO_ROOM)
        total = store.grid.num_tiles - store.grid.num_blocks
        write_each(partial(mirror_tile, store), missing, counter(report, "mirrored", total - len(missing), total))
        store.finalize("full")
    return len(missing)


def mirror_tile(store: KernelStore, tile: Tile) -> None:
    """Write the transpose of a stored tile off the diagonal on the other side.

    Raises:
        StoreError: If the tile is damaged, or gone.
    """
    for name in store.array_names:
        store.write_transpose(name, tile, _read_stored(store, name, tile))


def _read_stored(store: KernelStore, name: str, tile: Tile) -> npt.NDArray[np.floating]:
    """Read a whole tile as it is stored.

    Raises:
        StoreError: If it is damaged, or gone.
    """
    try:
        values = np.asarray(store.zarr_array(name)[store.region(tile)])
        found = "" if np.isfinite(values).all() else "what is not finite, as a file that has gone"
    except (ValueError, RuntimeError) as error:
        found = str(error)
    if found:
        raise StoreError(
            f"Tile ({tile.row}, {tile.col}) of {name} in {store.name} is damaged: expected finite numbers that match "
            f"their checksum, found {found}. A disk error or an interrupted copy? {_remedy(store).repair}"
        )
    return values


def _remedy(store: KernelStore) -> Remedy:
    return Remedy.of(store.name, store.manifest)


def _require_square(store: KernelStore) -> None:
    """Refuse a kernel without triangles.

    Raises:
        InputError: If it is rectangular.
    """
    if not store.grid.is_symmetric:
        raise InputError(
            f"The kernel at {store.name} has no triangles: expected one whose columns are the samples of its rows, "
            f"found {store.grid.num_rows} × {store.grid.num_cols}, of rows against other samples. It is stored whole "
            "already; there is nothing to do."
        )


def _require_finished(store: KernelStore) -> None:
    """Refuse a store that lacks something.

    Raises:
        StoreError: If it does; the message counts the tiles.
    """
    if not store.is_complete:
        raise StoreError(
            f"The store at {store.name} is not finished: expected {store.grid.num_tiles} tiles, what belongs to them "
            f"and its mark as complete, found {len(store.missing_tiles())} tiles missing. Was it interrupted, or a "
            f"file removed? Finish it with the same `{_remedy(store).command}`, then mirror it."
        )
