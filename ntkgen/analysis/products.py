"""Products of a stored kernel with vectors; the first pass also measures the trace and the Frobenius norm."""

from collections.abc import Sequence

import numpy as np

from ntkgen.analysis.linalg.factor import WORKSPACE_BYTES
from ntkgen.analysis.linalg.krylov import Sizes
from ntkgen.analysis.linalg.quadrature import Moments
from ntkgen.analysis.matrix import FloatArray, Matrix, require_memory
from ntkgen.analysis.passes import Arrays
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, Step, counter, ignore_report

# Memory of a pass in float64 tiles: the tiles that are read and multiplied, and the buffers for reading.
TILES_HELD = 6


def reading_bytes(matrix: Matrix, vectors: int = 0) -> int:
    """Estimate the bytes for reading tiles and multiplying them with vectors, with the workspace of the BLAS.

    The vectors themselves are not included.
    """
    return WORKSPACE_BYTES + 8 * matrix.side * (TILES_HELD * matrix.side + 2 * vectors)


def space_bytes(matrix: Matrix, sizes: Sizes) -> int:
    """Estimate what a Krylov space takes, with the tiles that are multiplied by it."""
    return sizes.bytes + reading_bytes(matrix, sizes.block)


def require_space(matrix: Matrix, sizes: Sizes, memory_bytes: int | None, remedy: str) -> None:
    """Refuse a Krylov space that does not fit in what a budget for the whole process leaves.

    Raises:
        BudgetError: If it does not; the message has the remedy.
    """
    what = f"{sizes.capacity + sizes.block:,} vectors of {sizes.num_rows:,} rows and {TILES_HELD} tiles ({remedy})"
    require_memory(what, space_bytes(matrix, sizes), memory_bytes)


class Products:
    """Multiplies a kernel with vectors; the first pass also sums its diagonal and the squares of its entries."""

    def __init__(self, matrix: Matrix, report: Report = ignore_report) -> None:
        self.matrix = matrix
        self.moments: Moments | None = None
        self._report = report
        self._passes = 0

    @property
    def squares(self) -> float | None:
        """‖K‖_F²; None before the first pass."""
        return None if self.moments is None else self.moments.squares

    def __call__(self, V: FloatArray) -> FloatArray:
        """Compute K V, in one pass."""
        tiles = self.matrix.num_tiles
        step = counter(self._report, "spectrum", self._passes * tiles, (self._passes + 1) * tiles)
        self._passes += 1
        if self.moments is not None:
            return self.matrix.matmat(V, step=step)
        product, self.moments = multiply_and_measure(self.matrix, V, step)
        return product


def multiply_and_measure(matrix: Matrix, V: FloatArray, step: Step) -> tuple[FloatArray, Moments]:
    """Compute K V, tr K and ‖K‖_F² in one pass over one triangle."""
    product, sums = matrix.fold(_multiplied_and_measured, V, step=step)
    return product, Moments(matrix.num_rows, *(float(value) for value in sums))


def _multiplied_and_measured(matrix: Matrix, V: FloatArray, tiles: Sequence[Tile], step: Step) -> Arrays:
    """Compute what some tiles add to K V, and to (tr K, ‖K‖_F²)."""
    product, trace, squares = np.zeros_like(V, order="C"), 0.0, 0.0
    for rows, cols, tile in matrix.tiles(tiles, step=step):
        product[rows] += tile @ V[cols]
        square = float(np.linalg.norm(tile)) ** 2
        if rows == cols:
            trace += float(np.trace(tile))
            squares += square
        else:
            product[cols] += tile.T @ V[rows]
            squares += 2 * square
    return product, np.array([trace, squares])
