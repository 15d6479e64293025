"""Which arrays a store has from the start, and how an array is made: chunks, codecs, fill value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ntkgen.plan.tiles import TileGrid

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

COORDINATES = {axis: f"{axis}_sample {axis}_output {axis}_label" for axis in ("row", "col")}


@dataclass(frozen=True)
class Samples:
    """Which samples a kernel is of, in its order: positions in their data set, and labels."""

    index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    against: "Samples | None" = None  # those of the columns, where they are others


def small_arrays(grid: TileGrid) -> tuple[str, ...]:
    """Name the coordinates of rows and columns, and the positions of the samples in their data sets."""
    names = tuple(name for axis in COORDINATES.values() for name in axis.split())
    return ("sample_index", *names) if grid.is_symmetric else ("sample_index", "col_sample_index", *names)


def side_arrays(grid: TileGrid) -> tuple[tuple[str, str], ...]:
    """Name the diagonal and the logits of the rows and, where they are other samples, of the columns."""
    rows = (("diagonal", "logits"),)
    return rows if grid.is_symmetric else (*rows, ("col_diagonal", "col_logits"))


@dataclass(frozen=True)
class ArrayLayout:
    """The shape of an array, its chunks and the names of its axes."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dims: tuple[str, ...]


def _create_small(group: zarr.Group, name: str, values: npt.NDArray[np.int64], axis: str, meaning: str) -> None:
    """Write a small array whole, unless it is there with these values."""
    if name in group:
        array = group[name]
        assert isinstance(array, zarr.Array)
        try:
            if np.array_equal(np.asarray(array[...]), values):
                return
        except (ValueError, RuntimeError):  # a damaged chunk
            pass
    else:
        layout = ArrayLayout(values.shape, values.shape, (axis,))
        array = create_array(group, name, "int64", layout, {"long_name": meaning})
        if (values == array.fill_value).all():  # as labels that nobody gave: what has no chunk reads so
            return
    array.with_config({"write_empty_chunks": True})[...] = values


def create_array(
    group: zarr.Group, name: str, dtype: str, layout: ArrayLayout, attributes: Mapping[str, Any]
) -> "ZarrArray":
    """Create an array as every array of a store is: Zarr v3, unsharded, checksums, no compressor, NaN where empty."""
    array = group.create_array(
        name,
        shape=layout.shape,
        chunks=layout.chunks,
        dtype=dtype,
        fill_value=float("nan") if dtype.startswith("float") else -1,
        compressors=[Crc32cCodec()],
        dimension_names=layout.dims,
        attributes=dict(attributes),
    )
    return array.with_config({"write_empty_chunks": True})


def create_static(group: zarr.Group, grid: TileGrid, samples: Samples, num_logits: int) -> None:
    """Create what is there from the start, where it is not: the coordinates, and room for diagonals and logits."""
    columns = samples if samples.against is None else samples.against
    for axis, side in (("row", samples), ("col", columns)):
        _create_coordinates(group, grid.num_outputs, axis, side)
    note = "position of the sample in its data set"
    _create_small(group, "sample_index", samples.index, "sample", note)
    _create_side(group, grid, ("diagonal", "logits"), ("row", "sample"), (grid.num_samples, num_logits))
    if grid.num_col_samples is not None:
        _create_small(group, "col_sample_index", columns.index, "against_sample", note)
        sizes = (grid.num_col_samples, num_logits)
        _create_side(group, grid, ("col_diagonal", "col_logits"), ("col", "against_sample"), sizes)


def _create_coordinates(group: zarr.Group, num_outputs: int, axis: str, samples: Samples) -> None:
    n, m = len(samples.index), num_outputs
    columns = {
        "sample": (np.repeat(np.arange(n), m), "position of the sample in this store"),
        "output": (np.tile(np.arange(m), n), "output of the network, after the output map"),
        "label": (np.repeat(samples.labels, m), "label of the sample"),
    }
    for name, (values, meaning) in columns.items():
        _create_small(group, f"{axis}_{name}", values.astype(np.int64), axis, meaning)


def _create_side(
    group: zarr.Group, grid: TileGrid, names: tuple[str, str], axes: tuple[str, str], sizes: tuple[int, int]
) -> None:
    """Make room for the exact diagonal and the logits of some samples."""
    (diagonal, logits), (axis, sample_axis), (n, num_logits) = names, axes, sizes
    if diagonal not in group:
        layout = ArrayLayout((n * grid.num_outputs,), (grid.side,), (axis,))
        if grid.num_planes > 1:
            layout = ArrayLayout((grid.num_planes, n), (grid.num_planes, grid.side), ("output", axis))
        note = {"long_name": "exact diagonal of the kernel", "units": "1", "coordinates": COORDINATES[axis]}
        create_array(group, diagonal, "float64", layout, note)
    if num_logits and logits not in group:
        note = {"long_name": "outputs of the network", "units": "1"}
        layout = ArrayLayout((n, num_logits), (grid.tile_samples, num_logits), (sample_axis, "output"))
        create_array(group, logits, "float64", layout, note)
