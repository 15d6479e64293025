"""A kernel of this program's predecessor (github.com/liamhodg/ntkgen), opened for reading.

What it wrote is J Jᵀ / √P of P parameters, rounded to one dtype, its rows sample-major like ours: a Zarr array whose
upper triangle counts, with zeros below, or a file with the raw matrix. What is zero on the diagonal, or not there of
the upper triangle, it had not finished.
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

# Rows of a raw file whose diagonal is read at a time.
STEP_ROWS = 4096

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class SourceDescription:
    """What the files of a kernel do not say, or not surely."""

    num_samples: int
    num_outputs: int
    num_params: int | None = None  # P; None: not known, and the kernel stays divided by √P
    dtype: str | None = None  # of a raw file whose name does not tell
    tile_side: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the kernel, n · m."""
        return self.num_samples * self.num_outputs

    @property
    def scale(self) -> float:
        """By what the stored numbers are to be multiplied."""
        return 1.0 if self.num_params is None else math.sqrt(self.num_params)

    @property
    def quantity(self) -> str:
        """What the stored numbers, times the scale, are."""
        return "J Jᵀ" if self.num_params is not None else "J Jᵀ/√P (normalised by 1/√P)"


@dataclass(frozen=True)
class ForeignKernel:
    """A kernel that another program has written, opened for reading."""

    name: str  # of its file, as an error names it
    matrix: "Matrix"
    given: SourceDescription

    @property
    def dtype(self) -> str:
        """Its one dtype."""
        return str(self.matrix.dtype.name)

    @property
    def short_name(self) -> str:
        """The name of its file, without the folder."""
        return self.name.rstrip("/").rpartition("/")[2]

    def read(self, rows: slice, cols: slice) -> FloatArray:
        """Read a part of the upper triangle, or one on the diagonal, mirrored from the part above it."""
        values = self._read(rows, cols)
        if rows == cols:
            below = np.tri(len(values), k=-1, dtype=bool)
            values = np.where(below, values.T, values)  # no arithmetic: every bit stays
        return self._checked(values, rows, cols)

    def _read(self, rows: slice, cols: slice) -> FloatArray:
        try:
            return np.array(self.matrix[rows, cols], dtype=self.dtype, order="C")
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreError(
                f"{self.name} cannot be read at {_where(rows, cols)} ({' '.join(str(error).split())}): expected chunks "
                "that can be unpacked. A disk error or an interrupted copy? Copy it again."
            ) from error

    def _checked(self, values: FloatArray, rows: slice, cols: slice) -> FloatArray:
        """Refuse what is no kernel.

        Raises:
            StoreError: If entries are not finite, or all of a row or a column are zero.
        """
        is_finite = np.isfinite(values)
        if not is_finite.all():
            raise StoreError(
                f"{self.name} is not finite at {_where(rows, cols)}: expected numbers, found {(~is_finite).sum()} of "
                f"{values.size} entries infinite or NaN. {_OVERFLOW}"
            )
        for axis, name in ((1, "row"), (0, "column")):
            if len(empty := np.flatnonzero(~values.any(axis))):
                raise self._unfinished(f"zeros alone in {name} {empty[0]} of {_where(rows, cols)}")
        return values

    def read_diagonal(self) -> npt.NDArray[np.float64]:  # (rows,)
        """Read the stored diagonal, and refuse a kernel that is not whole.

        Raises:
            StoreError: If an entry is zero or not finite; the message names its row.
        """
        size, step = self.given.num_rows, self._step
        parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        diagonal = np.concatenate([self._read(part, part).diagonal() for part in parts]).astype(np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(diagonal))):
            raise StoreError(
                f"{self.name} is not finite on its diagonal: expected numbers, found {diagonal[bad[0]]} in row "
                f"{bad[0]}, and {len(bad)} such rows. {_OVERFLOW}"
            )
        if len(bad := np.flatnonzero(diagonal <= 0)):
            raise self._unfinished(f"{diagonal[bad[0]]:g} in row {bad[0]}, and {len(bad)} such rows")
        return diagonal

    @property
    def _step(self) -> int:
        return STEP_ROWS if isinstance(self.matrix, np.ndarray) else int((self.matrix.shards or self.matrix.chunks)[0])

    def require_chunks(self, folder: Folder) -> None:
        """Refuse a Zarr array that lacks a chunk of its upper triangle: it would read as zeros.

        Raises:
            StoreError: If one is not there.
        """
        assert not isinstance(self.matrix, np.ndarray)
        there, count = set(folder.sizes()), -(-self.given.num_rows // self._step)
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        missing = [key for pair in pairs if (key := self.matrix.metadata.encode_chunk_key(pair)) not in there]
        if missing:
            raise self._unfinished(f"{len(missing)} of {len(pairs)} chunks missing, the first {missing[0]}")

    def _unfinished(self, found: str) -> StoreError:
        return StoreError(
            f"The kernel at {self.name} is not finished: expected a diagonal of positive numbers and the whole upper "
            f"triangle, found {found}. Was the program interrupted that wrote it, or the copy? Finish that first, or "
            "take a whole copy."
        )


_OVERFLOW = (
    "Did float16 overflow where it was computed? These entries are lost: import the float32 kernel beside it, or "
    "compute it anew with `ntkgen compute`, which scales before it rounds."
)


def open_foreign(folder: Folder, given: SourceDescription) -> ForeignKernel:
    """Open a kernel of the predecessor, and compare it with what is said of it.

    Raises:
        InputError: If size and dtype are not those that are said.
        StoreError: If it is no such kernel.
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
            raise InputError(f"A kernel has `{name}`: expected at least 1, found {number}. Is the number misspelt?")


def _open_raw(path: Path, given: SourceDescription) -> FloatArray:
    """Map a raw file, the whole matrix row by row.

    Raises:
        InputError: If its dtype is not known, or its size another.
    """
    found = re.search(r"float(16|32|64)", path.name)
    dtype = given.dtype or (found and found[0])
    if dtype not in STORE_DTYPES:
        raise InputError(
            f"{path} does not say in what dtype it is: expected a name as ntk_float32.bin, or `dtype` with one of "
            f"{', '.join(STORE_DTYPES)}, found {dtype or 'neither'}. Was it renamed? Say it with `dtype`."
        )
    expected, size = given.num_rows**2 * np.dtype(dtype).itemsize, path.stat().st_size
    if size != expected:
        rows = math.isqrt(size // np.dtype(dtype).itemsize)
        raise InputError(
            f"{path} does not hold a {dtype} kernel of {given.num_samples} samples × {given.num_outputs} outputs: "
            f"expected {given.num_rows}² entries, {expected} bytes, found {size} bytes, about {rows}² entries. Is it "
            "of fewer samples, of another dtype, or cut short? Correct `num_samples`, `num_outputs` or `dtype`."
        )
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", shape=(given.num_rows, given.num_rows))


def _open_array(folder: Folder, given: SourceDescription) -> "zarr.Array[Any]":
    """Open a Zarr array.

    Raises:
        StoreError: If there is none, or not of a kernel.
        InputError: If it has another shape than is said.
    """
    try:
        array = zarr.open_array(folder.zarr_store(read_only=True), mode="r")
    except (ValueError, KeyError, TypeError, OSError) as error:  # zarr's own errors are among these
        raise StoreError(
            f"{folder} is no kernel of this program's predecessor: expected a Zarr array, as ntk_float32.zarr, or a "
            f"raw file, as ntk_float32.bin, found neither ({type(error).__name__}: {' '.join(str(error).split())}). "
            "Is it a folder around one, or a store of this program, which needs no import? Give the array's own path."
        ) from error
    if array.ndim != 2 or array.dtype.name not in STORE_DTYPES:
        raise StoreError(
            f"{folder} is a Zarr array, and not of a kernel: expected 2 axes and one of {', '.join(STORE_DTYPES)}, "
            f"found the shape {array.shape} of {array.dtype.name}. Was another array meant?"
        )
    if array.shape != (given.num_rows, given.num_rows):
        raise InputError(
            f"{folder} is not the kernel of {given.num_samples} samples × {given.num_outputs} outputs: expected the "
            f"shape {(given.num_rows, given.num_rows)}, found {array.shape}. Was it made of fewer samples, or for "
            "another number of classes? Correct `num_samples` or `num_outputs`."
        )
    if len(set(array.chunks)) != 1:
        raise StoreError(
            f"{folder} has chunks of {array.chunks} entries: expected square ones, as the predecessor writes them. Was "
            "it written by something else? Copy it into an array with square chunks."
        )
    if given.dtype not in {None, array.dtype.name}:
        raise InputError(
            f"{folder} says itself in what dtype it is, {array.dtype.name}, and `dtype` says {given.dtype}: expected "
            "it for raw files alone. Nothing is converted; leave it out."
        )
    return array


def _where(rows: slice, cols: slice) -> str:
    return f"rows {rows.start}–{rows.stop - 1}, columns {cols.start}–{cols.stop - 1}"
