"""Compare three ways to call BLAS in a factorisation: by the addresses of its functions, by NumPy, and by SciPy.

    uv run python scripts/bench/blas.py [--rows 6000] [--sides 512 --sides 2048] [--panel-tiles 2] [--trials 7]

The script makes three measurements. The three ways alternate in each of them, so that other programs slow down all ways
equally:

1. The two operations of a panel: the product C ← C − A Bᵀ of a tile with a strip, and the division X ← X L⁻ᵀ of a tile.
2. The same operations while another thread reads tiles, as a factorisation does. The script also counts the tiles that
   are read. The other thread can read only while a way does not hold Python's global interpreter lock.
3. A whole log-determinant of a synthetic kernel.

The script prints a line for each operation and way: the median, minimum and maximum time, and the median ratio to the
time of the first way. ``--json`` prints one JSON object each: what, way, side, rows, cols, seconds (all trials), median
and ratio, in some objects also tiles_per_second or logdet. With ``--cpu``, times are CPU times of all threads. With one
thread (OMP_NUM_THREADS=1), CPU times can be compared on a busy machine too.
"""

import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import numpy.typing as npt
import psutil
import zarr
from analysis import OUTPUTS, eigenvalues, fill
from scipy.linalg import blas as scipy_blas

from ntkgen.analysis.determinant import LogdetSettings, logdet
from ntkgen.analysis.linalg import blas, cholesky, indefinite
from ntkgen.analysis.linalg.factor import MIN_SIDE, reading_bytes
from ntkgen.analysis.matrix import Matrix, open_matrix
from ntkgen.store.opening import open_store
from ntkgen.store.schema import StoredArray, create_array

FloatArray = npt.NDArray[np.float64]

# Number of different tiles that the reading thread reads.
TILES = 4
# Maximum size in bytes of a temporary product of NumPy.
ROOM_BYTES = 2**23


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements."""

    rows: int
    panel_tiles: int
    trials: int
    clock: Callable[[], float]


@dataclass(frozen=True)
class Way:
    """Functions for the two operations of a panel."""

    subtract_product: Callable[[FloatArray, FloatArray, FloatArray], None]
    divide_right: Callable[[FloatArray, FloatArray], None]


def subtract_by_numpy(C: FloatArray, A: FloatArray, B: FloatArray) -> None:
    """Compute C ← C − A Bᵀ by NumPy, with a temporary product for a block of columns at a time."""
    if C.size:
        columns = max(1, ROOM_BYTES // (8 * len(A)))
        product = np.empty((min(columns, len(B)), len(A)))
        for at in range(0, len(B), columns):
            part = B[at : at + columns]
            C.T[at : at + columns] -= np.matmul(part, A.T, out=product[: len(part)])


def subtract_by_scipy(C: FloatArray, A: FloatArray, B: FloatArray) -> None:
    """Compute C ← C − A Bᵀ by SciPy's function for BLAS."""
    if C.size and A.shape[1]:
        assert np.shares_memory(scipy_blas.dgemm(-1.0, A, B, 1.0, C, trans_b=1, overwrite_c=1), C)


def divide_by_scipy(X: FloatArray, L: FloatArray) -> None:
    """Compute X ← X L⁻ᵀ by SciPy's function for BLAS."""
    if X.size:
        assert np.shares_memory(scipy_blas.dtrsm(1.0, L, X, side=1, lower=1, trans_a=1, overwrite_b=1), X)


WAYS: Mapping[str, Way] = {
    "addresses": Way(blas.subtract_product, blas.divide_right),
    "NumPy": Way(subtract_by_numpy, divide_by_scipy),
    "SciPy": Way(subtract_by_scipy, divide_by_scipy),
}


def in_turn(trial: int) -> list[tuple[str, Way]]:
    """List the ways. Each trial starts with another one."""
    ways, first = list(WAYS.items()), trial % len(WAYS)
    return ways[first:] + ways[:first]


# operations of a panel ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """Arrays with the shapes and memory orders of a panel and its tiles."""

    target: FloatArray  # (side, panel rows), in Fortran order
    tile: FloatArray  # (side, side), as read from the disk
    strip: FloatArray  # (panel rows, side)
    lower: FloatArray  # (side, side), in Fortran order


def make_operands(side: int, panel_tiles: int) -> Operands:
    """Draw random operands."""
    rng = np.random.default_rng(0)
    target, strip = (np.asfortranarray(rng.normal(size=(side, panel_tiles * side))) for _ in range(2))
    lower = np.asfortranarray(np.tril(rng.normal(size=(side, side)), -1) / side**2 + np.eye(side))
    return Operands(target, rng.normal(size=(side, side)), strip.T, lower)


def operations(way: Way, operands: Operands) -> dict[str, Callable[[], None]]:
    """Return the operations of a panel by name. Their repetition neither overflows nor underflows."""
    side = len(operands.tile)
    return {
        "product": lambda: way.subtract_product(operands.target, operands.tile, operands.strip),
        "division": lambda: way.divide_right(operands.target[:, :side], operands.lower),
    }


@contextmanager
def reading(array: "zarr.Array[Any]") -> Iterator[list[int]]:
    """Read tiles in another thread within the context, and count them."""
    side = array.shape[1]
    counted, stop = [0], threading.Event()

    def read() -> None:
        while not stop.is_set():
            at = counted[0] % TILES * side
            assert np.isfinite(np.asarray(array[at : at + side, :])).all()
            counted[0] += 1

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield counted
    finally:
        stop.set()
        thread.join()


def store_tiles(folder: Path, side: int) -> "zarr.Array[Any]":
    """Write tiles in the format of a factor on disk."""
    group = zarr.open_group(folder / f"tiles-{side}.zarr", mode="w")
    shape = (TILES * side, side)
    array = create_array(group, StoredArray("factor", "float64", shape, (side, side), ("row", "col")))
    array[...] = np.random.default_rng(1).normal(size=shape)
    return array


def time_operations(
    folder: Path, side: int, settings: Settings, *, is_beside_reading: bool
) -> Iterator[dict[str, Any]]:
    """Time each operation with all ways alternately."""
    operands, array = make_operands(side, settings.panel_tiles), store_tiles(folder, side)
    for name in ("product", "division"):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        tiles: dict[str, list[float]] = {way: [] for way in WAYS}
        for trial in range(settings.trials + 1):  # the first is not counted
            for way, calls in in_turn(trial):
                run, repeats = operations(calls, operands)[name], min(16, max(2, 8192 // side))
                if is_beside_reading:
                    with reading(array) as counted:
                        time.sleep(0.02)
                        found = _timed(run, repeats, counted, settings.clock)
                else:
                    found = _timed(run, repeats, [0], settings.clock)
                if trial:
                    seconds[way].append(found[0])
                    tiles[way].append(found[1])
        what = f"{name} beside reading" if is_beside_reading else name
        for row in _rows(what, seconds):
            shape = {"side": side, "rows": side, "cols": side * (settings.panel_tiles if name == "product" else 1)}
            read = {"tiles_per_second": statistics.median(tiles[row["way"]])} if is_beside_reading else {}
            yield row | shape | read


def _timed(
    run: Callable[[], None], repeats: int, counted: list[int], clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the mean time of a run, and the number of tiles that were read per second."""
    before, started, began = counted[0], time.perf_counter(), clock()
    for _ in range(repeats):
        run()
    return (clock() - began) / repeats, (counted[0] - before) / (time.perf_counter() - started)


def _rows(what: str, seconds: Mapping[str, Sequence[float]]) -> Iterator[dict[str, Any]]:
    first = next(iter(seconds.values()))
    for way, found in seconds.items():
        ratios = [mine / other for mine, other in zip(found, first, strict=True)]
        yield {
            "what": what, "way": way, "seconds": list(found), "median": statistics.median(found),
            "ratio": statistics.median(ratios),
        }  # fmt: skip


# a log-determinant ----------------------------------------------------------------------------------------------------


def time_logdet(folder: Path, settings: Settings) -> Iterator[dict[str, Any]]:
    """Time a whole log-determinant with all ways alternately."""
    rows = settings.rows - settings.rows % OUTPUTS
    store = fill(folder, eigenvalues(rows))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    found: dict[str, float] = {}
    for trial in range(settings.trials + 1):
        for way, calls in in_turn(trial):
            shutil.rmtree(f"{store.name}.analysis", ignore_errors=True)
            with by(calls):
                matrix, began = open_matrix(open_store(store.name)), settings.clock()
                answer = logdet(matrix, LogdetSettings(memory_bytes=_budget(matrix, settings.panel_tiles)))
                taken = settings.clock() - began
            if trial:
                seconds[way].append(taken)
            found[way] = answer.logdet
    for row in _rows("log-determinant", seconds):
        shape = {"side": answer.tile_rows, "rows": rows, "cols": answer.panel_rows}
        yield row | shape | {"logdet": found[row["way"]]}


@contextmanager
def by(way: Way) -> Iterator[None]:
    """Let the factorisation use a way within the context."""
    with (
        mock.patch.object(cholesky, "subtract_product", way.subtract_product),
        mock.patch.object(cholesky, "divide_right", way.divide_right),
        mock.patch.object(indefinite, "divide_right", way.divide_right),
    ):
        yield


def _budget(matrix: Matrix, panel_tiles: int) -> int:
    """Return a memory limit that gives panels of the wanted width."""
    panel = 8 * MIN_SIDE * (matrix.num_rows + MIN_SIDE)
    needed = reading_bytes(matrix) + 48 * MIN_SIDE**2 + int((panel_tiles + 0.5) * panel)
    return int(psutil.Process().memory_info().rss + needed / 0.92)


# the command ----------------------------------------------------------------------------------------------------------


def line(row: Mapping[str, Any]) -> str:
    """Format a result as one line of text."""
    seconds = [1e3 * value for value in row["seconds"]]
    words = f"{row['what']:<24} {row['rows']:>6,} × {row['cols']:<6,} {row['way']:<10}"
    words += f"{1e3 * row['median']:9.2f} ms ({min(seconds):.2f}–{max(seconds):.2f})  {row['ratio']:.3f} ×"
    return words + (f"  {row['tiles_per_second']:,.0f} tiles/s" if "tiles_per_second" in row else "")


@click.command()
@click.option("--rows", type=click.IntRange(min=2 * OUTPUTS), default=6000, show_default=True, help="Kernel rows.")
@click.option("--sides", type=click.IntRange(min=1), multiple=True, default=(512, 2048), show_default=True,
              help="Rows of a tile. The option can be repeated.")  # fmt: skip
@click.option("--panel-tiles", type=click.IntRange(min=1), default=2, show_default=True, help="Panel width in tiles.")
@click.option("--trials", type=click.IntRange(min=1), default=7, show_default=True, help="Number of trials.")
@click.option("--cpu", is_flag=True, help="Measure the CPU time of all threads.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
def main(*, rows: int, sides: tuple[int, ...], panel_tiles: int, trials: int, cpu: bool, as_json: bool) -> None:
    """Time the matrix products of a factorisation."""
    settings = Settings(rows, panel_tiles, trials, time.process_time if cpu else time.perf_counter)
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), sides, settings):
            click.echo(json.dumps(row) if as_json else line(row))


def measure(folder: Path, sides: Sequence[int], settings: Settings) -> Iterator[dict[str, Any]]:
    """Time the operations for each size of a tile, without and with a reading thread, and then a log-determinant."""
    for side in sides:
        for is_beside_reading in (False, True):
            yield from time_operations(folder, side, settings, is_beside_reading=is_beside_reading)
    yield from time_logdet(folder, settings)


if __name__ == "__main__":
    main()
