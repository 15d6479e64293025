"""An opened kernel store: view the kernel, list missing tiles, commit tiles, mark the store complete.

A store is a Zarr v3 group, readable without this package. `ntkgen.store.schema` has the table of its arrays.

Rows are sample-major. One unsharded chunk is one tile. It has no compressor, so that its size is known and a directory
listing shows truncated files. A tile is complete if all its chunks exist and have the right size. There is no other
record of progress. With the layout `upper` only tiles with row <= col are stored, and the attribute `storage_mode` of
the array is `symmetric-upper`. With the layout `full` all tiles are stored, and the attribute is `square`.

The attribute `ntkgen` of the group is the manifest: the identity of the kernel, its fingerprint (a hash), and the plan
that determines its bytes. It contains no time and no path. Two runs of the same command therefore give equal bytes.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from ntkgen.alone import alone
from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.plan.tiles import Tile, TileGrid
from ntkgen.store.manifest import Manifest
from ntkgen.store.matrices import as_dask, as_xarray, layers_as_xarray, matrix_of
from ntkgen.store.rounding import Underflow, count_underflow, scale_of, to_stored
from ntkgen.store.schema import (
    BY_LAYER,
    STORAGE_MODES,
    UNDERFLOW,
    Key,
    StoredArray,
    arrays_of,
    create_array,
    side_arrays,
    side_of,
    sides_of,
)
from ntkgen.store.view import SymmetricArray
from ntkgen.store.writing import Index, Writer

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

FloatArray = npt.NDArray[np.floating]
TileValues = FloatArray | Sequence[FloatArray]


class KernelStore:
    """An opened store.

    Reading needs no lock. If several processes write, each of them writes its own tiles, and one of them also writes
    all other files.
    """

    def __init__(self, folder: Folder, group: zarr.Group, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.group = group
        self._writer = Writer(self.zarr_array)

    def __repr__(self) -> str:
        """Show the place, the size, the dtypes and the layout."""
        rows, cols = self.grid.num_rows, self.grid.num_cols
        return f"<KernelStore {self.name}: {rows} × {cols}, {', '.join(self.manifest.dtypes)}, {self.manifest.layout}>"

    @property
    def grid(self) -> TileGrid:
        """The tile grid, fixed when the store was created."""
        return self.manifest.plan.grid

    @property
    def name(self) -> str:
        """Path or URL of the store."""
        return str(self.folder)

    @property
    def path(self) -> Path:
        """Folder of a store on a local disk.

        Raises:
            InputError: If the store is not on a local disk.
        """
        if not isinstance(self.folder, LocalFolder):
            raise InputError(
                f"The store at {self.name} has no path: expected a store on a local disk, found one in an object store "
                "or in a Zarr store. Use store.folder, which reads and writes all of them."
            )
        return self.folder.path

    # reading -------------------------------------------------------------------------------------------------------

    def kernel(self, dtype: str | None = None, output: int | None = None, layer: str | None = None) -> SymmetricArray:
        """View the kernel as a full matrix, by default in the most precise stored dtype.

        The values are those of the kernel: the stored values times the scale factor. A store of the output map
        `diagonal` has one matrix per ``output``. All other stores have a single matrix. With a ``layer`` it is the
        kernel of one of the groups of parameters in `layers`, which are stored in the most precise dtype only.

        Raises:
            StoreError: If the store has no array of that dtype, or if the array is not created yet.
            InputError: If ``output`` is missing or out of range, or is given for a store with a single matrix.
            UnknownNameError: If the store has no layer of that name.
        """
        return matrix_of(self, dtype, output, layer)

    @property
    def layers(self) -> list[str]:
        """Names of the groups of parameters that have a kernel each; empty if the store has only the whole kernel."""
        return list(self.manifest.layers)

    @property
    def array(self) -> SymmetricArray:
        """The kernel as a lazy, NumPy-like full matrix in the most precise stored dtype."""
        return self.kernel()

    @property
    def dask(self) -> Any:
        """The kernel as a dask array of the full matrix, with one task per tile.

        For the output map `diagonal`, the array has the dimensions (output, row, col).
        """
        return as_dask(self)

    @property
    def xarray(self) -> Any:
        """The kernel as a lazy `xarray.DataArray` of the full matrix, with coordinates of rows and columns.

        Each coordinate is an index: ``.sel(row_label=3)`` selects the rows with label 3. One call takes one index per
        dimension. ``.sel(row_label=3).sel(row_output=0)`` selects the rows with label 3 that belong to the first
        output.
        """
        return as_xarray(self)

    @property
    def by_layer(self) -> Any:
        """The kernels of groups of parameters as a lazy `xarray.DataArray`, selected by ``.sel(layer=name)``.

        Their sum over ``layer`` is the kernel, to rounding.

        Raises:
            InputError: If the store has only the whole kernel.
        """
        return layers_as_xarray(self)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the Zarr group, without the manifest."""
        return {name: value for name, value in self.group.attrs.asdict().items() if name != "ntkgen"}

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read a whole small array: the diagonal, the logits or a coordinate.

        Raises:
            StoreError: If the array is damaged.
            UnknownNameError: If the store has no array of that name.
        """
        array = self.zarr_array(name)
        try:
            return np.asarray(array[...])
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"The array {name} of {self.name} is damaged: expected chunks that match their checksums, found an "
                f"error ({error}). A disk error or an interrupted copy? Run the same `ntkgen compute` or "
                "`ntkgen import` again, which writes the array again."
            ) from error

    @property
    def array_names(self) -> list[str]:
        """Names of the kernel arrays that exist. They are created once the diagonal is complete."""
        return [array.name for array in self._kernels if self._has(array.name)]

    def scale_factor(self, name: str) -> float:
        """Return the factor by which the values of a stored kernel array must be multiplied."""
        return float(self.zarr_array(name).attrs.asdict().get("scale_factor", 1.0))  # type: ignore[arg-type]

    @property
    def float16_underflow(self) -> Underflow | None:
        """Number of entries that float16 stores with fewer bits, and of those that become zero, in all stored tiles."""
        if not self._has(UNDERFLOW):
            return None
        counts = np.maximum(self.read(UNDERFLOW), 0).sum((0, 1))
        return Underflow(with_fewer_bits=int(counts[0]), vanished=int(counts[1]))

    # progress ------------------------------------------------------------------------------------------------------

    def missing_tiles(self, layout: str | None = None) -> list[Tile]:
        """List the tiles that are missing in any dtype. In the layout `full`, each tile also needs its transpose."""
        missing: set[Tile] = set()
        for array in self._kernels:
            done = self._chunks(array)
            missing.update(
                tile for tile in self.grid.tiles() if not done.issuperset(self.chunks_of(array, tile, layout))
            )
        return sorted(missing)

    def has_tile(self, tile: Tile) -> bool:
        """Tell whether a tile is complete in all dtypes, and in the layout `full` also its transpose."""
        return all(
            self.folder.size(array.file(key)) == array.file_bytes
            for array in self._kernels
            for key in self.chunks_of(array, tile)
        )

    @property
    def _kernels(self) -> list[StoredArray]:
        return [array for array in self.arrays() if array.role == "kernel"]

    @property
    def tile_bytes(self) -> int:
        """Size of one tile in bytes, over all dtypes, without its transpose."""
        return sum(len(array.keys_at(Tile(0, 0))) * array.file_bytes for array in self._kernels)

    def chunks_of(self, array: StoredArray, tile: Tile, layout: str | None = None) -> list[Key]:
        """List the chunks of a tile in a kernel array, with the layout `full` also those of its transpose."""
        is_mirrored = self._is_mirrored_in(layout or self.manifest.layout)
        places = {tile, Tile(tile.col, tile.row) if is_mirrored else tile}
        return [key for place in places for key in array.keys_at(place)]

    def _is_mirrored_in(self, layout: str) -> bool:
        return layout == "full" and self.grid.is_symmetric

    @property
    def is_complete(self) -> bool:
        """Whether the store is marked complete and no tile, diagonal or array is missing."""
        has_all = self.manifest.is_complete and all(self._has(array.name) for array in self.arrays())
        return has_all and not self.missing_tiles() and not self.missing_blocks()

    def _has(self, name: str) -> bool:
        """Tell whether an array exists and its metadata can be read."""
        try:
            return isinstance(self.group.get(name), zarr.Array)
        except (ValueError, KeyError, TypeError):
            return False

    def zarr_array(self, name: str) -> "ZarrArray":
        """Look up an array by its name.

        Raises:
            UnknownNameError: If the store has no array of that name.
            StoreError: If the metadata of the array cannot be read.
        """
        try:
            array = self.group[name]
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"The metadata of {self.name}/{name} is damaged: expected valid Zarr metadata, found an error "
                f"({type(error).__name__}). A disk error or an interrupted copy? Run the same `ntkgen compute` or "
                "`ntkgen import` again, which writes the metadata again."
            ) from error
        except KeyError:
            raise UnknownNameError("array", name, sorted(self.group.array_keys())) from None
        assert isinstance(array, zarr.Array)
        return array

    def missing_blocks(self) -> list[int]:
        """List the blocks of samples whose diagonal or logits are missing.

        The blocks of the row samples are numbered first. The blocks of the column samples of a rectangular kernel
        follow.
        """
        stored = {array.name: self._chunks(array) for array in self.arrays() if array.role == "side"}
        return [
            index
            for index, side in enumerate(sides_of(self.grid))
            if any(key not in stored[name] for name, key in side.chunks(self.grid.num_planes) if name in stored)
        ]

    @property
    def num_logits(self) -> int:
        """Number of network outputs per sample. It is 0 for an imported kernel, which has no logits."""
        return self.manifest.num_logits

    def _chunks(self, array: StoredArray) -> set[Key]:
        """List the chunks of an array that have their exact size, from a listing of its folder."""
        return array.whole_chunks(self.folder.sizes(f"{array.name}/c"))

    @property
    def stored_bytes(self) -> int:
        """Total size of the store's files in bytes, without files that are being written."""
        return sum(self.folder.sizes().values())

    # writing -------------------------------------------------------------------------------------------------------

    def commit_block(self, index: int, diagonal: npt.NDArray[np.float64], logits: npt.NDArray[np.float64]) -> None:
        """Store the exact diagonal and the logits of one block of samples, numbered as in `missing_blocks`."""
        side = side_of(self.grid, index)
        rows, samples = side.block.rows(self.grid.num_outputs), slice(side.block.start, side.block.stop)
        if self.num_logits:
            self._writer.write(side.logits, (samples, slice(None)), to_stored(logits, "float64", 1.0))
        region = (rows,) if self.grid.num_planes == 1 else (slice(None), rows)
        self._writer.write(side.diagonal, region, to_stored(diagonal, "float64", 1.0))

    def create_kernels(self) -> None:
        """Create the kernel arrays with their scales, which are computed from the complete diagonal."""
        maxima = [float(self.read(diagonal).max()) for diagonal, _ in side_arrays(self.grid)]
        maximum = math.sqrt(maxima[0] * maxima[-1])  # by Cauchy–Schwarz
        late = [array for array in self.arrays() if array.is_of_tiles and not self._has(array.name)]
        for array in sorted(late, key=lambda array: array.role == "kernel"):  # counts first, as in `commit`
            scale = 1.0
            if array.role == "kernel":
                scale = float(self.manifest.identity.get("scale_factor", scale_of(array.dtype, maximum)))
            scaled = {} if scale == 1 else {"scale_factor": scale}
            create_array(self.group, dataclasses.replace(array, attributes={**array.attributes, **scaled}))

    def commit(self, tile: Tile, values: TileValues) -> None:
        """Store one whole computed tile in every dtype.

        Args:
            tile: The tile.
            values: Its values. In a store with layers, those of each layer, whose sum is the kernel.

        Raises:
            DivergedError: If an entry is not finite. In this case no part of the tile is written.
        """
        by_layer = values if self.grid.num_groups else ()
        assert len(by_layer) == self.grid.num_groups
        kernel: FloatArray = functools.reduce(np.add, by_layer) if self.grid.num_groups else np.asarray(values)
        assert kernel.shape[-2:] == tuple(part.stop - part.start for part in self.region(tile))
        stored = {dtype: to_stored(kernel, dtype, self.scale_factor(f"ntk_{dtype}")) for dtype in self.manifest.dtypes}
        if "float16" in stored:
            counts = count_underflow(kernel, self.scale_factor("ntk_float16"))
            self._writer.write(
                UNDERFLOW, (slice(tile.row, tile.row + 1), slice(tile.col, tile.col + 1)), counts[None, None]
            )
        dtype = self.manifest.layer_dtype
        for number, layer in enumerate(by_layer):
            rounded = to_stored(layer, dtype, self.scale_factor(f"{BY_LAYER}_{dtype}"))
            self._write_tile(f"{BY_LAYER}_{dtype}", tile, rounded[None], (slice(number, number + 1), ...))
        self.commit_stored(tile, stored)

    def commit_stored(self, tile: Tile, stored: Mapping[str, FloatArray]) -> None:
        """Store one tile of the kernel whose values are already scaled and rounded to each dtype."""
        for dtype, values in stored.items():
            self._write_tile(f"ntk_{dtype}", tile, values)

    def region(self, tile: Tile) -> tuple[slice, slice]:
        """Return the rows and columns of a tile, which are the last two axes of the kernel arrays."""
        m = self.grid.num_outputs
        return self.grid.block(tile.row).rows(m), self.grid.col_block(tile.col).rows(m)

    def _write_tile(self, name: str, tile: Tile, values: FloatArray, first: Index = (...,)) -> None:
        """Write a tile, and with the layout `full` its transpose. ``first`` selects along the axes before the rows."""
        self._writer.write(name, (*first, *self.region(tile)), values)
        if self._is_mirrored_in(self.manifest.layout) and tile.row != tile.col:
            self.write_transpose(name, tile, values, first)

    def write_transpose(self, name: str, tile: Tile, values: FloatArray, first: Index = (...,)) -> None:
        """Write the transpose of a tile, which lies below the diagonal, with the same bits."""
        rows, cols = self.region(tile)
        self._writer.write(name, (*first, cols, rows), np.ascontiguousarray(values.swapaxes(-1, -2)))

    def set_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest, in one atomic write."""
        self.group.attrs.update({"ntkgen": manifest.to_json()})
        self.manifest = manifest

    def arrays(self) -> list[StoredArray]:
        """List all arrays of the finished store."""
        return arrays_of(self.manifest)

    def finalize(self, layout: str | None = None) -> None:
        """Mark the store complete, and collect its metadata in one file, so that it opens quickly.

        Args:
            layout: New layout of the store, if it changes. The manifest, which holds the layout, is written last.

        Raises:
            StoreError: If tiles of the layout are missing.
        """
        layout = layout or self.manifest.layout
        if missing := self.missing_tiles(layout):
            raise StoreError(
                f"The store at {self.name} cannot be marked complete: expected all tiles, and {len(missing)} of "
                f"{self.grid.num_tiles} tiles are missing. Was a file removed during the run? Run the same command "
                "again."
            )
        if layout != self.manifest.layout:
            for name in self.array_names:
                self.zarr_array(name).attrs.update({"storage_mode": STORAGE_MODES[layout]})
        with alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Zarr v3 does not specify consolidated metadata, and files may be foreign
            self.group = zarr.consolidate_metadata(self.folder.zarr_store(read_only=False))
        done = Manifest(**{**vars(self.manifest), "is_complete": True, "layout": layout})
        self.set_manifest(done)
