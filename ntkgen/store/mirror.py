"""Mirroring: a store that holds the upper triangle of a kernel gets the lower triangle too."""

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

# Advice for a disk that is too small.
NO_ROOM = (
    "Is one triangle enough? `ntkgen.open` gives the full matrix from one triangle. Otherwise free disk space, and "
    "run the same command again."
)


def mirror(store: KernelStore, report: Report = ignore_report) -> int:
    """Write the lower triangle of a finished store of the layout `upper`, and return the number of tiles written.

    Each tile is read and compared with its checksum, and its transpose is stored bit by bit, in every dtype. The same
    call continues an interrupted mirroring: a transpose is complete when its chunk has its exact size. Until the last
    write the store has the layout `upper`, and readers ignore what is below the diagonal. Afterwards the bytes of the
    store equal those that ``--layout full`` writes. The certificate (the measured error bound of the kernel) stays
    valid, because the matrix is the same. A store of the layout `full` is not changed.

    Args:
        store: Store to mirror. It is opened again for writing, under its lock.
        report: Function that is called as the stage ``mirrored`` proceeds.

    Raises:
        InputError: If the kernel is rectangular and therefore has no triangles.
        StoreError: If tiles are missing or damaged.
        DiskSpaceError: If the disk has no space for the other triangle.
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
    """Write the transpose of a stored off-diagonal tile to its position below the diagonal.

    Raises:
        StoreError: If the tile is damaged or missing.
    """
    for name in store.array_names:
        store.write_transpose(name, tile, _read_stored(store, name, tile))


def _read_stored(store: KernelStore, name: str, tile: Tile) -> npt.NDArray[np.floating]:
    """Read a whole tile as it is stored.

    Raises:
        StoreError: If the tile is damaged or missing.
    """
    try:
        values = np.asarray(store.zarr_array(name)[(..., *store.region(tile))])
        fault = "" if np.isfinite(values).all() else "entries that are not finite, which a missing file also gives"
    except (ValueError, RuntimeError) as error:
        fault = str(error)
    if fault:
        raise StoreError(
            f"Tile ({tile.row}, {tile.col}) of {name} in {store.name} is damaged: expected finite numbers that match "
            f"their checksum, found {fault}. A disk error or an interrupted copy? {_remedy(store).repair}"
        )
    return values


def _remedy(store: KernelStore) -> Remedy:
    return Remedy.of(store.name, store.manifest)


def _require_square(store: KernelStore) -> None:
    """Refuse a kernel without triangles.

    Raises:
        InputError: If the kernel is rectangular.
    """
    if not store.grid.is_symmetric:
        raise InputError(
            f"The kernel at {store.name} has no triangles: expected a symmetric kernel with the same samples in rows "
            f"and columns, found {store.grid.num_rows} × {store.grid.num_cols}, with other samples in its columns. "
            "A rectangular kernel is always stored whole. There is nothing to do."
        )


def _require_finished(store: KernelStore) -> None:
    """Refuse a store that is not complete.

    Raises:
        StoreError: If tiles, other arrays or the mark of completion are missing. The message gives the number of tiles.
    """
    if not store.is_complete:
        raise StoreError(
            f"The store at {store.name} is not finished: expected {store.grid.num_tiles} tiles, all other arrays and "
            f"the mark of completion, found {len(store.missing_tiles())} tiles missing. Was the run interrupted, or a "
            f"file removed? Finish it with the same `{_remedy(store).command}`, then mirror it."
        )
