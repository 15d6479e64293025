"""The kernel on disk: create, open, commit a tile, list what is missing.

A store is a Zarr v3 group, readable without this package:

    ntk_float16, ntk_float32, ntk_float64   (row, col)        the kernel; true value = stored · scale_factor (or 1)
    underflow_float16            (tile_row, tile_col, kind)   entries with fewer bits in float16, entries become zero
    diagonal                                (row)    float64  the exact diagonal, computed first
    logits                                  (sample, output)  float64
    row_sample, row_output, row_label       (row)             what a row is: position in the store, output, label
    col_sample, col_output, col_label       (col)             the same of a column
    sample_index                            (sample)          the samples' positions in their data set

With the output `diagonal` a kernel is (output, row, col), a matrix for each output, and the diagonal (output, row). A
rectangular kernel, of rows against other samples, has col_diagonal, col_logits and col_sample_index too.

Rows are sample-major. One unsharded chunk is one tile, `bytes` (little endian) and `crc32c`, no compressor, so a chunk
has a known size and truncation shows in a directory listing. What is not stored reads as NaN. A tile is done when its
chunks exist at their exact size; there is no other record of progress. With the layout `upper` only tiles with
row <= col are stored (`storage_mode` of the array is `symmetric-upper`), with `full` all are (`square`).

The group's attribute `ntkgen` is the manifest: what the kernel is of, its fingerprint, and the plan that its bytes
follow. It holds no time, no path and no measurement, so that two runs of one command give equal bytes.
"""

import contextlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

import ntkgen
from ntkgen.errors import InputError, StoreError, UnknownNameError
from ntkgen.kernel.arrays import (
    COORDINATES,
    ArrayLayout,
    Samples,
    create_array,
    create_static,
    side_arrays,
    small_arrays,
)
from ntkgen.kernel.manifest import FORMAT_VERSION, Manifest
from ntkgen.kernel.rounding import STORE_DTYPES, count_underflow, scale_of, to_stored
from ntkgen.kernel.symmetric import SymmetricArray
from ntkgen.kernel.tiles import Block, Tile, TileGrid

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

CHECKSUM_BYTES = 4
UNDERFLOW = "underflow_float16"

_CHUNK_2D = re.compile(r"^\d+$")

FloatArray = npt.NDArray[np.floating]


class KernelStore:
    """An opened store. Reading needs no lock; writing is for one process at a time, under `write_lock`."""

    def __init__(self, path: Path, group: zarr.Group, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._group = group

    def __repr__(self) -> str:
        """Say what the kernel is of."""
        rows, cols = self.grid.num_rows, self.grid.num_cols
        return f"<KernelStore {self.path}: {rows} × {cols}, {', '.join(self.manifest.dtypes)}, {self.manifest.layout}>"

    @property
    def grid(self) -> TileGrid:
        """The tile grid, fixed when the store was created."""
        return self.manifest.plan.grid

    # reading -------------------------------------------------------------------------------------------------------

    def kernel(self, dtype: str | None = None, output: int | None = None) -> SymmetricArray:
        """View the kernel as one full matrix of true values, in the most precise stored dtype or a chosen one.

        A store of the output `diagonal` has one matrix per ``output``; the others have one in all.

        Raises:
            StoreError: If no tile of that dtype can be there yet.
            InputError: If an output must be chosen, or cannot be.
        """
        self._check_output(output)
        dtype = dtype or max(self.manifest.dtypes, key=STORE_DTYPES.index)
        if not self._has(f"ntk_{dtype}"):
            raise StoreError(
                f"The store at {self.path} has no {dtype} kernel: it is to hold {', '.join(self.manifest.dtypes)}, and "
                "those are made after the diagonal. Choose one of them, or finish the store with the same command."
            )
        manifest = self.manifest
        token = f"{manifest.fingerprint}-{manifest.is_complete}-{manifest.replanned}"
        return SymmetricArray(
            self._array(f"ntk_{dtype}"), is_upper=manifest.layout == "upper", token=token, plane=output
        )

    def _check_output(self, output: int | None) -> None:
        planes = self.grid.num_planes
        if (output is None) != (planes == 1) or (output is not None and not 0 <= output < planes):
            raise InputError(
                f"The store at {self.path} holds {f'{planes} matrices, one for each output' if planes > 1 else 'one'}: "
                f"expected {f'an output from 0 to {planes - 1}' if planes > 1 else 'no output'}, found {output}. Use "
                f"{'store.kernel(output=0)' if planes > 1 else 'store.array'}."
            )

    @property
    def array(self) -> SymmetricArray:
        """The full matrix of true values, NumPy-like and lazy, in the most precise stored dtype."""
        return self.kernel()

    @property
    def dask(self) -> Any:
        """The full matrix of true values as a dask array, one task per tile; (output, row, col) if several."""
        if self.grid.num_planes == 1:
            return self.kernel().to_dask()
        import dask.array as da

        return da.stack([self.kernel(output=output).to_dask() for output in range(self.grid.num_planes)])

    @property
    def xarray(self) -> Any:
        """The full matrix of true values as a lazy `xarray.DataArray` with the coordinates of rows and columns."""
        import xarray

        coords = {name: (axis, self.read(name)) for axis, names in COORDINATES.items() for name in names.split()}
        dims = ("row", "col") if self.grid.num_planes == 1 else ("output", "row", "col")
        return xarray.DataArray(self.dask, dims=dims, coords=coords, name="ntk", attrs=self.attributes)

    @property
    def attributes(self) -> dict[str, Any]:
        """The group's attributes but for the manifest."""
        return {name: value for name, value in self._group.attrs.asdict().items() if name != "ntkgen"}

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one of the small arrays whole: diagonal, logits, a coordinate.

        Raises:
            StoreError: If the array is damaged.
            UnknownNameError: If there is none of that name.
        """
        array = self._array(name)
        try:
            return np.asarray(array[...])
        except (ValueError, RuntimeError) as error:
            raise StoreError(
                f"The array {name} of {self.path} is damaged ({error}): expected chunks that match their checksums. A "
                "disk error or an interrupted copy? Run the same `ntkgen compute` again: it writes it anew."
            ) from error

    @property
    def array_names(self) -> list[str]:
        """Name the kernel arrays that exist; they are created once the diagonal is complete."""
        return [name for dtype in self.manifest.dtypes if self._has(name := f"ntk_{dtype}")]

    def scale_factor(self, name: str) -> float:
        """Say by what a kernel array is to be multiplied."""
        return float(self._array(name).attrs.asdict().get("scale_factor", 1.0))  # type: ignore[arg-type]

    @property
    def float16_underflow(self) -> dict[str, int] | None:
        """Count the entries that float16 stores with fewer bits, or as zero, of the tiles that are there."""
        if not self._has(UNDERFLOW):
            return None
        counts = np.maximum(self.read(UNDERFLOW), 0).sum((0, 1))
        return {"with_fewer_bits": int(counts[0]), "vanished": int(counts[1])}

    # progress ------------------------------------------------------------------------------------------------------

    def missing_tiles(self) -> list[Tile]:
        """List the tiles that are not there in every dtype and, with the full layout, on both sides."""
        missing: set[Tile] = set()
        for dtype in self.manifest.dtypes:
            done = self._chunks(f"ntk_{dtype}", self.grid.side**2 * np.dtype(dtype).itemsize)
            missing.update(tile for tile in self.grid.tiles() if not done.issuperset(self._chunks_of(tile)))
        return sorted(missing)

    def _chunks_of(self, tile: Tile) -> list[tuple[int, ...]]:
        """Name the chunks of a tile: on both sides with the full layout, and one per plane."""
        places = {(tile.row, tile.col), (tile.col, tile.row) if self._is_mirrored else (tile.row, tile.col)}
        if self.grid.num_planes == 1:
            return list(places)
        return [(plane, *place) for plane in range(self.grid.num_planes) for place in places]

    @property
    def _is_mirrored(self) -> bool:
        return self.manifest.layout == "full" and self.grid.is_symmetric

    @property
    def is_complete(self) -> bool:
        """Say whether the store was finished, and nothing of it has gone since."""
        has_all = self.manifest.is_complete and all(map(self._has, self._arrays()))
        return has_all and not self.missing_tiles() and not self.missing_blocks()

    def _has(self, name: str) -> bool:
        """Say whether an array is there, with metadata that can be read."""
        try:
            return isinstance(self._group.get(name), zarr.Array)
        except (ValueError, KeyError, TypeError):
            return False

    def _array(self, name: str) -> "ZarrArray":
        """Look up an array.

        Raises:
            UnknownNameError: If the store has no array of that name.
            StoreError: If its metadata cannot be read.
        """
        try:
            array = self._group[name]
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"The metadata of {self.path / name} is damaged ({type(error).__name__}). A disk error or an "
                "interrupted copy? Run the same `ntkgen compute` again: it writes it anew."
            ) from error
        except KeyError:
            raise UnknownNameError("array", name, sorted(self._group.array_keys())) from None
        assert isinstance(array, zarr.Array)
        return array

    def missing_blocks(self) -> list[int]:
        """List the blocks whose diagonal or logits are not there: of rows, then, numbered on, of other columns."""
        grid, missing, first = self.grid, [], 0
        logit_bytes = grid.tile_samples * self.manifest.plan.profile.num_logits * 8
        for (diagonal, logits), count in zip(side_arrays(grid), self._side_counts(), strict=True):
            there = {key[-1] for key in self._chunks(diagonal, grid.num_planes * grid.side * 8)}
            there &= {key[0] for key in self._chunks(logits, logit_bytes)}
            missing += [first + index for index in range(count) if index not in there]
            first += count
        return missing

    def _side_counts(self) -> list[int]:
        grid = self.grid
        return [grid.num_blocks] if grid.is_symmetric else [grid.num_blocks, grid.num_col_blocks]

    def _side(self, index: int) -> tuple[tuple[str, str], int, Block]:
        """Locate a block that `missing_blocks` numbers: its arrays, its number among them, its samples."""
        names, rows = side_arrays(self.grid), self.grid.num_blocks
        if index < rows:
            return names[0], index, self.grid.block(index)
        return names[1], index - rows, self.grid.col_block(index - rows)

    def _chunks(self, name: str, payload_bytes: int) -> set[tuple[int, ...]]:
        """List the chunks of an array that have their exact size, by directory scan."""
        size = payload_bytes + CHECKSUM_BYTES
        found: set[tuple[int, ...]] = set()

        def scan(folder: Path, prefix: tuple[int, ...]) -> None:
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if not _CHUNK_2D.match(entry.name):
                        continue
                    key = (*prefix, int(entry.name))
                    if entry.is_dir():
                        scan(Path(entry.path), key)
                    elif entry.stat().st_size == size:
                        found.add(key)

        scan(self.path / name / "c", ())
        return found

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files of the store, but for what is being written."""
        total = 0
        for file in self.path.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size if file.is_file() and file.suffix != ".partial" else 0
        return total

    # writing -------------------------------------------------------------------------------------------------------

    def commit_block(self, index: int, diagonal: npt.NDArray[np.float64], logits: npt.NDArray[np.float64]) -> None:
        """Store the exact diagonal and the logits of one block that `missing_blocks` has named."""
        (diagonal_name, logits_name), _, block = self._side(index)
        rows = block.rows(self.grid.num_outputs)
        self._write(logits_name, (slice(block.start, block.stop), slice(None)), to_stored(logits, "float64", 1.0))
        region = (rows,) if self.grid.num_planes == 1 else (slice(None), rows)
        self._write(diagonal_name, region, to_stored(diagonal, "float64", 1.0))

    def create_kernels(self) -> None:
        """Create the kernel arrays with their scales, which follow from the complete diagonal."""
        maxima = [float(self.read(diagonal).max()) for diagonal, _ in side_arrays(self.grid)]
        maximum = math.sqrt(maxima[0] * maxima[-1])  # by Cauchy–Schwarz
        if "float16" in self.manifest.dtypes and not self._has(UNDERFLOW):
            shape = (self.grid.num_blocks, self.grid.num_col_blocks, 2)
            note = {"long_name": "entries that float16 stores with fewer bits, and as zero", "units": "1"}
            layout = ArrayLayout(shape, (1, 1, 2), ("tile_row", "tile_col", "kind"))
            create_array(self._group, UNDERFLOW, "int64", layout, note)
        for dtype in self.manifest.dtypes:
            if self._has(f"ntk_{dtype}"):
                continue
            scale = scale_of(dtype, maximum)
            attributes = {
                "long_name": "empirical neural tangent kernel, J Jᵀ",
                "units": "1",
                "coordinates": " ".join(COORDINATES.values()),
                "storage_mode": "square" if self.manifest.layout == "full" else "symmetric-upper",
                **({} if scale == 1 else {"scale_factor": scale}),
            }
            side, planes = self.grid.side, self.grid.num_planes
            layout = ArrayLayout((self.grid.num_rows, self.grid.num_cols), (side, side), ("row", "col"))
            if planes > 1:
                layout = ArrayLayout((planes, *layout.shape), (1, *layout.chunks), ("output", *layout.dims))
            create_array(self._group, f"ntk_{dtype}", dtype, layout, attributes)

    def commit(self, tile: Tile, values: FloatArray) -> None:
        """Store one computed tile, in every dtype, whole.

        Raises:
            DivergedError: If an entry is not finite; nothing of the tile is then written.
        """
        m = self.grid.num_outputs
        rows, cols = self.grid.block(tile.row).rows(m), self.grid.col_block(tile.col).rows(m)
        assert values.shape[-2:] == (rows.stop - rows.start, cols.stop - cols.start)
        stored = {dtype: to_stored(values, dtype, self.scale_factor(f"ntk_{dtype}")) for dtype in self.manifest.dtypes}
        if "float16" in stored:
            counts = count_underflow(values, self.scale_factor("ntk_float16"))
            self._write(UNDERFLOW, (slice(tile.row, tile.row + 1), slice(tile.col, tile.col + 1)), counts[None, None])
        planes: tuple[slice, ...] = () if self.grid.num_planes == 1 else (slice(None),)
        for dtype, rounded in stored.items():
            self._write(f"ntk_{dtype}", (*planes, rows, cols), rounded)
            if self._is_mirrored and tile.row != tile.col:
                self._write(f"ntk_{dtype}", (*planes, cols, rows), np.ascontiguousarray(rounded.swapaxes(-1, -2)))

    def _write(self, name: str, region: tuple[slice, ...], values: npt.NDArray[Any]) -> None:
        # the Rust pipeline, if the user has chosen it, does not write atomically
        with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}):
            self._array(name).with_config({"write_empty_chunks": True})[region] = values

    def set_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest, in one atomic write."""
        self._group.attrs.update({"ntkgen": manifest.to_json()})
        self.manifest = manifest

    def repair(self, samples: Samples) -> None:
        """Put in order what an interrupted write or a damaged disk left behind; only under the lock.

        Left-over partial files go, small arrays that are damaged or gone are written anew, and chunks of the diagonal
        and the logits that do not match their checksums are removed, so that they are computed anew. The tiles
        themselves are not read.
        """
        for leftover in self.path.rglob("*.partial"):
            leftover.unlink()
        for name in ["zarr.json", *(f"{name}/zarr.json" for name in self._arrays())]:
            if (self.path / name).exists() and not _is_json(self.path / name):
                (self.path / name).unlink()
        create_static(self._group, self.grid, samples, self.manifest.plan.profile.num_logits)
        for side in range(sum(self._side_counts())):
            (diagonal, logits), index, block = self._side(side)
            rows, planes = block.rows(self.grid.num_outputs), self.grid.num_planes
            self._remove_damaged(diagonal, str(index) if planes == 1 else f"0/{index}", (..., rows))
            self._remove_damaged(logits, f"{index}/0", (slice(block.start, block.stop), ...))
        if not self.missing_blocks():
            self.create_kernels()

    def _arrays(self) -> list[str]:
        sides = [name for pair in side_arrays(self.grid) for name in pair]
        kernels = [f"ntk_{dtype}" for dtype in self.manifest.dtypes]
        return [*small_arrays(self.grid), *sides, *kernels, *([UNDERFLOW] if "float16" in self.manifest.dtypes else [])]

    def _remove_damaged(self, name: str, key: str, region: Any) -> None:
        """Remove a chunk that does not match its checksum, so that it is computed anew."""
        chunk = self.path / name / "c" / key
        try:
            _ = self._array(name)[region] if chunk.exists() else None
        except (ValueError, RuntimeError):
            chunk.unlink()

    def finalize(self) -> None:
        """Mark a store complete whose tiles are all there, and gather its metadata in one file for quick opening.

        Raises:
            StoreError: If tiles are missing.
        """
        if missing := self.missing_tiles():
            raise StoreError(
                f"The store at {self.path} cannot be complete: {len(missing)} of {self.grid.num_tiles} tiles are "
                "missing. Was a file removed meanwhile? Run the same command again."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            self._group = zarr.consolidate_metadata(LocalStore(self.path))
        done = Manifest(**{**vars(self.manifest), "is_complete": True})
        self.set_manifest(done)


def create_store(path: Path, manifest: Manifest, samples: Samples) -> KernelStore:
    """Create a store with everything but its numbers. It appears at its path whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".creating")
    if draft.exists():
        shutil.rmtree(draft)
    grid = manifest.plan.grid
    group = zarr.create_group(LocalStore(draft))
    create_static(group, grid, samples, manifest.plan.profile.num_logits)
    n, m = grid.num_samples, grid.num_outputs
    model, dataset = (manifest.provenance.get(name, "?") for name in ("model", "dataset"))
    group.attrs.put(
        {
            "title": f"Empirical neural tangent kernel of {model} on {dataset}, {n} samples × {m} outputs",
            "Conventions": "CF-1.10",
            "source": f"ntkgen {ntkgen.__version__}",
            "ntkgen": manifest.to_json(),
        }
    )
    draft.rename(path)
    return open_store(path, mode="r+")


def open_store(path: str | os.PathLike[str], mode: Literal["r", "r+"] = "r") -> KernelStore:
    """Open a store; ``mode`` is ``r`` or, for the process that holds the lock, ``r+``.

    Raises:
        StoreError: If there is none at the path, or one of another format version.
    """
    place = Path(str(path).removeprefix("file://"))
    if not (place / "zarr.json").exists():
        raise StoreError(
            f"There is no kernel store at {place}: expected a Zarr v3 group with a zarr.json, found "
            f"{'a folder without one' if place.is_dir() else 'nothing'}. Is the path the folder ending in .zarr?"
        )
    try:
        group = zarr.open_group(LocalStore(place, read_only=mode == "r"), mode=mode, use_consolidated=False)
        values = _manifest_values(group.attrs.asdict())
        version = values["format_version"]
        manifest = Manifest.from_json(values) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, OSError) as error:  # zarr's own errors are among these
        raise StoreError(
            f"What lies at {place} is not a kernel store: expected a Zarr v3 group with the attribute 'ntkgen', found "
            f"otherwise ({type(error).__name__}: {' '.join(str(error).split())}). Was it made by another program, or "
            "is its zarr.json damaged? Give the path of a store that `ntkgen compute` made."
        ) from error
    if manifest is None:
        raise StoreError(
            f"The store at {place} has format version {version}, and this ntkgen ({ntkgen.__version__}) reads version "
            f"{FORMAT_VERSION}. Made by ntkgen {values.get('version')}: use that."
        )
    return KernelStore(place, group, manifest)


def _manifest_values(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the manifest among a group's attributes.

    Raises:
        KeyError: If it is not there; the message says what is.
    """
    if "ntkgen" not in attributes:
        raise KeyError(f"its attributes are {', '.join(attributes) or 'none'}")
    values: Mapping[str, Any] = attributes["ntkgen"]
    return values


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
