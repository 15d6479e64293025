"""Measure the speed of a CUDA device, and extrapolate the time of the whole kernel of CIFAR-10.

    uv run python scripts/bench/gpu.py --models resnet9 resnet18 resnet50 --precision float32 bfloat16 --tile 4070 10000

For each network, the script makes the same plan for ``--n`` samples as the command `compute`. It times the factors of
two blocks, the product of the two with its copy to the host, and the exact diagonal of one block. It scales these times
to the whole plan, which computes the diagonal and the upper triangle. The result does not include writing to disk,
training and reading the data. One multiply-add counts as two FLOPs.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from ntkgen.cli.options import SEED, Bytes, Command, ManyOption
from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # makes settings that must precede the import of torch

import torch
from engine import build_all, random_samples
from full_jacobian import timed
from machine import machine
from printing import Line, one_line_errors, print_table, say
from torch import Tensor

from ntkgen.engine.machine import choose_device as any_device
from ntkgen.engine.machine import environment, memory_budget
from ntkgen.errors import InputError
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import contract, exact_diagonal
from ntkgen.jacobian.cost import factor_macs, product_macs
from ntkgen.jacobian.factors import BlockFactors
from ntkgen.jacobian.measure import rates_of
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.precision import check_device, exact_arithmetic, policy
from ntkgen.plan.order import count_factor_samples, projected_flops
from ntkgen.plan.plan import Budget, Choices, Plan, make_plan
from ntkgen.plan.tiles import make_grid
from ntkgen.units import human_bytes

# Hours for the upper triangle of the CIFAR-10 kernel (50,000 samples, 10 outputs) on one H100, by the dtype of the
# computation: Ameli, van der Heide, Hodgkinson, Roosta, Mahoney (2025), "Determinant Estimation under Memory
# Constraints and Neural Scaling Laws" (MEMDET), Table B.2.
PUBLISHED_HOURS = {
    "resnet9": {"float16": 6, "float32": 24, "float64": 70},
    "resnet18": {"float16": 14, "float32": 63, "float64": 65},
    "resnet50": {"float16": 37, "float32": 177, "float64": 297},
    "resnet101": {"float16": 107, "float32": 442, "float64": 1178},
}
PUBLISHED_SAMPLES = 50_000
# For each precision, a published dtype that is not more accurate.
COMPARED_WITH = {
    "bfloat16": "float16",
    "tf32": "float16",
    "float32": "float32",
    "float64-accumulate": "float32",
    "float64": "float64",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    n: int
    trials: int
    seed: int
    memory_bytes: int | None
    width: int | None
    device: torch.device


@dataclass(frozen=True)
class Seconds:
    """Median times of the factors of one sample, the diagonal of one sample, and one product of two blocks."""

    factors_per_sample: float
    diagonal_per_sample: float
    product: float


@dataclass(frozen=True)
class Amounts:
    """Work of the whole kernel: samples of factors, and multiply-adds of factors and products."""

    factor_samples: int
    factor_macs: int
    product_macs: int
    macs_of_one_product: int

    @classmethod
    def of(cls, plan: Plan, cached_blocks: int) -> "Amounts":
        """Count the work of the engine for an empty store."""
        tiles = list(plan.grid.tiles())
        rows = range(plan.grid.num_blocks)[::-1]
        samples = count_factor_samples(plan, tiles, cached_blocks, rows)
        factors = samples * factor_macs(plan.profile, plan.jacobian)
        everything = projected_flops(plan, tiles, cached_blocks, rows) // 2
        side = plan.block_samples
        one = product_macs(plan.jacobian, side, side, is_diagonal=False)
        return cls(samples, factors, everything - factors, one)


def measure(network: Network, plan: Plan, settings: Settings) -> Seconds:
    """Time the factors of a block, its diagonal, and the product of two blocks with its copy to the host."""
    side = plan.block_samples
    x = random_samples(2 * side, settings.seed).to(settings.device)

    def factors(samples: Tensor) -> BlockFactors:
        return compute_factors(network, plan.jacobian, samples)

    with exact_arithmetic(settings.device):
        factors(x[: plan.jacobian.batch_size])
        left, of_factors = repeated(settings, factors, x[:side])
        right = factors(x[side:])
        _, of_diagonal = repeated(settings, exact_diagonal, left)
        _, of_product = repeated(settings, lambda: contract(left, right, plan.jacobian).cpu())
    return Seconds(of_factors / side, of_diagonal / side, of_product)


def repeated(settings: Settings, work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Run a function several times after a first run. Return its last result and the median time in seconds."""
    seconds: list[float] = []
    for _ in range(settings.trials + 1):
        result = None  # frees the result before the next one is computed
        result, took = timed(settings.device, work, *args)
        seconds.append(took)
    return result, statistics.median(seconds[1:])


def bench(name: str, network: Network, tile: int | None, settings: Settings) -> dict[str, Any]:
    """Measure one network, and extrapolate the time of the whole kernel."""
    precision = network.precision.name
    budget = memory_budget(settings.device, settings.memory_bytes)
    plan = plan_kernel(network, tile, budget, settings)
    say(f"{name}: {precision}, tiles of {plan.grid.side} rows, blocks of {plan.block_samples} samples")
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
    seconds = measure(network, plan, settings)
    cached_blocks = plan.cached_blocks(budget)
    return {
        "model": name,
        "n": settings.n,
        "precision": precision,
        "tile_rows": plan.grid.side,
        "block_samples": plan.block_samples,
        "batch_size": plan.jacobian.batch_size,
        "cached_blocks": cached_blocks,
        **extrapolate(plan, seconds, Amounts.of(plan, cached_blocks)),
        **memory(plan, settings.device),
        **machine(settings.device),
        "width": settings.width,
        "seed": settings.seed,
        "trials": settings.trials,
    }


def plan_kernel(network: Network, tile: int | None, budget: Budget, settings: Settings) -> Plan:
    """Plan the whole kernel in the same way as the command `compute`."""
    choices = Choices(network.precision.name, rates_of(network.device, network.precision.name))
    grid = make_grid(settings.n, network.profile.num_outputs, tile)
    here = environment(settings.device)
    return make_plan(network.profile, grid, choices, budget=budget, environment=here)


def extrapolate(plan: Plan, seconds: Seconds, amounts: Amounts) -> dict[str, Any]:
    """Scale the times to the whole kernel. Products are scaled by their multiply-adds."""
    factor_hours = seconds.factors_per_sample * amounts.factor_samples / 3600
    diagonal_hours = seconds.diagonal_per_sample * plan.grid.num_samples / 3600
    product_hours = seconds.product / amounts.macs_of_one_product * amounts.product_macs / 3600
    explicit_pairs = plan.block_samples**2 * plan.grid.num_outputs**2
    return {
        "factor_seconds_per_sample": seconds.factors_per_sample,
        "diagonal_seconds_per_sample": seconds.diagonal_per_sample,
        "product_seconds": seconds.product,
        "product_seconds_per_sample_pair": seconds.product / plan.block_samples**2,
        "product_flops": 2 * amounts.macs_of_one_product,
        "product_flops_per_second": 2 * amounts.macs_of_one_product / seconds.product,
        "effective_flops_per_second": 2 * explicit_pairs * plan.profile.num_params / seconds.product,
        "factor_samples": amounts.factor_samples,
        "factor_flops": 2 * amounts.factor_macs,
        "all_products_flops": 2 * amounts.product_macs,
        "factor_hours": factor_hours,
        "diagonal_hours": diagonal_hours,
        "product_hours": product_hours,
        "hours": factor_hours + diagonal_hours + product_hours,
    }


def memory(plan: Plan, device: torch.device) -> dict[str, int | None]:
    """Return the projected memory and the measured peak. On a CPU the peak is not measured."""
    measured = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"projected_bytes": plan.projected_bytes(2), "peak_bytes": measured}


def compare_with_published(result: dict[str, Any]) -> dict[str, Any]:
    """Add the published hours if the paper has the same network, width and number of samples."""
    is_published = result["n"] == PUBLISHED_SAMPLES and result["width"] is None
    hours = PUBLISHED_HOURS.get(result["model"], {}) if is_published else {}
    dtype = COMPARED_WITH[result["precision"]]
    published = hours.get(dtype)
    return {
        **result,
        "published_hours": hours,
        "published_device": "NVIDIA H100" if hours else None,
        "compared_with": dtype,
        "ratio": published / result["hours"] if published else None,
    }


def _published(result: Mapping[str, Any]) -> str:
    hours = result["published_hours"].get(result["compared_with"])
    return f"{hours} h in {result['compared_with']}" if hours else "none"


TABLE: tuple[Line, ...] = (
    ("precision", lambda r: f"{r['precision']}"),
    ("samples", lambda r: f"{r['n']}"),
    ("rows of a tile", lambda r: f"{r['tile_rows']}"),
    ("samples of a block", lambda r: f"{r['block_samples']}"),
    ("factors of a sample", lambda r: f"{r['factor_seconds_per_sample'] * 1e3:.3g} ms"),
    ("diagonal of a sample", lambda r: f"{r['diagonal_seconds_per_sample'] * 1e3:.3g} ms"),
    ("pair of samples", lambda r: f"{r['product_seconds_per_sample_pair'] * 1e6:.3g} µs"),
    ("executed, TFLOP/s", lambda r: f"{r['product_flops_per_second'] / 1e12:.3g}"),
    ("effective, TFLOP/s", lambda r: f"{r['effective_flops_per_second'] / 1e12:.3g}"),
    ("memory, projected", lambda r: human_bytes(r["projected_bytes"])),
    ("memory, measured", lambda r: human_bytes(r["peak_bytes"]) if r["peak_bytes"] is not None else "not measured"),
    ("factors", lambda r: f"{r['factor_hours']:.3g} h"),
    ("diagonal", lambda r: f"{r['diagonal_hours']:.3g} h"),
    ("products", lambda r: f"{r['product_hours']:.3g} h"),
    ("in all, extrapolated", lambda r: f"{r['hours']:.3g} h"),
    ("published, one H100", _published),
    ("ratio", lambda r: f"{r['ratio']:.1f} ×" if r["ratio"] else ""),
)


@click.command(cls=Command)
@click.option("--device", default="cuda", show_default=True, help="Device: cuda, cuda:1, …; or cpu to test the script.")
@click.option(
    "--models", cls=ManyOption, default=("resnet9", "resnet18", "resnet50"), metavar="NAME...", help="Networks."
)
@click.option("--precision", "precisions", cls=ManyOption, default=("float32",), metavar="NAME...", help="Precisions.")
@click.option("--tile", "tile_side", cls=ManyOption, type=int, default=(), metavar="ROWS...", help="Rows per tile.")
@click.option(
    "--n", default=PUBLISHED_SAMPLES, show_default=True, type=click.IntRange(min=1), help="Number of samples."
)
@click.option("--trials", default=3, show_default=True, type=click.IntRange(min=1), help="Number of trials.")
@click.option("--memory", "memory_bytes", type=Bytes(), help="Memory of the device, such as 60GB [as for compute].")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of the samples.")
@click.option("--width", type=int, help="Channels of the first stage of a ResNet [64].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per measurement instead of a table.")
def main(
    *,
    device: str,
    models: tuple[str, ...],
    precisions: tuple[str, ...],
    tile_side: tuple[int, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the speed of a device, and extrapolate the time of the whole kernel of CIFAR-10."""
    with one_line_errors():
        settings = Settings(device=choose_device(device), **options)
        for precision in precisions:
            check_device(policy(precision), settings.device)
        results = []
        for name, model in build_all(models, settings.width).items():
            for precision, tile in itertools.product(precisions, tile_side or (None,)):
                network = prepare(model, random_samples(2, settings.seed), policy(precision), settings.device)
                results.append(compare_with_published(bench(name, network, tile, settings)))
                if as_json:
                    click.echo(json.dumps(results[-1]))
        if not as_json:
            print_table(results, TABLE, results[0]["device"])


def choose_device(name: str) -> torch.device:
    """Return the device with a name.

    Raises:
        InputError: If the name asks for CUDA and there is no CUDA device.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "There is no CUDA device here: expected one to measure, and torch finds only a CPU. Is the driver missing, "
            "or is torch built without CUDA? Run the script on a machine with a GPU, or test the script with "
            "--device cpu --n 640 --tile 80."
        )
    return any_device(name)


if __name__ == "__main__":
    main()
