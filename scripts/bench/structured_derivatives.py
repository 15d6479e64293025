"""Time `ntkgen.ntk` against the structured derivatives of neural-tangents, on networks that both can express.

    uv run python scripts/bench/structured_derivatives.py --trials 5

neural-tangents was archived in 2025 and needs an old JAX and an old NumPy. `uv` therefore runs it in an environment of
its own (`jax_kernels.py`), on the same weights and samples, after ntkgen, on the same core. Compilation by JAX is not
counted, nor is the first kernel of a module in ntkgen. The table has medians of wall seconds in float32, and relative
errors of the kernel of the first samples to the float64 reference.
Source: Novak, Sohl-Dickstein, Schoenholz (2022), arXiv:2206.08720.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ntkgen.cli.options import Command
from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # sets what must be set before torch is loaded

import torch
from printing import one_line_errors
from torch import Tensor, nn
from zoo_of_networks import ROWS

import ntkgen
from ntkgen.errors import InputError
from ntkgen.jacobian.reference import reference_ntk

# Networks and numbers of samples.
SUBJECTS = {"mlp": 64, "lenet": 96, "vgg-without-norm": 32}
# Samples that are compared with the reference.
COMPARED = 4
OTHER = Path(__file__).with_name("jax_kernels.py")
# The last releases that fit each other.
PACKAGES = ("jax[cpu]==0.4.20", "neural-tangents==0.6.5", "numpy<2", "scipy<1.13")


def subject(name: str, samples: int) -> tuple[nn.Sequential, Tensor]:
    """Build the network of a row of `networks.py`, and as many different samples as asked for."""
    model, x = ROWS[name].subject()
    assert isinstance(model, nn.Sequential)
    x = torch.cat([x] * -(-samples // len(x)))[:samples]
    return model, x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def export(model: nn.Sequential, x: Tensor, folder: Path) -> None:
    """Write the layers, weights and samples for the other program."""
    arrays: dict[str, Any] = {"x": x.numpy()}
    layers: list[dict[str, Any]] = []
    for number, layer in enumerate(model):
        params = list(layer.parameters())
        padding = int(layer.padding[0]) if isinstance(layer, nn.Conv2d) else 0
        layers.append({"kind": type(layer).__name__, "params": len(params), "padding": padding})
        arrays |= {f"{number}_{index}": param.detach().numpy() for index, param in enumerate(params)}
    (folder / "layers.json").write_text(json.dumps(layers), encoding="utf-8")
    np.savez(folder / "arrays.npz", allow_pickle=False, **arrays)


def ours(model: nn.Module, x: Tensor, trials: int) -> tuple[list[float], Tensor]:
    """Time ntkgen, after a first kernel."""
    kernel, times = ntkgen.ntk(model, x), []
    for _ in range(trials):
        start = time.perf_counter()
        kernel = ntkgen.ntk(model, x)
        times.append(time.perf_counter() - start)
    return times, kernel


def theirs(folder: Path, trials: int) -> tuple[list[float], Tensor]:
    """Time neural-tangents in its own environment.

    Raises:
        InputError: If its program fails.
    """
    packages = [part for package in PACKAGES for part in ("--with", package)]
    command = ["uv", "run", "--no-project", *packages, "python", str(OTHER), str(folder), str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"neural-tangents does not run: expected times, found exit code {done.returncode} ({last[:200]}). Is the "
            "package index out of reach, or the Python newer than 3.11? Run it with Python 3.11."
        )
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times, torch.from_numpy(np.load(folder / "kernel.npy"))


def measure(name: str, samples: int, trials: int) -> dict[str, Any]:
    """Measure both on a row."""
    model, x = subject(name, samples)
    exact = reference_ntk(model, x[:COMPARED])
    with tempfile.TemporaryDirectory() as folder:
        export(model, x, Path(folder))
        measured = {"ntkgen": ours(model, x, trials), "neural-tangents": theirs(Path(folder), trials)}
    medians = {way: statistics.median(times) for way, (times, _) in measured.items()}
    parts = {way: kernel[: len(exact), : len(exact)] for way, (_, kernel) in measured.items()}
    return {
        "row": name,
        "n": samples,
        "seconds": {way: times for way, (times, _) in measured.items()},
        "medians": medians,
        "errors": {way: float((part - exact).norm() / exact.norm()) for way, part in parts.items()},
        "times_faster": medians["neural-tangents"] / medians["ntkgen"],
    }


@click.command(cls=Command, help=__doc__)
@click.option("--trials", default=5, show_default=True, type=click.IntRange(min=1), help="Kernels of each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row instead of a table.")
def main(*, trials: int, as_json: bool) -> None:
    with one_line_errors():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # JAX has no option for the number of threads
        torch.set_num_threads(1)
        if not as_json:
            click.echo(f"{'network':<18}{'n':>5}{'ntkgen':>10}{'neural-tangents':>17}{'faster':>9}{'errors':>18}")
        for name, samples in SUBJECTS.items():
            found = measure(name, samples, trials)
            if as_json:
                click.echo(json.dumps(found))
                continue
            click.echo(
                f"{name:<18}{samples:>5}{found['medians']['ntkgen']:>10.4f}{found['medians']['neural-tangents']:>17.4f}"
                f"{found['times_faster']:>8.2f}x{found['errors']['ntkgen']:>9.0e}"
                f"{found['errors']['neural-tangents']:>9.0e}"
            )


if __name__ == "__main__":
    main()
