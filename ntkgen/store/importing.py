"""Import of a kernel that this program's predecessor has written: a store with the same numbers, bit by bit.

`ntkgen.store.foreign` reads the source.
"""

import hashlib
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.files.lock import require_no_tile_writers, write_lock
from ntkgen.files.place import folder_of
from ntkgen.files.room import require_room
from ntkgen.jacobian.cost import JacobianPlan, NetworkProfile, sizes_for
from ntkgen.plan.plan import Environment, Plan
from ntkgen.plan.tiles import Tile, TileGrid, make_grid
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.foreign import ForeignKernel, SourceDescription, open_foreign
from ntkgen.store.manifest import IMPORTED, Manifest, check_identity
from ntkgen.store.opening import create_store, has_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore
from ntkgen.store.tidy import tidy
from ntkgen.store.writing import write_each

# Advice for a disk that is too small.
NO_ROOM = "Is the source on the same disk? Free disk space, or choose another `target`."


def import_kernel(
    source: str | PathLike[str] | Folder,
    target: str | PathLike[str] | Folder,
    given: SourceDescription,
    report: Report = ignore_report,
) -> KernelStore:
    """Convert a kernel of the predecessor into a store of the layout `upper`, with the same numbers.

    Only the upper triangle of the source is used. Within the tiles on the diagonal it is mirrored. If the number P of
    parameters is known, the attribute ``scale_factor`` is √P, so that `ntkgen.open` gives J Jᵀ. The same call continues
    an interrupted import.

    Args:
        source: Path or URL of a Zarr array, or path of a raw file.
        target: Path or URL of the store.
        given: Properties of the kernel that the source does not state.
        report: Function that is called as the stage ``imported`` proceeds.

    Raises:
        InputError: If the given properties do not match the source.
        StoreError: If the source is not a kernel of the predecessor, or not complete.
        FingerprintError: If the target holds another kernel.
        DiskSpaceError: If the disk has no space for the store.
    """
    source, target = folder_of(source), folder_of(target)
    _require_elsewhere(source, target)
    foreign = open_foreign(source, given)
    diagonal = foreign.read_diagonal() * given.scale
    target.require_writable()
    with write_lock(target):
        require_no_tile_writers(target)
        require_room(target, _missing_bytes(target, foreign), "the imported kernel", NO_ROOM)
        is_new = not has_store(target)
        store = _open_or_create(target, foreign, diagonal)
        _write_diagonal(store, diagonal)
        missing, total = store.missing_tiles(), store.grid.num_tiles

        def write(tile: Tile) -> None:
            store.commit_stored(tile, {foreign.dtype: foreign.read(*store.region(tile))})

        try:
            write_each(write, missing, counter(report, "imported", total - len(missing), total))
        except StoreError:  # the source is refused, and the new store is useless
            if is_new:
                target.clear()
            raise
        store.finalize()
    return store


def default_target(source: str) -> str:
    """Derive the path of the store from that of the source.

    >>> default_target("ckpt/ntk_float32.zarr/"), default_target("ntk_float16.bin")
    ('ckpt/ntk_float32.imported.zarr', 'ntk_float16.imported.zarr')

    Raises:
        InputError: If the source has no name.
    """
    whole = source.rstrip("/")
    if whole.rpartition("/")[2] in {"", ".", "..", "~"}:
        raise InputError(
            f"The path {source} gives no name for the new store: expected a path that ends in a name. Is it the "
            "current folder? Give the path of the store as `target`."
        )
    return f"{whole.removesuffix('.zarr').removesuffix('.bin')}.imported.zarr"


def _require_elsewhere(source: Folder, target: Folder) -> None:
    places = [_resolved(source), _resolved(target)]
    if f"{places[1]}/".startswith(f"{places[0]}/"):
        raise InputError(
            f"{source} cannot be imported into its own folder: expected another place for the store, found {target}. "
            "Should the store replace the source? Choose another `target`, and remove the source afterwards."
        )


def _resolved(folder: Folder) -> str:
    return str(folder.path.resolve()) if isinstance(folder, LocalFolder) else str(folder)


def _open_or_create(target: Folder, foreign: ForeignKernel, diagonal: npt.NDArray[np.float64]) -> KernelStore:
    given = foreign.given
    identity = _identity(foreign, diagonal)
    samples = Samples(np.arange(given.num_samples), np.full(given.num_samples, -1))
    if has_store(target):
        store = open_store(target, mode="r+")
        check_identity(str(target), store.manifest, identity)
    else:
        provenance = Provenance.of({IMPORTED: foreign.short_name, "quantity": given.quantity})
        plan = _plan(given)
        store = create_store(target, Manifest(identity, provenance, plan, (foreign.dtype,), "upper"), samples)
    tidy(store, samples)
    return store


def _identity(foreign: ForeignKernel, diagonal: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Collect the properties that a continued import must match. A hash of the diagonal represents all entries."""
    given = foreign.given
    return {
        IMPORTED: foreign.short_name,
        "num_samples": given.num_samples,
        "num_outputs": given.num_outputs,
        "num_params": given.num_params,
        "scale_factor": given.scale,
        "diagonal": hashlib.sha256(diagonal.tobytes()).hexdigest(),
        "dtypes": [foreign.dtype],
        "tile_side": _grid(given).side,
    }


def _grid(given: SourceDescription) -> TileGrid:
    return make_grid(given.num_samples, given.num_outputs, given.tile_side)


def _plan(given: SourceDescription) -> Plan:
    """Make the empty plan of an imported kernel: no layers, no logits, and an unknown precision."""
    m = given.num_outputs
    jacobian = JacobianPlan("unknown", m, (), 0, (), sizes_for("unknown", 1, 1))
    profile = NetworkProfile(m, given.num_params or 0, (), 0, (), activation_numbers=0, input_numbers=0, num_logits=0)
    return Plan(_grid(given), jacobian, profile, Environment("unknown", "unknown", "unknown", 1))


def _write_diagonal(store: KernelStore, diagonal: npt.NDArray[np.float64]) -> None:
    for index in store.missing_blocks():
        block = store.grid.block(index)
        rows = block.rows(store.grid.num_outputs)
        store.commit_block(index, diagonal[rows], np.empty((len(block), 0)))
    store.create_kernels()


def _missing_bytes(target: Folder, foreign: ForeignKernel) -> int:
    """Count the bytes that are still to be written."""
    grid = _grid(foreign.given)
    whole = grid.num_tiles * grid.side**2 * np.dtype(foreign.dtype).itemsize
    return whole - sum(target.sizes(f"ntk_{foreign.dtype}").values())
