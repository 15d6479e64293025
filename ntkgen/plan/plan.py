"""Budget → block sizes, tiles to do, projected bytes and FLOPs; says no before anything runs. Integers only."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ntkgen.blocks import Block, block_pairs
from ntkgen.errors import BudgetError
from ntkgen.jacobian.cache import count_samples
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.cost import (
    DIAGONAL_NUMBERS,
    PRECISION_BYTES,
    SIZES,
    USUAL_RATES,
    JacobianPlan,
    LayerPlan,
    LayerShape,
    NetworkProfile,
    Order,
    Rates,
    Reduction,
    Sizes,
    contraction_numbers,
    factor_macs,
    factor_numbers,
    product_macs,
    sizes_for,
)
from ntkgen.plan.tiles import Tile, TileGrid
from ntkgen.units import human_bytes

# A forward pass and a backward pass hold, beside the saved activations, about as much again in gradients and clones.
ACTIVATION_COPIES = 3
# Per entry of a tile on the host: two computed ones, three store dtypes of each, a mirror, a chunk with its checksum.
TILE_COPY_BYTES = 60


@dataclass(frozen=True)
class Budget:
    """Bytes allowed. ``planned_bytes`` shapes the plan and must be the same on every run of a machine."""

    planned_bytes: int
    available_bytes: int

    @classmethod
    def of(cls, requested: int | None, *, total_bytes: int, free_bytes: int) -> "Budget":
        """Take what the user asked for, or two fifths of the device's memory, which does not change between runs."""
        if requested is not None:
            return cls(requested, requested)
        return cls(total_bytes * 2 // 5, free_bytes * 4 // 5)


@dataclass(frozen=True)
class Environment:
    """What tile bytes depend on beside the plan. The libraries below torch are taken to be those of its version."""

    device_type: str
    device_name: str
    torch_version: str
    threads: int

    def differences(self, other: "Environment") -> list[str]:
        """Name what differs, with both values; this one is the store's."""
        pairs = zip(dataclasses.asdict(self).items(), dataclasses.asdict(other).values(), strict=True)
        return [
            f"{name.replace('_', ' ')} {mine} there, {theirs} here" for (name, mine), theirs in pairs if mine != theirs
        ]


@dataclass(frozen=True)
class Band:
    """Row blocks whose factors stay while the columns of some tiles stream past; none where they do not fit."""

    held: tuple[Block, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a tile's bytes are a function of, and the sizes from which its cost follows."""

    grid: TileGrid
    jacobian: JacobianPlan
    profile: NetworkProfile
    environment: Environment

    @property
    def precision(self) -> str:
        """The precision policy."""
        return self.jacobian.precision

    @property
    def block_samples(self) -> int:
        """Samples whose factors are kept together; a tile is cut into such blocks."""
        return self.jacobian.sizes.block_samples

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number of the network."""
        return 8 if self.precision == "float64" else 4

    @property
    def product_bytes(self) -> int:
        """Bytes of a computed entry."""
        return PRECISION_BYTES[self.precision][1]

    def blocks(self, index: int) -> list[Block]:
        """Cut one row of tiles into the blocks that are computed together."""
        return self.grid.block(index).pieces(self.block_samples)

    def col_blocks(self, index: int) -> list[Block]:
        """Cut one column of tiles; samples of other columns than rows are numbered after those of the rows."""
        if self.grid.is_symmetric:
            return self.blocks(index)
        block, first = self.grid.col_block(index), self.grid.num_samples
        return Block(first + block.start, first + block.stop).pieces(self.block_samples)

    def side_blocks(self, index: int) -> list[Block]:
        """Cut a row of tiles or, numbered after those, a column of other samples: what has a diagonal of its own."""
        rows = self.grid.num_blocks
        return self.blocks(index) if index < rows else self.col_blocks(index - rows)

    def pairs(self, tile: Tile) -> Iterator[tuple[Block, Block]]:
        """List the products of blocks that fill a tile."""
        return block_pairs(self.blocks(tile.row), self.col_blocks(tile.col))

    @property
    def num_sides(self) -> int:
        """Count what `side_blocks` numbers."""
        return self.grid.num_blocks + (0 if self.grid.is_symmetric else self.grid.num_col_blocks)

    @property
    def num_samples(self) -> int:
        """Samples whose factors are needed, of rows and columns."""
        return self.grid.num_samples + (self.grid.num_col_samples or 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's factors."""
        return self.block_samples * self.jacobian.factor_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes beside the factors: network, samples, one batch, one contraction, two tiles on their way to disk."""
        m, batch = self.jacobian.num_outputs, self.jacobian.batch_size
        per_sample = ACTIVATION_COPIES * self.profile.activation_numbers + 2 * self.profile.input_numbers
        kept = [layer.shape for layer in self.jacobian.layers if layer.keeps_rows]
        shapes = self.profile.layers
        widest = max((shape.groups * shape.positions * shape.inputs for shape in shapes), default=0)
        unfolded = sum(shape.groups * shape.positions * shape.inputs for shape in kept)
        passes = (
            3 * self.profile.num_params  # our copy, what the libraries pack of it, and what allocators lose
            + batch * (per_sample + 2 * widest)
            + (2 * m * self.jacobian.dense_params if self.jacobian.fallback else 0)
        )
        result = 3 * (self.block_samples * m) ** 2
        samples = 2 * 4 * self.num_samples * self.profile.input_numbers
        diagonal = 8 * max((self._diagonal_numbers(p) for p in self.jacobian.layers if not p.keeps_rows), default=0)
        return (
            passes * self.compute_bytes
            + (contraction_numbers(self.jacobian) + result + batch * unfolded) * self.product_bytes
            + samples
            + diagonal
            + self.grid.num_planes * self.grid.side**2 * (self.product_bytes + TILE_COPY_BYTES)
        )

    def _diagonal_numbers(self, layer: LayerPlan) -> int:
        """Count the float64 numbers with which one sample's diagonal is computed."""
        grams = max(layer.shape.positions, layer.widest) ** 2
        return max(DIAGONAL_NUMBERS, grams) * 3 + factor_numbers(layer, self.jacobian.num_outputs)

    @property
    def preparing_bytes(self) -> int:
        """Bytes with which the network is made ready: a float64 copy, and the check of its rules on three samples."""
        shapes, copy = self.profile.layers, self.profile.num_params * 6 // 5  # a fifth is what allocators lose
        inputs = max((shape.groups * shape.positions * shape.inputs for shape in shapes), default=0)
        params = max((shape.num_params for shape in shapes), default=0)
        return 8 * (copy + 3 * ACTIVATION_COPIES * self.profile.activation_numbers + 3 * inputs + 5 * params)

    @property
    def minimum_bytes(self) -> int:
        """Bytes without which no tile can be computed: a row block and a column block."""
        return self.projected_bytes(2)

    def cached_blocks(self, budget: Budget) -> int:
        """Count the blocks whose factors may be held at a time.

        Raises:
            BudgetError: If not even two fit.
        """
        if self.preparing_bytes > budget.available_bytes:
            raise BudgetError(
                f"Making the network ready takes {human_bytes(self.preparing_bytes)} of memory and "
                f"{human_bytes(budget.available_bytes)} are allowed: a copy of its {self.profile.num_params:,} "
                "parameters in float64, on which it is checked. Is --memory meant for a smaller network? Raise it."
            )
        if self.minimum_bytes > budget.available_bytes:
            raise BudgetError(
                f"One tile needs {human_bytes(self.minimum_bytes)} of memory and {human_bytes(budget.available_bytes)} "
                f"are allowed: {human_bytes(self.fixed_bytes)} for the network, a batch of {self.jacobian.batch_size} "
                f"and a tile of {self.grid.side} rows, {human_bytes(2 * self.block_bytes)} for the factors of two "
                f"blocks of {self.block_samples} samples. Raise --memory, free some, or take a smaller --tile."
            )
        fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes)
        return min(fits, self._all_blocks)

    @property
    def _all_blocks(self) -> int:
        return sum(len(self.side_blocks(index)) for index in range(self.num_sides))

    def projected_bytes(self, cached_blocks: int) -> int:
        """Project the peak of memory that the computation adds to the loaded process."""
        return max(self.fixed_bytes + cached_blocks * self.block_bytes, self.preparing_bytes)

    def bands(self, tiles: Iterable[Tile], cached_blocks: int) -> Iterator[Band]:
        """Order some tiles in bands: as many row blocks stay as fit beside those of one column.

        The columns of a band are as many as the matrix is wide, so fewer and higher bands compute fewer factors.
        """
        per_tile = len(self.blocks(0))
        fits = cached_blocks >= self._all_blocks
        height = self.grid.num_blocks if fits else cached_blocks // per_tile - 1
        if height <= 0 and cached_blocks > per_tile:
            height = 1  # each column block passes the one held row of tiles once
        by_band: dict[int, list[Tile]] = {}
        for tile in tiles:
            by_band.setdefault(tile.row // max(1, height), []).append(tile)
        for _, members in sorted(by_band.items()):
            rows = sorted({tile.row for tile in members}) if height > 0 else []
            held = tuple(block for row in rows for block in self.blocks(row))
            yield Band(held, tuple(sorted(members, key=lambda tile: (tile.col, tile.row) if height > 0 else tile)))

    def projected_flops(self, tiles: Sequence[Tile], cached_blocks: int, diagonal: Sequence[int] = ()) -> int:
        """Project the floating-point operations of some tiles, two per multiply-add, factors included.

        Those of the ``diagonal``, by row block, come first; its own products are left out, a sample's each.
        """
        computed = count_factor_samples(self, tiles, cached_blocks, diagonal)
        products = sum(
            product_macs(self.jacobian, len(row), len(column), is_diagonal=row == column)
            for tile in tiles
            for row, column in self.pairs(tile)
        )
        return 2 * (computed * factor_macs(self.profile, self.jacobian) + products)

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values for the manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Read back what `to_json` wrote."""
        profile, jacobian = dict(values["profile"]), dict(values["jacobian"])
        layers = tuple(LayerShape(**shape) for shape in profile["layers"])
        plans = tuple(LayerPlan(**{**layer, "shape": LayerShape(**layer["shape"])}) for layer in jacobian["layers"])
        jacobian |= {
            "layers": plans,
            "fallback": tuple(jacobian["fallback"]),
            "sizes": Sizes(**jacobian["sizes"]),
            "rates": Rates(**jacobian["rates"]),
        }
        return cls(
            grid=TileGrid(**values["grid"]),
            jacobian=JacobianPlan(**jacobian),
            profile=NetworkProfile(**{**profile, "layers": layers, "fallback": tuple(profile["fallback"])}),
            environment=Environment(**values["environment"]),
        )


@dataclass(frozen=True)
class Choices:
    """What is chosen of a plan rather than planned: the precision policy, the rates that it goes by, forced orders."""

    precision: str = "float32"
    rates: Rates = USUAL_RATES
    orders: tuple[Order, ...] = ()
    reduction: Reduction = "none"


def make_plan(
    profile: NetworkProfile,
    grid: TileGrid,
    choices: Choices,
    *,
    budget: Budget,
    environment: Environment,
) -> Plan:
    """Fix a plan: the largest blocks, then the largest batches, whose projected bytes fit the budget.

    Raises:
        BudgetError: If not even one sample at a time fits; the message has both numbers.
    """
    device = environment.device_type

    def candidate(block: int, batch: int) -> Plan:
        sizes = sizes_for(device, block, batch, max(1, budget.planned_bytes // 64))
        jacobian = plan_jacobian(
            profile,
            sizes,
            precision=choices.precision,
            rates=choices.rates,
            reduction=choices.reduction,
            orders=choices.orders,
        )
        return Plan(grid, jacobian, profile, environment)

    largest = min(SIZES.get(device, SIZES["cpu"]).batch_size, grid.tile_samples)
    for block in _block_sizes(grid.tile_samples):
        for batch in _halvings(min(largest, block)):
            plan = candidate(block, batch)
            if plan.minimum_bytes <= budget.planned_bytes:
                return plan
    plan.cached_blocks(Budget(budget.planned_bytes, budget.planned_bytes))  # raises, with both numbers
    return plan


def _halvings(number: int) -> list[int]:
    """Halve a number down to 1.

    >>> _halvings(10)
    [10, 5, 2, 1]
    """
    return [number >> shift for shift in range(number.bit_length())]


def _block_sizes(tile_samples: int) -> Iterable[int]:
    """List the block sizes to try: a tile cut into 1, 2, 3, 4, 6, 8, … equal parts.

    >>> list(_block_sizes(10))
    [10, 5, 4, 3, 2, 1]
    """
    parts = [1, 2, 3, *(base << shift for shift in range(1, 20) for base in (2, 3))]
    return sorted({-(-tile_samples // count) for count in parts}, reverse=True)


def count_factor_samples(plan: Plan, tiles: Iterable[Tile], cached_blocks: int, diagonal: Iterable[int] = ()) -> int:
    """Count the samples whose factors are computed, with a cache of ``cached_blocks`` blocks.

    First for the ``diagonal`` of some row blocks, one after the other, then for some tiles.
    """
    return count_samples(cached_blocks, _steps(plan, tiles, cached_blocks, diagonal))


def _steps(
    plan: Plan, tiles: Iterable[Tile], cached_blocks: int, diagonal: Iterable[int]
) -> Iterator[tuple[Sequence[Block], Iterable[Block]]]:
    """List what is held and what is asked for, in the order in which the engine does."""
    yield (), (block for index in diagonal for block in plan.side_blocks(index))
    for band in plan.bands(tiles, cached_blocks):
        yield band.held, (block for tile in band.tiles for pair in plan.pairs(tile) for block in pair)
