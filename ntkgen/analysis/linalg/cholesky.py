"""Out-of-core Cholesky factorisation K + λI = L D Lᵀ: left-looking, panel by panel, with each tile of L written once.

A panel consists of consecutive columns of tiles, from the diagonal down. Its part of the kernel is read, the products
of the finished columns to its left are subtracted, and then its own columns are factored and written one after the
other. An interrupted factorisation continues with the first panel that is not finished.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zarr
from scipy.linalg import lapack

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Settings
from ntkgen.analysis.linalg.blas import divide_right, subtract_product
from ntkgen.analysis.linalg.factor import (
    PIECE_BYTES,
    Factor,
    FactorPlan,
    open_factor,
    place_of_factor,
    plan_factor,
    reading_bytes,
)
from ntkgen.analysis.linalg.indefinite import pivoted
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left
from ntkgen.analysis.results import require_writable_beside
from ntkgen.errors import InputError, NotPositiveError, StoreError
from ntkgen.files.lock import write_lock
from ntkgen.files.room import require_room
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, ignore_report
from ntkgen.store.remedy import Remedy
from ntkgen.store.view import read_ahead
from ntkgen.store.writing import WRITING

# What to do where the disk is too small.
NO_ROOM = "A factor has the size of one triangle in float64. Free some, and ask again: what is finished stays."


@dataclass(frozen=True)
class FactorSettings(Settings):
    """Settings of a factorisation of K + ``shift`` I.

    Attributes:
        shift: Shift λ that is added to the diagonal; not negative.
        indefinite: Whether to pivot diagonal tiles that are not positive definite instead of raising an error.
        keep: Whether to keep the factor on disk, so that later calls can use it to solve linear systems.
    """

    shift: float = defaults.SHIFT
    indefinite: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.shift < np.inf:
            raise InputError(
                f"A shift of {self.shift:g} cannot be added: expected a number that is not negative, so that K + λI is "
                "positive definite where K is. Was its size meant? Pass `shift` 0 or more."
            )


@dataclass
class Work:
    """The share of a factorisation that this process has done."""

    seconds: float = 0.0
    products: int = 0  # number of products of two tiles


@contextmanager
def factored(matrix: Matrix, settings: FactorSettings, report: Report = ignore_report) -> Iterator[tuple[Factor, Work]]:
    """Factor K + λI = L D Lᵀ on disk beside the store, or continue an interrupted factorisation.

    L is lower triangular, and D = I if all pivots are positive. With N rows and panels of w columns the factorisation
    costs N³/3 FLOPs, holds 8wN bytes in memory, and reads 4N³/3w bytes of the tiles that it has written. The factor is
    removed at the end of the context unless ``keep`` is set. After an error it stays, so that another call continues.

    Raises:
        NotPositiveError: If a pivot is not positive although ``indefinite`` is not set.
        BudgetError: If the memory limit is too small for a panel.
        DiskSpaceError: If the disk has too little space for the factor.
        StoreLockedError: If another process is computing the factor.
        InputError: If nothing can be written beside the store.
    """
    require_writable_beside(matrix, "A factor")
    folder, identity = place_of_factor(matrix, settings.shift)
    with write_lock(folder):
        folder.sweep()
        left = memory_left(settings.memory_bytes)
        planned = plan_factor(matrix, left)
        factor = open_factor(folder, identity, planned, left - reading_bytes(matrix))
        with zarr.config.set(WRITING):
            work = _finish(matrix, factor, settings, report)
        yield factor, work
        if not settings.keep:
            factor.remove()


def _finish(matrix: Matrix, factor: Factor, settings: FactorSettings, report: Report) -> Work:
    """Compute the missing panels."""
    plan, started = factor.plan, time.monotonic()
    first = factor.num_done
    if first < plan.num_blocks:
        first -= first % plan.panel_tiles
        missing_bytes = plan.factor_bytes - len(factor.tiles_there()) * plan.tile_bytes
        require_room(factor.folder, missing_bytes, "the factor", NO_ROOM)
    counted = _Counted(plan, first, report)
    before = counted.done
    if first < plan.num_blocks:
        room = _Room(np.empty(plan.panel_rows * plan.num_rows), np.empty((plan.panel_rows, plan.side)))
        for at in range(first, plan.num_blocks, plan.panel_tiles):
            panel = Panel(plan, at, room)
            load(panel, matrix, settings.shift)
            subtract_finished(panel, factor, counted)
            _finish_columns(panel, _Hands(matrix, factor, settings), counted)
    return Work(time.monotonic() - started, counted.done - before)


class _Counted:
    """Counts the products of two tiles, and reports their number as progress."""

    def __init__(self, plan: FactorPlan, columns: int, report: Report) -> None:
        self.done = sum(col * (plan.num_blocks - col) for col in range(columns))
        self._total, self._report = plan.num_products, report
        self.add(0)

    def add(self, count: int) -> None:
        self.done += count
        self._report("factor", self.done, self._total)


# panel ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Room:
    """Memory for a panel and for its part of one column of tiles; allocated once and used for all panels."""

    panel: FloatArray  # (panel rows · rows,)
    strip: FloatArray  # (panel rows, side)


class Panel:
    """Columns of tiles from ``first`` on, from the diagonal down, stored as rows of tiles in Fortran order.

    Rows of tiles that cross the diagonal are stored up to the diagonal tile.
    """

    def __init__(self, plan: FactorPlan, first: int, room: _Room) -> None:
        self.plan, self.first, self._room = plan, first, room
        self.stop = min(first + plan.panel_tiles, plan.num_blocks)
        self.start = first * plan.side
        self._rows: dict[int, FloatArray] = {}
        at = 0
        for row in range(first, plan.num_blocks):
            height = plan.rows(row).stop - plan.rows(row).start
            width = plan.rows(min(row, self.stop - 1)).stop - self.start
            self._rows[row] = room.panel[at : at + height * width].reshape((height, width), order="F")
            at += height * width

    def row(self, row: int, first: int | None = None) -> FloatArray:
        """Return a view of a row of tiles, from the column of tiles ``first`` on."""
        return self._rows[row][:, self._columns(self.first if first is None else first).start :]

    def tile(self, row: int, col: int) -> FloatArray:
        """Return a view of a tile."""
        return self._rows[row][:, self._columns(col)]

    def strip(self, first: int) -> FloatArray:
        """Return a view of the memory for one column of tiles, from the row of tiles ``first`` on."""
        stop = self.plan.rows(self.stop - 1).stop
        return self._room.strip[self._columns(first).start : stop - self.start]

    def _columns(self, col: int) -> slice:
        columns = self.plan.rows(col)
        return slice(columns.start - self.start, columns.stop - self.start)

    def subtract(self, row: int, tile: FloatArray, strip: FloatArray, first: int) -> None:
        """Subtract the product of a tile and the strip's transpose from a row of tiles, from column ``first`` on."""
        target = self.row(row, first)
        subtract_product(target, tile, strip[: target.shape[1], : tile.shape[1]])


def load(panel: Panel, matrix: Matrix, shift: float) -> None:
    """Read the panel's part of K + λI into its memory.

    Raises:
        StoreError: If the kernel has an entry that is not finite.
    """
    plan = panel.plan
    columns = slice(panel.start, plan.rows(panel.stop - 1).stop)
    for rows, cols in _pieces(matrix, panel.start, columns):
        values = matrix.block(rows, cols)
        if not np.isfinite(values).all():
            raise StoreError(
                f"The kernel at {matrix.name} is not finite in rows {rows.start:,} to {rows.stop - 1:,}: expected "
                f"numbers. Was it overwritten? {Remedy.of(matrix.name, matrix.store.manifest).repair}"
            )
        for row in range(rows.start // plan.side, -(-rows.stop // plan.side)):
            _place(panel, row, values, (rows, cols))
    for row in range(panel.first, panel.stop):
        np.einsum("ii->i", panel.tile(row, row))[:] += shift


def _pieces(matrix: Matrix, start: int, columns: slice) -> Iterator[tuple[slice, slice]]:
    """Divide the part of the columns on and below the diagonal into pieces of stored tiles, small beside a panel."""
    height = max(1, PIECE_BYTES // (8 * min(matrix.side, columns.stop - columns.start)))
    for cols in _spans(columns, matrix.side):
        for whole in _spans(slice(start, matrix.num_rows), matrix.side):
            for rows in (slice(at, min(at + height, whole.stop)) for at in range(whole.start, whole.stop, height)):
                if rows.stop > cols.start:
                    yield rows, cols


def _spans(rows: slice, side: int) -> Iterator[slice]:
    """Divide a range at the ends of the stored tiles."""
    at = rows.start
    while at < rows.stop:
        stop = min((at // side + 1) * side, rows.stop)
        yield slice(at, stop)
        at = stop


def _place(panel: Panel, row: int, values: FloatArray, piece: tuple[slice, slice]) -> None:
    """Copy the part of a piece that belongs to a row of tiles into that row of the panel."""
    rows, cols = piece
    target, lines = panel.row(row), panel.plan.rows(row)
    top, bottom = max(rows.start, lines.start), min(rows.stop, lines.stop)
    left, right = cols.start - panel.start, min(cols.stop - panel.start, target.shape[1])
    if left < right:
        target[top - lines.start : bottom - lines.start, left:right] = values[
            top - rows.start : bottom - rows.start, : right - left
        ]


def subtract_finished(panel: Panel, factor: Factor, counted: _Counted) -> None:
    """Subtract the products of the finished columns to the left; read each tile once, and the next ones in threads."""
    blocks = panel.plan.num_blocks
    tiles = [Tile(row, col) for col in range(panel.first) for row in range(panel.first, blocks)]
    signs = np.sign(factor.pivots(panel.first)) if panel.first else np.empty(0)
    strip = panel.strip(panel.first)
    for (row, col), tile in read_ahead(factor.tile, tiles):
        if row < panel.stop:
            strip[panel.plan.rows(row).start - panel.start :][: len(tile)] = tile
        if row == panel.stop - 1:
            _subtract_crossing(panel, strip, signs[panel.plan.rows(col)], counted)
        elif row >= panel.stop:
            panel.subtract(row, tile, strip, panel.first)
            counted.add(panel.stop - panel.first)


def _subtract_crossing(panel: Panel, strip: FloatArray, signs: FloatArray, counted: _Counted) -> None:
    """Apply the signs of the pivots to the strip, and subtract its products from the rows that cross the diagonal."""
    tiles = strip.copy() if (signs < 0).any() else strip
    strip *= signs
    for row in range(panel.first, panel.stop):
        lines = panel.plan.rows(row)
        panel.subtract(row, tiles[lines.start - panel.start : lines.stop - panel.start], strip, panel.first)
        counted.add(row - panel.first + 1)


# columns of the panel -------------------------------------------------------------------------------------------------


class DiagonalTile(Protocol):
    """A factored diagonal tile M S Mᵀ, where S is a diagonal matrix with the entries ±1."""

    @property
    def factor(self) -> FloatArray:  # (side, side)
        """M."""

    @property
    def pivots(self) -> FloatArray:  # (side,)
        """Numbers whose product is the determinant of the tile and whose signs are S."""

    def divide(self, X: FloatArray) -> None:
        """Compute X ← X M⁻ᵀ S in place."""


@dataclass(frozen=True)
class PositiveTile:
    """A factored positive definite tile M Mᵀ."""

    factor: FloatArray  # (side, side), lower triangular

    @property
    def pivots(self) -> FloatArray:
        """The squares of the diagonal entries of M."""
        return np.square(np.diagonal(self.factor))

    def divide(self, X: FloatArray) -> None:
        """Compute X ← X M⁻ᵀ in place."""
        divide_right(X, self.factor)


@dataclass(frozen=True)
class _Hands:
    """The kernel, its factor on disk and the settings, which the functions on columns need."""

    matrix: Matrix
    factor: Factor
    settings: FactorSettings


def _finish_columns(panel: Panel, hands: _Hands, counted: _Counted) -> None:
    """Factor the panel's columns of tiles in turn; a thread writes each column while the next ones are updated.

    Raises:
        NotPositiveError: If a pivot must be positive and is not; the columns before it are then on disk.
    """
    there = hands.factor.tiles_there()
    with ThreadPoolExecutor(1) as pool:
        writes: list[Future[None]] = []
        for col in range(panel.first, panel.stop):
            diagonal = _factor_diagonal(panel.tile(col, col), col, hands)
            if diagonal is None:
                _finish_writes(writes)
                raise NotPositiveError(_not_positive(panel.tile(col, col), col, hands))
            for row in range(col + 1, panel.plan.num_blocks):
                diagonal.divide(panel.tile(row, col))
            panel.tile(col, col)[...] = diagonal.factor
            writes.append(pool.submit(_write_column, panel, col, diagonal.pivots, (hands.factor, there)))
            _subtract_own(panel, col, np.sign(diagonal.pivots), counted)
            _finish_writes([write for write in writes if write.done()])
    _finish_writes(writes)


def _finish_writes(writes: list[Future[None]]) -> None:
    """Wait for some writes, and raise the first exception among them."""
    for write in writes:
        write.result()


def _write_column(panel: Panel, col: int, pivots: FloatArray, where: tuple[Factor, set[Tile]]) -> None:
    """Write a finished column of tiles, and then its pivots; skip the tiles that an interrupted run has written."""
    factor, there = where
    for row in range(col, panel.plan.num_blocks):
        if (row, col) not in there:
            factor.write(Tile(row, col), panel.tile(row, col))
    factor.write_pivots(col, pivots)


def _subtract_own(panel: Panel, col: int, signs: FloatArray, counted: _Counted) -> None:
    """Subtract the products of one column of tiles of the panel from the columns to its right."""
    if col + 1 == panel.stop:
        return
    strip = panel.strip(col + 1)[:, : len(signs)]
    for row in range(col + 1, panel.stop):
        lines = panel.plan.rows(row)
        offset = panel.plan.rows(col + 1).start
        np.multiply(panel.tile(row, col), signs, out=strip[lines.start - offset : lines.stop - offset])
    for row in range(col + 1, panel.plan.num_blocks):
        panel.subtract(row, panel.tile(row, col), strip, col + 1)
        counted.add(min(row, panel.stop - 1) - col)


def _factor_diagonal(tile: FloatArray, col: int, hands: _Hands) -> DiagonalTile | None:
    """Factor a diagonal tile; return None if it is not positive definite and ``indefinite`` is not set."""
    lower, failed = lapack.dpotrf(tile, lower=1, clean=1, overwrite_a=0)
    if not failed:
        return PositiveTile(lower)
    if not hands.settings.indefinite:
        return None
    return pivoted(tile, f"from row {hands.factor.plan.rows(col).start:,} on of the kernel at {hands.matrix.name}")


def _not_positive(tile: FloatArray, col: int, hands: _Hands) -> str:
    """Describe the first pivot that is not positive, and the known accuracy of the kernel."""
    matrix, at = hands.matrix, int(lapack.dpotrf(tile, lower=1)[1]) - 1
    row = hands.factor.plan.rows(col).start + at
    before = lapack.dpotrf(np.asfortranarray(tile[:at, :at]), lower=1, clean=1)[0] if at else np.eye(0)
    line = lapack.dtrtrs(before, tile[at, :at], lower=1)[0] if at else np.empty(0)
    logdet = np.log(hands.factor.pivots(col)).sum() + 2 * np.log(np.diagonal(before)).sum()
    sample, output = divmod(row, matrix.num_outputs)
    known = "Its error is not known, because it has no certificate (a measured error bound). "
    if (norm := matrix.error_norm) is not None:
        known = f"Its certificate bounds its error by ‖E‖ ≤ {norm:.3g}, and smaller eigenvalues are not known. "
    return (
        f"The kernel at {matrix.name} is not positive definite: expected positive pivots, found "
        f"{tile[at, at] - line @ line:.3g} in row {row:,} (sample {sample:,}, output "
        f"{output if matrix.output is None else matrix.output}). {known}"
        f"The log-determinant of the {row:,} rows before it is {logdet:.12g}. Is it stored or computed too coarsely, "
        "or are there fewer parameters than rows? Set `shift` above 0, continue with `indefinite`, or compute it with "
        "`ntkgen compute --precision float64 --dtype float64`."
    )
