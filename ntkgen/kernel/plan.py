"""Budget → block sizes, tiles to do, projected bytes and FLOPs; says no before anything runs. Integers only."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ntkgen.errors import BudgetError
from ntkgen.jacobian.cost import (
    DIAGONAL_NUMBERS,
    JacobianPlan,
    LayerPlan,
    LayerShape,
    NetworkProfile,
    Order,
    factor_macs,
    factor_numbers,
    intermediate_numbers,
    plan_jacobian,
)
from ntkgen.kernel.tiles import Block, Tile, TileGrid, block_pairs
from ntkgen.units import human_bytes

# Samples in one forward pass, and numbers in one intermediate of a contraction: what suits the device's caches.
BATCH_SIZE = {"cpu": 32, "cuda": 64, "mps": 32}
WORKSPACE_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 27, "mps": 1 << 24}
# A forward pass and a backward pass hold, beside the saved activations, about as much again in gradients and clones.
ACTIVATION_COPIES = 3
# Per entry of a tile on the host: the computed one's copy, the three store dtypes, a mirror, a chunk with its checksum.
TILE_COPY_BYTES = 40


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
class Plan:
    """Everything that a tile's bytes are a function of, and the sizes from which its cost follows."""

    grid: TileGrid
    precision: str
    block_samples: int  # samples whose factors are kept together; a tile is cut into such blocks
    jacobian: JacobianPlan
    profile: NetworkProfile
    environment: Environment

    @property
    def itemsize(self) -> int:
        """Bytes of a computed number."""
        return {"float32": 4, "float64": 8}[self.precision]

    def blocks(self, index: int) -> list[Block]:
        """Cut one row or column of tiles into the blocks that are computed together."""
        return self.grid.block(index).pieces(self.block_samples)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's factors."""
        return self.block_samples * self.jacobian.factor_numbers * self.itemsize

    @property
    def fixed_bytes(self) -> int:
        """Bytes beside the factors: network, samples, one batch, one contraction, one tile on its way to disk."""
        m, batch = self.grid.num_outputs, self.jacobian.batch_size
        per_sample = ACTIVATION_COPIES * self.profile.activation_numbers + 2 * self.profile.input_numbers
        widest = max((s.groups * s.positions * s.inputs for s in self.profile.layers), default=0)
        numbers = (
            3 * self.profile.num_params  # our copy, and one in float64 while the rules are checked
            + batch * (per_sample + 2 * widest)
            + (2 * m * self.jacobian.dense_params if self.jacobian.fallback else 0)
            + 3 * max(self.jacobian.workspace_numbers, *map(self._least_intermediate, self.jacobian.layers), 0)
            + 3 * (self.block_samples * m) ** 2
        )
        samples = 2 * 4 * self.grid.num_samples * self.profile.input_numbers
        pairs = [layer.shape for layer in self.jacobian.layers if not layer.keeps_rows]
        diagonal = 8 * max(map(self._diagonal_numbers, pairs), default=0)
        return numbers * self.itemsize + samples + diagonal + self.grid.side**2 * (self.itemsize + TILE_COPY_BYTES)

    def _least_intermediate(self, layer: LayerPlan) -> int:
        """Count the numbers of a layer's smallest slice: one pair of samples, or one channel of two blocks."""
        shape, m = layer.shape, self.grid.num_outputs
        if layer.keeps_rows:
            return 0
        if layer.order == "explicit":
            return 2 * self.block_samples * m * (shape.positions + shape.inputs)
        return intermediate_numbers(shape, m, layer.order)

    def _diagonal_numbers(self, shape: LayerShape) -> int:
        """Count the float64 numbers with which one sample's diagonal is computed."""
        grams = shape.groups * shape.positions**2
        return max(DIAGONAL_NUMBERS, grams) * 3 + factor_numbers(shape, self.grid.num_outputs)

    @property
    def minimum_bytes(self) -> int:
        """Bytes without which no tile can be computed: a row block and a column block."""
        return self.fixed_bytes + 2 * self.block_bytes

    def cached_blocks(self, budget: Budget) -> int:
        """Count the blocks whose factors may be held at a time.

        Raises:
            BudgetError: If not even two fit.
        """
        if self.minimum_bytes > budget.available_bytes:
            raise BudgetError(
                f"One tile needs {human_bytes(self.minimum_bytes)} of memory and {human_bytes(budget.available_bytes)} "
                f"are allowed: {human_bytes(self.fixed_bytes)} for the network, a batch of {self.jacobian.batch_size} "
                f"and a tile of {self.grid.side} rows, {human_bytes(2 * self.block_bytes)} for the factors of two "
                f"blocks of {self.block_samples} samples. Raise --memory, free some, or take a smaller --tile."
            )
        fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes)
        return min(fits, sum(len(self.blocks(i)) for i in range(self.grid.num_blocks)))

    def projected_bytes(self, cached_blocks: int) -> int:
        """Project the peak of memory that the computation adds to the loaded process."""
        return self.fixed_bytes + cached_blocks * self.block_bytes

    def projected_flops(self, tiles: Sequence[Tile], cached_blocks: int, diagonal: Sequence[int] = ()) -> int:
        """Project the floating-point operations of some tiles, two per multiply-add, factors included.

        Those of the ``diagonal``, by row block, come first; its own products are left out, a sample's each.
        """
        computed = count_factor_samples(self, tiles, cached_blocks, diagonal)
        pairs = sum(self._pairs(tile) for tile in tiles)
        return 2 * (computed * factor_macs(self.profile, self.jacobian) + pairs * self.jacobian.pair_macs)

    def _pairs(self, tile: Tile) -> int:
        """Count the sample pairs of a tile that are computed: on the diagonal, the upper blocks alone."""
        return sum(len(r) * len(c) for r, c in block_pairs(self.blocks(tile.row), self.blocks(tile.col)))

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values for the manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Read back what `to_json` wrote."""
        profile = dict(values["profile"])
        jacobian = dict(values["jacobian"])
        layers = tuple(LayerShape(**shape) for shape in profile["layers"])
        plans = tuple(
            LayerPlan(LayerShape(**layer["shape"]), layer["order"], keeps_rows=layer["keeps_rows"])
            for layer in jacobian["layers"]
        )
        return cls(
            grid=TileGrid(**values["grid"]),
            precision=values["precision"],
            block_samples=values["block_samples"],
            jacobian=JacobianPlan(**{**jacobian, "layers": plans, "fallback": tuple(jacobian["fallback"])}),
            profile=NetworkProfile(**{**profile, "layers": layers, "fallback": tuple(profile["fallback"])}),
            environment=Environment(**values["environment"]),
        )


def make_plan(
    profile: NetworkProfile,
    grid: TileGrid,
    *,
    precision: str,
    budget: Budget,
    environment: Environment,
    orders: Sequence[Order] = (),
) -> Plan:
    """Fix a plan: the largest blocks, then the largest batches, whose projected bytes fit the budget.

    Raises:
        BudgetError: If not even one sample at a time fits; the message has both numbers.
    """
    workspace = min(WORKSPACE_NUMBERS[environment.device_type], max(1, budget.planned_bytes // 64))

    def candidate(block: int, batch: int) -> Plan:
        jacobian = plan_jacobian(
            profile, block_samples=block, batch_size=batch, workspace_numbers=workspace, orders=orders
        )
        return Plan(grid, precision, block, jacobian, profile, environment)

    largest = min(BATCH_SIZE[environment.device_type], grid.tile_samples)
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
    """Count the samples whose factors are computed, with a cache of so many blocks.

    First for the ``diagonal`` of some row blocks, one after the other, then for some tiles.
    """
    held: OrderedDict[Block, None] = OrderedDict()
    computed = 0
    for block in _accesses(plan, tiles, diagonal):
        if block not in held:
            computed += len(block)
            if len(held) >= cached_blocks:
                held.popitem(last=False)
        held[block] = None
        held.move_to_end(block)
    return computed


def _accesses(plan: Plan, tiles: Iterable[Tile], diagonal: Iterable[int]) -> Iterator[Block]:
    """List the blocks in the order in which their factors are asked for."""
    for index in diagonal:
        yield from plan.blocks(index)
    for tile in tiles:
        for pair in block_pairs(plan.blocks(tile.row), plan.blocks(tile.col)):
            yield from pair
