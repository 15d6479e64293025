"""Time a call of `ntkgen.KernelFunction` against `ntkgen.ntk` and against `torch.func`, in turns.

    uv run python scripts/bench/kernel_function.py --trials 20

The networks are those of the issue that asked for it: MLPs 3072-w-w-w-10 with tanh and a LeNet, untrained, in float32.
`torch.func` is ``vmap(jacrev)`` of one parameter after the other and ``einsum``, as in PyTorch's tutorial on neural
tangent kernels. Each trial times all three once. The table gives medians, with the least and the most in brackets.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # sets what must be set before torch is loaded

import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ntkgen

# The einsum of the blocks of two samples for each output map.
EINSUMS = {"full": "Naf,Mbf->NaMb", "trace": "Naf,Maf->NM"}


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and its samples."""

    name: str
    model: nn.Module
    x: Tensor


def mlp(width: int) -> nn.Module:
    """Build 3072-w-w-w-10 with tanh."""
    sizes = [3072, width, width, width]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def lenet() -> nn.Module:
    """Build LeNet-5 for 28 × 28 images."""
    features = [
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    dense = [nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, *dense)


def subjects() -> list[Subject]:
    """Build all networks from one seed."""
    torch.manual_seed(0)
    images = torch.randn(50, 3, 32, 32)
    return [
        Subject("mlp-100", mlp(100), images),
        Subject("mlp-1000", mlp(1000), images),
        Subject("lenet", lenet(), torch.randn(96, 1, 28, 28)),
    ]


def torch_func(model: nn.Module, x: Tensor, output: str) -> Tensor:
    """Compute the kernel by per-sample Jacobians."""
    params = {name: param.detach() for name, param in model.named_parameters()}

    def outputs(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        found: Tensor = functional_call(model, params, (sample[None],))
        return found[0]

    rows = vmap(jacrev(outputs), (None, 0))(params, x)
    total = sum(torch.einsum(EINSUMS[output], part.flatten(2), part.flatten(2)) for part in rows.values())
    assert isinstance(total, Tensor)
    return total.flatten(2).flatten(0, 1) if output == "full" else total


def seconds(run: Callable[[], object]) -> float:
    """Time one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(subject: Subject, output: str, trials: int) -> dict[str, Any]:
    """Time the three ways in turns, after one run of each that is not counted."""
    function = ntkgen.KernelFunction(subject.model, subject.x, output=output)
    ways: dict[str, Callable[[], object]] = {
        "call": lambda: function(subject.model),
        "ntk": lambda: ntkgen.ntk(subject.model, subject.x, output=output),
        "torch.func": lambda: torch_func(subject.model, subject.x, output),
    }
    exact = ntkgen.ntk(subject.model, subject.x, output=output, precision="float64")
    kernel = function(subject.model)
    assert isinstance(kernel, Tensor)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(trials + 1):
        for name, run in ways.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    return {
        "network": subject.name,
        "output": output,
        "samples": len(subject.x),
        "seconds": medians,
        "least": {name: min(found[1:]) for name, found in times.items()},
        "most": {name: max(found[1:]) for name, found in times.items()},
        "ratio_to_ntk": medians["call"] / medians["ntk"],
        "ratio_to_torch_func": medians["call"] / medians["torch.func"],
        "relative_error": float((kernel - exact).norm() / exact.norm()),
        "threads": torch.get_num_threads(),
    }


def line(result: dict[str, Any]) -> str:
    """Write a result in one line."""
    times = []
    for name, median in result["seconds"].items():
        least, most = (1e3 * result[key][name] for key in ("least", "most"))
        times.append(f"{name} {1e3 * median:.1f} ms ({least:.1f}–{most:.1f})")
    return (
        f"{result['network']:<9} {result['output']:<6} {', '.join(times)}; call / ntk {result['ratio_to_ntk']:.2f}, "
        f"call / torch.func {result['ratio_to_torch_func']:.2f}; error {result['relative_error']:.1e}"
    )


@click.command()
@click.option("--trials", default=20, show_default=True, type=click.IntRange(min=1), help="Turns of the three ways.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per measurement.")
def main(*, trials: int, as_json: bool) -> None:
    """Time a call of `ntkgen.KernelFunction` against `ntkgen.ntk` and `torch.func`."""
    for subject in subjects():
        for output in EINSUMS:
            result = measure(subject, output, trials)
            click.echo(json.dumps(result) if as_json else line(result))


if __name__ == "__main__":
    main()
