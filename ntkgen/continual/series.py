"""Arrays that grow along time on disk: an ordinary Zarr group, whole up to the last finished time after any kill.

Every array that grows has a time axis first, and one chunk per time or a few hundred times per chunk. The group's
``zarr.json`` holds the metadata of all arrays ("consolidated metadata"), so that one atomic write of this file adds a
time to all arrays of an axis at once. What a kill leaves behind that write is not visible. The metadata of single
arrays are brought up to date by `Series.sync`; until then they describe fewer times.
"""

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import Folder
from ntkgen.store.schema import CHECKSUM_BYTES, StoredArray, create_array, writable

if TYPE_CHECKING:
    import xarray

    Metadata = dict[str, Any]

# Times in a chunk of an array that holds a few numbers per time.
TIMES_PER_CHUNK = 512
# An array with more numbers per time has a chunk of its own for each time.
FEW_NUMBERS = 64
ROOT = "zarr.json"
# What stands for the length of a time axis until it is written.
LENGTH_OF = "<ntkgen length of> "
# The attribute of an array that grows.
GROWS = "grows"


@dataclass(frozen=True)
class GrowingArray:
    """An array of a series.

    Attributes:
        name: Name in the group.
        dtype: Dtype of the numbers.
        shape: Shape of the values of one time.
        dims: Names of the axes. The first is the time axis that the array grows along.
        attributes: Attributes by the CF conventions.
        separator: What stands between the numbers in the name of a chunk. A dot needs no new folder for each time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    separator: Literal["/", "."] = "."

    @property
    def times_per_chunk(self) -> int:
        """Number of times in a chunk."""
        return TIMES_PER_CHUNK if math.prod(self.shape) <= FEW_NUMBERS else 1

    @property
    def stored(self) -> StoredArray:
        """The array before its first time."""
        attributes = {**self.attributes, GROWS: True}
        chunks = (self.times_per_chunk, *(max(1, length) for length in self.shape))
        return StoredArray(self.name, self.dtype, (0, *self.shape), chunks, self.dims, attributes)

    def file(self, time: int) -> str:
        """Name the file with the values of a time."""
        numbers = (time // self.times_per_chunk, *(0 for _ in self.shape))
        return f"{self.name}/{self.separator.join(['c', *map(str, numbers)])}"


@dataclass(frozen=True, eq=False)
class FixedArray:
    """An array of a series that is written once."""

    name: str
    values: npt.NDArray[Any]
    dims: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Series:
    """Arrays that grow along time, open for appending; one process writes them."""

    def __init__(self, folder: Folder, arrays: Mapping[str, GrowingArray], root: "Metadata") -> None:
        self.folder = folder
        self._arrays = dict(arrays)
        self._root = root
        self._text = _split_at_lengths(root, arrays)
        self._last_chunks: dict[str, tuple[int, npt.NDArray[Any]]] = {}  # by array: the first time, and the values

    @classmethod
    def create(
        cls,
        folder: Folder,
        growing: list[GrowingArray],
        fixed: list[FixedArray],
        attributes: Mapping[str, Any],
    ) -> "Series":
        """Create a group without any times. The group is there when its ``zarr.json`` is.

        Raises:
            InputError: If there is a group already.
        """
        if folder.has(ROOT):
            raise InputError(
                f"There is a Zarr group at {folder}: expected nothing, because a new series was to begin there. Was it "
                "made by another run? Choose another place, or remove it."
            )
        files: dict[str, Any] = {}
        group = zarr.create_group(zarr.storage.MemoryStore(files), zarr_format=3, attributes=dict(attributes))
        for array in growing:
            create_array(group, array.stored, array.separator)
        for each in fixed:
            shape = each.values.shape
            stored = StoredArray(each.name, str(each.values.dtype), shape, shape, each.dims, each.attributes)
            writable(create_array(group, stored))[...] = each.values
        data = {key: bytes(value.to_bytes()) for key, value in files.items()}
        names = [*(array.name for array in growing), *(each.name for each in fixed)]
        nodes = {name: json.loads(data[f"{name}/{ROOT}"]) for name in names}
        root: Metadata = json.loads(data.pop(ROOT))
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
        for key, content in data.items():
            folder.write(key, content)
        folder.write(ROOT, json.dumps(root).encode())
        return cls(folder, {array.name: array for array in growing}, root)

    @classmethod
    def open(cls, folder: Folder) -> "Series":
        """Open a group to append to it.

        Raises:
            StoreError: If there is none, or it is not one of these.
        """
        series = cls._as_stored(folder)
        series.sync()
        return series

    @classmethod
    def _as_stored(cls, folder: Folder) -> "Series":
        """Read the metadata of a group, and change nothing.

        Raises:
            StoreError: If there is none, or it is not one of these.
        """
        data = folder.read(ROOT)
        if data is None:
            raise StoreError(
                f"There is no series of arrays at {folder}: expected a Zarr group with consolidated metadata, found "
                "none. Is it another path? Check it."
            )
        try:
            root: Metadata = json.loads(data)
            nodes = root["consolidated_metadata"]["metadata"]
            arrays = {name: _growing(name, node) for name, node in nodes.items() if _is_growing(node)}
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(_unreadable(folder, error)) from error
        return cls(folder, arrays, root)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes of the group."""
        found: Mapping[str, Any] = self._root["attributes"]
        return found

    def length(self, dim: str) -> int:
        """Number of finished times of a time axis."""
        lengths = {self._node(array.name)["shape"][0] for array in self._along(dim)}
        assert len(lengths) == 1
        return int(lengths.pop())

    def names(self, dim: str) -> list[str]:
        """Name the arrays of a time axis."""
        return [array.name for array in self._along(dim)]

    def append(self, dim: str, values: Mapping[str, npt.ArrayLike]) -> None:
        """Add one time to all arrays of an axis.

        Args:
            dim: The time axis.
            values: The values of the time, for each array of this axis.
        """
        arrays, time = self._along(dim), self.length(dim)
        assert set(values) == {array.name for array in arrays}
        for array in arrays:
            self._write(array, time, np.asarray(values[array.name], dtype=array.dtype))
        self._set_length(dim, time + 1)

    def read(self, name: str, time: int) -> npt.NDArray[Any]:
        """Read the values of one time.

        Raises:
            StoreError: If they are damaged.
        """
        array = self._arrays[name]
        if array.times_per_chunk > 1:
            return np.array(self._chunk(array, time)[time % array.times_per_chunk])
        found: npt.NDArray[Any] = self._decoded(array, time)[0]
        return found

    def require_whole(self) -> None:
        """Require that all finished times can be read. Zarr would read a missing file as NaN.

        Raises:
            StoreError: If a file is missing or damaged.
        """
        for array in self._arrays.values():
            for time in range(0, self._node(array.name)["shape"][0], array.times_per_chunk):
                self._decoded(array, time)

    def truncate(self, dim: str, length: int) -> None:
        """Drop the times from ``length`` on."""
        if length >= (before := self.length(dim)):
            return
        self._set_length(dim, length)
        self.sync()
        for array in self._along(dim):
            self._last_chunks.pop(array.name, None)
            kept = {array.file(time) for time in range(length)}
            for file in {array.file(time) for time in range(length, before)} - kept:
                self.folder.remove(file)

    def sync(self) -> None:
        """Bring the metadata of each array up to date with those of the group."""
        for name in self._arrays:
            data = json.dumps(self._node(name)).encode()
            if self.folder.read(f"{name}/{ROOT}") != data:
                self.folder.write(f"{name}/{ROOT}", data)

    def __enter__(self) -> Self:
        """Return the series, which is synchronised at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sync()

    def _along(self, dim: str) -> list[GrowingArray]:
        return [array for array in self._arrays.values() if array.dims[0] == dim]

    def _node(self, name: str) -> "Metadata":
        node: Metadata = self._root["consolidated_metadata"]["metadata"][name]
        return node

    def _set_length(self, dim: str, length: int) -> None:
        for array in self._along(dim):
            self._node(array.name)["shape"][0] = length
        text = (part if index % 2 == 0 else str(self.length(part)) for index, part in enumerate(self._text))
        self.folder.write(ROOT, "".join(text).encode())

    def _write(self, array: GrowingArray, time: int, values: npt.NDArray[Any]) -> None:
        if array.times_per_chunk == 1:
            self._write_chunk(array, time, values.reshape(1, *array.shape))
            return
        index = time % array.times_per_chunk
        chunk = self._chunk(array, time).copy()
        if index and chunk[index].tobytes() == values.tobytes():  # as bytes, because NaN differs from itself
            return
        chunk[index:] = values  # not only of this time: if the values stay the same, the next times need no write
        self._write_chunk(array, time, chunk)
        self._last_chunks[array.name] = (time - index, chunk)

    def _write_chunk(self, array: GrowingArray, time: int, chunk: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(chunk, dtype=np.dtype(array.dtype).newbyteorder("<")).tobytes()
        self.folder.write(array.file(time), data + _checksum(data))

    def _chunk(self, array: GrowingArray, time: int) -> npt.NDArray[Any]:
        """The chunk with a time. The last one of each array is kept in memory while times are appended to it."""
        first = time - time % array.times_per_chunk
        kept = self._last_chunks.get(array.name)
        if kept is None or kept[0] != first:
            if first < self._node(array.name)["shape"][0]:
                chunk = self._decoded(array, time)
            else:
                chunk = np.full((array.times_per_chunk, *array.shape), array.stored.fill_value, dtype=array.dtype)
            kept = self._last_chunks[array.name] = (first, chunk)
        return kept[1]

    def _decoded(self, array: GrowingArray, time: int) -> npt.NDArray[Any]:
        data = self.folder.read(array.file(time))
        if data is None:
            raise StoreError(
                f"Time {time} of {array.name} in {self.folder} is missing: expected the file {array.file(time)}, found "
                "none. Was it removed, or was the run copied in part? Put it back, or record this run again in another "
                "folder."
            )
        values, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if len(data) != array.stored.file_bytes or _checksum(values) != checksum:
            raise StoreError(
                f"Time {time} of {array.name} in {self.folder} is damaged: expected {array.stored.file_bytes:,} bytes "
                f"that match their checksum, found {len(data):,}. A disk error? Record this run again in another "
                "folder."
            )
        dtype = np.dtype(array.dtype).newbyteorder("<")
        return np.frombuffer(values, dtype).reshape(array.stored.chunks).astype(array.dtype)


def read_arrays(folder: Folder) -> "xarray.Dataset":
    """Open a group to read it. Arrays are read when they are used, without dask, which is slow for many small arrays.

    Raises:
        StoreError: If it is not there, or damaged.
    """
    import xarray

    if not folder.has(ROOT):
        raise StoreError(
            f"There is nothing at {folder}: expected the Zarr group of a run of `ntkgen cl-run`, found none. Was the "
            "run stopped at its beginning, or copied in part? Run the same command again, or copy the whole folder."
        )
    try:
        found: xarray.Dataset = xarray.open_zarr(folder.zarr_store(read_only=True), consolidated=True, chunks=None)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(_unreadable(folder, error)) from error
    return found


def require_whole(folder: Folder) -> None:
    """Require that all finished times of a group can be read, without a change to it.

    Raises:
        StoreError: If a file is missing or damaged.
    """
    Series._as_stored(folder).require_whole()


def _unreadable(folder: Folder, error: Exception) -> str:
    return (
        f"The arrays at {folder} cannot be read ({type(error).__name__}): expected the Zarr group of a run, found "
        f"another {ROOT}. A disk error, or a copy of a part? Copy the whole folder again, or learn the run anew in "
        "another one."
    )


def _split_at_lengths(root: "Metadata", arrays: Mapping[str, GrowingArray]) -> list[str]:
    """Encode metadata once: text, and at every second place the name of the axis whose length stands there."""
    marked = copy.deepcopy(root)
    for name, array in arrays.items():
        marked["consolidated_metadata"]["metadata"][name]["shape"][0] = LENGTH_OF + array.dims[0]
    return re.split(f'"{LENGTH_OF}([^"]*)"', json.dumps(marked))


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def _is_growing(node: "Metadata") -> bool:
    return bool(node["node_type"] == "array" and node["attributes"].get(GROWS, False))


def _growing(name: str, node: "Metadata") -> GrowingArray:
    attributes, dims = node["attributes"], tuple(node["dimension_names"])
    separator = node["chunk_key_encoding"]["configuration"]["separator"]
    return GrowingArray(name, str(node["data_type"]), tuple(node["shape"][1:]), dims, attributes, separator)
