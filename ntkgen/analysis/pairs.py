"""Sums over the entries of two kernels, in one pass over both."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ntkgen.analysis.alignment import centered_product, ratio
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, require_memory
from ntkgen.analysis.passes import Arrays, fold
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, Step, counter, ignore_step
from ntkgen.store.view import read_ahead

# Number of rows that are subtracted at a time.
SLAB_ROWS = 256
# Memory of a pass in float64 tiles: two tiles in use, two that are being read, and their stored forms.
TILES_HELD = 8


@dataclass
class PairMoments:
    """Sums over the entries of two kernels K and L."""

    row_sums: FloatArray  # (2, rows)
    squares: FloatArray  # (2,), ‖K‖², ‖L‖²
    inner: float = 0.0  # ⟨K, L⟩
    difference: float = 0.0  # ‖K − L‖²
    change: float = 0.0  # ⟨K − L, K + L⟩

    @classmethod
    def of(
        cls, tiles: Sequence[Tile], first: Matrix, second: Matrix, side: int, step: Step = ignore_step
    ) -> "PairMoments":
        """Sum over the given parts of both kernels, each with ``side`` rows and columns; each part is read once."""
        moments = cls(np.zeros((2, first.num_rows)), np.zeros(2))
        for rows, cols, pair in _pairs(tiles, first, second, side):
            moments.add(rows, cols, *pair)
            step()
        return moments

    def add(self, rows: slice, cols: slice, K: FloatArray, L: FloatArray) -> None:
        """Add one part of K and L; a part above the diagonal counts for both triangles."""
        count = 1 if rows == cols else 2
        self.inner += count * float(np.vdot(K, L))
        self.squares += [count * float(np.vdot(M, M)) for M in (K, L)]
        for start in range(0, len(K), SLAB_ROWS):
            slab = slice(start, start + SLAB_ROWS)
            difference = K[slab] - L[slab]
            self.difference += count * float(np.vdot(difference, difference))
            self.change += count * float(np.vdot(difference, K[slab] + L[slab]))
        for sums, M in zip(self.row_sums, (K, L), strict=True):
            sums[rows] += M.sum(1)
            if rows != cols:
                sums[cols] += M.sum(0)

    @property
    def distance(self) -> float | None:
        """1 − ⟨K, L⟩ / (‖K‖ ‖L‖), without cancellation where K and L are close.

        For close kernels it is computed as (‖K − L‖² − g²) / (2 ‖K‖ ‖L‖) with g = ‖K‖ − ‖L‖, which is
        ⟨K − L, K + L⟩ / (‖K‖ + ‖L‖).
        """
        norms = [math.sqrt(square) for square in self.squares]
        if not all(norms):
            return None
        if self.difference > self.squares[0] / 4:  # not close
            return 1 - self.inner / norms[0] / norms[1]
        gap = self.change / sum(norms)
        return max(0.0, self.difference - gap**2) / (2 * norms[0] * norms[1])

    @property
    def centered_alignment(self) -> float | None:
        """⟨H K H, H L H⟩ / (‖H K H‖ ‖H L H‖); None where one of the norms is zero up to rounding."""
        rows, means = self.row_sums.shape[1], self.row_sums / self.row_sums.shape[1]
        squares = [centered_product(square, r, r) for square, r in zip(self.squares, means, strict=True)]
        limits = [4 * rows * EPSILON * square for square in self.squares]
        kept = [0.0 if square <= limit else square for square, limit in zip(squares, limits, strict=True)]
        return ratio(centered_product(self.inner, *means), *kept)


def measure_pair(first: Matrix, second: Matrix, memory_bytes: int | None, report: Report) -> PairMoments:
    """Sum over the entries of both kernels, in one pass.

    Raises:
        BudgetError: If two tiles of each do not fit in memory.
    """
    side = max(first.side, second.side)
    require_memory("two tiles of each kernel", 8 * TILES_HELD * min(side, first.num_rows) ** 2, memory_bytes)
    blocks = -(-first.num_rows // side)
    tiles = [Tile(row, col) for row in range(blocks) for col in range(row, blocks)]
    step = counter(report, "compared", 0, len(tiles))
    if first.client is None:
        return PairMoments.of(tiles, first, second, side, step)
    for row, col in tiles:
        _count(first, second, (_span(first, side, row), _span(first, side, col)))
    sums = fold(first.client, _measured, tiles, (first.carried, second.carried, side), step)
    return PairMoments(sums[0], sums[1], *(float(value) for value in sums[2]))


def _measured(tiles: Sequence[Tile], first: Matrix, second: Matrix, side: int) -> Arrays:
    """Compute the sums over some parts of both kernels, on a worker."""
    moments = PairMoments.of(tiles, first, second, side)
    return moments.row_sums, moments.squares, np.array([moments.inner, moments.difference, moments.change])


def _pairs(
    tiles: Sequence[Tile], first: Matrix, second: Matrix, side: int
) -> Iterator[tuple[slice, slice, FloatArray]]:
    """Read the same parts of both kernels, cut as the larger tiles; a thread reads the next part in the meantime."""

    def read(tile: Tile) -> FloatArray:  # (2, rows, cols)
        rows, cols = (_span(first, side, block) for block in tile)
        pair = np.empty((2, rows.stop - rows.start, cols.stop - cols.start))
        for values, matrix in zip(pair, (first, second), strict=True):
            values[...] = matrix.view[rows, cols]
        return pair

    for (row, col), pair in read_ahead(read, tiles, 1):
        spans = _span(first, side, row), _span(first, side, col)
        _count(first, second, spans)
        yield *spans, pair


def _span(matrix: Matrix, side: int, block: int) -> slice:
    return slice(block * side, min((block + 1) * side, matrix.num_rows))


def _count(first: Matrix, second: Matrix, spans: tuple[slice, slice]) -> None:
    """Add the stored tiles that one part of both kernels is read from to ``tiles_read``."""
    for matrix in (first, second):
        matrix.tiles_read += _spanned(spans[0], matrix.side) * _spanned(spans[1], matrix.side)


def _spanned(span: slice, side: int) -> int:
    return -(-int(span.stop) // side) - int(span.start) // side
