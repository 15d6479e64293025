"""A stored kernel with one or both triangles as a lazy full matrix, for NumPy, dask, SciPy and xarray."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.errors import DamagedTileError, InputError, ShapeError, StoreError
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Step, ignore_step
from ntkgen.store.remedy import Remedy

if TYPE_CHECKING:
    import zarr
    from scipy.sparse.linalg import LinearOperator

    ZarrArray = zarr.Array[Any]

Index = npt.NDArray[np.intp]
FloatArray = npt.NDArray[np.float64]

# Number of tiles that are read while another is multiplied. From a local disk, two are fast enough for products with a
# few vectors. Each further one would hold one more tile in float64, which is 134 MB with 4096 rows.
TILES_AHEAD = 2


def read_ahead(
    read: Callable[[Tile], FloatArray], tiles: Sequence[Tile], count: int = TILES_AHEAD
) -> Iterator[tuple[Tile, FloatArray]]:
    """Read tiles with ``count`` threads, at most ``count`` tiles ahead, and yield them in the given order."""
    with ThreadPoolExecutor(count) as pool:
        waiting = deque(pool.submit(read, tile) for tile in tiles[:count])
        for position, tile in enumerate(tiles, start=count):
            values = waiting.popleft().result()
            waiting.extend(pool.submit(read, following) for following in tiles[position : position + 1])
            yield tile, values


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, without the bytes that may follow."""
    return str(error).split("\n", maxsplit=1)[0].partition(". ")[0]


class SymmetricArray:
    """A stored kernel as a NumPy-like full matrix.

    The values are those of the kernel: the stored values times the scale factor. If only one triangle is stored, it is
    mirrored. Indexing reads only the tiles that it needs, and follows NumPy's rules for integers, slices and index
    arrays. A float16 kernel is returned in float32, in which its scale is exact. Tiles that are not stored yet read as
    NaN. For a finished store, a missing tile raises an error.
    """

    ndim = 2

    def __init__(
        self,
        array: "ZarrArray",
        *,
        is_upper: bool,
        token: str,
        place: tuple[int, ...] = (),
        is_complete: bool = False,
        remedy: Remedy | None = None,
    ) -> None:
        """View an array.

        Args:
            array: Stored kernel.
            is_upper: Whether only the upper triangle of tiles is stored.
            token: String by which dask identifies the contents.
            place: Position of the matrix along the axes before the rows, if the array holds several.
            is_complete: Whether a missing tile is an error.
            remedy: Place of the store and advice, for error messages. By default they name the place of the array.
        """
        self._array = array
        self._is_complete = is_complete
        self._place = place
        self._is_upper = is_upper
        self._token = token
        self._remedy = remedy or Remedy(str(array.store).removeprefix("file://"))
        self.scale = float(array.attrs.asdict().get("scale_factor", 1.0))  # type: ignore[arg-type]
        self.shape = (int(array.shape[-2]), int(array.shape[-1]))
        self.dtype = np.dtype(np.float32) if array.dtype == np.float16 else np.dtype(array.dtype)
        self.side = int(array.chunks[-1])

    def __repr__(self) -> str:
        """Show the size, the stored dtype and the layout."""
        half = "upper triangle" if self._is_upper else "whole"
        return f"<SymmetricArray {self.shape[0]} × {self.shape[1]}, stored as {self._array.dtype}, {half}>"

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __dask_tokenize__(self) -> tuple[str, str]:
        """Identify the contents for dask by the token, the name and dtype of the array, and the position in it."""
        return (self._token, f"{self._array.path} {self._array.dtype} {self._place}")

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:  # noqa: FBT001
        """Read the whole matrix into memory.

        Raises:
            ValueError: If a view without a copy is requested.
        """
        if copy is False:
            raise ValueError("A stored kernel cannot become a NumPy array without a copy. Leave out copy=False.")
        return np.asarray(self[:, :], dtype=dtype)

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Read a part of the matrix.

        Raises:
            StoreError: If a required tile is damaged, or missing from a finished store. The message names the tile.
            IndexError: If an index is out of range, or if more than two are given.
        """
        keys = list(key) if isinstance(key, tuple) else [key]
        for at in [position for position, k in enumerate(keys) if k is Ellipsis][:1]:
            keys[at : at + 1] = [slice(None)] * (3 - len(keys))
        if any(k is None for k in keys):
            raise IndexError("a kernel takes no new axis (None); index first, then reshape the result")
        if len(keys) > 2:
            raise IndexError(f"too many indices: a kernel has 2 axes, and {len(keys)} were indexed")
        keys += [slice(None)] * (2 - len(keys))
        wanted = [np.arange(length, dtype=np.intp)[k] for length, k in zip(self.shape, keys, strict=True)]
        needed = [np.unique(w) for w in wanted]
        block = self._read(*needed)
        # Translate the key into positions within the block: apply slices first, then leave the rest to NumPy.
        rest: list[Any] = []
        for axis, (k, n, w) in enumerate(zip(keys, needed, wanted, strict=True)):
            if isinstance(k, slice):
                block = np.flip(block, axis) if (k.step or 1) < 0 else block
                rest.append(slice(None))
            else:
                rest.append(np.searchsorted(n, w))
        return np.asarray(block[tuple(rest)])

    def _read(self, rows: Index, cols: Index) -> npt.NDArray[Any]:
        """Read the sub-matrix of the given sorted rows and columns, tile by tile."""
        out = np.empty((len(rows), len(cols)), self.dtype)
        for i in np.unique(rows // self.side):
            at_rows = np.flatnonzero(rows // self.side == i)
            for j in np.unique(cols // self.side):
                at_cols = np.flatnonzero(cols // self.side == j)
                values = self._read_tile(int(i), int(j), rows[at_rows], cols[at_cols])
                out[at_rows[0] : at_rows[-1] + 1, at_cols[0] : at_cols[-1] + 1] = values
        return out

    def _read_tile(self, i: int, j: int, rows: Index, cols: Index) -> npt.NDArray[Any]:
        mirrored = self._is_upper and i > j
        tile, first, second = (Tile(j, i), cols, rows) if mirrored else (Tile(i, j), rows, cols)
        region = (slice(int(first[0]), int(first[-1]) + 1), slice(int(second[0]), int(second[-1]) + 1))
        part = self._read_stored(tile, region, is_required=self._is_complete)
        if part.shape != (len(first), len(second)):  # rows or columns are not contiguous
            part = part[np.ix_(first - first[0], second - second[0])]
        part = part.astype(self.dtype, copy=False)
        if self.scale != 1:
            part = part * self.dtype.type(self.scale)
        return part.T if mirrored else part

    def _read_stored(self, tile: Tile, region: tuple[slice, slice], *, is_required: bool) -> npt.NDArray[Any]:
        """Read a part of one tile as it is stored.

        Raises:
            DamagedTileError: If the tile is damaged.
            StoreError: If the tile is required and missing.
        """
        where: Any = (*self._place, *region)
        try:
            values = np.asarray(self._array[where])
        except (ValueError, RuntimeError) as error:
            raise DamagedTileError(
                f"{self._name(tile)} is damaged ({_first_sentence(error)}): expected its chunk file "
                f"{self._chunk(tile)} to match its checksum. A disk error or an interrupted copy? {self._remedy.repair}"
            ) from error
        if is_required and np.isnan(values[0, 0]):  # tiles hold no NaN, so this one stands for a missing file
            raise self._missing(tile)
        return values

    def leading(self, rows: int) -> "SymmetricArray":
        """View the first rows and columns of a symmetric kernel. A missing tile in this part raises an error.

        Only the upper triangle of tiles is read, even if both triangles are stored.

        Raises:
            ShapeError: If the kernel is rectangular, or has fewer rows.
        """
        if self.shape[0] != self.shape[1] or not 0 < rows <= self.shape[0]:
            raise ShapeError(
                f"The kernel of {self.shape[0]} × {self.shape[1]} has no leading part of {rows} rows: expected a "
                f"square kernel and a number from 1 to {self.shape[0]}. Does the kernel have other samples in its "
                "columns, or was the number of samples passed? Pass the number of samples times the number of outputs."
            )
        part = copy.copy(self)
        part.shape, part._token = (rows, rows), f"{self._token}-{rows}"
        part._is_upper = part._is_complete = True
        return part

    # products ------------------------------------------------------------------------------------------------------

    def matmat(
        self,
        V: npt.ArrayLike,  # (cols,) or (cols, vectors); for the transpose (rows,) or (rows, vectors)
        *,
        transposed: bool = False,
        tiles: Sequence[Tile] | None = None,  # stored tiles to multiply; None means all
        step: Step = ignore_step,  # called after each tile
    ) -> FloatArray:  # (rows,) or (rows, vectors); for the transpose (cols,) or (cols, vectors)
        """Multiply the kernel, or its transpose, with vectors in float64, in one pass over the stored tiles.

        Each tile is read once. If one triangle is stored, each off-diagonal tile is used twice: as it is, and
        transposed. The next tiles are read while one is multiplied. The products are added in the order of the tiles.
        Equal calls therefore give equal bits. This costs 2 · rows · cols FLOPs per vector, and needs memory for four
        tiles in float64.

        Raises:
            ShapeError: If the vectors do not have one entry per column of the kernel, or per row for the transpose.
            InputError: If the vectors do not hold real numbers.
            StoreError: If a tile is missing, damaged or not finite. The message names the tile.
        """
        transposed = transposed and not self._is_upper
        length, entries = self.shape if not transposed else self.shape[::-1]
        V = self._vectors(V, entries)
        product = np.zeros((length, *V.shape[1:]))
        for tile, values in read_ahead(self._whole_tile, self.tiles() if tiles is None else tiles):
            rows, cols = self._region(tile)
            if not transposed:
                product[rows] += self._part(tile, values, V[cols])
            if transposed or (self._is_upper and rows != cols):
                product[cols] += self._part(tile, values.T, V[rows])
            step()
        product *= self.scale
        return product

    def __matmul__(self, other: npt.ArrayLike) -> FloatArray:
        """Multiply with a vector or with the columns of a matrix, in float64."""
        return self.matmat(other)

    def to_scipy(self) -> "LinearOperator":
        """View as a `scipy.sparse.linalg.LinearOperator`, for example for `eigsh`, `svds` and `cg`.

        Each product is one pass over the stored tiles, for any number of vectors. Methods that multiply with several
        vectors at once, such as `lobpcg`, therefore read less.
        """
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(
            shape=self.shape,
            dtype=np.dtype(np.float64),
            matvec=lambda v: self.matmat(v.ravel()),
            matmat=self.matmat,
            rmatvec=lambda v: self.matmat(v.ravel(), transposed=True),
            rmatmat=lambda V: self.matmat(V, transposed=True),
        )

    def tiles(self) -> list[Tile]:
        """List the stored tiles, row by row."""
        num_rows, num_cols = (-(-length // self.side) for length in self.shape)
        return [Tile(i, j) for i in range(num_rows) for j in range(i if self._is_upper else 0, num_cols)]

    def _region(self, tile: Tile) -> tuple[slice, slice]:
        """Locate the rows and columns of a tile. The last tiles of a row or column can be smaller."""
        rows, cols = (
            slice(at * self.side, min((at + 1) * self.side, length))
            for at, length in zip(tile, self.shape, strict=True)
        )
        return rows, cols

    def _whole_tile(self, tile: Tile) -> FloatArray:
        """Read a tile in float64, without its scale factor."""
        return self._read_stored(tile, self._region(tile), is_required=True).astype(np.float64, copy=False)

    def _part(self, tile: Tile, values: FloatArray, V: FloatArray) -> FloatArray:
        """Multiply one tile with vectors. The tile is searched for NaN and infinity only if the product has some.

        Raises:
            DamagedTileError: If an entry of the tile is not finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            part: FloatArray = values @ V
        if not np.isfinite(part).all() and not (is_finite := np.isfinite(values)).all():
            raise DamagedTileError(
                f"{self._name(tile)} is not finite: expected numbers, found {values.size - int(is_finite.sum())} of "
                f"{values.size} entries infinite or NaN. Was it overwritten? {self._remedy.repair}"
            )
        return part

    def _vectors(self, V: npt.ArrayLike, entries: int) -> FloatArray:
        """Convert vectors to float64.

        Raises:
            ShapeError: If their shape does not fit the kernel.
            InputError: If they do not hold real numbers.
        """
        vectors = np.asarray(V)
        if vectors.dtype.kind not in "fiub":
            raise InputError(
                f"A kernel is multiplied with real numbers: expected an array of them, found {vectors.dtype}. Is it "
                "complex or sparse? Multiply the real and the imaginary part, or make it dense."
            )
        if vectors.ndim not in {1, 2} or len(vectors) != entries:
            raise ShapeError(
                f"The vectors do not fit the kernel of {self.shape[0]} × {self.shape[1]}: expected ({entries},) or "
                f"({entries}, vectors), found {vectors.shape}. Do they belong to other samples or outputs, or to the "
                "transpose? Pass one entry per column, or `transposed=True` and one entry per row."
            )
        return vectors.astype(np.float64, copy=False)

    # errors --------------------------------------------------------------------------------------------------------

    def _name(self, tile: Tile) -> str:
        return f"Tile ({tile.row}, {tile.col}) of {self._array.path} in {self._remedy.place}"

    def _chunk(self, tile: Tile) -> str:
        """Return the path of a tile's file, relative to the store."""
        return f"{self._array.path}/c/" + "/".join(map(str, (*self._place, *tile)))

    def _missing(self, tile: Tile) -> StoreError:
        missing = f"{self._name(tile)} is missing: expected its chunk file {self._chunk(tile)}, found NaN. "
        again = f"the same `{self._remedy.command}` again"
        if not self._is_complete:
            return StoreError(f"{missing}Is the store unfinished? Run {again} to continue it.")
        return StoreError(
            f"{missing}The store was finished: was the file removed since, or not copied? Run `ntkgen verify "
            f"{self._remedy.place}`, which lists all missing tiles, and then {again} to restore them."
        )

    # dask ----------------------------------------------------------------------------------------------------------

    def to_dask(self, *, tiles_per_chunk: int = 1) -> Any:
        """View as a dask array, with one task per square of ``tiles_per_chunk`` × ``tiles_per_chunk`` tiles.

        Dask builds a graph of 300 × 300 tasks in seconds, and every operation adds as many tasks. Larger chunks are
        therefore better for larger kernels. A slice reads only the tiles that it needs, for any size of chunk.

        Raises:
            InputError: If ``tiles_per_chunk`` is less than 1.
        """
        import dask.array as da
        from dask.base import tokenize

        if tiles_per_chunk < 1:
            raise InputError(
                f"A chunk must hold at least one tile along each side: expected at least 1, and tiles_per_chunk is "
                f"{tiles_per_chunk}. Was the number of chunks meant? Pass 1, or more for fewer tasks."
            )
        return da.from_array(
            self,
            chunks=tiles_per_chunk * self.side,
            name=f"ntk-{tokenize(self, tiles_per_chunk)}",
            asarray=False,
            lock=False,
            inline_array=True,
            meta=np.empty((0, 0), self.dtype),
        )
