"""The full-Jacobian method of published code, with which the engine is compared.

For each pair of blocks of samples on or above the diagonal, it multiplies the two Jacobians, parameter by parameter.
``vmap(jacrev(…))`` forms the whole Jacobian of a block. The Jacobian of the column block is formed again for each pair.
The engine does not use this module.
"""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ntkgen.blocks import Block, block_pairs
from ntkgen.errors import BudgetError
from ntkgen.jacobian.precision import exact_arithmetic
from ntkgen.jacobian.reference import trainable
from ntkgen.units import human_bytes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Maximum fraction of the free memory for the Jacobians of a row block and a column block.
MEMORY_SHARE = 0.6
# Maximum memory in bytes for the gradients of the activations of samples that are differentiated together.
BACKWARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Schedule:
    """The pairs of blocks that are computed and timed, row by row. All pairs would fill the upper triangle."""

    num_samples: int
    block_samples: int
    pairs: tuple[tuple[Block, Block], ...]

    @property
    def all_pairs(self) -> list[tuple[Block, Block]]:
        """List all pairs of blocks of the upper triangle, row by row."""
        blocks = Block(0, self.num_samples).pieces(self.block_samples)
        return sorted(block_pairs(blocks, blocks))

    @property
    def jacobian_samples(self) -> int:
        """Count the samples whose Jacobians the method forms: each once as a row, and once as a column per pair."""
        return self.num_samples + sum(len(column) for _, column in self.all_pairs)

    @property
    def sample_pairs(self) -> int:
        """Count the pairs of samples that the method multiplies."""
        return sum(len(row) * len(column) for row, column in self.all_pairs)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Times of some pairs of blocks, numbers of their samples and pairs of samples, and their part of the kernel."""

    jacobian_seconds: float
    jacobian_samples: int
    product_seconds: float
    sample_pairs: int
    parts: tuple[Tensor, ...]  # per pair (row samples · outputs, column samples · outputs), on the CPU

    def scaled(self, schedule: Schedule) -> float:
        """Scale the time to all pairs of blocks: Jacobians by samples, products by pairs of samples."""
        jacobians = self.jacobian_seconds / self.jacobian_samples * schedule.jacobian_samples
        return jacobians + self.product_seconds / self.sample_pairs * schedule.sample_pairs


@dataclass(frozen=True, eq=False)
class FullJacobian:
    """The method for one network, which is in evaluation mode and in the dtype of the computation."""

    module: nn.Module
    chunk_samples: int  # samples that are differentiated together

    def rows(
        self,
        x: Tensor,  # (samples, …)
    ) -> list[Tensor]:  # per parameter (samples · outputs, scalars)
        """Form the Jacobian of a block."""

        def outputs(params: dict[str, Tensor], sample: Tensor) -> Tensor:
            result: Tensor = functional_call(self.module, params, (sample[None],))[0]
            return result

        differentiate = vmap(jacrev(outputs), in_dims=(None, 0), chunk_size=self.chunk_samples)
        return [part.detach().flatten(2).flatten(0, 1) for part in differentiate(trainable(self.module), x).values()]


def multiply(
    left: list[Tensor],
    right: list[Tensor],
) -> Tensor:  # (left samples · outputs, right samples · outputs)
    """Multiply two Jacobians parameter by parameter, K = Σ_p J₁ₚ J₂ₚᵀ."""
    kernel = left[0] @ right[0].T
    for one, other in zip(left[1:], right[1:], strict=True):
        kernel.addmm_(one, other.T)
    return kernel


def measure(method: FullJacobian, x: Tensor, schedule: Schedule) -> Measurement:
    """Compute the pairs of a schedule. The Jacobian of a row is formed once, that of a column for every pair."""
    jacobian_seconds = product_seconds = 0.0
    samples = pairs = 0
    parts = []
    with exact_arithmetic(x.device):
        for row, in_row in itertools.groupby(schedule.pairs, key=lambda pair: pair[0]):
            left, seconds = timed(x.device, method.rows, x[row.start : row.stop])
            jacobian_seconds, samples = jacobian_seconds + seconds, samples + len(row)
            for _, column in in_row:
                right, seconds = timed(x.device, method.rows, x[column.start : column.stop])
                jacobian_seconds, samples = jacobian_seconds + seconds, samples + len(column)
                part, seconds = timed(x.device, multiply, left, right)
                product_seconds, pairs = product_seconds + seconds, pairs + len(row) * len(column)
                parts.append(part.cpu())
                del right  # memory has room for two Jacobians only
            del left
    return Measurement(jacobian_seconds, samples, product_seconds, pairs, tuple(parts))


def timed(
    device: torch.device, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> tuple[Result, float]:
    """Call a function. Return its result and the seconds that the device took."""
    synchronize(device)
    start = time.perf_counter()
    result = work(*args, **kwargs)
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def make_schedule(num_samples: int, block_samples: int, count: int | None, seed: int) -> Schedule:
    """Draw ``count`` pairs of blocks off the diagonal, from one row if it has enough. Without a count, take all.

    >>> [(row.start, column.start) for row, column in make_schedule(6, 2, 2, seed=0).pairs]
    [(0, 2), (0, 4)]
    >>> len(make_schedule(6, 2, None, seed=0).pairs)
    6
    """
    pairs = Schedule(num_samples, block_samples, ()).all_pairs
    beside = [(row, column) for row, column in pairs if row != column]
    if count is not None and beside:
        generator = random.Random(seed)  # noqa: S311 - not a secret
        generator.shuffle(beside)
        in_row = Counter(row for row, _ in beside)
        draw = {row: generator.random() for row in in_row}
        beside.sort(key=lambda pair: (in_row[pair[0]] < count, draw[pair[0]]))
        pairs = sorted(beside[:count])
    return Schedule(num_samples, block_samples, tuple(pairs))


def largest_block(block_samples: int, sample_bytes: int, free_bytes: int) -> int:
    """Halve the size of blocks until the Jacobians of two blocks fit in memory.

    >>> largest_block(16, sample_bytes=10, free_bytes=400)
    8

    Raises:
        BudgetError: If the Jacobians of two samples do not fit.
    """
    while 2 * block_samples * sample_bytes > MEMORY_SHARE * free_bytes:
        if block_samples == 1:
            raise BudgetError(
                f"The full-Jacobian method does not fit in memory: expected {human_bytes(2 * sample_bytes)} for the "
                f"Jacobians of two samples, found {human_bytes(MEMORY_SHARE * free_bytes)}. Is the network too large, "
                "or does another program use the memory? Use a smaller network."
            )
        block_samples //= 2
    return block_samples


def chunk_samples(block_samples: int, activation_bytes: int, num_outputs: int) -> int:
    """Return the number of samples of a block that are differentiated together: as many as the memory allows.

    >>> chunk_samples(16, activation_bytes=100 << 20, num_outputs=10)
    4
    """
    return max(1, min(block_samples, BACKWARD_BYTES // (activation_bytes * num_outputs)))
