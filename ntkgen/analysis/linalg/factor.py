"""The factor L D Lᵀ = K + λI of a kernel on disk, in tiles; D is a diagonal matrix with the entries ±1.

The factor is a Zarr group beside the store with two arrays. `factor` (row, col) has one chunk per tile; only tiles with
row >= col are written. `pivots` (row) has one chunk per column of tiles. L is lower triangular except for diagonal
tiles that were pivoted. The determinant is the product of the pivots. A column of tiles is finished when its chunks
exist with their exact size. There is no other record of progress.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from scipy.linalg import solve_triangular

from ntkgen.analysis.matrix import FloatArray, Matrix
from ntkgen.analysis.results import folder_of_results, identity_of
from ntkgen.errors import BudgetError, StoreError
from ntkgen.files.folder import Folder
from ntkgen.plan.tiles import Tile
from ntkgen.store.schema import Key, StoredArray, create_array, writable
from ntkgen.store.view import read_ahead

if TYPE_CHECKING:
    ZarrArray = zarr.Array[Any]

FORMAT_VERSION = 1
# Preferred number of tiles per side of the matrix, with which the diagonal tiles take little of the time.
MANY_TILES = 40
# Minimum number of rows of a tile, below which products of tiles are slow, and maximum number, above which a few tiles
# would fill the memory.
MIN_SIDE, MAX_SIDE = 512, 2048
# Minimum number of columns of a panel when memory is short.
NARROWEST = 64
# Maximum size in bytes, in float64, of a piece of the kernel that is read at a time.
PIECE_BYTES = 16 * 10**6
# Reserve in bytes for the workspace of the BLAS, for threads, and for freed memory that the process still holds.
WORKSPACE_BYTES = 80 * 10**6


@dataclass(frozen=True)
class FactorPlan:
    """The partition of a factor: tiles of ``side`` rows, and panels of ``panel_tiles`` columns of tiles."""

    num_rows: int
    side: int
    panel_tiles: int

    @property
    def num_blocks(self) -> int:
        """Number of tiles per side of the matrix."""
        return -(-self.num_rows // self.side)

    @property
    def panel_rows(self) -> int:
        """Number of columns of a panel, w."""
        return min(self.panel_tiles * self.side, self.num_rows)

    @property
    def panel_bytes(self) -> int:
        """Memory of a panel in bytes: 8wN, and its part of one column of tiles."""
        return 8 * self.panel_rows * (self.num_rows + self.side)

    @property
    def num_products(self) -> int:
        """Number of products of two tiles, about N³/6T³."""
        return self.num_blocks * (self.num_blocks**2 - 1) // 6

    @property
    def factor_bytes(self) -> int:
        """Size of the factor on disk in bytes."""
        return self.num_blocks * (self.num_blocks + 1) // 2 * self.tile_bytes

    @property
    def tile_bytes(self) -> int:
        """Size of a tile on disk in bytes."""
        return self.arrays["factor"].file_bytes

    @property
    def arrays(self) -> dict[str, StoredArray]:
        """The arrays of the group: L, whose tiles with row >= col are written, and the pivots."""
        rows, side = self.num_rows, self.side
        factor = {"long_name": "L of K + λI = L D Lᵀ, its tiles with row >= col"}
        pivots = {"long_name": "pivots, whose product is the determinant; D is their signs"}
        return {
            "factor": StoredArray("factor", "float64", (rows, rows), (side, side), ("row", "col"), factor),
            "pivots": StoredArray("pivots", "float64", (rows,), (side,), ("row",), pivots),
        }

    @property
    def bytes_read(self) -> int:
        """Number of bytes of finished tiles that the factorisation reads, about 4N³/3w: each panel reads a tile once.

        >>> FactorPlan(num_rows=1200, side=100, panel_tiles=3).bytes_read / 80_004
        90.0
        """
        starts = range(0, self.num_blocks, self.panel_tiles)
        return sum(first * (self.num_blocks - first) for first in starts) * self.tile_bytes

    def rows(self, block: int) -> slice:
        """Return the rows of a row of tiles; the last row of tiles may have fewer."""
        return slice(block * self.side, min((block + 1) * self.side, self.num_rows))


def plan_factor(matrix: Matrix, free_bytes: int) -> FactorPlan:
    """Choose tiles and panels so that a panel fits in memory; if possible, tiles consist of whole samples.

    Raises:
        BudgetError: If not even the narrowest panel fits.
    """
    num_rows, room = matrix.num_rows, int(0.92 * free_bytes) - reading_bytes(matrix)
    wanted = min(MAX_SIDE, max(MIN_SIDE, -(-num_rows // MANY_TILES)))
    fitting = min(wanted, max(room, 0) // (8 * (num_rows + 6 * wanted)), num_rows)
    if fitting < min(NARROWEST, wanted, num_rows):
        raise BudgetError(_too_little(matrix, room - free_bytes, wanted))
    m = matrix.num_outputs
    chosen = fitting if fitting == num_rows or fitting < m else fitting - fitting % m
    blocks = -(-num_rows // chosen)
    widest = max(1, (room - 6 * 8 * chosen**2) // (8 * chosen * (num_rows + chosen)))
    panels = -(-blocks // widest)
    return FactorPlan(num_rows, chosen, -(-blocks // panels))


def _too_little(matrix: Matrix, beside: int, wanted: int) -> str:
    needed = 8 * min(NARROWEST, wanted) * (matrix.num_rows + 6 * wanted) - beside
    return (
        f"The memory limit is too small to factor the kernel at {matrix.name}: a panel of its {matrix.num_rows:,} rows "
        f"takes {needed / 1e6:,.0f} MB beside what this program itself takes. Raise `memory_bytes`."
    )


def reading_bytes(matrix: Matrix) -> int:
    """Estimate the bytes in memory besides a panel: a stored tile, pieces of it, and the workspace of the BLAS."""
    tile = matrix.side**2 * np.dtype(matrix.dtype).itemsize
    return WORKSPACE_BYTES + tile + 3 * min(8 * matrix.side**2, PIECE_BYTES)


class Factor:
    """The finished part of L and of the pivots of K + λI = L D Lᵀ. A process that writes to it must hold the lock."""

    def __init__(self, folder: Folder, group: zarr.Group, plan: FactorPlan) -> None:
        self.folder = folder
        self.plan = plan
        self.tiles_read = 0
        self._tiles: ZarrArray = _array(group, "factor")
        self._pivots: ZarrArray = _array(group, "pivots")

    @property
    def num_done(self) -> int:
        """Number of leading columns of tiles that are finished."""
        there, pivots, blocks = self.tiles_there(), self._there("pivots"), self.plan.num_blocks
        columns = (all((row, col) in there for row in range(col, blocks)) and (col,) in pivots for col in range(blocks))
        return next((col for col, is_done in enumerate(columns) if not is_done), blocks)

    def tiles_there(self) -> set[Tile]:
        """List the tiles that exist with their exact size."""
        return {Tile(row, col) for row, col in self._there("factor")}

    def _there(self, name: str) -> set[Key]:
        return self.plan.arrays[name].whole_chunks(self.folder.sizes(f"{name}/c"))

    # numbers -------------------------------------------------------------------------------------------------------

    def pivots(self, stop: int | None = None) -> FloatArray:
        """Read the pivots of the first ``stop`` columns of tiles; their product is the determinant of that block."""
        rows = self.plan.num_rows if stop is None else min(stop * self.plan.side, self.plan.num_rows)
        return self._read(self._pivots, (slice(0, rows),), "The pivots")

    def tile(self, tile: Tile) -> FloatArray:
        """Read a tile."""
        row, col = tile
        self.tiles_read += 1
        return self._read(self._tiles, (self.plan.rows(row), self.plan.rows(col)), f"Tile ({row}, {col})")

    def _read(self, array: "ZarrArray", region: tuple[slice, ...], name: str) -> FloatArray:
        """Read a region of an array.

        Raises:
            StoreError: If the region is damaged or missing.
        """
        try:
            values = np.asarray(array[region], dtype=np.float64)
            found = "" if np.isfinite(values).all() else "values that are not finite, as after the loss of a file"
        except (ValueError, RuntimeError) as error:
            found = str(error)
        if found:
            raise StoreError(
                f"{name} of the factor at {self.folder} is damaged: expected numbers that match their checksum, found "
                f"{found}. Is there a disk error? Remove this folder and run the same command again, which computes "
                "the factor anew."
            )
        return values

    def write(self, tile: Tile, values: FloatArray) -> None:
        """Write a tile."""
        self._tiles[self.plan.rows(tile.row), self.plan.rows(tile.col)] = np.ascontiguousarray(values)

    def write_pivots(self, col: int, values: FloatArray) -> None:
        """Write the pivots of a column of tiles."""
        self._pivots[self.plan.rows(col)] = values

    # products ------------------------------------------------------------------------------------------------------

    def solve(
        self,
        V: FloatArray,  # (rows,) or (rows, vectors)
    ) -> FloatArray:  # as V
        """Solve (K + λI) X = V in float64, in two passes over the factor, which read 8N² bytes in total.

        Costs 2N² FLOPs per vector. Holds a few tiles in memory besides V and X.
        """
        X = np.array(V, dtype=np.float64)
        signs = np.sign(self.pivots())
        for (row, col), tile in read_ahead(self.tile, list(self._by_columns())):
            at, from_ = self.plan.rows(row), self.plan.rows(col)
            if row == col:
                X[at] = _divide(tile, X[at], is_transposed=False)
            else:
                X[at] -= tile @ X[from_]
        X *= signs.reshape(-1, *[1] * (X.ndim - 1))
        for (row, col), tile in read_ahead(self.tile, list(self._by_columns())[::-1]):
            at, to = self.plan.rows(row), self.plan.rows(col)
            if row == col:
                X[to] = _divide(tile, X[to], is_transposed=True)
            else:
                X[to] -= tile.T @ X[at]
        return X

    def multiply(
        self,
        V: FloatArray,  # (rows, vectors)
    ) -> tuple[FloatArray, float]:  # (rows, vectors), the largest entry
        """Multiply L D Lᵀ with vectors in two passes; also return the largest |L|."""
        turned, product, largest = np.zeros_like(V), np.zeros_like(V), 0.0
        tiles = list(self._by_columns())
        for (row, col), tile in read_ahead(self.tile, tiles):
            turned[self.plan.rows(col)] += tile.T @ V[self.plan.rows(row)]
            largest = max(largest, float(np.abs(tile).max()))
        turned *= np.sign(self.pivots())[:, None]
        for (row, col), tile in read_ahead(self.tile, tiles):
            product[self.plan.rows(row)] += tile @ turned[self.plan.rows(col)]
        return product, largest

    def _by_columns(self) -> Iterator[Tile]:
        blocks = self.plan.num_blocks
        return (Tile(row, col) for col in range(blocks) for row in range(col, blocks))

    def remove(self) -> None:
        """Remove the factor."""
        remove_folder(self.folder)


def _divide(tile: FloatArray, X: FloatArray, *, is_transposed: bool) -> FloatArray:
    """Solve a linear system with a diagonal tile, which is triangular unless it was pivoted."""
    if np.triu(tile, 1).any():
        return np.asarray(np.linalg.solve(tile.T if is_transposed else tile, X))
    return np.asarray(solve_triangular(tile, X, lower=True, trans=int(is_transposed), check_finite=False))


def place_of_factor(matrix: Matrix, shift: float) -> tuple[Folder, dict[str, Any]]:
    """Return the folder of the factor of K + λI, beside the store, and the values that identify the factor."""
    identity = {**identity_of(matrix), "shift": float(shift), "format_version": FORMAT_VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return folder_of_results(matrix) / f"factor-{digest}.zarr", identity


def open_factor(folder: Folder, identity: dict[str, Any], planned: FactorPlan, widest_bytes: int) -> Factor:
    """Open an existing factor to continue it, or begin a new one as planned.

    An existing factor keeps its tiles. It also keeps its panels unless they exceed the memory limit, so that the result
    has the same bits as that of an uninterrupted run.
    """
    existing = _existing_plan(folder, identity)
    if existing is None or existing.num_rows != planned.num_rows:
        remove_folder(folder)
        return _begin(folder, identity, planned)
    if existing.panel_bytes > widest_bytes:
        column_bytes = 8 * existing.side * (existing.num_rows + existing.side)
        panel_tiles = max(1, min(widest_bytes // column_bytes, existing.panel_tiles))
        existing = FactorPlan(existing.num_rows, existing.side, panel_tiles)
    return _begin(folder, identity, existing)


def _existing_plan(folder: Folder, identity: dict[str, Any]) -> FactorPlan | None:
    try:
        values = json.loads(folder.read("zarr.json") or b"{}")["attributes"]
        arrays = [json.loads(folder.read(f"{name}/zarr.json") or b"{}")["shape"] for name in ("factor", "pivots")]
        plan = FactorPlan(**values["plan"])
    except (ValueError, KeyError, TypeError):  # no factor, or one whose creation was interrupted
        return None
    return plan if values["identity"] == identity and len(arrays) == 2 else None


def _begin(folder: Folder, identity: dict[str, Any], plan: FactorPlan) -> Factor:
    group = zarr.open_group(folder.zarr_store(read_only=False), mode="a", use_consolidated=False)
    for name, array in plan.arrays.items():
        if name not in group:
            create_array(group, array)
    group.attrs.put({"identity": identity, "plan": vars(plan)})
    return Factor(folder, group, plan)


def _array(group: zarr.Group, name: str) -> "ZarrArray":
    array = group[name]
    assert isinstance(array, zarr.Array)
    return writable(array)


def remove_folder(folder: Folder) -> None:
    """Remove a folder with its contents, beginning with zarr.json, so that a partly removed factor is not opened."""
    folder.remove("zarr.json")
    folder.clear()


def prefix_logdets(pivots: Iterable[float]) -> FloatArray:
    """Compute log |det| of each leading principal block as cumulative sums of the logarithms of the pivots."""
    return np.cumsum(np.log(np.abs(np.asarray(pivots, np.float64))))
