"""Every file of a store read; those named that are missing, cut short or damaged, and these removed on request.

Of each array it is known beforehand which files it has, and how long they are: its own metadata is not trusted, but
compared. A file is read whole, by several threads at a time, and nothing of it is kept.
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

# Threads that read, and the bytes that they may hold together.
THREADS, HELD_BYTES = 8, 1 << 29
# Small files are read several at a turn: the most files of a turn, and the most bytes.
TURN_FILES, TURN_BYTES = 256, 1 << 22
LABELS = ("row_label", "col_label")


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file of a store.

    Attributes:
        file: Its name, below the store.
        problem: ``missing``, ``cut short``, ``too long``, ``damaged`` by its checksum, ``not finite``, ``unreadable``
            where the disk has lost it, ``different`` from what the network of the store gives.
        tile: The tile that it belongs to, as it is computed: of a symmetric kernel, above the diagonal.
    """

    file: str
    problem: str
    tile: Tile | None = None

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values."""
        return {**vars(self), "tile": None if self.tile is None else self.tile.to_json()}


# reading --------------------------------------------------------------------------------------------------------------


def find_damage(store: KernelStore, report: Report = ignore_report) -> list[Damage]:
    """Read every file of a store, and compare it with its size and its checksum; what it holds must be finite.

    Nothing is written. What an unfinished store has not computed yet is no damage; see `unfinished_tiles`. Damage is
    named array by array, in the order of the chunks. Costs one pass over the store, and one listing per array.

    Args:
        store: What is read, on a disk or in an object store.
        report: Called as the stage ``files`` proceeds.
    """
    arrays = store.arrays()
    total, done = sum(sum(1 for _ in array.chunk_keys()) for array in arrays), 0
    found: list[Damage] = []
    for number, damage in _read(store, arrays):
        found += damage
        done += number
        report("files", done, total)
    return found


def _read(store: KernelStore, arrays: Sequence[StoredArray]) -> Iterator[tuple[int, list[Damage]]]:
    """Examine the files of some arrays, in several threads; give for each turn how many there were, and the damage."""
    threads = max(1, min(THREADS, HELD_BYTES // max(array.file_bytes for array in arrays)))
    waiting: deque[tuple[int, Future[list[Damage]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="ntkgen-verify") as pool:
        for turn in _turns(store, arrays):
            waiting.append((turn.num_files, pool.submit(turn.examine)))
            if len(waiting) > 2 * threads:
                number, first = waiting.popleft()
                yield number, first.result()
        for number, rest in waiting:
            yield number, rest.result()


@dataclass(frozen=True)
class _Turn:
    """Some files of one array, for a thread to examine; or, without any, its metadata."""

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
            if error.errno != errno.EIO:  # of all others a file is not to blame
                raise
            return "unreadable"
        return "missing" if data is None else _content_problem(self.array, key, data)


def _turns(store: KernelStore, arrays: Sequence[StoredArray]) -> Iterator[_Turn]:
    for array in arrays:
        sizes = store.folder.sizes(f"{array.name}/c")
        yield _Turn(store, array, (), sizes)
        keys, count = array.chunk_keys(), max(1, min(TURN_FILES, TURN_BYTES // array.file_bytes))
        while turn := tuple(itertools.islice(keys, count)):
            yield _Turn(store, array, turn, sizes)


def _size_problem(array: StoredArray, size: int) -> str | None:
    if size == array.file_bytes:
        return None
    return "cut short" if size < array.file_bytes else "too long"


def _content_problem(array: StoredArray, key: Key, data: bytes) -> str | None:
    """Compare a chunk with the checksum at its end, and look for what is not finite within the array."""
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
    """Compare the metadata of an array with what it must be, and its attributes with the copy of a finished store."""
    data = store.folder.read(f"{array.name}/zarr.json")
    if data is None:
        return "missing" if is_used or not _is_made_late(store, array) else None
    try:
        values = json.loads(data)
        found, expected = (_without_attributes(each) for each in (ArrayV3Metadata.from_dict(values), _metadata(array)))
        is_right = found == expected and _lasting(values) == _lasting(_gathered(store).get(array.name, values))
    except (ValueError, KeyError, TypeError, AttributeError):  # what is read may be anything
        is_right = False
    return None if is_right else "damaged"


def _metadata(array: StoredArray) -> ArrayV3Metadata:
    made = create_array(zarr.create_group(MemoryStore()), array)
    assert isinstance(made.metadata, ArrayV3Metadata)
    return made.metadata


def _without_attributes(metadata: ArrayV3Metadata) -> dict[str, Any]:
    return {name: value for name, value in metadata.to_dict().items() if name != "attributes"}


def _lasting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Take the attributes of an array, but for the one that an interrupted mirroring may have changed already."""
    return {name: value for name, value in values["attributes"].items() if name != "storage_mode"}


def _gathered(store: KernelStore) -> Mapping[str, Any]:
    """Read the metadata that a finished store has gathered in one file."""
    root = json.loads(store.folder.read(ROOT) or b"{}")
    gathered: Mapping[str, Any] = (root.get("consolidated_metadata") or {}).get("metadata", {})
    return gathered


# what there should be -------------------------------------------------------------------------------------------------


def _tile(grid: TileGrid, array: StoredArray, key: Key) -> Tile | None:
    if not array.is_of_tiles:
        return None
    row, col = array.place(key)
    return Tile(col, row) if grid.is_symmetric and row > col else Tile(row, col)


def _is_made_late(store: KernelStore, array: StoredArray) -> bool:
    """Say whether an array is made after others, and need not be there in an unfinished store."""
    return array.is_of_tiles and not store.manifest.is_complete


def _may_be_absent(store: KernelStore, array: StoredArray, key: Key) -> bool:
    """Say whether a file needs not be there: what is not computed yet, and labels of -1, as nothing reads.

    Data sets have labels, and of a symmetric kernel columns have those of the rows. The counts of a tile are written
    before it, so that one of them may be missing alone.
    """
    if array.name in LABELS:
        is_of_data = not store.manifest.provenance.is_empty and not store.manifest.is_imported
        return not is_of_data and not (
            store.grid.is_symmetric and any(store.folder.has(f"{each}/c/0") for each in LABELS)
        )
    if store.manifest.is_complete or array.role == "coordinate":
        return False
    return array.role != "counts" or not store.folder.has(_file_of_counted(store, key))


def _file_of_counted(store: KernelStore, key: Key) -> str:
    """Name a file of the tile whose counts are in a chunk of `underflow_float16`."""
    plane = "0/" if store.grid.num_planes > 1 else ""
    return f"ntk_float16/c/{plane}{key[0]}/{key[1]}"


# what is to be done ---------------------------------------------------------------------------------------------------


def unfinished_tiles(store: KernelStore, found: Sequence[Damage]) -> list[Tile]:
    """List the tiles that an unfinished store has not computed yet: those that are missing, and not by damage."""
    if store.manifest.is_complete:
        return []
    damaged = {damage.tile for damage in found}
    return [tile for tile in store.missing_tiles() if tile not in damaged]


def whole_tiles(store: KernelStore, found: Sequence[Damage]) -> list[Tile]:
    """List the tiles that are there, and have no damage."""
    absent = {damage.tile for damage in found} | set(unfinished_tiles(store, found))
    return [tile for tile in store.grid.tiles() if tile not in absent]


def files_to_remove(store: KernelStore, found: Sequence[Damage]) -> list[str]:
    """Name the files that must go so that everything is made anew that is damaged; those alone that are there.

    The counts of a tile are written with the tile, which then must go too.
    """
    files = [damage.file for damage in found]
    for name in [name for name in files if name.startswith(f"{UNDERFLOW}/c/")]:
        row, col = name.split("/")[2:4]
        files.append(_file_of_counted(store, (int(row), int(col))))
    missing = {damage.file for damage in found if damage.problem == "missing"}
    return [name for name in dict.fromkeys(files) if name not in missing and store.folder.has(name)]


def repair(store: KernelStore, found: Sequence[Damage]) -> list[str]:
    """Remove what is damaged, so that the command that made the store makes it anew; only under its lock, and alone.

    The manifest says first that the store is not finished, so that it is not taken for whole meanwhile. Of a store
    without damage only what interrupted writes have left behind is removed.

    Returns:
        The names of the files that were removed.
    """
    store.folder.sweep()
    if not found:
        return []
    unfinished = dataclasses.replace(store.manifest, is_complete=False, certificate=None)
    if unfinished != store.manifest:
        store.set_manifest(unfinished)
    files = files_to_remove(store, found)
    with ThreadPoolExecutor(THREADS) as pool:
        deque(pool.map(store.folder.remove, files), maxlen=0)  # raises what a thread has raised
    return files


def next_step(store: KernelStore, found: Sequence[Damage]) -> str:
    """Say what makes a store whole; after a repair, the command that made it."""
    first = f"run `ntkgen verify --repair {store.name}`, then " if files_to_remove(store, found) else ""
    command = Remedy.of(store.name, store.manifest).command
    return f"{first}run the same `{command}` again: it makes what is missing anew"


def explain_damage(store: KernelStore, found: Sequence[Damage]) -> str:
    """Say in one line what is wrong with a store, and what to do."""
    files = first_few(f"{damage.file} {damage.problem}" for damage in found)
    return (
        f"The store at {store.name} is not whole: expected every file with its exact size, its checksum and the "
        f"numbers of its network, found {len(found)} otherwise ({files}). An interrupted computation or copy, or a "
        f"disk error? To mend it, {next_step(store, found)}."
    )


def explain_unfinished(store: KernelStore, unfinished: Sequence[Tile]) -> str:
    """Say in one line what an unfinished store lacks, and what to do."""
    total, command = store.grid.num_tiles, Remedy.of(store.name, store.manifest).command
    return (
        f"The store at {store.name} is not finished: expected all of its {total} tiles and the mark of completion, "
        f"found {total - len(unfinished)} tiles. Was its computation interrupted, or is it under way? Run the same "
        f"`{command}` again: it goes on from there."
    )
