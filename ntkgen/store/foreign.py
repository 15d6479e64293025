"""Reading of a kernel that this program's predecessor (github.com/liamhodg/ntkgen) has written.

The predecessor stored J Jᵀ / √P of P parameters, rounded to one dtype, with sample-major rows as here. It wrote either
a Zarr array with the upper triangle, and zeros below the diagonal, or a raw file with the whole matrix. If the diagonal
has a zero, or if a chunk of the upper triangle is missing, the predecessor had not finished the kernel.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from ntkgen.errors import InputError, StoreError
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.store.rounding import STORE_DTYPES

if TYPE_CHECKING:
    Matrix = zarr.Array[Any] | npt.NDArray[np.floating]

# Number of rows of a raw file that are read at a time for the diagonal.
STEP_ROWS = 4096

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class SourceDescription:
    """Properties of a kernel that its files do not state, or not reliably."""

    num_samples: int
    num_outputs: int
    num_params: int | None = None  # P; None means unknown, and the kernel stays divided by √P
    dtype: str | None = None  # dtype of a raw file whose name does not contain it
    tile_side: int | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of the kernel, n · m."""
        return self.num_samples * self.num_outputs

    @property
    def scale(self) -> float:
        """Factor by which the stored numbers are multiplied."""
        return 1.0 if self.num_params is None else math.sqrt(self.num_params)

    @property
    def quantity(self) -> str:
        """Meaning of the stored numbers times the scale."""
        return "J Jᵀ" if self.num_params is not None else "J Jᵀ/√P (normalised by 1/√P)"


@dataclass(frozen=True)
class ForeignKernel:
    """A kernel of the predecessor, opened for reading."""

    name: str  # path or URL of the file, for error messages
    matrix: "Matrix"
    given: SourceDescription

    @property
    def dtype(self) -> str:
        """Dtype of the stored numbers."""
        return str(self.matrix.dtype.name)

    @property
    def short_name(self) -> str:
        """Name of the file without its folder."""
        return self.name.rstrip("/").rpartition("/")[2]

    def read(self, rows: slice, cols: slice) -> FloatArray:
        """Read a tile of the upper triangle. A tile on the diagonal is made symmetric from its upper triangle."""
        values = self._read(rows, cols)
        if rows == cols:
            below = np.tri(len(values), k=-1, dtype=bool)
            values = np.where(below, values.T, values)  # no arithmetic, so that every bit is kept
        return self._checked(values, rows, cols)

    def _read(self, rows: slice, cols: slice) -> FloatArray:
        try:
            return np.array(self.matrix[rows, cols], dtype=self.dtype, order="C")
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(
                f"{self.name} cannot be read at {_where(rows, cols)}: expected chunks that can be decompressed, found "
                f"an error ({' '.join(str(error).split())}). A disk error or an interrupted copy? Copy it again."
            ) from error

    def _checked(self, values: FloatArray, rows: slice, cols: slice) -> FloatArray:
        """Return the entries, or refuse them if they cannot belong to a finished kernel.

        Raises:
            StoreError: If an entry is not finite, or if a whole row or column is zero.
        """
        is_finite = np.isfinite(values)
        if not is_finite.all():
            raise StoreError(
                f"{self.name} is not finite at {_where(rows, cols)}: expected numbers, found {(~is_finite).sum()} of "
                f"{values.size} entries infinite or NaN. {_OVERFLOW}"
            )
        for axis, name in ((1, "row"), (0, "column")):
            if len(empty := np.flatnonzero(~values.any(axis))):
                raise self._unfinished(f"only zeros in {name} {empty[0]} of {_where(rows, cols)}")
        return values

    def read_diagonal(self) -> npt.NDArray[np.float64]:  # (rows,)
        """Read the stored diagonal, and refuse a kernel that is not finished.

        Raises:
            StoreError: If an entry is not finite or not positive. The message names its row.
        """
        size, step = self.given.num_rows, self._step
        parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        diagonal = np.concatenate([self._read(part, part).diagonal() for part in parts]).astype(np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(diagonal))):
            raise StoreError(
                f"{self.name} is not finite on its diagonal: expected numbers, found {diagonal[bad[0]]} in row "
                f"{bad[0]}, the first of {len(bad)} such rows. {_OVERFLOW}"
            )
        if len(bad := np.flatnonzero(diagonal <= 0)):
            raise self._unfinished(f"{diagonal[bad[0]]:g} in row {bad[0]}, the first of {len(bad)} such rows")
        return diagonal

    @property
    def _step(self) -> int:
        return STEP_ROWS if isinstance(self.matrix, np.ndarray) else int((self.matrix.shards or self.matrix.chunks)[0])

    def require_chunks(self, folder: Folder) -> None:
        """Refuse a Zarr array that lacks a chunk of its upper triangle. A missing chunk would read as zeros.

        Raises:
            StoreError: If a chunk is missing.
        """
        assert not isinstance(self.matrix, np.ndarray)
        files, count = set(folder.sizes()), -(-self.given.num_rows // self._step)
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        missing = [key for pair in pairs if (key := self.matrix.metadata.encode_chunk_key(pair)) not in files]
        if missing:
            raise self._unfinished(f"{len(missing)} of {len(pairs)} chunks missing, the first {missing[0]}")

    def _unfinished(self, found: str) -> StoreError:
        return StoreError(
            f"The kernel at {self.name} is not finished: expected a diagonal of positive numbers and the whole upper "
            f"triangle, found {found}. Was the predecessor or the copy interrupted? Finish the kernel with the "
            "predecessor, or copy it again."
        )


# Cause and advice for entries that are not finite.
_OVERFLOW = (
    "Did float16 overflow when the kernel was computed? These entries are lost. Import the float32 kernel beside it, "
    "or compute the kernel again with `ntkgen compute`, which scales the entries before rounding."
)


def open_foreign(folder: Folder, given: SourceDescription) -> ForeignKernel:
    """Open a kernel of the predecessor, and compare it with its description.

    Raises:
        InputError: If its size or dtype differs from the description.
        StoreError: If it is not a kernel of the predecessor.
    """
    _require_positive(given)
    if isinstance(folder, LocalFolder) and folder.path.is_file():
        return ForeignKernel(str(folder), _open_raw(folder.path, given), given)
    foreign = ForeignKernel(str(folder), _open_array(folder, given), given)
    foreign.require_chunks(folder)
    return foreign


def _require_positive(given: SourceDescription) -> None:
    for name in ("num_samples", "num_outputs", "num_params"):
        number = getattr(given, name)
        if number is not None and number < 1:
            raise InputError(
                f"The setting `{name}` of the kernel is not positive: expected at least 1, found {number}. Is the "
                "number misspelt? Give the number that the kernel was computed with."
            )


def _open_raw(path: Path, given: SourceDescription) -> FloatArray:
    """Map a raw file, which holds the whole matrix row by row, into memory.

    Raises:
        InputError: If its dtype is unknown, or if its size does not match.
    """
    in_name = re.search(r"float(16|32|64)", path.name)
    dtype = given.dtype or (in_name and in_name[0])
    if dtype not in STORE_DTYPES:
        raise InputError(
            f"The dtype of {path} is unknown: expected a file name such as ntk_float32.bin, or `dtype` with one of "
            f"{', '.join(STORE_DTYPES)}, found {dtype or 'neither'}. Was the file renamed? Give its `dtype`."
        )
    expected, size = given.num_rows**2 * np.dtype(dtype).itemsize, path.stat().st_size
    if size != expected:
        rows = math.isqrt(size // np.dtype(dtype).itemsize)
        raise InputError(
            f"{path} does not hold a {dtype} kernel of {given.num_samples} samples × {given.num_outputs} outputs: "
            f"expected {given.num_rows}² entries, {expected} bytes, found {size} bytes, about {rows}² entries. Does it "
            "have fewer samples or another dtype, or is it truncated? Correct `num_samples`, `num_outputs` or `dtype`."
        )
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", shape=(given.num_rows, given.num_rows))


def _open_array(folder: Folder, given: SourceDescription) -> "zarr.Array[Any]":
    """Open a Zarr array.

    Raises:
        StoreError: If there is no array, or if it cannot be a kernel of the predecessor.
        InputError: If its shape or dtype differs from the description.
    """
    try:
        array = zarr.open_array(folder.zarr_store(read_only=True), mode="r")
    except (ValueError, KeyError, TypeError, OSError) as error:  # base classes of Zarr's errors
        raise StoreError(
            f"{folder} is not a kernel of this program's predecessor: expected a Zarr array such as ntk_float32.zarr, "
            f"or a raw file such as ntk_float32.bin, found neither ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Does it contain the array as a subfolder, or is it a store of this "
            "program, which needs no import? Give the path of the array."
        ) from error
    if array.ndim != 2 or array.dtype.name not in STORE_DTYPES:
        raise StoreError(
            f"{folder} is a Zarr array but not a kernel: expected 2 axes and one of {', '.join(STORE_DTYPES)}, found "
            f"the shape {array.shape} of {array.dtype.name}. Was another array meant? Give the path of the kernel."
        )
    if array.shape != (given.num_rows, given.num_rows):
        raise InputError(
            f"{folder} is not the kernel of {given.num_samples} samples × {given.num_outputs} outputs: expected the "
            f"shape {(given.num_rows, given.num_rows)}, found {array.shape}. Was it computed for fewer samples, or for "
            "another number of classes? Correct `num_samples` or `num_outputs`."
        )
    if len(set(array.chunks)) != 1:
        raise StoreError(
            f"{folder} has chunks of {array.chunks} entries: expected square chunks, as the predecessor writes them. "
            "Was it written by another program? Copy it into an array with square chunks."
        )
    if given.dtype not in {None, array.dtype.name}:
        raise InputError(
            f"The Zarr array {folder} has another dtype than `dtype`: expected {given.dtype}, found "
            f"{array.dtype.name}. Should it be converted? An import keeps the stored numbers. Leave out `dtype`, which "
            "only a raw file needs."
        )
    return array


def _where(rows: slice, cols: slice) -> str:
    return f"rows {rows.start}–{rows.stop - 1}, columns {cols.start}–{cols.stop - 1}"
