"""The stored triangle as one full lazy matrix (NumPy, dask, xarray)."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.errors import StoreError

if TYPE_CHECKING:
    import zarr

    ZarrArray = zarr.Array[Any]

Index = npt.NDArray[np.intp]


class SymmetricArray:
    """A stored kernel as a NumPy-like matrix of true values: mirrored where one triangle is stored, and scaled.

    Indexing reads the tiles it needs and follows NumPy's rules for integers, slices and index arrays. float16 kernels
    are given as float32, in which their scale is exact. What is not stored yet reads as NaN.
    """

    ndim = 2

    def __init__(self, array: "ZarrArray", *, is_upper: bool, token: str, plane: int | None = None) -> None:
        self._array = array
        self._plane = plane  # which matrix, where the array holds one per output
        self._is_upper = is_upper
        self._token = token
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
            StoreError: If a tile that is read is damaged; the message names it.
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
        places = [np.searchsorted(n, w) for n, w in zip(needed, wanted, strict=True)]
        rest: list[Any] = []
        for axis, (k, place) in enumerate(zip(keys, places, strict=True)):
            if isinstance(k, slice):
                block = np.take(block, place, axis=axis)
                rest.append(slice(None))
            else:
                rest.append(place)
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
        first, second = (cols, rows) if mirrored else (rows, cols)
        region = (slice(int(first[0]), int(first[-1]) + 1), slice(int(second[0]), int(second[-1]) + 1))
        try:
            span = np.asarray(self._array[region if self._plane is None else (self._plane, *region)])
        except (ValueError, RuntimeError) as error:
            tile = (j, i) if mirrored else (i, j)
            raise StoreError(
                f"Tile {tile} of {self._array.path} in {self._array.store} is damaged ({error}). A disk error or an "
                f"interrupted copy? Remove its chunk file {self._array.path}/c/{self._key(tile)} and run the same "
                "`ntkgen compute` again: it makes it anew."
            ) from error
        part = span[np.ix_(first - first[0], second - second[0])].astype(self.dtype)
        if self.scale != 1:
            part *= self.dtype.type(self.scale)
        return part.T if mirrored else part

    def _key(self, tile: tuple[int, int]) -> str:
        return "/".join(map(str, tile if self._plane is None else (self._plane, *tile)))

    def to_dask(self) -> Any:
        """View as a dask array, one task per tile."""
        import dask.array as da

        return da.from_array(self, chunks=self.side, asarray=False, lock=False, inline_array=True)
