"""The machine of a benchmark: its description, and the speed of large matrix products."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from full_jacobian import timed
from torch import Tensor

from ntkgen.engine.machine import choose_device as any_device
from ntkgen.engine.machine import environment
from ntkgen.errors import InputError
from ntkgen.jacobian.precision import exact_arithmetic, policy, reduced_products
from ntkgen.jacobian.products import Products, routes

# Number of rows of the square matrices for the peak speed, and number of measurements.
PEAK_SIDE = {"cpu": 3072, "cuda": 8192}
PEAK_REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """FLOP/s of large square products in each measurement, by `torch.mm` and by the fastest method of the engine."""

    mm: tuple[float, ...]
    route: tuple[float, ...]

    def __add__(self, other: "Peak") -> "Peak":
        """Join the measurements of two peaks."""
        return Peak(self.mm + other.mm, self.route + other.route)

    @property
    def mm_flops(self) -> float:
        """Median speed of `torch.mm`."""
        return statistics.median(self.mm)

    @property
    def route_flops(self) -> float:
        """Median speed of the fastest method of the engine."""
        return statistics.median(self.route)

    @property
    def flops(self) -> float:
        """The larger of the two speeds."""
        return max(self.mm_flops, self.route_flops)


def measure_peak(precision: str, device: torch.device) -> Peak:
    """Time large square products in a precision, by `torch.mm` and by the fastest method of the engine."""
    side, rounding = PEAK_SIDE[device.type], policy(precision)
    ways = [Products(rounding, route) for route in routes(device)]
    a, b = (ways[0].operand(torch.randn(side, side, device=device)) for _ in range(2))
    out = torch.empty_like(a)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        with reduced_products(device, rounding.rounding):
            return torch.mm(a, b, out=out)

    runs = [plain, *(way.rounded for way in ways)]
    with exact_arithmetic(device):
        seconds = [[timed(device, run, a, b)[1] for run in runs] for _ in range(PEAK_REPEATS + 1)]
    mm, *by_route = ([2 * side**3 / took for took in of_run] for of_run in zip(*seconds[1:], strict=True))
    return Peak(tuple(mm), tuple(max(by_route, key=statistics.median)))


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine of a measurement."""
    return {
        "device": environment(device).device_name,
        "cpu_model": environment(torch.device("cpu")).device_name,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def choose_device(name: str) -> torch.device:
    """Return the CPU or a CUDA device.

    Raises:
        InputError: If the name is that of another kind of device.
    """
    device = torch.device("cpu") if name == "auto" and not torch.cuda.is_available() else any_device(name)
    if device.type not in PEAK_SIDE:
        raise InputError(
            f"The benchmark cannot run on {name!r}: expected cpu or cuda. It can measure matrix products only there. "
            "Was --device copied from another command? Use --device cpu."
        )
    return device
