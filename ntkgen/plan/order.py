"""The order in which missing tiles are computed, for the memory that is allowed, and the work that follows from it.

All quantities are integers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ntkgen.blocks import Block
from ntkgen.jacobian.cache import count_samples
from ntkgen.jacobian.cost import factor_macs, product_macs
from ntkgen.plan.plan import Plan
from ntkgen.plan.tiles import Tile


@dataclass(frozen=True)
class Band:
    """Row blocks whose factors are held in memory while the columns of some tiles are computed. There may be none."""

    held: tuple[Block, ...]
    tiles: tuple[Tile, ...]


def bands_of(plan: Plan, tiles: Iterable[Tile], cached_blocks: int) -> Iterator[Band]:
    """Order some tiles in bands. A band has as many rows of tiles as fit in memory with one column.

    Each band needs the factors of all columns of the matrix, so fewer and higher bands compute fewer factors.
    """
    per_tile = len(plan.blocks(0))
    fits = cached_blocks >= plan.num_blocks
    height = plan.grid.num_blocks if fits else cached_blocks // per_tile - 1
    if height <= 0 and cached_blocks > per_tile:
        height = 1  # hold one row of tiles, so each column block is computed once
    by_band: dict[int, list[Tile]] = {}
    for tile in tiles:
        by_band.setdefault(tile.row // max(1, height), []).append(tile)
    for _, members in sorted(by_band.items()):
        rows = sorted({tile.row for tile in members}) if height > 0 else []
        held = tuple(block for row in rows for block in plan.blocks(row))
        yield Band(held, tuple(sorted(members, key=lambda tile: (tile.col, tile.row) if height > 0 else tile)))


def count_factor_samples(plan: Plan, tiles: Iterable[Tile], cached_blocks: int, diagonal: Iterable[int] = ()) -> int:
    """Count the samples whose factors are computed, with a cache of ``cached_blocks`` blocks.

    Factors are needed for the ``diagonal`` of some row blocks first, and then for some tiles.
    """
    return count_samples(cached_blocks, _steps(plan, tiles, cached_blocks, diagonal))


def projected_flops(plan: Plan, tiles: Sequence[Tile], cached_blocks: int, diagonal: Sequence[int] = ()) -> int:
    """Project the floating-point operations of some tiles, two per multiply-add, including those of the factors.

    The factors for the ``diagonal`` of some row blocks are included. The few products of the diagonal are not.
    """
    computed = count_factor_samples(plan, tiles, cached_blocks, diagonal)
    products = sum(
        product_macs(plan.jacobian, len(row), len(column), is_diagonal=row == column)
        for tile in tiles
        for row, column in plan.pairs(tile)
    )
    return 2 * (computed * factor_macs(plan.profile, plan.jacobian) + products)


def _steps(
    plan: Plan, tiles: Iterable[Tile], cached_blocks: int, diagonal: Iterable[int]
) -> Iterator[tuple[Sequence[Block], Iterable[Block]]]:
    """List the blocks that the engine holds and the blocks that it requests, in the order of the computation."""
    yield (), (block for index in diagonal for block in plan.side_blocks(index))
    for band in bands_of(plan, tiles, cached_blocks):
        yield band.held, (block for tile in band.tiles for pair in plan.pairs(tile) for block in pair)
