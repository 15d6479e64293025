"""A stored kernel as a symmetric matrix in float64, which is read in parts and counts the tiles that were read."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.passes import Arrays, fold
from ntkgen.engine.cluster import shared
from ntkgen.errors import BudgetError, InputError, StoreError
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Step, ignore_step
from ntkgen.store.opening import open_store
from ntkgen.store.remedy import Remedy
from ntkgen.store.rounding import STORE_DTYPES
from ntkgen.store.store import KernelStore
from ntkgen.store.view import SymmetricArray, read_ahead
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from distributed import Client

FloatArray = npt.NDArray[np.float64]
# Function that computes arrays from some tiles of a matrix and some vectors; the arrays of all parts are summed.
Part = Callable[["Matrix", FloatArray, Sequence[Tile], Step], Arrays]


@dataclass
class Matrix:
    """A symmetric kernel, or its largest complete leading part, which is read from one stored triangle.

    Attributes:
        store: The store that holds the kernel.
        dtype: Data type of the stored kernel. A store may hold kernels of several data types.
        output: Output whose kernel this is, in a store with the output map ``diagonal``; otherwise None.
        num_rows: Number of rows.
        view: The matrix as a lazy array.
        tiles_read: Number of tiles that were read. A tile is read as a whole even if only a part of it is needed.
        client: Client of a dask cluster, whose workers share each pass over the tiles; None for this process alone.
    """

    store: KernelStore
    dtype: str
    output: int | None
    num_rows: int
    view: SymmetricArray
    tiles_read: int = field(default=0)
    client: "Client | None" = None

    @property
    def name(self) -> str:
        """Path of the store."""
        return self.store.name

    @property
    def num_outputs(self) -> int:
        """Number of rows per sample, m."""
        return self.store.grid.num_outputs

    @property
    def num_samples(self) -> int:
        """Number of samples, n."""
        return self.num_rows // self.num_outputs

    @property
    def side(self) -> int:
        """Number of rows of a stored tile, T."""
        return self.store.grid.side

    @property
    def num_tiles(self) -> int:
        """Number of stored tiles of one triangle, which one pass reads."""
        blocks = -(-self.num_rows // self.side)
        return blocks * (blocks + 1) // 2

    @property
    def passes(self) -> float:
        """Number of passes over the stored triangle so far."""
        return self.tiles_read / self.num_tiles

    @property
    def is_partial(self) -> bool:
        """Whether this is the leading part of a kernel that is not complete."""
        return self.num_rows < self.store.grid.num_rows

    @property
    def labels(self) -> npt.NDArray[np.int64]:  # (samples,)
        """Labels of the samples.

        Raises:
            InputError: If the store has no labels.
        """
        labels: npt.NDArray[np.int64] = self.store.read("row_label")[: self.num_rows : self.num_outputs]
        if (labels < 0).any():
            raise InputError(
                f"The store at {self.name} has no labels: expected one for each of its {self.num_samples} samples, "
                "found none. Was it computed in Python, or imported? Pass the labels to ntkgen.compute(…, labels=…), "
                "which stores them."
            )
        return labels

    @property
    def error_norm(self) -> float | None:
        """Upper bound on ‖E‖_F, where E is the error of the stored kernel.

        The bound was measured when the store was certified. It has 95 % confidence, or is ‖E‖_F itself if every entry
        was compared. It is None without a certificate and for a partial kernel.
        """
        certificate = self.store.manifest.certificate
        errors = () if certificate is None else certificate.errors
        bounds = [error.bound for error in errors if error.dtype == self.dtype]
        return bounds[0] if bounds and not self.is_partial else None

    def matmat(self, V: npt.ArrayLike, *, step: Step = ignore_step) -> FloatArray:
        """Multiply with vectors in float64, in one pass over the stored triangle."""
        return self.fold(_multiply, np.asarray(V, dtype=np.float64), step=step)[0]

    def fold(self, part: Part, V: FloatArray, *, step: Step = ignore_step) -> Arrays:
        """Apply ``part`` to all tiles of one triangle and to vectors, in one pass, and sum the resulting arrays.

        On a cluster, each worker processes some of the tiles. The sums then differ by rounding errors from the sums of
        a single process.
        """
        tiles = tiles_of(self)
        if self.client is None:
            return part(self, V, tiles, step)
        self.tiles_read += len(tiles)
        return fold(self.client, _fold_on_worker, tiles, (part, self.carried, V), step)

    @cached_property
    def carried(self) -> "Matrix":
        """A copy that can be sent to the workers of a cluster."""
        store = open_store(shared(self.store.folder))
        return _matrix_of(store, self.dtype, self.output, self.num_rows)

    def block(self, rows: slice, cols: slice) -> FloatArray:
        """Read a part of the matrix in float64."""
        self.tiles_read += len(self._spanned(rows)) * len(self._spanned(cols))
        return np.asarray(self.view[rows, cols], dtype=np.float64)

    def tiles(
        self, tiles: Sequence[Tile] | None = None, *, step: Step = ignore_step
    ) -> Iterator[tuple[slice, slice, FloatArray]]:
        """Read each tile of one triangle once, row by row, in float64.

        Threads read the next tiles in the meantime. At most four tiles are in memory.

        Raises:
            StoreError: If a tile is missing, damaged or not finite. The message names the tile.
        """

        def read(tile: Tile) -> FloatArray:
            return np.asarray(self.view[self._span(tile.row), self._span(tile.col)], dtype=np.float64)

        for (row, col), values in read_ahead(read, tiles_of(self) if tiles is None else tiles):
            if not np.isfinite(values).all():
                raise StoreError(
                    f"Tile ({row}, {col}) of ntk_{self.dtype} in {self.name} is not finite: expected numbers, found "
                    f"{np.count_nonzero(~np.isfinite(values))} of {values.size} entries infinite or NaN. Was it "
                    f"overwritten? {Remedy.of(self.name, self.store.manifest).repair}"
                )
            self.tiles_read += 1
            step()
            yield self._span(row), self._span(col), values

    def dense(self, *, step: Step = ignore_step) -> FloatArray:  # (rows, rows), in Fortran order
        """Read both triangles into one matrix in Fortran order, which LAPACK can overwrite without a copy."""
        values = np.empty((self.num_rows, self.num_rows), order="F")
        for rows, cols, tile in self.tiles(step=step):
            values[rows, cols] = tile
            values[cols, rows] = tile.T
        return values

    def diagonal(self) -> FloatArray:
        """Read the diagonal of the stored matrix, which equals the exact diagonal in the store up to rounding."""
        spans = [slice(at, min(at + self.side, self.num_rows)) for at in range(0, self.num_rows, self.side)]
        return np.concatenate([np.diagonal(self.block(span, span)) for span in spans])

    def _span(self, block: int) -> slice:
        return slice(block * self.side, min((block + 1) * self.side, self.num_rows))

    def _spanned(self, rows: slice) -> range:
        start, stop, _ = rows.indices(self.num_rows)
        return range(start // self.side, -(-stop // self.side))


def open_matrix(
    store: KernelStore,
    *,
    dtype: str | None = None,
    output: int | None = None,
    allow_partial: bool = False,
    client: "Client | None" = None,
) -> Matrix:
    """Open the kernel of a store for analysis.

    Args:
        store: An opened store of a symmetric kernel.
        dtype: Data type of the stored kernel to use. None means the most precise one in the store.
        output: Output whose kernel is used, in a store with the output map ``diagonal``.
        allow_partial: Whether to use the largest complete leading part if tiles are missing.
        client: Client of a dask cluster whose workers see the same files. The workers share each pass over the tiles.
            Factorisations, by LAPACK or tile by tile, run in this process.

    Raises:
        StoreError: If tiles are missing and ``allow_partial`` is not set, or if no leading part is complete.
        InputError: If the kernel is rectangular.
    """
    if not store.grid.is_symmetric:
        raise InputError(
            f"The kernel at {store.name} is rectangular: expected one of samples with themselves, found one of "
            f"{store.grid.num_rows:,} × {store.grid.num_cols:,}. Was it made against other samples? Take the one "
            "made without."
        )
    num_rows = _rows_there(store, allow_partial=allow_partial)
    chosen = dtype or max(store.manifest.dtypes, key=STORE_DTYPES.index)
    return dataclasses.replace(_matrix_of(store, chosen, output, num_rows), client=client)


def _matrix_of(store: KernelStore, dtype: str, output: int | None, num_rows: int) -> Matrix:
    return Matrix(store, dtype, output, num_rows, store.kernel(dtype, output).leading(num_rows))


def _fold_on_worker(tiles: Sequence[Tile], part: Part, matrix: Matrix, V: FloatArray) -> Arrays:
    return part(matrix, V, tiles, ignore_step)


def _multiply(matrix: Matrix, V: FloatArray, tiles: Sequence[Tile], step: Step) -> Arrays:
    """Multiply some tiles with vectors."""

    def count() -> None:
        matrix.tiles_read += 1
        step()

    return (matrix.view.matmat(V, tiles=tiles, step=count),)


def _rows_there(store: KernelStore, *, allow_partial: bool) -> int:
    """Count the rows of the largest leading part without missing tiles.

    Raises:
        StoreError: If tiles are missing and ``allow_partial`` is not set, or if no leading part is complete.
    """
    missing, grid = store.missing_tiles(), store.grid
    if not missing:
        return grid.num_rows
    blocks = min(tile.col for tile in missing)
    if not allow_partial or not blocks:
        some = f"; all tiles of its first {blocks * grid.side:,} rows are there, which `allow_partial` takes" * (
            blocks > 0
        )
        command = Remedy.of(store.name, store.manifest).command
        raise StoreError(
            f"The kernel at {store.name} is not complete: expected {grid.num_tiles:,} tiles, {len(missing):,} are "
            f"missing{some}. Is it still being computed? Run the same `{command}` again to finish it."
        )
    return blocks * grid.side


def tiles_of(matrix: Matrix) -> list[Tile]:
    """List the stored tiles of one triangle, row by row."""
    return matrix.view.tiles()


def memory_left(memory_bytes: int | None) -> int:
    """Return how many bytes of a memory limit for the whole process are left.

    The memory that Python and its libraries occupy counts against the limit. Without a limit the result is 80 % of the
    memory that is free.

    Raises:
        InputError: If the process already exceeds the limit.
    """
    import psutil

    if memory_bytes is None:
        return int(psutil.virtual_memory().available) * 4 // 5
    taken = int(psutil.Process().memory_info().rss)
    if taken >= memory_bytes:
        raise InputError(
            f"A memory limit of {memory_bytes / 1e6:,.0f} MB is too small: this program itself takes "
            f"{taken / 1e6:,.0f} MB of it. Is the unit right? Raise `memory_bytes`."
        )
    return memory_bytes - taken


def require_memory(what: str, needed_bytes: int, memory_bytes: int | None) -> None:
    """Refuse a computation that needs more memory than `memory_left` returns.

    Raises:
        BudgetError: If the memory is too small.
    """
    left = memory_left(memory_bytes)
    if needed_bytes <= left:
        return
    limit = (
        f"A memory limit of {human_bytes(memory_bytes)}" if memory_bytes else "What is free of this machine's memory"
    )
    raise BudgetError(
        f"{limit} is too small: expected {human_bytes(needed_bytes)} for {what}, found {human_bytes(left)} beside the "
        "program itself. Is there more? Raise `memory_bytes`."
    )
