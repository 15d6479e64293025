"""Time learners of single samples: the networks of many seeds as one stack, one by one, and by torch.

    OMP_NUM_THREADS=1 uv run python scripts/bench/streaming.py --seeds 20 --samples 200 --trials 5

A trial learns the samples once in each way, in turns. `stack` is the computation of a run with all seeds. `one` is that
of a run with one seed, which is what a separate process per seed does. `torch` is what the published programs do for
one seed: a module, autograd, and an optimizer that changes one parameter after the other. All ways learn by UPGD with
noise, and compute the loss of each sample again after its step. The table has the median of the samples per second of
each way, with the least and the most in brackets. A sample of 20 seeds counts 20 times. `parts` divides the time of a
step of the stack.
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
from torch import Tensor
from torch.nn import functional as F

from ntkgen.continual.optim.registry import LEARNERS, make_optimizer
from ntkgen.continual.streaming.learner import Learner
from ntkgen.continual.streaming.network import StackedNetwork
from ntkgen.continual.streaming.statistics import losses
from ntkgen.jacobian.precision import flushed_denormals
from ntkgen.training import zoo

SHAPE, CLASSES = (3, 32, 32), 10
OPTIONS: dict[str, Any] = {"lr": 0.01, "beta_utility": 0.999, "sigma": 0.001}


def make_stack(model: str, method: str, num_seeds: int) -> Learner:
    """Make the networks of some seeds, and their optimizer."""
    network = StackedNetwork([zoo.build(model, CLASSES, seed=seed) for seed in range(num_seeds)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_seeds)]
    own = {name: value for name, value in OPTIONS.items() if name in LEARNERS[method].options}
    optimizer = make_optimizer(method, network.parameters.items(), members=num_seeds, generators=generators, **own)
    return Learner(network, optimizer)


def learn_by_torch(model: str, x: Tensor, targets: Tensor) -> Callable[[], None]:
    """Prepare a module that learns samples by first-order global UPGD, written as in the published program."""
    module = zoo.build(model, CLASSES, seed=0)
    utilities = [torch.zeros_like(param) for param in module.parameters()]

    def step(number: int) -> None:
        largest = torch.tensor(-torch.inf)
        for param, utility in zip(module.parameters(), utilities, strict=True):
            assert param.grad is not None
            utility.mul_(0.999).add_(-param.grad * param, alpha=0.001)
            largest = torch.maximum(largest, utility.max())
        for param, utility in zip(module.parameters(), utilities, strict=True):
            scaled = torch.sigmoid((utility / (1 - 0.999**number)) / largest)
            noise = torch.randn_like(param) * 0.001
            assert param.grad is not None
            param.add_((param.grad + noise) * (1 - scaled), alpha=-0.01)

    def run() -> None:
        for number, (sample, target) in enumerate(zip(x, targets, strict=True), 1):
            module.zero_grad()
            F.cross_entropy(module(sample), target).backward()
            with torch.no_grad():
                step(number)
                F.cross_entropy(module(sample), target)

    return run


def parts(learner: Learner, x: Tensor, targets: Tensor) -> dict[str, float]:
    """Time the parts of a step, in milliseconds, the least of several."""
    network, params = learner.network, list(learner.network.parameters.values())
    prepared = network.prepared(x)

    def differentiate() -> None:
        loss = losses(network.forward(prepared).outputs, targets).sum()
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad

    def look_again() -> None:
        with torch.no_grad():
            network.forward(prepared)

    differentiate()
    ways: dict[str, Callable[[], Any]] = {
        "forward and backward pass": differentiate,
        "optimizer with noise": learner.optimizer.step,
        "second forward pass": look_again,
        "noise alone": lambda: [
            torch.empty(sum(param[0].numel() for param in params)).normal_() for _ in range(len(x))
        ],
    }
    return {name: 1e3 * min(seconds(way) for _ in range(20)) for name, way in ways.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Time a run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(model: str, method: str, num_seeds: int, num_samples: int, trials: int) -> dict[str, Any]:
    """Time the ways in turns, after one turn that is not counted."""
    torch.manual_seed(0)
    x = torch.randn(num_samples, num_seeds, *SHAPE)
    targets = torch.randint(0, CLASSES, (num_samples, num_seeds))
    stack, one = make_stack(model, method, num_seeds), make_stack(model, method, 1)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "stack": (lambda: stack.learn(x, targets), num_seeds),
        "one": (lambda: one.learn(x[:, :1], targets[:, :1]), 1),
        "torch": (learn_by_torch(model, x[:, :1], targets[:, :1]), 1),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + 1):
        for name, (run, _) in ways.items():
            taken = seconds(run)
            if trial:
                times[name].append(taken)
    rates = {name: [num_samples * ways[name][1] / taken for taken in each] for name, each in times.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "model": model,
        "method": method,
        "seeds": num_seeds,
        "threads": torch.get_num_threads(),
        "samples_per_second": {name: [medians[name], min(each), max(each)] for name, each in rates.items()},
        "stack_over_one": medians["stack"] / medians["one"],
        "stack_over_torch": medians["stack"] / medians["torch"],
        "parts": parts(stack, x[0], targets[0]),
    }


@click.command(help=__doc__)
@click.option("--model", default="lenet-stream", show_default=True)
@click.option("--method", default="baseline", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--samples", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--trials", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(*, model: str, method: str, seeds: int, samples: int, trials: int, as_json: bool) -> None:
    with flushed_denormals():
        found = measure(model, method, seeds, samples, trials)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{model}, {method}, {found['threads']} threads; samples per second, median [least, most] of {trials}")
    for name, (middle, least, most) in found["samples_per_second"].items():
        count = seeds if name == "stack" else 1
        print(f"  {name:<8}{count:>3} seed{'s' * (count > 1):<3}{middle:>10,.0f} [{least:,.0f}, {most:,.0f}]")
    print(f"  stack / one {found['stack_over_one']:.2f}, stack / torch {found['stack_over_torch']:.2f}")
    print("  parts of a step of the stack, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in found["parts"].items()))


if __name__ == "__main__":
    main()
