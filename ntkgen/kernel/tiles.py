"""The tile grid: which tile covers which rows, in which order; integers only.

Rows are sample-major, ``row = sample · num_outputs + output``; this is the one place where that is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ntkgen.errors import InputError

# At least so many tiles along a side, so that an interruption of a small kernel loses a small part of it …
MIN_BLOCKS = 8
# … but no tile under so many samples, and none with more rows than this, rounded up to whole samples.
MIN_TILE_SAMPLES = 16
MAX_TILE_ROWS = 4096


def row_of(sample: int, output: int, num_outputs: int) -> int:
    """Number the row of one output of one sample.

    >>> row_of(sample=3, output=1, num_outputs=10)
    31
    """
    return sample * num_outputs + output


@dataclass(frozen=True, order=True)
class Block:
    """A contiguous range of samples."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Count the samples."""
        return self.stop - self.start

    def rows(self, num_outputs: int) -> slice:
        """Locate the rows of these samples."""
        return slice(row_of(self.start, 0, num_outputs), row_of(self.stop, 0, num_outputs))

    def pieces(self, size: int) -> list["Block"]:
        """Cut into blocks of at most ``size`` samples.

        >>> Block(10, 15).pieces(2)
        [Block(start=10, stop=12), Block(start=12, stop=14), Block(start=14, stop=15)]
        """
        return [Block(start, min(start + size, self.stop)) for start in range(self.start, self.stop, size)]


def block_pairs(rows: list[Block], columns: list[Block]) -> Iterator[tuple[Block, Block]]:
    """List the products that fill a rectangle of the kernel; on the diagonal, those of the upper triangle.

    >>> blocks = Block(0, 4).pieces(2)
    >>> [(row.start, column.start) for row, column in block_pairs(blocks, blocks)]
    [(0, 0), (0, 2), (2, 2)]
    """
    is_diagonal = rows == columns
    return ((row, column) for row in rows for column in columns if not (is_diagonal and column < row))


@dataclass(frozen=True, order=True)
class Tile:
    """A row block and a column block, by number; ``row <= col``."""

    row: int
    col: int

    @property
    def is_diagonal(self) -> bool:
        """Say whether rows and columns are the same samples."""
        return self.row == self.col


@dataclass(frozen=True)
class TileGrid:
    """The upper triangle of square tiles of a symmetric kernel; the last block may be ragged."""

    num_samples: int
    num_outputs: int
    tile_samples: int

    @property
    def num_rows(self) -> int:
        """Rows of the kernel, n · m."""
        return self.num_samples * self.num_outputs

    @property
    def side(self) -> int:
        """Rows of a tile, T."""
        return self.tile_samples * self.num_outputs

    @property
    def num_blocks(self) -> int:
        """Tiles along a side.

        >>> TileGrid(num_samples=10, num_outputs=2, tile_samples=4).num_blocks
        3
        """
        return -(-self.num_samples // self.tile_samples)

    @property
    def num_tiles(self) -> int:
        """Tiles of the upper triangle."""
        return self.num_blocks * (self.num_blocks + 1) // 2

    def block(self, index: int) -> Block:
        """Locate the samples of one row or column of tiles."""
        start = index * self.tile_samples
        return Block(start, min(start + self.tile_samples, self.num_samples))

    def tiles(self) -> Iterator[Tile]:
        """List the upper triangle row by row, so that a row block's factors are used up before the next is needed.

        >>> [(tile.row, tile.col) for tile in TileGrid(6, 1, 3).tiles()]
        [(0, 0), (0, 1), (1, 1)]
        """
        return (Tile(row, col) for row in range(self.num_blocks) for col in range(row, self.num_blocks))


def default_tile_samples(num_samples: int, num_outputs: int) -> int:
    """Choose the samples of a tile, ⌈n/g⌉ with g = max(min(8, ⌈n/16⌉), ⌈nm/4096⌉) tiles along a side.

    A function of n and m alone: the same for every dtype and every machine.

    >>> default_tile_samples(500, 10), default_tile_samples(50_000, 10), default_tile_samples(3, 10)
    (63, 407, 3)
    """
    blocks = max(min(MIN_BLOCKS, -(-num_samples // MIN_TILE_SAMPLES)), -(-num_samples * num_outputs // MAX_TILE_ROWS))
    return -(-num_samples // blocks)


def make_grid(num_samples: int, num_outputs: int, side: int | None = None) -> TileGrid:
    """Lay the grid, with tiles of ``side`` rows or of the default size.

    Raises:
        InputError: If the side is not a positive multiple of the number of outputs.
    """
    if side is None:
        return TileGrid(num_samples, num_outputs, default_tile_samples(num_samples, num_outputs))
    if side <= 0 or side % num_outputs:
        nearest = max(1, round(side / num_outputs)) * num_outputs
        raise InputError(
            f"A tile side of {side} rows does not fit: expected a positive multiple of the {num_outputs} outputs, so "
            f"that a tile holds whole samples. The nearest is --tile {nearest}."
        )
    return TileGrid(num_samples, num_outputs, min(side // num_outputs, num_samples))
