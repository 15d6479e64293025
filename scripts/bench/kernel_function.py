"""Time a call of `ntkgen.KernelFunction` against `ntkgen.ntk` and `torch.func`, and an append of `ntkgen.Snapshots`.

    uv run python scripts/bench/kernel_function.py --trials 20

The networks have ten outputs and are untrained: MLPs 3072-w-w-w-10 with tanh, and a LeNet for colour images of 32 × 32
pixels. All computations are in float32. `torch.func` is ``vmap(jacrev)`` of all parameters and ``einsum``, as in
PyTorch's tutorial on neural tangent kernels. Each trial times a call and `ntk` once, in turns. `torch.func` is slower,
and takes part in the first trials only. It is left out where its Jacobian is larger than `JACOBIAN_BYTES`. The table
has medians, with the least and the most in brackets, and the ratio of the medians, with the least and the most ratio
of a trial.

The time of an append is that of a call of `ntkgen.Snapshots` without the time of the kernel.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import click

from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # sets what must be set before torch is loaded

import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ntkgen
from ntkgen.continual import snapshots as recording

NETWORKS = ("mlp-100", "mlp-1000", "lenet")
# Maximum size of the Jacobian of `torch.func`. Its vmap needs several times as much, and that of the MLP of width 1,000
# has 10 GB.
JACOBIAN_BYTES = 1 << 30
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
    """Build LeNet-5 for colour images of 32 × 32 pixels."""
    features = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, *dense)


def subjects(names: Sequence[str]) -> list[Subject]:
    """Build some of the networks, each from the same seed."""
    made = []
    for name in names:
        torch.manual_seed(0)
        model = lenet() if name == "lenet" else mlp(int(name.removeprefix("mlp-")))
        made.append(Subject(name, model, torch.randn(96 if name == "lenet" else 50, 3, 32, 32)))
    return made


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


def measure(subject: Subject, output: str, trials: int, torch_func_trials: int) -> dict[str, Any]:
    """Time the ways in turns, after one run of each that is not counted."""
    model, x = subject.model, subject.x
    function = ntkgen.KernelFunction(model, x, output=output)
    ways: dict[str, Callable[[], object]] = {
        "call": lambda: function(model),
        "ntk": lambda: ntkgen.ntk(model, x, output=output),
        "torch.func": lambda: torch_func(model, x, output),
    }
    jacobian_bytes = 4 * len(x) * function.num_logits * sum(param.numel() for param in model.parameters())
    turns = {"call": trials, "ntk": trials, "torch.func": min(trials, torch_func_trials)}
    if not torch_func_trials or jacobian_bytes > JACOBIAN_BYTES:
        del ways["torch.func"]
    exact = ntkgen.ntk(model, x, output=output, precision="float64")
    kernel = function(model)
    assert isinstance(kernel, Tensor)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + 1):
        for name, run in ways.items():
            if trial <= turns[name]:
                times[name].append(seconds(run))
    times = {name: found[1:] for name, found in times.items()}
    return {
        "network": subject.name,
        "output": output,
        "samples": len(x),
        "seconds": {name: spread(found) for name, found in times.items()},
        "ratios": {name: ratio(times["call"], times[name]) for name in times if name != "call"},
        "relative_error": float((kernel - exact).norm() / exact.norm()),
        "threads": torch.get_num_threads(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarise some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Divide the medians and the least times, and find the least and the most ratio of one trial."""
    each = [one / other for one, other in zip(ours, theirs, strict=False)]
    return {
        "of_medians": statistics.median(ours) / statistics.median(theirs),
        "of_least": min(ours) / min(theirs),
        "least": min(each),
        "most": max(each),
    }


def measure_append(subject: Subject, output: str, trials: int, *, folder: str | None, fsync: bool) -> dict[str, Any]:
    """Time calls of `Snapshots` without the time of their kernels."""
    kernels: list[float] = []

    class Timed(ntkgen.KernelFunction):
        """Records the time of each call."""

        def __call__(self, state: Any, *, prove: bool = False) -> Any:
            found: list[Any] = []
            kernels.append(seconds(lambda: found.append(super(Timed, self).__call__(state, prove=prove))))
            return found[0]

    appends = []
    with tempfile.TemporaryDirectory(dir=folder) as place, mock.patch.object(recording, "KernelFunction", Timed):
        snapshots = ntkgen.Snapshots(f"{place}/run.zarr", subject.model, subject.x, output=output, fsync=fsync)
        for trial in range(trials + 1):
            record = partial(snapshots, subject.model, iteration=trial, epoch=trial / 10, task=0, step_size=0.1)
            appends.append(seconds(record) - kernels[-1])
    return {"network": subject.name, "output": output, "fsync": fsync, "append_seconds": spread(appends[1:])}


def line(result: dict[str, Any]) -> str:
    """Write a result in one line."""
    start = f"{result['network']:<9} {result['output']:<6}"
    if "append_seconds" in result:
        return f"{start} append{' with fsync' if result['fsync'] else ''} {milliseconds(result['append_seconds'])}"
    times = [f"{name} {milliseconds(found)}" for name, found in result["seconds"].items()]
    ratios = [
        f"call / {name} {found['of_medians']:.3f} ({found['least']:.3f}–{found['most']:.3f}; least times "
        f"{found['of_least']:.3f})"
        for name, found in result["ratios"].items()
    ]
    return f"{start} {', '.join(times)}; {', '.join(ratios)}; error {result['relative_error']:.1e}"


def milliseconds(found: dict[str, float]) -> str:
    """Write the median, and the least and the most in brackets."""
    return f"{1e3 * found['median']:.2f} ms ({1e3 * found['least']:.2f}–{1e3 * found['most']:.2f})"


@click.command()
@click.option("--trials", default=20, show_default=True, type=click.IntRange(min=1), help="Turns of a call and `ntk`.")
@click.option(
    "--torch-func-trials",
    default=2,
    show_default=True,
    type=click.IntRange(min=0),
    help="Turns of `torch.func`; 0 leaves it out.",
)
@click.option("--network", "names", multiple=True, type=click.Choice(NETWORKS), help="Networks; by default all.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Folder for the files of snapshots.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per measurement.")
def main(*, trials: int, torch_func_trials: int, names: tuple[str, ...], folder: str | None, as_json: bool) -> None:
    """Time a call of `ntkgen.KernelFunction` against `ntkgen.ntk` and `torch.func`, and an append of snapshots."""
    show = json.dumps if as_json else line
    for subject in subjects(names or NETWORKS):
        for output in EINSUMS:
            click.echo(show(measure(subject, output, trials, torch_func_trials)))
            for fsync in (False, True):
                click.echo(show(measure_append(subject, output, trials, folder=folder, fsync=fsync)))


if __name__ == "__main__":
    main()
