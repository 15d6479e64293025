"""The tile grid: the rows and columns of each tile, and the order of the tiles; integers only."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ntkgen.blocks import Block
from ntkgen.errors import InputError

# Minimum number of tiles along a side. An interruption then loses only a small part of a small kernel.
MIN_BLOCKS = 8
# Minimum number of samples of a tile. It has priority over the minimum number of tiles.
MIN_TILE_SAMPLES = 16
# Maximum number of rows of a tile, rounded up to whole samples.
MAX_TILE_ROWS = 4096


class Tile(NamedTuple):
    """A row block and a column block, by number; ``row <= col`` in a symmetric kernel."""

    row: int
    col: int


@dataclass(frozen=True)
class Part:
    """One of several equal parts of the tiles, for independent jobs of a job array. The first part has number 1."""

    number: int
    count: int

    def __str__(self) -> str:
        """Format as on the command line."""
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parse ``k/K``.

        >>> Part.parse("2/8")
        Part(number=2, count=8)

        Raises:
            InputError: If the text has another form, or k is not between 1 and K.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(*map(int, match.groups())) if match else None
        if part is None or not 1 <= part.number <= part.count:
            raise InputError(
                f"{text!r} is not a part: expected k/K, from 1/K to K/K, such as 3/8 for the third of eight. Does the "
                "job array count from 0? Add 1."
            )
        return part

    def of(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        """Select the tiles of this part. They are neighbours, so that they share factors.

        >>> Part(2, 3).of([Tile(0, col) for col in range(7)])
        [Tile(row=0, col=2), Tile(row=0, col=3)]
        """
        n = len(tiles)
        return tiles[n * (self.number - 1) // self.count : n * self.number // self.count]


@dataclass(frozen=True)
class SideBlock:
    """The samples of a row of tiles or, where the columns are of other samples, of a column."""

    axis: int  # 0: of the rows; 1: of the columns
    number: int  # among the rows, or among the columns
    block: Block


@dataclass(frozen=True)
class TileGrid:
    """Square tiles of the upper triangle of a symmetric kernel, or of a whole rectangular kernel.

    The last tiles of a row or column may be smaller. A tile has ``num_planes`` matrices: one per output for the
    reduction `diagonal`, otherwise one. If groups of parameters have a kernel each, a tile also has the matrices
    of each group.
    """

    num_samples: int
    num_outputs: int  # rows of the kernel per sample
    tile_samples: int
    num_col_samples: int | None = None  # samples of the columns; None if they are the samples of the rows
    num_planes: int = 1
    num_groups: int = 0

    @property
    def num_matrices(self) -> int:
        """Matrices of a tile: one per output, or a single one, of the kernel and of each group of parameters.

        >>> TileGrid(6, 1, 3, num_planes=2, num_groups=4).num_matrices
        10
        """
        return self.num_planes * (1 + self.num_groups)

    @property
    def is_symmetric(self) -> bool:
        """Whether rows and columns have the same samples."""
        return self.num_col_samples is None

    @property
    def num_cols(self) -> int:
        """Columns of the kernel."""
        return (self.num_samples if self.num_col_samples is None else self.num_col_samples) * self.num_outputs

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
        """Tiles along a column.

        >>> TileGrid(num_samples=10, num_outputs=2, tile_samples=4).num_blocks
        3
        """
        return -(-self.num_samples // self.tile_samples)

    @property
    def num_col_blocks(self) -> int:
        """Tiles along a row."""
        return -(-self.num_cols // self.side)

    @property
    def num_tiles(self) -> int:
        """Tiles of the upper triangle, or of the rectangle."""
        if self.is_symmetric:
            return self.num_blocks * (self.num_blocks + 1) // 2
        return self.num_blocks * self.num_col_blocks

    def block(self, index: int) -> Block:
        """Return the samples of one row of tiles. In a symmetric kernel a column of tiles has the same samples."""
        start = index * self.tile_samples
        return Block(start, min(start + self.tile_samples, self.num_samples))

    def col_block(self, index: int) -> Block:
        """Return the samples of one column of tiles, numbered within the samples of the columns."""
        if self.num_col_samples is None:
            return self.block(index)
        start = index * self.tile_samples
        return Block(start, min(start + self.tile_samples, self.num_col_samples))

    @property
    def num_sides(self) -> int:
        """Count what has a diagonal of its own: the rows of tiles and, where their samples are others, the columns."""
        return self.num_blocks + (0 if self.is_symmetric else self.num_col_blocks)

    def side_block(self, index: int) -> SideBlock:
        """Locate one of the `num_sides`: the rows come first, and the columns are numbered after them.

        >>> TileGrid(6, 1, 3, num_col_samples=2).side_block(2)
        SideBlock(axis=1, number=0, block=Block(start=0, stop=2))
        """
        if index < self.num_blocks:
            return SideBlock(0, index, self.block(index))
        number = index - self.num_blocks
        return SideBlock(1, number, self.col_block(number))

    def tiles(self) -> Iterator[Tile]:
        """List the tiles row by row, so that the factors of a row block are no longer needed when the next row begins.

        >>> [(tile.row, tile.col) for tile in TileGrid(6, 1, 3).tiles()]
        [(0, 0), (0, 1), (1, 1)]
        """
        positions = itertools.product(range(self.num_blocks), range(self.num_col_blocks))
        return (Tile(row, col) for row, col in positions if row <= col or not self.is_symmetric)


def default_tile_samples(num_samples: int, num_outputs: int, num_matrices: int = 1) -> int:
    """Choose the number of samples of a tile, ⌈n/g⌉ with g = max(min(8, ⌈n/16⌉), ⌈nm/4096⌉) tiles along a side.

    For p matrices per tile, 4096 is divided by √p. The result depends only on n, m and p, and not on the dtype or the
    machine.

    >>> default_tile_samples(500, 10), default_tile_samples(50_000, 10), default_tile_samples(3, 10)
    (63, 407, 3)
    """
    longest = MAX_TILE_ROWS // math.isqrt(num_matrices)
    blocks = max(min(MIN_BLOCKS, -(-num_samples // MIN_TILE_SAMPLES)), -(-num_samples * num_outputs // longest))
    return -(-num_samples // blocks)


def make_grid(
    num_samples: int,
    num_outputs: int,
    side: int | None = None,
    *,
    num_col_samples: int | None = None,
    num_planes: int = 1,
    num_groups: int = 0,
) -> TileGrid:
    """Build the grid, with tiles of ``side`` rows or of the default size.

    Raises:
        InputError: If the side is not a positive multiple of the number of outputs.
    """
    if side is None:
        longest = max(num_samples, num_col_samples or 0)
        tile_samples = default_tile_samples(longest, num_outputs, num_planes * (1 + num_groups))
        return TileGrid(num_samples, num_outputs, tile_samples, num_col_samples, num_planes, num_groups)
    if side <= 0 or side % num_outputs:
        nearest = max(1, round(side / num_outputs)) * num_outputs
        raise InputError(
            f"A tile side of {side} rows does not fit: expected a positive multiple of the {num_outputs} outputs, so "
            f"that a tile holds whole samples. The nearest is `tile_side` {nearest}."
        )
    tile_samples = min(side // num_outputs, max(num_samples, num_col_samples or 0))
    return TileGrid(num_samples, num_outputs, tile_samples, num_col_samples, num_planes, num_groups)
