"""Which arrays a store has from the start, and how an array is made: chunks, codecs, fill value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ntkgen.kernel.tiles import TileGrid

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

COORDINATES = {axis: f"{axis}_sample {axis}_output {axis}_label" for axis in ("row", "col")}
SMALL_ARRAYS = ("sample_index", *(name for names in COORDINATES.values() for name in names.split()))


@dataclass(frozen=True)
class Samples:
    """Which samples a kernel is of, in its order: positions in their data set, and labels."""

    index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ArrayLayout:
    """The shape of an array, its chunks and the names of its axes."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dims: tuple[str, ...]


def _create_small(group: zarr.Group, name: str, values: npt.NDArray[np.int64], axis: str, meaning: str) -> None:
    """Write a small array whole, unless it is there with these values."""
    if name not in group:
        layout = ArrayLayout(values.shape, values.shape, (axis,))
        create_array(group, name, "int64", layout, {"long_name": meaning})
    array = group[name]
    assert isinstance(array, zarr.Array)
    try:
        if np.array_equal(np.asarray(array[...]), values):
            return
    except (ValueError, RuntimeError):  # a damaged chunk
        pass
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


def create_static(group: zarr.Group, grid: TileGrid, samples: Samples) -> None:
    """Create what is there from the start, where it is not: the coordinates, and room for diagonal and logits."""
    n, m = grid.num_samples, grid.num_outputs
    columns = {
        "sample": (np.repeat(np.arange(n), m), "position of the sample in this store"),
        "output": (np.tile(np.arange(m), n), "output of the network"),
        "label": (np.repeat(samples.labels, m), "label of the sample"),
    }
    for axis in ("row", "col"):
        for name, (values, meaning) in columns.items():
            _create_small(group, f"{axis}_{name}", values.astype(np.int64), axis, meaning)
    _create_small(group, "sample_index", samples.index, "sample", "position of the sample in its data set")
    if "diagonal" not in group:
        note = {"long_name": "exact diagonal of the kernel", "units": "1", "coordinates": COORDINATES["row"]}
        create_array(group, "diagonal", "float64", ArrayLayout((n * m,), (grid.side,), ("row",)), note)
    if "logits" not in group:
        note = {"long_name": "outputs of the network", "units": "1"}
        create_array(
            group, "logits", "float64", ArrayLayout((n, m), (grid.tile_samples, m), ("sample", "output")), note
        )
