"""The stored triangle as one full lazy matrix (NumPy, dask, SciPy, xarray)."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.errors import DamagedTileError, InputError, ShapeError, StoreError
from ntkgen.progress import Step, ignore_step
from ntkgen.store.remedy import Remedy

if TYPE_CHECKING:
    import zarr
    from scipy.sparse.linalg import LinearOperator

    ZarrArray = zarr.Array[Any]

Index = npt.NDArray[np.intp]
FloatArray = npt.NDArray[np.float64]
Place = tuple[int, int]  # of a tile: its row and its column of tiles

# Tiles that are read while another is multiplied. Two keep up with the products of a few vectors from a local disk, and
# each more would hold one more tile in float64, 134 MB with 4096 rows.
TILES_AHEAD = 2


def read_ahead(
    read: Callable[[Place], FloatArray], places: Sequence[Place], count: int = TILES_AHEAD
) -> Iterator[tuple[Place, FloatArray]]:
    """Read tiles in as many threads as tiles may be waiting, and give them in their order."""
    with ThreadPoolExecutor(count) as pool:
        waiting = deque(pool.submit(read, place) for place in places[:count])
        for position, place in enumerate(places, start=count):
            values = waiting.popleft().result()
            waiting.extend(pool.submit(read, following) for following in places[position : position + 1])
            yield place, values


def _words(error: Exception) -> str:
    """Quote an error without the bytes that it may show."""
    return str(error).split("\n", maxsplit=1)[0].partition(". ")[0]


class SymmetricArray:
    """A stored kernel as a NumPy-like matrix of true values: mirrored where one triangle is stored, and scaled.

    Indexing reads the tiles it needs and follows NumPy's rules for integers, slices and index arrays. float16 kernels
    are given as float32, in which their scale is exact. What is not stored yet reads as NaN; what is gone from a
    finished store is an error.
    """

    ndim = 2

    def __init__(
        self,
        array: "ZarrArray",
        *,
        is_upper: bool,
        token: str,
        plane: int | None = None,
        is_complete: bool = False,
        remedy: Remedy | None = None,
    ) -> None:
        """View an array.

        Args:
            array: The stored kernel.
            is_upper: Whether it has one triangle of tiles.
            token: What dask tells its contents from others by.
            plane: Which matrix, where it holds one per output.
            is_complete: Whether no tile may be missing.
            remedy: What errors say of its store, and what to do; otherwise they name the array's place.
        """
        self._array = array
        self._is_complete = is_complete
        self._plane = plane
        self._is_upper = is_upper
        self._token = token
        self._remedy = remedy or Remedy(str(array.store).removeprefix("file://"))
        self.scale = float(array.attrs.asdict().get("scale_factor", 1.0))  # type: ignore[arg-type]
        self.shape = (int(array.shape[-2]), int(array.shape[-1]))
        self.dtype = np.dtype(np.float32) if array.dtype == np.float16 else np.dtype(array.dtype)
        self.side = int(array.chunks[-1])

    def __repr__(self) -> str:
        """Say the size and the stored dtype."""
        half = "upper triangle" if self._is_upper else "whole"
        return f"<SymmetricArray {self.shape[0]} × {self.shape[1]}, stored as {self._array.dtype}, {half}>"

    def __len__(self) -> int:
        """Count the rows."""
        return self.shape[0]

    def __dask_tokenize__(self) -> tuple[str, str]:
        """Name the contents for dask: the kernel's fingerprint and its dtype."""
        return (self._token, f"{self._array.dtype} {self._plane}")

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:  # noqa: FBT001
        """Read the whole matrix into memory.

        Raises:
            ValueError: If a view without a copy is asked for, which there cannot be.
        """
        if copy is False:
            raise ValueError("A stored kernel cannot become a NumPy array without a copy. Leave out copy=False.")
        return np.asarray(self[:, :], dtype=dtype)

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """Read a part of the matrix.

        Raises:
            StoreError: If a tile that is read is damaged, or missing from a finished store; the message names it.
            IndexError: If an index is out of range, or there are more than two.
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
        # the same key, in positions within what was read: slices first, then NumPy's own rules for the rest
        rest: list[Any] = []
        for axis, (k, n, w) in enumerate(zip(keys, needed, wanted, strict=True)):
            if isinstance(k, slice):
                block = np.flip(block, axis) if (k.step or 1) < 0 else block
                rest.append(slice(None))
            else:
                rest.append(np.searchsorted(n, w))
        return np.asarray(block[tuple(rest)])

    def _read(self, rows: Index, cols: Index) -> npt.NDArray[Any]:
        """Read the sub-matrix of some sorted rows and columns, tile by tile."""
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
        tile, first, second = ((j, i), cols, rows) if mirrored else ((i, j), rows, cols)
        region = (slice(int(first[0]), int(first[-1]) + 1), slice(int(second[0]), int(second[-1]) + 1))
        part = self._read_stored(tile, region, is_required=self._is_complete)
        if part.shape != (len(first), len(second)):  # with gaps
            part = part[np.ix_(first - first[0], second - second[0])]
        part = part.astype(self.dtype, copy=False)
        if self.scale != 1:
            part = part * self.dtype.type(self.scale)
        return part.T if mirrored else part

    def _read_stored(self, tile: Place, region: tuple[slice, slice], *, is_required: bool) -> npt.NDArray[Any]:
        """Read a part of one stored tile, as it is stored.

        Raises:
            DamagedTileError: If the tile is damaged.
            StoreError: If it is required, and missing.
        """
        try:
            values = np.asarray(self._array[region if self._plane is None else (self._plane, *region)])
        except (ValueError, RuntimeError) as error:
            raise DamagedTileError(
                f"{self._name(tile)} is damaged ({_words(error)}): expected its chunk file {self._chunk(tile)} to "
                f"match its checksum. A disk error or an interrupted copy? {self._remedy.repair}"
            ) from error
        if is_required and np.isnan(values[0, 0]):  # no tile has a NaN, so that this is what an absent file reads as
            raise self._missing(tile)
        return values

    def leading(self, rows: int) -> "SymmetricArray":
        """View the first rows and columns of a symmetric kernel; no tile of theirs may be missing.

        One triangle of tiles is read, also where both are stored.

        Raises:
            ShapeError: If the kernel is rectangular, or has not as many rows.
        """
        if self.shape[0] != self.shape[1] or not 0 < rows <= self.shape[0]:
            raise ShapeError(
                f"The kernel of {self.shape[0]} × {self.shape[1]} has no leading part of {rows} rows: expected a "
                "square kernel and 1 row to all. Is it of rows against others, or were rows and samples confused? "
                "Pass samples times outputs."
            )
        part = copy.copy(self)
        part.shape, part._token = (rows, rows), f"{self._token}-{rows}"
        part._is_upper = part._is_complete = True
        return part

    # products ------------------------------------------------------------------------------------------------------

    def matmat(
        self,
        V: npt.ArrayLike,  # (cols,) or (cols, vectors); of the transpose (rows,) or (rows, vectors)
        *,
        transposed: bool = False,
        places: Sequence[Place] | None = None,  # the stored tiles that are multiplied, if not all
        step: Step = ignore_step,  # called after each tile
    ) -> FloatArray:  # (rows,) or (rows, vectors); of the transpose (cols,) or (cols, vectors)
        """Multiply the kernel, or its transpose, with vectors in float64, in one pass over the stored tiles.

        Each is read once: where one triangle is stored, a tile off the diagonal is used as it is and transposed. The
        next tiles are read while one is multiplied, and the sums are made in the order of the tiles, so that the same
        product has the same bits. Costs 2 · rows · cols FLOPs per vector, and holds four tiles in float64.

        Raises:
            ShapeError: If the vectors have not as many entries as the kernel has columns, or its transpose.
            InputError: If they are not real numbers.
            StoreError: If a tile is missing, damaged or not finite; the message names it.
        """
        transposed = transposed and not self._is_upper
        length, entries = self.shape if not transposed else self.shape[::-1]
        V = self._vectors(V, entries)
        product = np.zeros((length, *V.shape[1:]))
        for tile, values in read_ahead(self._whole_tile, self.places() if places is None else places):
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
        """View as a `scipy.sparse.linalg.LinearOperator`, for `eigsh`, `svds`, `cg` and their like.

        Each product is a pass over the stored tiles, whatever the number of its vectors: methods that multiply with
        several at once (`lobpcg`) read less.
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

    def places(self) -> list[Place]:
        """List the stored tiles, row by row."""
        num_rows, num_cols = (-(-length // self.side) for length in self.shape)
        return [(i, j) for i in range(num_rows) for j in range(i if self._is_upper else 0, num_cols)]

    def _region(self, tile: Place) -> tuple[slice, slice]:
        """Locate the rows and columns of a tile; the last ones are ragged."""
        rows, cols = (
            slice(at * self.side, min((at + 1) * self.side, length))
            for at, length in zip(tile, self.shape, strict=True)
        )
        return rows, cols

    def _whole_tile(self, tile: Place) -> FloatArray:
        """Read a tile in float64, not scaled."""
        return self._read_stored(tile, self._region(tile), is_required=True).astype(np.float64, copy=False)

    def _part(self, tile: Place, values: FloatArray, V: FloatArray) -> FloatArray:
        """Multiply one tile.

        Raises:
            DamagedTileError: If it holds what is not finite, which the product shows at a fraction of the cost.
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
        """Take what is to be multiplied as float64.

        Raises:
            ShapeError: If it does not fit.
            InputError: If it is not of real numbers.
        """
        found = np.asarray(V)
        if found.dtype.kind not in "fiub":
            raise InputError(
                f"A kernel is multiplied with real numbers: expected an array of them, found {found.dtype}. Is it "
                "complex or sparse? Multiply the real and the imaginary part, or make it dense."
            )
        if found.ndim not in {1, 2} or len(found) != entries:
            raise ShapeError(
                f"What is to be multiplied does not fit the kernel of {self.shape[0]} × {self.shape[1]}: expected "
                f"({entries},) or ({entries}, vectors), found {found.shape}. Was it made for other samples or outputs, "
                "or is it the transpose that is meant? Pass one entry per column, or `transposed=True` and one per row."
            )
        return found.astype(np.float64, copy=False)

    # errors --------------------------------------------------------------------------------------------------------

    def _name(self, tile: Place) -> str:
        return f"Tile {tile} of {self._array.path} in {self._remedy.place}"

    def _chunk(self, tile: Place) -> str:
        """Name the file of a tile, within the store."""
        return f"{self._array.path}/c/" + "/".join(map(str, tile if self._plane is None else (self._plane, *tile)))

    def _missing(self, tile: Place) -> StoreError:
        missing = f"{self._name(tile)} is missing: expected its chunk file {self._chunk(tile)}, and it reads as NaN. "
        again = f"the same `{self._remedy.command}` again"
        if not self._is_complete:
            return StoreError(f"{missing}Is the store unfinished? Run {again}: it goes on.")
        return StoreError(
            f"{missing}The store was finished: was the file removed since, or not copied? Run `ntkgen verify "
            f"{self._remedy.place}`, which lists what else is gone, and then {again}: it makes it anew."
        )

    # dask ----------------------------------------------------------------------------------------------------------

    def to_dask(self, *, tiles_per_chunk: int = 1) -> Any:
        """View as a dask array, one task per tile, or per square of ``tiles_per_chunk`` tiles along each side.

        A graph of 300 × 300 tasks is made in seconds, and every operation on it adds as many: larger chunks suit larger
        kernels. A slice reads the tiles that it needs, whatever the chunks.

        Raises:
            InputError: If there is not at least one tile to a chunk.
        """
        import dask.array as da
        from dask.base import tokenize

        if tiles_per_chunk < 1:
            raise InputError(
                f"A chunk must hold at least one tile along each side, and tiles_per_chunk is {tiles_per_chunk}. Was "
                "the number of chunks meant? Pass 1, or more for fewer tasks."
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
