"""What the check of every batch costs: `ntkgen.ntk` with it and without it, in turns.

    python scripts/bench_checks.py --models lenet resnet18 vgg11 --n 128 --trials 5

Prints a line per network: the median seconds of both, and the median, least and most of the ratio of each pair of
turns, in wall time and in processor time.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import ntkgen
from ntkgen import zoo
from ntkgen.jacobian import compute

SAMPLE_SHAPE = (3, 32, 32)
CHECKS = ("require_true_factors", "require_same_alone", "require_planned_uses")


@contextmanager
def without_checks() -> Iterator[None]:
    """Leave every batch unchecked meanwhile."""
    kept = {name: getattr(compute, name) for name in CHECKS}
    try:
        for name in CHECKS:
            setattr(compute, name, lambda *_: None)
        yield
    finally:
        for name, check in kept.items():
            setattr(compute, name, check)


def timed(model: nn.Module, x: Tensor, precision: str) -> tuple[float, float]:
    """Time one kernel, in wall seconds and in seconds of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    ntkgen.ntk(model, x, precision=precision)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, count: int, trials: int, precision: str) -> str:
    """Time both ways in turns, after a run of each that is not counted."""
    model = zoo.build(name, 10, seed=0)
    x = torch.randn(count, *SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    checked, unchecked = [], []
    for _ in range(trials + 1):
        checked.append(timed(model, x, precision))
        with without_checks():
            unchecked.append(timed(model, x, precision))
    wall, cpu = ([a[kind] / b[kind] for a, b in zip(checked[1:], unchecked[1:], strict=True)] for kind in (0, 1))
    seconds = [statistics.median(each[0] for each in turns[1:]) for turns in (checked, unchecked)]
    return (
        f"{name:<12} n = {count}: {seconds[0]:.2f} s with the checks, {seconds[1]:.2f} s without; ratio in wall time "
        f"{spread(wall)}, in processor time {spread(cpu)}"
    )


def spread(ratios: list[float]) -> str:
    """Write the median, the least and the most."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    """Measure the networks that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet", "resnet18", "vgg11"])
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    settings = parser.parse_args()
    for name in settings.models:
        print(measure(name, settings.n, settings.trials, settings.precision), flush=True)


if __name__ == "__main__":
    main()
