"""What the proof of every batch costs: the part of the time of `ntkgen.ntk` that its checks take.

    python scripts/bench/checks.py --models lenet resnet18 vgg11 --n 128 --trials 5

The checks are timed within the run that they are a part of, so that a busy machine slows both alike. Prints a line per
network: the median seconds of the run, and the median, least and most of what the checks add to the rest, in per cent.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import ntkgen
from ntkgen.jacobian import compute
from ntkgen.training import zoo

SAMPLE_SHAPE = (3, 32, 32)
CHECKS = ("require_planned_uses", "require_true_factors", "require_same_in_other_batches")


@contextmanager
def timed_checks() -> Iterator[list[float]]:
    """Collect the seconds of every check meanwhile."""
    kept = {name: getattr(compute, name) for name in CHECKS}
    seconds: list[float] = []

    def timed(check: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            started = time.perf_counter()
            check(*args)
            seconds.append(time.perf_counter() - started)

        return run

    try:
        for name, check in kept.items():
            setattr(compute, name, timed(check))
        yield seconds
    finally:
        for name, check in kept.items():
            setattr(compute, name, check)


def run_once(model: nn.Module, x: Tensor, precision: str) -> tuple[float, float]:
    """Time one kernel: all of it, and its checks."""
    with timed_checks() as checks:
        started = time.perf_counter()
        ntkgen.ntk(model, x, precision=precision)
        return time.perf_counter() - started, sum(checks)


def measure(name: str, count: int, trials: int, precision: str) -> str:
    """Time some runs, after one that is not counted."""
    model = zoo.build(name, 10, seed=0)
    x = torch.randn(count, *SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    runs = [run_once(model, x, precision) for _ in range(trials + 1)][1:]
    added = [100 * checks / (total - checks) for total, checks in runs]
    seconds = statistics.median(total for total, _ in runs)
    return (
        f"{name:<10} n = {count}, {precision}, {torch.get_num_threads()} threads: {seconds:.2f} s; the checks add "
        f"{statistics.median(added):.1f} % ({min(added):.1f} to {max(added):.1f}), {trials} runs"
    )


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
