"""Compare the time of the engine with the full-Jacobian method and with the matrix products of the machine.

    uv run python scripts/bench/engine.py --models resnet9 resnet18 vgg11 --n 128

Both methods alternate in one process, with the same weights and samples. `ntkgen.ntk` is timed as a whole: preparation,
factors and products. The full-Jacobian method is timed for some pairs of blocks, and its time is scaled to all pairs.
The two kernels are compared with each other and with `ntkgen.reference_ntk`. The peak speed of matrix products is
measured before and after. It gives the time for the minimum number of multiply-adds of an exact plan. One multiply-add
counts as two FLOPs.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from ntkgen.cli.options import SEED, Command, ManyOption
from ntkgen.cli.session import start_process

if __name__ == "__main__":
    start_process()  # makes settings that must precede the import of torch

import full_jacobian
import psutil
import torch
from full_jacobian import FullJacobian, Measurement, Schedule, timed
from machine import Peak, choose_device, machine, measure_peak
from printing import Line, one_line_errors, print_table, say
from torch import Tensor, nn

import ntkgen
from ntkgen.jacobian import choice, dense
from ntkgen.jacobian.cost import NetworkProfile
from ntkgen.jacobian.dense import DensePlan
from ntkgen.jacobian.evaluation import as_input, evaluation_copy
from ntkgen.jacobian.precision import check_device, policy
from ntkgen.training import zoo

NUM_OUTPUTS = 10
SAMPLE_SHAPE = (3, 32, 32)  # shape of an input of the built-in networks
WARMUP_SAMPLES = 2


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    n: int
    precision: str
    trials: int
    block: int
    pairs: int | None
    check: int
    seed: int
    width: int | None
    device: torch.device


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and its samples, on the device."""

    name: str
    model: nn.Module
    x: Tensor  # (n, …)


@dataclass(frozen=True)
class Work:
    """FLOPs of one kernel: the minimum of an exact plan, those of the engine, and those of the full Jacobian."""

    minimal: int
    executed: int
    explicit: int


@dataclass(frozen=True, eq=False)
class Baseline:
    """The full-Jacobian method, its samples in its dtype, and the pairs of blocks that are timed."""

    method: FullJacobian
    x: Tensor  # (n, …)
    schedule: Schedule


@dataclass(frozen=True, eq=False)
class Trials:
    """Times of both methods in each trial, and the kernel of the engine."""

    seconds: tuple[float, ...]
    baseline: tuple[Measurement, ...]
    kernel: Tensor  # (n m, n m), on the CPU


def count_work(plan: DensePlan) -> Work:
    """Count the FLOPs of a kernel of these samples with themselves."""
    n, profile = len(plan.x), plan.network.profile
    return Work(
        minimal=2 * choice.minimal_macs(profile, n),
        executed=2 * plan.macs,
        explicit=(n * profile.num_outputs) ** 2 * profile.num_params,
    )


def make_baseline(subject: Subject, settings: Settings, profile: NetworkProfile) -> Baseline:
    """Prepare the full-Jacobian method with blocks that fit. It uses float64 for that precision, otherwise float32."""
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    module = evaluation_copy(subject.model, dtype, settings.device)
    sample_bytes = profile.num_outputs * profile.num_params * dtype.itemsize
    wanted = min(settings.block, settings.n)
    block = full_jacobian.largest_block(wanted, sample_bytes, free_bytes(settings.device))
    chunk = full_jacobian.chunk_samples(block, profile.activation_numbers * dtype.itemsize, profile.num_outputs)
    schedule = full_jacobian.make_schedule(settings.n, block, settings.pairs, settings.seed)
    return Baseline(FullJacobian(module, chunk), as_input(subject.x, dtype, settings.device), schedule)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes, including the memory that torch has cached."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def run_trials(subject: Subject, settings: Settings, baseline: Baseline) -> Trials:
    """Time both methods alternately, after a short run of each."""
    ntkgen.ntk(subject.model, subject.x[:WARMUP_SAMPLES], precision=settings.precision)
    baseline.method.rows(baseline.x[:WARMUP_SAMPLES])
    seconds, measurements = [], []
    for trial in range(1, settings.trials + 1):
        kernel, took = timed(settings.device, ntkgen.ntk, subject.model, subject.x, precision=settings.precision)
        seconds.append(took)
        say(f"{subject.name}: trial {trial} of {settings.trials}: this engine {took:.2f} s")
        on_host = kernel.cpu()
        del kernel
        measurements.append(full_jacobian.measure(baseline.method, baseline.x, baseline.schedule))
        scaled = measurements[-1].scaled(baseline.schedule)
        say(f"{subject.name}: trial {trial} of {settings.trials}: full Jacobian {scaled:.1f} s, scaled to all pairs")
    return Trials(tuple(seconds), tuple(measurements), on_host)


def difference_to_baseline(trials: Trials, schedule: Schedule) -> float:
    """Compare the kernel with the pairs of blocks that the baseline computed, in the Frobenius norm."""
    m = len(trials.kernel) // schedule.num_samples
    found = [trials.kernel[row.rows(m), column.rows(m)] for row, column in schedule.pairs]
    return relative_difference(found, trials.baseline[-1].parts)


def error_to_reference(subject: Subject, kernel: Tensor, count: int) -> float:
    """Compare the kernel with the float64 reference on ``count`` evenly spaced samples, in the Frobenius norm."""
    samples = torch.linspace(0, len(subject.x) - 1, min(count, len(subject.x))).round().long()
    m = len(kernel) // len(subject.x)
    rows = (samples[:, None] * m + torch.arange(m)).flatten()
    exact = ntkgen.reference_ntk(subject.model, subject.x[samples.to(subject.x.device)])
    return relative_difference([kernel[rows][:, rows]], [exact])


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compute ‖found − expected‖ / ‖expected‖ over all given parts of a kernel together."""
    error = sum(
        float((one.double() - other.double()).square().sum()) for one, other in zip(found, expected, strict=True)
    )
    return float((error / sum(float(other.double().square().sum()) for other in expected)) ** 0.5)


def build_all(names: Sequence[str], width: int | None) -> dict[str, nn.Module]:
    """Build all networks before the first measurement, so that a wrong name is reported immediately."""
    return {name: zoo.build(name, NUM_OUTPUTS, seed=0, width=width).eval() for name in names}


def bench(name: str, model: nn.Module, settings: Settings) -> dict[str, Any]:
    """Measure one network, and put all numbers together."""
    model = model.to(settings.device)
    subject = Subject(name, model, random_samples(settings.n, settings.seed).to(settings.device))
    plan = dense.plan_ntk(model, subject.x, asked=dense.Request(precision=settings.precision))
    baseline, work = make_baseline(subject, settings, plan.network.profile), count_work(plan)
    del plan
    say(f"{name}: matrix-product peak")
    before = measure_peak(settings.precision, settings.device)
    trials = run_trials(subject, settings, baseline)
    peak = before + measure_peak(settings.precision, settings.device)
    say(f"{name}: float64 reference of {settings.check} samples")
    return {
        "model": name,
        "n": settings.n,
        "precision": settings.precision,
        **times(trials, baseline.schedule),
        "baseline_dtype": str(baseline.x.dtype).removeprefix("torch."),
        "baseline_chunk": baseline.method.chunk_samples,
        "relative_error": error_to_reference(subject, trials.kernel, settings.check),
        "relative_difference": difference_to_baseline(trials, baseline.schedule),
        **rates(statistics.median(trials.seconds), work, peak),
        "peak_mm_flops_before": before.mm_flops,
        "peak_route_flops_before": before.route_flops,
        **machine(settings.device),
        "width": settings.width,
        "seed": settings.seed,
        "trials": settings.trials,
    }


def times(trials: Trials, schedule: Schedule) -> dict[str, Any]:
    """Summarise the times of both methods, and the part of the baseline that was timed."""
    seconds = statistics.median(trials.seconds)
    scaled = [measurement.scaled(schedule) for measurement in trials.baseline]
    jacobian = statistics.median(part.jacobian_seconds / part.jacobian_samples for part in trials.baseline)
    product = statistics.median(part.product_seconds / part.sample_pairs for part in trials.baseline)
    return {
        "seconds": seconds,
        "seconds_all": list(trials.seconds),
        "spread": max(trials.seconds) / min(trials.seconds),
        "baseline_seconds": statistics.median(scaled),
        "baseline_seconds_all": scaled,
        "baseline_spread": max(scaled) / min(scaled),
        "ratio": statistics.median(scaled) / seconds,
        "baseline_scaled_from_pairs": len(schedule.pairs),
        "of": len(schedule.all_pairs),
        "baseline_block": schedule.block_samples,
        "baseline_jacobian_samples": schedule.jacobian_samples,
        "baseline_seconds_per_jacobian_sample": jacobian,
        "baseline_sample_pairs": schedule.sample_pairs,
        "baseline_seconds_per_sample_pair": product,
    }


def rates(seconds: float, work: Work, peak: Peak) -> dict[str, float]:
    """Compute speeds from the time, the FLOPs and the peak speed of the machine."""
    return {
        "peak_flops": peak.flops,
        "mm_flops": peak.mm_flops,
        "route_flops": peak.route_flops,
        "minimal_flops": work.minimal,
        "executed_flops": work.executed,
        "explicit_flops": work.explicit,
        "executed_over_minimal": work.executed / work.minimal,
        "executed_flops_per_second": work.executed / seconds,
        "effective_flops_per_second": work.explicit / seconds,
        "wall_over_minimal": seconds / (work.minimal / peak.flops),
    }


def random_samples(count: int, seed: int) -> Tensor:  # (count, 3, 32, 32)
    """Draw normal samples on the CPU, so that a seed gives the same samples for every device."""
    return torch.randn(count, *SAMPLE_SHAPE, generator=torch.Generator().manual_seed(seed))


TABLE: tuple[Line, ...] = (
    ("samples", lambda r: f"{r['n']}"),
    ("precision", lambda r: f"{r['precision']}"),
    ("this engine", lambda r: f"{r['seconds']:.2f} s"),
    ("  slowest / quickest", lambda r: f"{r['spread']:.2f}"),
    ("full Jacobian", lambda r: f"{r['baseline_seconds']:.1f} s"),
    ("  slowest / quickest", lambda r: f"{r['baseline_spread']:.2f}"),
    ("  scaled from pairs", lambda r: f"{r['baseline_scaled_from_pairs']} of {r['of']}"),
    ("  samples of a block", lambda r: f"{r['baseline_block']}"),
    ("ratio", lambda r: f"{r['ratio']:.1f} ×"),
    ("error to float64", lambda r: f"{r['relative_error']:.1e}"),
    ("difference of both", lambda r: f"{r['relative_difference']:.1e}"),
    ("peak, GFLOP/s", lambda r: f"{r['peak_flops'] / 1e9:.0f}"),
    ("  torch.mm", lambda r: f"{r['mm_flops'] / 1e9:.0f}"),
    ("  engine's route", lambda r: f"{r['route_flops'] / 1e9:.0f}"),
    ("executed, GFLOP/s", lambda r: f"{r['executed_flops_per_second'] / 1e9:.0f}"),
    ("effective, GFLOP/s", lambda r: f"{r['effective_flops_per_second'] / 1e9:.0f}"),
    ("executed / minimal", lambda r: f"{r['executed_over_minimal']:.2f}"),
    ("wall / minimal", lambda r: f"{r['wall_over_minimal']:.2f}"),
)


class Pairs(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of pairs of blocks, or ``all``."""

    name = "pairs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Read the number. None means all."""
        return None if value in {"all", None} else click.IntRange(min=1).convert(value, param, ctx)


@click.command(cls=Command)
@click.option("--device", default="auto", show_default=True, help="Device: auto, cpu or cuda.")
@click.option("--models", cls=ManyOption, default=("resnet9", "resnet18", "vgg11"), metavar="NAME...", help="Networks.")
@click.option("--n", default=128, show_default=True, type=click.IntRange(min=1), help="Number of samples.")
@click.option("--precision", default="float32", show_default=True, help="Precision of this engine.")
@click.option("--trials", default=3, show_default=True, type=click.IntRange(min=1), help="Number of trials.")
@click.option("--block", default=16, show_default=True, type=click.IntRange(min=1), help="Baseline samples per block.")
@click.option("--pairs", default="2", show_default=True, type=Pairs(), help="Timed baseline pairs, or all.")
@click.option("--check", default=2, show_default=True, type=click.IntRange(min=1), help="Reference samples.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of samples and pairs.")
@click.option("--width", type=int, help="Channels of the first stage of a ResNet [64].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per network instead of a table.")
def main(*, device: str, models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare the time of this engine with the full-Jacobian method and with the matrix products of the machine."""
    with one_line_errors():
        settings = Settings(device=choose_device(device), **options)
        check_device(policy(settings.precision), settings.device)
        results = []
        for name, model in build_all(models, settings.width).items():
            results.append(bench(name, model, settings))
            if as_json:
                click.echo(json.dumps(results[-1]))
        if not as_json:
            print_table(results, TABLE, f"{results[0]['device']}, {results[0]['threads']} threads")


if __name__ == "__main__":
    main()
