"""Measure the time that `ntkgen.ntk` takes for the checks of every batch.

    python scripts/bench/checks.py --models lenet resnet18 vgg11 --n 128 --trials 5

The checks are timed within a complete run, so that other programs on the machine slow down both equally. The script
prints a line per network: the median time of a run in seconds, and the median, minimum and maximum of the time of the
checks, in per cent of the time of the other work.
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
CHECKS = ("require_planned_uses", "has_true_factors", "require_same_in_other_batches")


@contextmanager
def timed_checks() -> Iterator[list[float]]:
    """Collect the duration of every check within the context, in seconds."""
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
    """Return the seconds of one kernel, and the seconds of its checks."""
    with timed_checks() as checks:
        started = time.perf_counter()
        ntkgen.ntk(model, x, precision=precision)
        return time.perf_counter() - started, sum(checks)


def measure(name: str, count: int, trials: int, precision: str) -> str:
    """Time several runs after a first run that is not counted."""
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
    """Measure the chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet", "resnet18", "vgg11"], help="networks")
    parser.add_argument("--n", type=int, default=128, help="number of samples")
    parser.add_argument("--trials", type=int, default=5, help="number of counted runs")
    parser.add_argument("--precision", default="float32", help="precision of the kernel")
    settings = parser.parse_args()
    for name in settings.models:
        print(measure(name, settings.n, settings.trials, settings.precision), flush=True)


if __name__ == "__main__":
    main()
