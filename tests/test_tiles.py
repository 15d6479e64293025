"""The grid: every pair of samples once, rows in order, the size of a tile."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, rectangles

from ntkgen.blocks import Block, block_pairs, row_of
from ntkgen.errors import InputError
from ntkgen.plan.tiles import (
    MAX_TILE_ROWS,
    MIN_BLOCKS,
    MIN_TILE_SAMPLES,
    Tile,
    TileGrid,
    default_tile_samples,
    make_grid,
)


@given(grids)
def test_tiles_and_their_mirrors_cover_every_pair_of_samples_once(grid):
    covered = np.zeros((grid.num_samples, grid.num_samples), int)
    for tile in grid.tiles():
        rows, cols = grid.block(tile.row), grid.block(tile.col)
        covered[rows.start : rows.stop, cols.start : cols.stop] += 1
        if tile.row != tile.col:
            covered[cols.start : cols.stop, rows.start : rows.stop] += 1
    assert (covered == 1).all()


@given(rectangles)
def test_tiles_of_a_rectangle_cover_every_pair_of_a_row_and_a_column_once(grid):
    covered = np.zeros((grid.num_samples, grid.num_col_samples), int)
    for tile in grid.tiles():
        rows, cols = grid.block(tile.row), grid.col_block(tile.col)
        covered[rows.start : rows.stop, cols.start : cols.stop] += 1
    assert (covered == 1).all()
    assert (grid.num_rows, grid.num_cols) == (grid.num_samples * grid.num_outputs, covered.shape[1] * grid.num_outputs)


@given(grids, st.integers(1, 12))
def test_the_products_of_a_tile_cover_it_once_and_of_a_diagonal_one_its_upper_half(grid, size):
    for tile in grid.tiles():
        rows, cols = grid.block(tile.row), grid.block(tile.col)
        covered = np.zeros((grid.num_samples, grid.num_samples), int)
        for row, col in block_pairs(rows.pieces(size), cols.pieces(size)):
            covered[row.start : row.stop, col.start : col.stop] += 1
            if tile.row == tile.col and row != col:
                covered[col.start : col.stop, row.start : row.stop] += 1
        assert (covered[rows.start : rows.stop, cols.start : cols.stop] == 1).all()
        assert covered.sum() == len(rows) * len(cols)


@given(grids | rectangles)
def test_tiles_are_counted_and_come_row_by_row(grid):
    tiles = list(grid.tiles())
    assert len(tiles) == grid.num_tiles
    assert tiles == sorted(tiles)
    assert {(tile.row, tile.col) for tile in tiles} == {
        (row, col)
        for row in range(grid.num_blocks)
        for col in range(grid.num_col_blocks)
        if row <= col or not grid.is_symmetric
    }


@given(grids)
def test_the_columns_of_a_symmetric_kernel_are_its_rows(grid):
    assert (grid.num_cols, grid.num_col_blocks) == (grid.num_rows, grid.num_blocks)
    assert all(grid.col_block(index) == grid.block(index) for index in range(grid.num_blocks))


@given(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), max_size=4))
def test_products_of_blocks_come_column_by_column_so_that_the_rows_can_stay(rows, columns):
    """A column block is made once where the rows are held, and a row block once per column where they are not."""
    left, right = ([Block(start, start + 1) for start in dict.fromkeys(side)] for side in (rows, columns))
    pairs = list(block_pairs(left, right))
    passed = [column for _, column in pairs]
    assert passed == sorted(passed, key=right.index)
    expected = {(i, j) for i in left for j in right if left != right or i <= j}
    assert len(pairs) == len(expected)
    assert set(pairs) == expected


@given(grids)
def test_blocks_follow_one_another_to_the_last_row(grid):
    blocks = [grid.block(index) for index in range(grid.num_blocks)]
    assert [sample for block in blocks for sample in range(block.start, block.stop)] == list(range(grid.num_samples))
    assert all(len(block) == grid.tile_samples for block in blocks[:-1])
    rows = [row for block in blocks for row in range(*block.rows(grid.num_outputs).indices(grid.num_rows))]
    assert rows == list(range(grid.num_rows))


@given(grids)
def test_rows_are_sample_major(grid):
    numbered = [row_of(i, o, grid.num_outputs) for i in range(grid.num_samples) for o in range(grid.num_outputs)]
    assert numbered == list(range(grid.num_rows))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 60))
def test_pieces_of_a_block_are_the_block(start, length, size):
    pieces = Block(start, start + length).pieces(size)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(start, start + length))
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(0 < len(piece) <= size for piece in pieces)


def test_one_sample_is_a_grid():
    grid = make_grid(1, 10)
    assert (grid.num_blocks, grid.num_tiles, grid.side) == (1, 1, 10)
    assert list(grid.tiles()) == [Tile(0, 0)]
    assert grid.block(0) == Block(0, 1)


# the size of a tile ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 2000))
def test_the_default_size_is_the_formula(n, m):
    tiles_along_a_side = max(min(8, math.ceil(n / 16)), math.ceil(n * m / 4096))
    assert default_tile_samples(n, m) == math.ceil(n / tiles_along_a_side)


@given(st.integers(1, 10**6), st.integers(1, 2000))
def test_a_default_tile_is_neither_tiny_nor_huge(n, m):
    grid = make_grid(n, m)
    assert 1 <= grid.tile_samples <= n
    assert grid.side < MAX_TILE_ROWS + m  # at most one sample above the limit
    assert grid.num_blocks >= MIN_BLOCKS - 1 or grid.tile_samples <= MIN_TILE_SAMPLES
    assert n <= MIN_TILE_SAMPLES or grid.num_blocks > 1


@pytest.mark.parametrize(
    ("n", "m", "side", "tile_samples"), [(100, 3, 9, 3), (100, 3, 300, 100), (100, 3, 3000, 100), (5, 1, 1, 1)]
)
def test_a_chosen_side_is_cut_to_the_kernel(n, m, side, tile_samples):
    assert make_grid(n, m, side) == TileGrid(n, m, tile_samples)


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 50))
def test_a_rectangle_has_the_tiles_of_the_square_over_its_longer_side(rows, columns, m):
    grid = make_grid(rows, m, num_col_samples=columns)
    assert grid.tile_samples == make_grid(max(rows, columns), m).tile_samples
    assert make_grid(rows, m, 10**6 * m, num_col_samples=columns).tile_samples == max(rows, columns)


@given(st.integers(1, 10**5), st.integers(1, 100))
def test_a_tile_of_several_planes_has_about_as_many_entries_as_one_of_a_single_plane(n, planes):
    grid = make_grid(n, 1, num_planes=planes)
    assert grid.tile_samples <= make_grid(n, 1).tile_samples
    assert planes * grid.side**2 <= 3 * MAX_TILE_ROWS**2  # the root is rounded down


@pytest.mark.parametrize(("side", "nearest"), [(8, 10), (14, 10), (16, 20), (1, 10), (0, 10), (-20, 10), (5, 10)])
def test_a_side_that_would_cut_a_sample_is_refused_and_the_nearest_named(side, nearest):
    with pytest.raises(InputError, match=rf"side of {side} rows.*10 outputs.*`tile_side` {nearest}\.$") as raised:
        make_grid(100, 10, side)
    assert "\n" not in str(raised.value)
    assert make_grid(100, 10, nearest).side == nearest
