"""The arrays of a store, in one table: `arrays_of` a manifest. Creation, opening and verification use this table.

    array                                  dimensions                  dtype    meaning
    ntk_float16, ntk_float32, ntk_float64  (row, col)                           kernel = stored · scale_factor (or 1)
    ntk_by_layer_float32                   (layer, row, col)                    kernels of groups of parameters
    underflow_float16                      (tile_row, tile_col, kind)  int64    entries with fewer bits, or zero
    diagonal                               (row)                       float64  the exact diagonal, computed first
    logits                                 (sample, output)            float64  outputs of the network
    row_sample, row_output, row_label      (row)                       int64    sample, output and label of a row
    col_sample, col_output, col_label      (col)                       int64    sample, output and label of a column
    sample_index                           (sample)                    int64    positions in the data set

The kernels of groups of parameters exist if they were asked for. They have the most precise dtype and the scale factor
of the kernel, which is their sum over `layer`.

With the output `diagonal` a kernel has the dimensions (output, row, col), one matrix per output, and the diagonal has
(output, row). A rectangular kernel, with other samples in its columns, also has the arrays col_diagonal, col_logits and
col_sample_index. An imported kernel has no logits and no counts of underflow, and its labels are -1.

Every array is a Zarr v3 array without shards. The codecs of its chunks are `bytes` (little endian) and `crc32c`. There
is no compressor. A missing chunk reads as NaN, and as -1 in an array of integers.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ntkgen.blocks import Block
from ntkgen.plan.tiles import TileGrid
from ntkgen.store.manifest import Manifest

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

Key = tuple[int, ...]
IntArray = npt.NDArray[np.int64]

# Number of bytes that the codec crc32c adds to a chunk.
CHECKSUM_BYTES = 4
UNDERFLOW = "underflow_float16"
BY_LAYER = "ntk_by_layer"
COORDINATES = {axis: f"{axis}_sample {axis}_output {axis}_label" for axis in ("row", "col")}
STORAGE_MODES = {"full": "square", "upper": "symmetric-upper"}

_CHUNK = re.compile(r"\d+(/\d+)*\Z")


@dataclass(frozen=True)
class Samples:
    """The samples of a kernel, in its order: positions in their data set, and labels."""

    index: IntArray
    labels: IntArray
    against: "Samples | None" = None  # samples of the columns, if they differ from those of the rows

    @property
    def columns(self) -> "Samples":
        """Samples of the columns."""
        return self if self.against is None else self.against


@dataclass(frozen=True)
class StoredArray:
    """One array of a store: its metadata and its chunks.

    Attributes:
        name: Name of the array in the group.
        dtype: Dtype of the numbers.
        shape: Shape of the whole array.
        chunks: Shape of a chunk. A chunk is one file. The last chunk of an axis is stored at full size too.
        dims: Names of the axes.
        attributes: Attributes that describe the array, by the CF conventions.
        role: A ``coordinate`` is written when the store is created. A ``side``, the diagonal or the logits of the rows
            or of the columns, is written block by block. A ``kernel`` and the ``counts`` of float16 underflow are
            created once the diagonal is complete, and written tile by tile.
        is_triangle: Whether only the chunks of tiles with row <= col are stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dims: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    role: Literal["coordinate", "side", "kernel", "counts"] = "kernel"
    is_triangle: bool = False

    @property
    def fill_value(self) -> float:
        """Value that is read where no chunk is stored."""
        return float("nan") if self.dtype.startswith("float") else -1

    @property
    def file_bytes(self) -> int:
        """Size of each chunk's file in bytes."""
        return math.prod(self.chunks) * np.dtype(self.dtype).itemsize + CHECKSUM_BYTES

    @property
    def is_of_tiles(self) -> bool:
        """Whether each chunk belongs to a tile and is written with it."""
        return self.role in {"kernel", "counts"}

    def file(self, key: Key) -> str:
        """Return the path of a chunk's file, relative to the store."""
        return f"{self.name}/c/{'/'.join(map(str, key))}"

    def inside(self, key: Key) -> tuple[slice, ...]:
        """Locate the part of a chunk that lies within the shape of the array."""
        axes = zip(self.shape, self.chunks, key, strict=True)
        return tuple(slice(min(chunk, length - at * chunk)) for length, chunk, at in axes)

    def chunk_keys(self) -> Iterator[Key]:
        """List the chunks that the finished array has. An array with one triangle has no others.

        >>> array = StoredArray("ntk_float16", "float16", (5, 5), (3, 3), ("row", "col"), is_triangle=True)
        >>> list(array.chunk_keys()), array.file_bytes, array.inside((0, 1))
        ([(0, 0), (0, 1), (1, 1)], 22, (slice(None, 3, None), slice(None, 2, None)))
        """
        counts = (-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True))
        keys = itertools.product(*map(range, counts))
        return (key for key in keys if (place := self.place(key))[0] <= place[1]) if self.is_triangle else keys

    def whole_chunks(self, sizes: Mapping[str, int]) -> set[Key]:
        """List the chunks whose files have their exact size, given the sizes of all files in the array's folder.

        >>> array = StoredArray("diagonal", "float64", (5,), (3,), ("row",), role="side")
        >>> array.whole_chunks({"diagonal/c/0": 28, "diagonal/c/1": 20, "diagonal/c/1.partial": 28})
        {(0,)}
        """
        size, first = self.file_bytes, len(self.name) + len("/c/")
        return {
            tuple(map(int, key[first:].split("/")))
            for key, file_size in sizes.items()
            if file_size == size and _CHUNK.match(key, first)
        }

    def keys_at(self, place: tuple[int, int]) -> list[Key]:
        """List the chunks of a kernel array at the row and column of a tile, one for each of its matrices.

        >>> array = StoredArray("ntk_by_layer_float64", "float64", (2, 5, 5), (1, 3, 3), ("layer", "row", "col"))
        >>> array.keys_at((0, 1))
        [(0, 0, 1), (1, 0, 1)]
        """
        return [(*matrix, *place) for matrix in itertools.product(*map(range, self.shape[:-2]))]

    def place(self, key: Key) -> tuple[int, int]:
        """Return the row and the column of the tile that a chunk belongs to."""
        first = self.dims.index("row" if self.role == "kernel" else "tile_row")
        return key[first], key[first + 1]


# the table ------------------------------------------------------------------------------------------------------------


def arrays_of(manifest: Manifest) -> list[StoredArray]:
    """List the arrays of the finished store."""
    grid = manifest.plan.grid
    return [*_coordinates(grid), *_sides(grid, manifest.num_logits), *_kernels(manifest), *_counts(manifest)]


def side_arrays(grid: TileGrid) -> tuple[tuple[str, str], ...]:
    """Name the arrays of diagonal and logits: a pair for the rows and, in a rectangular kernel, one for the columns."""
    rows = (("diagonal", "logits"),)
    return rows if grid.is_symmetric else (*rows, ("col_diagonal", "col_logits"))


@dataclass(frozen=True)
class Side:
    """A block of samples of the rows, or of the columns of a rectangular kernel, with its diagonal and logits."""

    diagonal: str  # name of the array of the diagonal
    logits: str  # name of the array of the logits
    number: int  # position among the blocks of the rows, or of the columns
    block: Block

    def chunks(self, num_planes: int) -> tuple[tuple[str, Key], tuple[str, Key]]:
        """Return array name and chunk key of the diagonal and of the logits."""
        return (self.diagonal, (self.number,) if num_planes == 1 else (0, self.number)), (self.logits, (self.number, 0))


def side_of(grid: TileGrid, index: int) -> Side:
    """Describe a side block of the grid, given its index."""
    side = grid.side_block(index)
    return Side(*side_arrays(grid)[side.axis], side.number, side.block)


def sides_of(grid: TileGrid) -> list[Side]:
    """List the side blocks of a grid, in the order of the grid."""
    return [side_of(grid, index) for index in range(grid.num_sides)]


def _coordinates(grid: TileGrid) -> Iterator[StoredArray]:
    lengths = {"sample_index": (grid.num_samples, "sample")}
    if grid.num_col_samples is not None:
        lengths["col_sample_index"] = (grid.num_col_samples, "against_sample")
    for axis, length in (("row", grid.num_rows), ("col", grid.num_cols)):
        lengths |= dict.fromkeys(COORDINATES[axis].split(), (length, axis))
    meanings = {
        "index": "position of the sample in its data set",
        "sample": "position of the sample in this store",
        "output": "output of the network, after the output map",
        "label": "label of the sample",
    }
    for name, (length, dim) in lengths.items():
        note = {"long_name": meanings[name.rpartition("_")[2]]}
        yield StoredArray(name, "int64", (length,), (length,), (dim,), note, "coordinate")


def _sides(grid: TileGrid, num_logits: int) -> Iterator[StoredArray]:
    sides = (("row", "sample", grid.num_samples), ("col", "against_sample", grid.num_col_samples or 0))
    for (diagonal, logits), (axis, sample_axis, n) in zip(side_arrays(grid), sides, strict=False):
        shape, chunks, dims = (n * grid.num_outputs,), (grid.side,), (axis,)
        note = {"long_name": "exact diagonal of the kernel", "units": "1", "coordinates": COORDINATES[axis]}
        yield _with_planes(StoredArray(diagonal, "float64", shape, chunks, dims, note, "side"), grid, grid.num_planes)
        if num_logits:
            chunk = (grid.tile_samples, num_logits)
            note = {"long_name": "outputs of the network", "units": "1"}
            yield StoredArray(logits, "float64", (n, num_logits), chunk, (sample_axis, "output"), note, "side")


def _kernels(manifest: Manifest) -> Iterator[StoredArray]:
    grid = manifest.plan.grid
    attributes = {
        "long_name": f"empirical neural tangent kernel, {manifest.quantity}",
        "units": "1",
        "coordinates": " ".join(COORDINATES.values()),
        "storage_mode": STORAGE_MODES[manifest.layout],
    }
    shape, chunks = (grid.num_rows, grid.num_cols), (grid.side, grid.side)
    is_triangle = grid.is_symmetric and manifest.layout == "upper"
    for dtype in manifest.dtypes:
        name = f"ntk_{dtype}"
        array = StoredArray(name, dtype, shape, chunks, ("row", "col"), attributes, "kernel", is_triangle)
        yield _with_planes(array, grid, 1)
        if manifest.layers and dtype == manifest.layer_dtype:
            yield _with_layers(_with_planes(array, grid, 1), list(manifest.layers))


def _counts(manifest: Manifest) -> Iterator[StoredArray]:
    """Yield the array that counts underflow in float16. The underflow of an imported kernel is unknown."""
    if "float16" not in manifest.dtypes or manifest.is_imported:
        return
    grid = manifest.plan.grid
    shape, dims = (grid.num_blocks, grid.num_col_blocks, 2), ("tile_row", "tile_col", "kind")
    note = {"long_name": "entries that float16 stores with fewer bits, and as zero", "units": "1"}
    yield StoredArray(UNDERFLOW, "int64", shape, (1, 1, 2), dims, note, "counts", grid.is_symmetric)


def _with_planes(array: StoredArray, grid: TileGrid, chunk: int) -> StoredArray:
    """Put an axis of outputs first, with chunks of size ``chunk``, if the kernel has a matrix for each output."""
    if grid.num_planes == 1:
        return array
    shape, chunks, dims = (grid.num_planes, *array.shape), (chunk, *array.chunks), ("output", *array.dims)
    return replace(array, shape=shape, chunks=chunks, dims=dims)


def _with_layers(kernel: StoredArray, layers: list[str]) -> StoredArray:
    """Describe the kernels of groups of parameters, with an axis of groups first."""
    note = {
        **kernel.attributes,
        "long_name": "kernels of groups of parameters, whose sum over layer is the kernel",
        "layer_names": layers,
    }
    shape, chunks, dims = (len(layers), *kernel.shape), (1, *kernel.chunks), ("layer", *kernel.dims)
    name = f"{BY_LAYER}_{kernel.dtype}"
    return replace(kernel, name=name, shape=shape, chunks=chunks, dims=dims, attributes=note)


# creation -------------------------------------------------------------------------------------------------------------


def create_array(group: zarr.Group, array: StoredArray, separator: Literal["/", "."] = "/") -> "ZarrArray":
    """Create an array without chunks. Every array of a store has checksums and no compressor.

    Args:
        group: The group.
        array: The array.
        separator: What stands between the numbers in the name of a chunk. With a slash, each is a folder.
    """
    return group.create_array(
        array.name,
        shape=array.shape,
        chunks=array.chunks,
        dtype=array.dtype,
        fill_value=array.fill_value,
        compressors=[Crc32cCodec()],
        dimension_names=array.dims,
        attributes=dict(array.attributes),
        chunk_key_encoding={"name": "default", "separator": separator},
    )


def writable(array: "ZarrArray") -> "ZarrArray":
    """Configure an array to write chunks that hold only the fill value, because an absent chunk counts as missing."""
    return array.with_config({"write_empty_chunks": True})


def create_first(group: zarr.Group, manifest: Manifest, samples: Samples) -> None:
    """Create the arrays that a new store has, unless they exist: coordinates, and empty diagonals and logits."""
    values = _coordinate_values(manifest.plan.grid, samples)
    for array in arrays_of(manifest):
        if array.role == "coordinate":
            _write_coordinate(group, array, values[array.name])
        elif array.role == "side" and array.name not in group:
            create_array(group, array)


def _coordinate_values(grid: TileGrid, samples: Samples) -> dict[str, IntArray]:
    values = {"sample_index": samples.index, "col_sample_index": samples.columns.index}
    for axis, side in (("row", samples), ("col", samples.columns)):
        n, m = len(side.index), grid.num_outputs
        values[f"{axis}_sample"] = np.repeat(np.arange(n), m)
        values[f"{axis}_output"] = np.tile(np.arange(m), n)
        values[f"{axis}_label"] = np.repeat(side.labels, m)
    return {name: coordinate.astype(np.int64) for name, coordinate in values.items()}


def _write_coordinate(group: zarr.Group, array: StoredArray, values: IntArray) -> None:
    """Write a whole coordinate, unless it is stored with these values already."""
    if array.name in group:
        stored = group[array.name]
        assert isinstance(stored, zarr.Array)
        try:
            if np.array_equal(np.asarray(stored[...]), values):
                return
        except (ValueError, RuntimeError):  # a damaged chunk
            pass
    else:
        stored = create_array(group, array)
        if (values == array.fill_value).all():  # for example labels that were not given: absent chunks read as -1
            return
    writable(stored)[...] = values
