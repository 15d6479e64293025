"""Verification of a store: all files are read, missing and damaged ones are listed, and on request removed.

The manifest determines the files of each array and their sizes. The metadata of an array is not trusted but compared
with the expected metadata. Several threads read whole files, and no contents are kept.
"""

import dataclasses
import errno
import itertools
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import MemoryStore

from ntkgen.plan.tiles import Tile, TileGrid
from ntkgen.progress import Report, ignore_report
from ntkgen.store.describe import first_few
from ntkgen.store.opening import ROOT
from ntkgen.store.remedy import Remedy
from ntkgen.store.schema import CHECKSUM_BYTES, UNDERFLOW, Key, StoredArray, create_array
from ntkgen.store.store import KernelStore

# Number of reading threads, and maximum total size of the files that they hold, in bytes.
THREADS, HELD_BYTES = 8, 1 << 29
# Maximum number of files that a thread examines per task, and their maximum total size in bytes.
BATCH_FILES, BATCH_BYTES = 256, 1 << 22
LABELS = ("row_label", "col_label")


@dataclass(frozen=True)
class Damage:
    """The damage of one file of a store.

    Attributes:
        file: Path of the file, relative to the store.
        problem: ``missing``, ``cut short``, ``too long``, ``damaged`` (its checksum does not match), ``not finite``,
            ``unreadable`` (the disk reports an error), or ``different`` (recomputation gives other numbers).
        tile: Tile that the file belongs to. In a symmetric kernel this is the tile on or above the diagonal.
    """

    file: str
    problem: str
    tile: Tile | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {**vars(self), "tile": None if self.tile is None else list(self.tile)}


# reading --------------------------------------------------------------------------------------------------------------


def find_damage(store: KernelStore, report: Report = ignore_report) -> list[Damage]:
    """Read every file of a store, compare its size and its checksum, and require finite numbers.

    Nothing is written. A tile that an unfinished store has not computed yet is not damage, and `unfinished_tiles` lists
    it. Damage is listed array by array, in the order of the chunks. Costs one pass over the store, and one listing per
    array.

    Args:
        store: Store on a disk or in an object store.
        report: Function that is called as the stage ``files`` proceeds.
    """
    arrays = store.arrays()
    total, done = sum(sum(1 for _ in array.chunk_keys()) for array in arrays), 0
    damaged: list[Damage] = []
    for number, damage in _read(store, arrays):
        damaged += damage
        done += number
        report("files", done, total)
    return damaged


def _read(store: KernelStore, arrays: Sequence[StoredArray]) -> Iterator[tuple[int, list[Damage]]]:
    """Examine the files of arrays in several threads. Yield for each batch the number of its files and the damage."""
    threads = max(1, min(THREADS, HELD_BYTES // max(array.file_bytes for array in arrays)))
    waiting: deque[tuple[int, Future[list[Damage]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ntkgen-verify") as pool:
        for batch in _batches(store, arrays):
            waiting.append((batch.num_files, pool.submit(batch.examine)))
            if len(waiting) > 2 * threads:
                number, first = waiting.popleft()
                yield number, first.result()
        for number, rest in waiting:
            yield number, rest.result()


@dataclass(frozen=True)
class _FileBatch:
    """Chunk files of one array that a thread examines. A batch without keys examines the metadata of the array."""

    store: KernelStore
    array: StoredArray
    keys: Sequence[Key]
    sizes: Mapping[str, int]

    @property
    def num_files(self) -> int:
        return len(self.keys)

    def examine(self) -> list[Damage]:
        if not self.keys:
            problem = _metadata_problem(self.store, self.array, is_used=bool(self.sizes))
            return [Damage(f"{self.array.name}/zarr.json", problem)] if problem else []
        problems = ((key, self._problem(key)) for key in self.keys)
        return [
            Damage(self.array.file(key), problem, _tile(self.store.grid, self.array, key))
            for key, problem in problems
            if problem
        ]

    def _problem(self, key: Key) -> str | None:
        file = self.array.file(key)
        if file not in self.sizes:
            return None if _may_be_absent(self.store, self.array, key) else "missing"
        if problem := _size_problem(self.array, self.sizes[file]):
            return problem
        try:
            data = self.store.folder.read(file)
        except OSError as error:
            if error.errno != errno.EIO:  # no other error shows damage of the file
                raise
            return "unreadable"
        return "missing" if data is None else _content_problem(self.array, key, data)


def _batches(store: KernelStore, arrays: Sequence[StoredArray]) -> Iterator[_FileBatch]:
    for array in arrays:
        sizes = store.folder.sizes(f"{array.name}/c")
        yield _FileBatch(store, array, (), sizes)
        keys, count = array.chunk_keys(), max(1, min(BATCH_FILES, BATCH_BYTES // array.file_bytes))
        while batch := tuple(itertools.islice(keys, count)):
            yield _FileBatch(store, array, batch, sizes)


def _size_problem(array: StoredArray, size: int) -> str | None:
    if size == array.file_bytes:
        return None
    return "cut short" if size < array.file_bytes else "too long"


def _content_problem(array: StoredArray, key: Key, data: bytes) -> str | None:
    """Compare a chunk with the checksum at its end, and look for entries that are not finite."""
    if problem := _size_problem(array, len(data)):
        return problem
    payload = np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES]
    if google_crc32c.value(payload) != int.from_bytes(data[-CHECKSUM_BYTES:], "little"):
        return "damaged"
    dtype = np.dtype(array.dtype).newbyteorder("<")
    if dtype.kind != "f":
        return None
    values = payload.view(dtype).reshape(array.chunks)[array.inside(key)]
    return None if np.isfinite(values).all() else "not finite"


def _metadata_problem(store: KernelStore, array: StoredArray, *, is_used: bool) -> str | None:
    """Compare the metadata of an array with the expected metadata, and its attributes with the consolidated copy."""
    data = store.folder.read(f"{array.name}/zarr.json")
    if data is None:
        return "missing" if is_used or not _is_made_late(store, array) else None
    try:
        values = json.loads(data)
        stored, expected = map(_without_attributes, (ArrayV3Metadata.from_dict(values), _metadata(array)))
        copy = _consolidated(store).get(array.name, values)
        is_right = stored == expected and _fixed_attributes(values) == _fixed_attributes(copy)
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged file may hold any JSON value
        is_right = False
    return None if is_right else "damaged"


def _metadata(array: StoredArray) -> ArrayV3Metadata:
    example = create_array(zarr.create_group(MemoryStore()), array)
    assert isinstance(example.metadata, ArrayV3Metadata)
    return example.metadata


def _without_attributes(metadata: ArrayV3Metadata) -> dict[str, Any]:
    return {name: value for name, value in metadata.to_dict().items() if name != "attributes"}


def _fixed_attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of an array without ``storage_mode``, which an interrupted mirroring may have changed."""
    return {name: value for name, value in values["attributes"].items() if name != "storage_mode"}


def _consolidated(store: KernelStore) -> Mapping[str, Any]:
    """Read the consolidated metadata of a finished store, by the name of the array."""
    root = json.loads(store.folder.read(ROOT) or b"{}")
    consolidated: Mapping[str, Any] = (root.get("consolidated_metadata") or {}).get("metadata", {})
    return consolidated


# expected files -------------------------------------------------------------------------------------------------------


def _tile(grid: TileGrid, array: StoredArray, key: Key) -> Tile | None:
    if not array.is_of_tiles:
        return None
    row, col = array.place(key)
    return Tile(col, row) if grid.is_symmetric and row > col else Tile(row, col)


def _is_made_late(store: KernelStore, array: StoredArray) -> bool:
    """Tell whether an array is created after others and can be absent from an unfinished store."""
    return array.is_of_tiles and not store.manifest.is_complete


def _may_be_absent(store: KernelStore, array: StoredArray, key: Key) -> bool:
    """Tell whether a chunk may be absent: one that is not computed yet, or labels of -1, because absent chunks read so.

    Labels of a data set must exist. In a symmetric kernel both label arrays exist or none. The counts of a tile must
    exist if the tile does, because they are written before it.
    """
    if array.name in LABELS:
        known = store.manifest.provenance
        has_labels = not known.is_empty and not store.manifest.is_imported and known.has_labels is not False
        return not has_labels and not (
            store.grid.is_symmetric and any(store.folder.has(f"{name}/c/0") for name in LABELS)
        )
    if store.manifest.is_complete or array.role == "coordinate":
        return False
    return array.role != "counts" or not store.folder.has(_file_of_counted(store, key))


def _file_of_counted(store: KernelStore, key: Key) -> str:
    """Return the path of a file of the tile whose counts are in the given chunk of `underflow_float16`."""
    plane = "0/" if store.grid.num_planes > 1 else ""
    return f"ntk_float16/c/{plane}{key[0]}/{key[1]}"


# repair ---------------------------------------------------------------------------------------------------------------


def unfinished_tiles(store: KernelStore, found: Sequence[Damage]) -> list[Tile]:
    """List the tiles that an unfinished store has not computed yet. Tiles that are missing by damage are left out."""
    if store.manifest.is_complete:
        return []
    damaged = {damage.tile for damage in found}
    return [tile for tile in store.missing_tiles() if tile not in damaged]


def whole_tiles(store: KernelStore, found: Sequence[Damage]) -> list[Tile]:
    """List the stored tiles without damage."""
    absent = {damage.tile for damage in found} | set(unfinished_tiles(store, found))
    return [tile for tile in store.grid.tiles() if tile not in absent]


def files_to_remove(store: KernelStore, found: Sequence[Damage]) -> list[str]:
    """List the existing files that must be removed so that all damaged files are written again.

    If the counts of a tile are damaged, the tile must be removed too, because both are written together.
    """
    files = [damage.file for damage in found]
    for name in [name for name in files if name.startswith(f"{UNDERFLOW}/c/")]:
        row, col = name.split("/")[2:4]
        files.append(_file_of_counted(store, (int(row), int(col))))
    missing = {damage.file for damage in found if damage.problem == "missing"}
    return [name for name in dict.fromkeys(files) if name not in missing and store.folder.has(name)]


def repair(store: KernelStore, found: Sequence[Damage]) -> list[str]:
    """Remove damaged files, so that the command that wrote the store writes them again.

    Before that, the store is marked as unfinished, so that no other process takes it for complete. In a store without
    damage, only the partial files of interrupted writes are removed. The caller must hold the lock of the store, and no
    other process may write tiles.

    Returns:
        The paths of the removed files.
    """
    store.folder.sweep()
    if not found:
        return []
    unfinished = dataclasses.replace(store.manifest, is_complete=False, certificate=None)
    if unfinished != store.manifest:
        store.set_manifest(unfinished)
    files = files_to_remove(store, found)
    with ThreadPoolExecutor(THREADS) as pool:
        deque(pool.map(store.folder.remove, files), maxlen=0)  # raises the errors of the threads
    return files


def next_step(store: KernelStore, found: Sequence[Damage]) -> str:
    """Return the commands that restore a damaged store. After a repair, this is only the command that wrote it."""
    first = f"run `ntkgen verify --repair {store.name}`, then " if files_to_remove(store, found) else ""
    command = Remedy.of(store.name, store.manifest).command
    return f"{first}run the same `{command}` again, which writes the missing files again"


def explain_damage(store: KernelStore, found: Sequence[Damage]) -> str:
    """Describe the damage of a store in one line, with the advice."""
    files = first_few(f"{damage.file} {damage.problem}" for damage in found)
    return (
        f"The store at {store.name} is damaged: expected every file with its exact size, its checksum and the numbers "
        f"of its network, found {len(found)} wrong or missing files ({files}). An interrupted computation or copy, or "
        f"a disk error? To repair it, {next_step(store, found)}."
    )


def explain_unfinished(store: KernelStore, unfinished: Sequence[Tile]) -> str:
    """Describe in one line the missing tiles of an unfinished store, with the advice."""
    total, command = store.grid.num_tiles, Remedy.of(store.name, store.manifest).command
    return (
        f"The store at {store.name} is not finished: expected all of its {total} tiles and the mark of completion, "
        f"found {total - len(unfinished)} tiles. Was its computation interrupted, or is it still running? Run the same "
        f"`{command}` again to continue it."
    )
