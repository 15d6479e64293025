"""Time slowly changing regression: the networks of many seeds as one stack, one after the other, and by torch.

    uv run python scripts/bench/slow_regression.py --seeds 20 --trials 5

A trial learns the samples once in each way, in turns. `stack` is the computation of a run. `separate` learns the same
networks one after the other, each in a stack of its own. `torch` is backpropagation alone, with a module, autograd and
an optimizer of torch, for one seed. The table has the median of the samples per second of
each way, with the least and the most in brackets. A sample of 20 seeds counts 20 times. Samples are drawn within the
time of `stack` and `separate`, and before that of `torch`.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click

from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # sets what must be set before torch is loaded

import torch
from torch import nn

from ntkgen.continual.slow_regression.settings import ALGORITHMS, OPTIMIZERS, RegressionSettings
from ntkgen.continual.slow_regression.stack import Stack
from ntkgen.continual.streams.regression import BLOCK, SlowRegression

OPTIMIZERS_OF_TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def learn(settings: RegressionSettings, num_samples: int) -> Callable[[], None]:
    """Prepare a stack that learns some samples."""
    stack = Stack(settings)

    def run() -> None:
        for start in range(0, num_samples, BLOCK):
            stack.learn(start, min(start + BLOCK, num_samples))

    return run


def learn_by_torch(settings: RegressionSettings, num_samples: int) -> Callable[[], None]:
    """Prepare a module of torch that learns the samples of the first seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(settings.num_inputs, settings.units), nn.ReLU(), nn.Linear(settings.units, 1))
    optimizer = OPTIMIZERS_OF_TORCH[settings.optimizer](model.parameters(), lr=settings.learning_rate)
    inputs, targets = SlowRegression(settings.stream, settings.seeds[0]).samples(0, num_samples)
    samples = list(zip(torch.from_numpy(inputs)[:, :-1], torch.from_numpy(targets)[:, None], strict=True))

    def run() -> None:
        for x, y in samples:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    return run


def seconds(runs: list[Callable[[], None]]) -> float:
    """Time some runs, one after the other."""
    started = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - started


def measure(settings: RegressionSettings, num_samples: int, trials: int) -> dict[str, Any]:
    """Time the ways in turns, after one turn that is not counted."""
    each = [RegressionSettings(**{**vars(settings), "seeds": (seed,)}) for seed in settings.seeds]
    ways = {
        "stack": ([learn(settings, num_samples)], len(settings.seeds) * num_samples),
        "separate": ([learn(one, num_samples) for one in each], len(settings.seeds) * num_samples),
        "torch": ([learn_by_torch(settings, num_samples)], num_samples),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(trials + 1):
        for name, (runs, _) in ways.items():
            times[name].append(seconds(runs))
    speeds = {name: [count / took for took in times[name][1:]] for name, (_, count) in ways.items()}
    return {
        "algorithm": settings.algorithms[0],
        "optimizer": settings.optimizer,
        "seeds": len(settings.seeds),
        "samples": num_samples,
        "microseconds_per_step": 1e6 * statistics.median(times["stack"][1:]) / num_samples,
        "samples_per_second": {name: spread(found) for name, found in speeds.items()},
        "threads": torch.get_num_threads(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Summarise some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def line(result: dict[str, Any]) -> str:
    """Write a result in one line."""
    speeds = [
        f"{name} {found['median']:,.0f} ({found['least']:,.0f}–{found['most']:,.0f})"
        for name, found in result["samples_per_second"].items()
    ]
    start = f"{result['algorithm']:<18} {result['optimizer']:<4} seeds {result['seeds']:>3}"
    return f"{start}: {', '.join(speeds)} samples/s, {result['microseconds_per_step']:.1f} µs per step of the stack"


@click.command()
@click.option("--seeds", multiple=True, default=(1, 20), show_default=True, type=click.IntRange(min=1), help="Numbers.")
@click.option("--samples", default=5_000, show_default=True, type=click.IntRange(min=1), help="Samples per trial.")
@click.option("--trials", default=5, show_default=True, type=click.IntRange(min=1), help="Turns of all ways.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per measurement.")
def main(*, seeds: tuple[int, ...], samples: int, trials: int, as_json: bool) -> None:
    """Time slowly changing regression: many seeds as one stack, one after the other, and by torch."""
    show = json.dumps if as_json else line
    for count in seeds:
        for algorithm in ALGORITHMS:
            for optimizer in OPTIMIZERS:
                settings = RegressionSettings((algorithm,), tuple(range(count)), optimizer=optimizer)
                click.echo(show(measure(settings, samples, trials)))


if __name__ == "__main__":
    main()
