"""The plan of a kernel: block sizes for a memory budget, and projected bytes.

A budget that is too small is refused before any computation. All quantities are integers.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ntkgen.blocks import Block, block_pairs
from ntkgen.errors import BudgetError
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
    factor_numbers,
    sizes_for,
)
from ntkgen.plan.tiles import Tile, TileGrid
from ntkgen.units import human_bytes

# Memory of a forward and a backward pass, as a multiple of the saved activations. It includes gradients and clones.
ACTIVATION_COPIES = 3
# Bytes of host memory per entry of a tile: two computed tiles, their copies in three store dtypes, a mirror, and a
# chunk with its checksum.
TILE_COPY_BYTES = 60


@dataclass(frozen=True)
class Budget:
    """The allowed bytes of memory. ``planned_bytes`` determines the plan, so it must be the same in every run."""

    planned_bytes: int
    available_bytes: int

    @classmethod
    def of(cls, requested: int | None, *, total_bytes: int, free_bytes: int) -> "Budget":
        """Return the user's budget, or two fifths of the device's total memory, which is the same in every run."""
        if requested is not None:
            return cls(requested, requested)
        return cls(total_bytes * 2 // 5, free_bytes * 4 // 5)


@dataclass(frozen=True)
class Environment:
    """The properties of a machine that tile bytes depend on. The torch version stands for the libraries below torch."""

    device_type: str
    device_name: str
    torch_version: str
    threads: int

    def differences(self, other: "Environment") -> list[str]:
        """List the fields that differ, with both values. This environment is that of the store."""
        pairs = zip(dataclasses.asdict(self).items(), dataclasses.asdict(other).values(), strict=True)
        return [
            f"{name.replace('_', ' ')} {stored} there, {current} here"
            for (name, stored), current in pairs
            if stored != current
        ]


@dataclass(frozen=True)
class Plan:
    """All settings that determine the bytes of a tile, and the sizes that determine its cost."""

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
        """Samples of a block, whose factors are stored together. A tile is cut into such blocks."""
        return self.jacobian.sizes.block_samples

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number in the network."""
        return 8 if self.precision == "float64" else 4

    @property
    def product_bytes(self) -> int:
        """Bytes of one computed entry of the kernel."""
        return PRECISION_BYTES[self.precision][1]

    def blocks(self, index: int) -> list[Block]:
        """Cut the samples of one row of tiles into blocks."""
        return self.grid.block(index).pieces(self.block_samples)

    def col_blocks(self, index: int) -> list[Block]:
        """Cut the samples of one column of tiles into blocks. Samples of other columns are numbered after the rows."""
        if self.grid.is_symmetric:
            return self.blocks(index)
        block, first = self.grid.col_block(index), self.grid.num_samples
        return Block(first + block.start, first + block.stop).pieces(self.block_samples)

    def side_blocks(self, index: int) -> list[Block]:
        """Cut a side block of the grid, which has a diagonal of its own, into the blocks that are computed together."""
        side = self.grid.side_block(index)
        return self.blocks(side.number) if side.axis == 0 else self.col_blocks(side.number)

    def pairs(self, tile: Tile) -> Iterator[tuple[Block, Block]]:
        """List the products of blocks that fill a tile."""
        return block_pairs(self.blocks(tile.row), self.col_blocks(tile.col))

    @property
    def num_samples(self) -> int:
        """Samples of rows and columns."""
        return self.grid.num_samples + (self.grid.num_col_samples or 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's factors."""
        return self.block_samples * self.jacobian.factor_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes besides the factors: network, samples, one batch, one contraction, and two tiles that are written."""
        m, batch = self.jacobian.num_outputs, self.jacobian.batch_size
        per_sample = ACTIVATION_COPIES * self.profile.activation_numbers + 2 * self.profile.input_numbers
        kept = [layer.shape for layer in self.jacobian.layers if layer.keeps_rows]
        shapes = self.profile.layers
        widest = max((shape.groups * shape.positions * shape.inputs for shape in shapes), default=0)
        unfolded = sum(shape.groups * shape.positions * shape.inputs for shape in kept)
        passes = (
            3 * self.profile.num_params  # the copy, packed weights of the libraries, and losses of the allocator
            + batch * (per_sample + 2 * widest)
            + self._fallback_numbers
        )
        result = 3 * (self.block_samples * m) ** 2
        samples = 2 * 4 * self.num_samples * self.profile.input_numbers
        diagonal = 8 * max((self._diagonal_numbers(p) for p in self.jacobian.layers if not p.keeps_rows), default=0)
        return (
            passes * self.compute_bytes
            + (contraction_numbers(self.jacobian) + result + batch * unfolded) * self.product_bytes
            + samples
            + diagonal
            + self.grid.num_matrices * self.grid.side**2 * (self.product_bytes + TILE_COPY_BYTES)
        )

    @property
    def _fallback_numbers(self) -> int:
        """Count the numbers in the passes of the parameters that are left to autograd."""
        if not self.jacobian.fallback:
            return 0
        m, samples = self.profile.num_logits, min(self.jacobian.fallback_samples, self.jacobian.batch_size)
        squared = samples if self.jacobian.fallback_way == "backward" else 1
        passes = samples * (m * squared + ACTIVATION_COPIES) * self.profile.activation_numbers
        return passes + 2 * m * self.jacobian.dense_params * samples

    def _diagonal_numbers(self, layer: LayerPlan) -> int:
        """Count the float64 numbers in the computation of one sample's diagonal."""
        grams = max(layer.shape.positions, layer.widest) ** 2
        return max(DIAGONAL_NUMBERS, grams) * 3 + factor_numbers(layer, self.jacobian.num_outputs)

    @property
    def preparing_bytes(self) -> int:
        """Bytes for the preparation of the network: a float64 copy, and the check of its rules on three samples."""
        # Measured with a ResNet68: the copy, its parts before the cast, and gradients take 2.2 times the parameters.
        shapes, copy = self.profile.layers, self.profile.num_params * 9 // 4
        inputs = max((shape.groups * shape.positions * shape.inputs for shape in shapes), default=0)
        params = max((shape.num_params for shape in shapes), default=0)
        return 8 * (copy + 3 * ACTIVATION_COPIES * self.profile.activation_numbers + 3 * inputs + 5 * params)

    @property
    def minimum_bytes(self) -> int:
        """Minimum bytes for the computation of a tile: a row block and a column block."""
        return self.projected_bytes(2)

    def cached_blocks(self, budget: Budget) -> int:
        """Return the number of blocks whose factors may be in memory at a time.

        Raises:
            BudgetError: If two blocks do not fit.
        """
        if self.preparing_bytes > budget.available_bytes:
            raise BudgetError(
                f"Making the network ready takes {human_bytes(self.preparing_bytes)} of memory and "
                f"{human_bytes(budget.available_bytes)} are allowed: a copy of its {self.profile.num_params:,} "
                "parameters in float64, on which it is checked. Is `memory_bytes` meant for a smaller network? "
                "Raise it."
            )
        if self.minimum_bytes > budget.available_bytes:
            raise BudgetError(
                f"One tile needs {human_bytes(self.minimum_bytes)} of memory and {human_bytes(budget.available_bytes)} "
                f"are allowed: {human_bytes(self.fixed_bytes)} for the network, a batch of {self.jacobian.batch_size} "
                f"and a tile of {self.grid.side} rows, {human_bytes(2 * self.block_bytes)} for the factors of two "
                f"blocks of {self.block_samples} samples. Raise `memory_bytes`, free some, or take a smaller "
                "`tile_side`."
            )
        fits = (budget.available_bytes - self.fixed_bytes) // max(1, self.block_bytes)
        return min(fits, self.num_blocks)

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all rows and columns of tiles."""
        return sum(len(self.side_blocks(index)) for index in range(self.grid.num_sides))

    def projected_bytes(self, cached_blocks: int) -> int:
        """Project the peak memory of the computation, without the memory of the process before it."""
        return max(self.fixed_bytes + cached_blocks * self.block_bytes, self.preparing_bytes)

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for the manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Plan":
        """Convert back from the values of `to_json`."""
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
    """Inputs of a plan: the precision policy, the rates of the device, forced orders, and the reduction."""

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
    """Make a plan with the largest blocks, and then the largest batches, whose projected bytes fit the budget.

    Raises:
        BudgetError: If blocks of one sample do not fit. The message has both numbers of bytes.
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
    plan.cached_blocks(Budget(budget.planned_bytes, budget.planned_bytes))  # raises an error with both numbers
    return plan


def _halvings(number: int) -> list[int]:
    """Halve a number down to 1.

    >>> _halvings(10)
    [10, 5, 2, 1]
    """
    return [number >> shift for shift in range(number.bit_length())]


def _block_sizes(tile_samples: int) -> Iterable[int]:
    """List the block sizes to try, which cut a tile into 1, 2, 3, 4, 6, 8, … equal parts.

    >>> list(_block_sizes(10))
    [10, 5, 4, 3, 2, 1]
    """
    parts = [1, 2, 3, *(base << shift for shift in range(1, 20) for base in (2, 3))]
    return sorted({-(-tile_samples // count) for count in parts}, reverse=True)
