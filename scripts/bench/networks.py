"""Time `ntkgen.ntk` against three lines of PyTorch and the Gramian engine of TorchJD, on the networks of today.

    uv run --group bench python scripts/bench/networks.py --trials 5

A trial computes the kernel of a network once in each way, in turns, in float32. `torch.func` is ``vmap(jacrev)`` of all
parameters, and one einsum for each. `TorchJD` takes part where it is installed. The table has the medians of the CPU
seconds, and `--json` has the wall seconds too. The three ratios divide the CPU seconds of ntkgen by those of
torch.func, so a number above one is bad. `ntk` is ``ntkgen.ntk`` of a module whose kernel was computed before, with the
proof of each batch. `first` is the same for a new copy of the module in each turn, which is tried first. `function` is
a call of a prepared ``KernelFunction``, without proof. Errors are relative Frobenius errors to a float64 double loop of
backward passes. `falls back` lists the parameters whose rows autograd computes, because no rule fits.

A way that raises an error `refuses`, and one whose kernel is not that of the double loop is `wrong`. `--json` has the
reasons. Networks of timm take minutes, and take part with `--slow` or by name. With `--times 8` there are eight times
as many samples.
"""

import copy
import json
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import click

from ntkgen.cli.options import Command, ManyOption
from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # sets what must be set before torch is loaded

import torch
from printing import one_line_errors, say
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from zoo_of_networks import ROWS, Row

import ntkgen
from ntkgen.errors import UnknownNameError
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import policy
from ntkgen.jacobian.reference import reference_ntk

OURS, FIRST, FUNCTION, TORCH_FUNC, TORCHJD = "ntkgen", "ntkgen, first", "KernelFunction", "torch.func", "TorchJD"
RATIOS = {"ntk": OURS, "first": FIRST, "function": FUNCTION}
# Maximum bytes of the float64 Jacobian of the double loop. It takes fewer samples of a larger network, at least two.
REFERENCE_BYTES = 1 << 30
# Maximum product of the numbers of all outputs and all inputs for TorchJD's engine without batches.
UNBATCHED_NUMBERS = 1 << 22
# A kernel with a larger error is not the kernel.
WRONG = 1e-3
TABLE_WIDTH = 100

Way = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """The times and the error of one way on one row."""

    cpu_seconds: tuple[float, ...] = ()
    wall_seconds: tuple[float, ...] = ()
    error: float | None = None
    refusal: str | None = None
    """The first line of the error that the way raises."""

    @property
    def cpu(self) -> float:
        """The median of the CPU seconds."""
        return statistics.median(self.cpu_seconds)

    @property
    def wall(self) -> float:
        """The median of the wall seconds."""
        return statistics.median(self.wall_seconds)

    @property
    def verdict(self) -> str:
        """An empty text, or what to print instead of times."""
        if self.refusal is not None:
            return "refuses"
        return "" if self.error is not None and self.error <= WRONG else "wrong"  # NaN is wrong too


# ways -----------------------------------------------------------------------------------------------------------------


def by_torch_func(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the kernel by the Jacobians of all samples at once."""
    params = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}

    def outputs(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        found: Tensor = functional_call(model, params, (sample[None],))
        return found[0]

    rows = vmap(jacrev(outputs), (None, 0))(params, x)
    total = sum(torch.einsum("Naf,Mbf->NaMb", part.flatten(2), part.flatten(2)) for part in rows.values())
    assert isinstance(total, Tensor)
    return total.flatten(2).flatten(0, 1)


def by_kernel_function() -> Way:
    """Compute the kernel by a function that is prepared in the first call for a module."""
    prepared: dict[int, ntkgen.KernelFunction] = {}

    def kernel(model: nn.Module, x: Tensor) -> Tensor:
        if id(model) not in prepared:
            prepared[id(model)] = ntkgen.KernelFunction(model, x)
        found = prepared[id(model)](model)
        assert isinstance(found, Tensor)
        return found

    return kernel


def by_torchjd(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the kernel by the Gramian engine of TorchJD. It hooks a copy, because its hooks stay.

    Its batched engine refuses recurrent layers and batch norm, and advises to use the other engine for these.

    Raises:
        MemoryError: If the other engine would need too much memory.
    """
    from torchjd.autogram import Engine

    copied, is_batched = copy.deepcopy(model), True
    try:
        engine = Engine(copied, batch_dim=0)
    except ValueError:
        copied, is_batched = copy.deepcopy(model), False  # the hooks of the first engine stay
        engine = Engine(copied, batch_dim=None)
    outputs = copied(x)
    if not is_batched and outputs.numel() * x.numel() > UNBATCHED_NUMBERS:
        raise MemoryError("The batched engine refuses, and the other one propagates all outputs through all samples.")
    gramian: Tensor = engine.compute_gramian(outputs)
    return gramian.reshape(outputs.numel(), -1)


def ways() -> dict[str, Way]:
    """List the ways whose packages are installed."""
    found: dict[str, Way] = {
        OURS: ntkgen.ntk,
        FIRST: ntkgen.ntk,
        FUNCTION: by_kernel_function(),
        TORCH_FUNC: by_torch_func,
    }
    return found | ({TORCHJD: by_torchjd} if find_spec("torchjd") else {})


# measurements ---------------------------------------------------------------------------------------------------------


def measure(row: Row, trials: int, times: int = 1) -> dict[str, Any]:
    """Measure all ways on a row, with ``times`` as many samples."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # a slow way of PyTorch's vmap
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft calls old names of transformers
        model, x = row.subject()
        x = torch.cat([x] * times)  # the time does not depend on the values
        with torch.no_grad():
            num_outputs = model(x[:1]).shape[1]
        exact = reference(model, x, num_outputs)
        measured = compare(model, x, exact, trials)
        left = fallback(model, x)
    return {
        "row": row.name,
        "n": len(x),
        "outputs": num_outputs,
        "parameters": sum(param.numel() for param in model.parameters() if param.requires_grad),
        "threads": torch.get_num_threads(),
        "reference_samples": len(exact) // num_outputs,
        "ratios": {name: ratio(measured[way], measured[TORCH_FUNC]) for name, way in RATIOS.items()},
        "ways": {name: asdict(found) | {"verdict": found.verdict} for name, found in measured.items()},
        "fallback": left,
    }


def compare(model: nn.Module, x: Tensor, exact: Tensor, trials: int) -> dict[str, Measured]:
    """Time the ways in turns, after one turn that is not counted and whose kernels are compared."""
    all_ways = ways()
    measured = {name: tried(way, model, x, exact) for name, way in all_ways.items()}
    running = {name: way for name, way in all_ways.items() if not measured[name].verdict}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(trials):
        for name, way in running.items():
            times[name].append(timed(way, copy.deepcopy(model) if name == FIRST else model, x))
    for name, taken in times.items():
        cpu, wall = zip(*taken, strict=True)
        measured[name] = Measured(cpu, wall, measured[name].error)
    return measured


def reference(model: nn.Module, x: Tensor, num_outputs: int) -> Tensor:
    """Compute the float64 kernel of the first samples, as many as `REFERENCE_BYTES` allow."""
    row_bytes = 8 * num_outputs * sum(param.numel() for param in model.parameters() if param.requires_grad)
    return reference_ntk(model, x[: max(2, REFERENCE_BYTES // row_bytes)])


def tried(way: Way, model: nn.Module, x: Tensor, exact: Tensor) -> Measured:
    """Compute a kernel once, and compare it with the exact kernel of the first samples."""
    try:
        found = way(model, x)[: len(exact), : len(exact)].detach()
    except Exception as error:  # noqa: BLE001 - any error of a library is a result here
        lines = str(error).strip().splitlines() or [""]
        return Measured(refusal=f"{type(error).__name__}: {lines[0]}")
    return Measured(error=float((found - exact).norm() / exact.norm()))


def timed(way: Way, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the CPU seconds and the wall seconds of one computation."""
    cpu, wall = time.process_time(), time.perf_counter()
    way(model, x)
    return time.process_time() - cpu, time.perf_counter() - wall


def ratio(ours: Measured, theirs: Measured) -> float | None:
    """Divide the CPU seconds of two ways, if both have times."""
    return None if ours.verdict or theirs.verdict else ours.cpu / theirs.cpu


def fallback(model: nn.Module, x: Tensor) -> list[str]:
    """List the parameters that are left to autograd. A refused network has none."""
    try:
        return list(prepare(model, x, policy("float32")).fallback)
    except ntkgen.errors.NtkgenError:
        return []


def chosen(names: Sequence[str], *, slow: bool) -> list[Row]:
    """Choose rows by name. Without names, choose all, and the slow ones only if they are asked for.

    Raises:
        UnknownNameError: If there is no row of a name.
    """
    for name in names:
        if name not in ROWS:
            raise UnknownNameError("row", name, ROWS)
    return [ROWS[name] for name in names] or [row for row in ROWS.values() if slow or not row.slow]


# printing -------------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'':<27}{'CPU seconds':>30}{'ntkgen / torch.func':>26}{'error':>10}\n"
    f"{'network':<19}{'n':>4}{'m':>4}{OURS:>10}{TORCH_FUNC:>11}{TORCHJD:>9}"
    f"{''.join(f'{name:>9}' for name in RATIOS)}{OURS:>8}{'t.func':>8}"
)


def lines(result: dict[str, Any]) -> str:
    """Write a result in one line, and the parameters that fall back in at most two more."""
    found = {name: Measured(**{k: v for k, v in way.items() if k != "verdict"}) for name, way in result["ways"].items()}
    other = found.get(TORCHJD)
    ratios = ("–" if result["ratios"][name] is None else f"{result['ratios'][name]:.2f}" for name in RATIOS)
    first = (
        f"{result['row']:<19}{result['n']:>4}{result['outputs']:>4}{cpu(found[OURS]):>10}"
        f"{cpu(found[TORCH_FUNC]):>11}{cpu(other):>9}{''.join(f'{text:>9}' for text in ratios)}"
        f"{error(found[OURS]):>8}{error(found[TORCH_FUNC]):>8}"
    )
    names = result["fallback"]
    if not names:
        return first
    text = f"falls back ({len(names)}): {', '.join(names)}"
    rest = textwrap.wrap(
        text, TABLE_WIDTH, initial_indent="  ", subsequent_indent="    ", max_lines=2, placeholder=" …"
    )
    return "\n".join([first, *rest])


def cpu(found: Measured | None) -> str:
    """Write the CPU seconds, or why there are none."""
    return "–" if found is None else found.verdict or f"{found.cpu:.3f}"


def error(found: Measured | None) -> str:
    """Write the error of a kernel."""
    return "–" if found is None or found.error is None else f"{found.error:.0e}"


@click.command(cls=Command, help=__doc__)
@click.option("--rows", cls=ManyOption, default=(), metavar="NAME...", help="Rows; by default all that are not slow.")
@click.option("--trials", default=5, show_default=True, type=click.IntRange(min=1), help="Turns of all ways.")
@click.option("--times", default=1, show_default=True, type=click.IntRange(min=1), help="Times as many samples.")
@click.option("--slow", is_flag=True, help="Include the networks of timm.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of torch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row instead of a table.")
def main(*, rows: tuple[str, ...], trials: int, times: int, slow: bool, threads: int, as_json: bool) -> None:
    with one_line_errors():
        asked = chosen(rows, slow=slow)
        torch.set_num_threads(threads)
        if not as_json:
            click.echo(f"float32, medians of {trials}, {threads} thread{'s' * (threads > 1)}\n{HEADER}")
        for row in asked:
            if row.missing:
                say(f"{row.name} is skipped: {' and '.join(row.missing)} is not installed")
                continue
            result = measure(row, trials, times)
            click.echo(json.dumps(result) if as_json else lines(result))


if __name__ == "__main__":
    main()
