"""A kernel of this program's predecessor (github.com/liamhodg/ntkgen) → one of our stores, bit by bit.

What it wrote is J Jᵀ / √P of P parameters, rounded to one dtype, its rows sample-major like ours: a Zarr array whose
upper triangle counts, with zeros below, or a file with the raw matrix. What is zero on the diagonal, or not there of
the upper triangle, it had not finished.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from ntkgen.errors import DiskSpaceError, InputError, StoreError
from ntkgen.files.folder import Folder, LocalFolder
from ntkgen.files.lock import require_no_tile_writers, write_lock
from ntkgen.files.place import folder_of
from ntkgen.jacobian.cost import JacobianPlan, NetworkProfile, sizes_for
from ntkgen.plan.plan import Environment, Plan
from ntkgen.plan.tiles import Tile, TileGrid, make_grid
from ntkgen.progress import Report, counter, ignore_report
from ntkgen.store.manifest import IMPORTED, Manifest, check_identity
from ntkgen.store.opening import create_store, has_store, open_store
from ntkgen.store.rounding import STORE_DTYPES
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore
from ntkgen.store.tidy import tidy
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    Matrix = zarr.Array[Any] | npt.NDArray[np.floating]

# Rows of a raw file whose diagonal is read at a time.
STEP_ROWS = 4096

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Facts:
    """What the files of a kernel do not say, or not surely."""

    num_samples: int
    num_outputs: int
    num_params: int | None = None  # P; None: nobody knows any more, and the kernel stays divided by √P
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
class Foreign:
    """A kernel that another program has written, opened for reading."""

    name: str  # of its file, as an error names it
    matrix: "Matrix"
    facts: Facts

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
        size, step = self.facts.num_rows, self._step
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
        there, count = set(folder.sizes()), -(-self.facts.num_rows // self._step)
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


def import_kernel(
    source: str | PathLike[str] | Folder,
    target: str | PathLike[str] | Folder,
    facts: Facts,
    report: Report = ignore_report,
) -> KernelStore:
    """Write a kernel of the predecessor as one of our stores, or finish it: the same numbers in our layout `upper`.

    The upper triangle counts, and is mirrored within the tiles on the diagonal. Where the number of parameters is
    known, the attribute ``scale_factor`` is √P, so that `ntkgen.open` gives J Jᵀ. An interrupted import goes on with
    the same call.

    Args:
        source: A Zarr array, at a path or a URL, or a raw file.
        target: Where the store is, or is to be.
        facts: What the source does not say.
        report: Called as the stage ``imported`` proceeds.

    Raises:
        InputError: If what is said of the source does not fit it.
        StoreError: If the source is no such kernel, or not a whole one.
        FingerprintError: If the store is of something else.
        DiskSpaceError: If the disk has no room for it.
    """
    source, target = folder_of(source), folder_of(target)
    _require_elsewhere(source, target)
    foreign = open_foreign(source, facts)
    diagonal = foreign.read_diagonal() * facts.scale
    target.require_writable()
    with write_lock(target):
        require_no_tile_writers(target)
        _require_room(target, foreign)
        is_new = not has_store(target)
        store = _open_or_create(target, foreign, diagonal)
        _write_diagonal(store, diagonal)
        missing, total = store.missing_tiles(), store.grid.num_tiles

        def write(tile: Tile) -> None:
            store.commit_stored(tile, {foreign.dtype: foreign.read(*_region(store.grid, tile))})

        try:
            store.write_each(write, missing, counter(report, "imported", total - len(missing), total))
        except StoreError:  # the source is refused, and what was begun of it is of no use
            if is_new:
                target.clear()
            raise
        store.finalize()
    return store


def default_target(source: str) -> str:
    """Name the store that a kernel becomes where nobody says.

    >>> default_target("ckpt/ntk_float32.zarr/"), default_target("ntk_float16.bin")
    ('ckpt/ntk_float32.imported.zarr', 'ntk_float16.imported.zarr')

    Raises:
        InputError: If the source has no name.
    """
    whole = source.rstrip("/")
    if whole.rpartition("/")[2] in {"", ".", "..", "~"}:
        raise InputError(
            f"The path {source} has no name to call the new store by: expected one that ends in a name. Is it the "
            "current folder? Say with --out where the store is to be."
        )
    return f"{whole.removesuffix('.zarr').removesuffix('.bin')}.imported.zarr"


def open_foreign(folder: Folder, facts: Facts) -> Foreign:
    """Open a kernel of the predecessor, and compare it with what is said of it.

    Raises:
        InputError: If size and dtype are not those that are said.
        StoreError: If it is no such kernel.
    """
    _require_positive(facts)
    if isinstance(folder, LocalFolder) and folder.path.is_file():
        return Foreign(str(folder), _open_raw(folder.path, facts), facts)
    foreign = Foreign(str(folder), _open_array(folder, facts), facts)
    foreign.require_chunks(folder)
    return foreign


def _require_positive(facts: Facts) -> None:
    numbers = {"samples": facts.num_samples, "outputs": facts.num_outputs, "params": facts.num_params}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"A kernel has {name}: expected at least 1, found {number}. Is --{name} misspelt?")


def _open_raw(path: Path, facts: Facts) -> FloatArray:
    """Map a raw file, the whole matrix row by row.

    Raises:
        InputError: If its dtype is not known, or its size another.
    """
    found = re.search(r"float(16|32|64)", path.name)
    dtype = facts.dtype or (found and found[0])
    if dtype not in STORE_DTYPES:
        raise InputError(
            f"{path} does not say in what dtype it is: expected a name as ntk_float32.bin, or --dtype with one of "
            f"{', '.join(STORE_DTYPES)}, found {dtype or 'neither'}. Was it renamed? Say it with --dtype."
        )
    expected, size = facts.num_rows**2 * np.dtype(dtype).itemsize, path.stat().st_size
    if size != expected:
        rows = math.isqrt(size // np.dtype(dtype).itemsize)
        raise InputError(
            f"{path} does not hold a {dtype} kernel of {facts.num_samples} samples × {facts.num_outputs} outputs: "
            f"expected {facts.num_rows}² entries, {expected} bytes, found {size} bytes, about {rows}² entries. Is it "
            "of fewer samples, of another dtype, or cut short? Correct --samples, --outputs or --dtype."
        )
    return np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", shape=(facts.num_rows, facts.num_rows))


def _open_array(folder: Folder, facts: Facts) -> "zarr.Array[Any]":
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
    if array.shape != (facts.num_rows, facts.num_rows):
        raise InputError(
            f"{folder} is not the kernel of {facts.num_samples} samples × {facts.num_outputs} outputs: expected the "
            f"shape {(facts.num_rows, facts.num_rows)}, found {array.shape}. Was it made with --subsample, or for "
            "another number of classes? Correct --samples or --outputs."
        )
    if len(set(array.chunks)) != 1:
        raise StoreError(
            f"{folder} has chunks of {array.chunks} entries: expected square ones, as the predecessor writes them. Was "
            "it written by something else? Copy it into an array with square chunks."
        )
    if facts.dtype not in {None, array.dtype.name}:
        raise InputError(
            f"{folder} says itself in what dtype it is, {array.dtype.name}, and --dtype says {facts.dtype}: expected "
            "it for raw files alone. Nothing is converted; leave it out."
        )
    return array


def _require_elsewhere(source: Folder, target: Folder) -> None:
    places = [_resolved(source), _resolved(target)]
    if f"{places[1]}/".startswith(f"{places[0]}/"):
        raise InputError(
            f"{source} cannot become a store where it lies: expected another place to write to, found {target}. Was "
            "the source meant to be replaced? Choose another --out, and remove the source afterwards."
        )


def _resolved(folder: Folder) -> str:
    return str(folder.path.resolve()) if isinstance(folder, LocalFolder) else str(folder)


def _open_or_create(target: Folder, foreign: Foreign, diagonal: npt.NDArray[np.float64]) -> KernelStore:
    facts = foreign.facts
    identity = _identity(foreign, diagonal)
    samples = Samples(np.arange(facts.num_samples), np.full(facts.num_samples, -1))
    if has_store(target):
        store = open_store(target, mode="r+")
        check_identity(str(target), store.manifest, identity)
    else:
        provenance = {IMPORTED: foreign.short_name, "quantity": facts.quantity}
        plan = _plan(facts)
        store = create_store(target, Manifest(identity, provenance, plan, (foreign.dtype,), "upper"), samples)
    tidy(store, samples)
    return store


def _identity(foreign: Foreign, diagonal: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Collect what an import that goes on must agree with; the diagonal stands for a terabyte of entries."""
    facts = foreign.facts
    return {
        IMPORTED: foreign.short_name,
        "num_samples": facts.num_samples,
        "num_outputs": facts.num_outputs,
        "num_params": facts.num_params,
        "scale_factor": facts.scale,
        "diagonal": hashlib.sha256(diagonal.tobytes()).hexdigest(),
        "dtypes": [foreign.dtype],
        "tile_side": _grid(facts).side,
    }


def _grid(facts: Facts) -> TileGrid:
    return make_grid(facts.num_samples, facts.num_outputs, facts.tile_side)


def _plan(facts: Facts) -> Plan:
    """Write down that nothing was planned: no layers, no logits, and nobody knows the precision."""
    m = facts.num_outputs
    jacobian = JacobianPlan("unknown", m, (), 0, (), sizes_for("unknown", 1, 1))
    profile = NetworkProfile(m, facts.num_params or 0, (), 0, (), activation_numbers=0, input_numbers=0, num_logits=0)
    return Plan(_grid(facts), jacobian, profile, Environment("unknown", "unknown", "unknown", 1))


def _write_diagonal(store: KernelStore, diagonal: npt.NDArray[np.float64]) -> None:
    for index in store.missing_blocks():
        block = store.grid.block(index)
        rows = block.rows(store.grid.num_outputs)
        store.commit_block(index, diagonal[rows], np.empty((len(block), 0)))
    store.create_kernels()


def _require_room(target: Folder, foreign: Foreign) -> None:
    """Refuse what the disk has no room for, beside what is there already.

    Raises:
        DiskSpaceError: If it has not; the message has both numbers.
    """
    grid, free = _grid(foreign.facts), target.free_bytes
    needed = grid.num_tiles * grid.side**2 * np.dtype(foreign.dtype).itemsize
    needed -= sum(target.sizes(f"ntk_{foreign.dtype}").values())
    if free is not None and needed > free:
        raise DiskSpaceError(
            f"The disk at {target} has no room for the imported kernel: {human_bytes(needed)} are needed and "
            f"{human_bytes(free)} are free. Does it lie on the same disk as the source? Free some, or choose another "
            "--out."
        )


def _region(grid: TileGrid, tile: Tile) -> tuple[slice, slice]:
    return grid.block(tile.row).rows(grid.num_outputs), grid.block(tile.col).rows(grid.num_outputs)


def _where(rows: slice, cols: slice) -> str:
    return f"rows {rows.start}–{rows.stop - 1}, columns {cols.start}–{cols.stop - 1}"
