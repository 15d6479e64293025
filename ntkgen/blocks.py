"""Ranges of samples, and the order of the rows of a kernel.

Rows are sample-major, ``row = sample · num_outputs + output``. Only this module defines the order of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass


def row_of(sample: int, output: int, num_outputs: int) -> int:
    """Return the row of one output of one sample.

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
        """Return the rows of these samples as a slice."""
        return slice(row_of(self.start, 0, num_outputs), row_of(self.stop, 0, num_outputs))

    def pieces(self, size: int) -> list["Block"]:
        """Cut into blocks of at most ``size`` samples.

        >>> Block(10, 15).pieces(2)
        [Block(start=10, stop=12), Block(start=12, stop=14), Block(start=14, stop=15)]
        """
        return [Block(start, min(start + size, self.stop)) for start in range(self.start, self.stop, size)]


def block_pairs(rows: list[Block], columns: list[Block]) -> Iterator[tuple[Block, Block]]:
    """List the pairs of blocks that fill a rectangle of the kernel, column by column.

    If the columns are the rows, only the pairs of the upper triangle are listed.

    >>> blocks = Block(0, 4).pieces(2)
    >>> [(row.start, column.start) for row, column in block_pairs(blocks, blocks)]
    [(0, 0), (0, 2), (2, 2)]
    """
    is_diagonal = rows == columns
    return ((row, column) for column in columns for row in rows if not (is_diagonal and column < row))
