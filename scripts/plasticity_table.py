"""Print the tables of `scripts/reproduce_plasticity.sh`, in Markdown.

    python scripts/plasticity_table.py runs/plasticity [--json]

Numbers are means over seeds with their 95 % interval (Student). The published numbers are read off the curves of Dohare
et al. (2024, Nature 632) at 100 classes, so they are of another network, more images and more epochs.

The last table correlates what is known of a network before a task with the accuracy that it reaches on the new classes
of this task, over the tasks, algorithms and seeds. Within a task, the mean over the algorithms and seeds is subtracted
from both. The interval is that of a bootstrap over seeds; see `ntkgen.continual.metrics.correlation`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ntkgen.continual.metrics.correlation import correlate
from ntkgen.continual.metrics.plasticity import RelativeAccuracy
from ntkgen.continual.metrics.spread import Spread
from ntkgen.continual.reader import RunReader
from ntkgen.continual.reading import open_collection
from ntkgen.continual.slow_regression.record import read_bins
from ntkgen.continual.slow_regression.summary import outcomes

FloatArray = npt.NDArray[np.float64]

BASELINE = "retrained_network"
# Read off the published curves at 100 classes: relative accuracy and dormant units in per cent, rank of 99 % of 512.
PUBLISHED = {
    "base_deep_learning_system": (-5.0, 55.0, 75.0),
    "continual_backpropagation": (0.0, 1.5, 92.5),
    "shrink_and_perturb": (-1.5, 8.0, 89.0),
    "head_resetting": (-2.4, 41.0, 90.0),
    "retrained_network": (0.0, None, None),
}
UNITS = ("next_task_dormant_units", "next_task_effective_rank", "next_task_rank_99", "weight_magnitude")
KERNELS = ("effective_rank", "numerical_rank", "condition_bound", "distance")
# The part of the largest eigenvalue above which an eigenvalue counts in the numerical rank.
TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the experiments")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    images = options.folder / "incremental-cifar100"
    runs = {name: list(finished(images / name)) for name in PUBLISHED if (images / name).exists()}
    found: dict[str, Any] = {}
    if (options.folder / "slow-regression").exists():
        found["slow_regression"] = [each.to_json() for each in outcomes(read_bins(options.folder / "slow-regression"))]
    found["incremental_cifar100"] = [row(name, of, runs.get(BASELINE, [])) for name, of in runs.items() if of]
    found["correlations"] = correlations([of for of in runs.values() if of])
    print(json.dumps(found) if options.json else "\n".join(page(found)))


def finished(folder: Path) -> Iterator[RunReader]:
    """List the finished runs of an algorithm whose units are measured."""
    for run in open_collection(folder).runs.values():
        if run.num_finished == run.num_tasks and run.has_plasticity:
            yield run


def row(name: str, runs: Sequence[RunReader], retrained: Sequence[RunReader]) -> dict[str, Any]:
    """Measure an algorithm at the end."""
    accuracies, baseline = ({run.settings.seed: seen_accuracy(run) for run in each} for each in (runs, retrained))
    paired = {seed: each for seed, each in accuracies.items() if seed in baseline}
    relative = RelativeAccuracy.of(paired, baseline).spreads[-1] if paired else None
    spreads = {
        "accuracy": Spread.of([each[-1] for each in accuracies.values()]),
        "relative_accuracy": relative,
        **{unit: Spread.of([last(run, unit) for run in runs]) for unit in UNITS},
    }
    return {"algorithm": name, **{key: None if each is None else each.to_json() for key, each in spreads.items()}}


def seen_accuracy(run: RunReader) -> FloatArray:  # (tasks,)
    """Compute the accuracy on all classes so far after each task."""
    matrix, counts = run.matrix().values, run.num_held_out
    means = [np.average(matrix[task, : task + 1], weights=counts[: task + 1]) for task in range(len(matrix))]
    return np.array(means)


def last(run: RunReader, unit: str) -> float:
    """Return a measure of the units at the last boundary before a task, or of the weights in the end."""
    values = np.asarray(run.plasticity[unit].values)
    return float(values[~np.isnan(values)][-1])


def quantities(run: RunReader) -> dict[str, FloatArray]:  # (tasks,) each
    """List what is known of the network before each task."""
    count = run.num_tasks
    found = {name: np.asarray(run.plasticity[name].values)[:count] for name in UNITS}
    for weighted in (False, True):
        measured = run.boundary_kernel_metrics("next_task", TOLERANCE, weighted=weighted)
        for name in KERNELS:
            if name in measured and measured[name].sizes.get("time", 0) >= count:
                label = f"{'loss-weighted kernel' if weighted else 'kernel'}, {name}"
                found[label] = np.asarray(measured[name].values, np.float64)[:count]
    return found


def correlations(algorithms: Sequence[Sequence[RunReader]]) -> dict[str, Any]:
    """Correlate each quantity before a task with the accuracy on its new classes after it."""
    seeds = (
        sorted(set.intersection(*({run.settings.seed for run in runs} for runs in algorithms))) if algorithms else []
    )
    by_seed = [[run for runs in algorithms for run in runs if run.settings.seed == seed] for seed in seeds]
    if not by_seed:
        return {}
    accuracy = np.array([np.concatenate([run.matrix().values.diagonal() for run in runs]) for runs in by_seed])
    measured = [[quantities(run) for run in runs] for runs in by_seed]
    groups = np.tile(np.arange(by_seed[0][0].num_tasks), len(algorithms))
    result = {}
    for name in measured[0][0]:
        values = np.array([np.concatenate([each[name] for each in of_seed]) for of_seed in measured])
        is_first = np.arange(values.shape[1]) % by_seed[0][0].num_tasks == 0  # the same network for all algorithms
        result[name] = correlate(values[:, ~is_first], accuracy[:, ~is_first], groups[~is_first]).to_json()
    return result


def page(found: dict[str, Any]) -> Iterator[str]:
    """Write the tables."""
    if "slow_regression" in found:
        yield "| slowly changing regression | first error | last error | dead units of 5 |"
        yield "|---|---:|---:|---:|"
        for each in found["slow_regression"]:
            columns = [cell(each[name], 2) for name in ("first", "last", "dead_units")]
            yield f"| {each['algorithm']} | {' | '.join(columns)} |"
        yield ""
    if not found["incremental_cifar100"]:
        return
    columns = ["accuracy, %", "relative accuracy, %", "dormant units, %", "rank of 99 %", "mean \\|w\\|"]
    yield f"| incremental CIFAR-100 | {' | '.join(columns)} |"
    yield "|---|---:|---:|---:|---:|---:|"
    for each in found["incremental_cifar100"]:
        columns = [cell(each["accuracy"], 1, 100), cell(each["relative_accuracy"], 1, 100)]
        columns += [cell(each["next_task_dormant_units"], 1, 100), cell(each["next_task_rank_99"], 1)]
        yield f"| {each['algorithm'].replace('_', ' ')} | {' | '.join([*columns, cell(each['weight_magnitude'], 4)])} |"
        published = ["" if value is None else f"{value:g}" for value in PUBLISHED[each["algorithm"]]]
        yield f"| published | | {' | '.join(published)} | |"
    yield ""
    yield "| before a task | Pearson with the accuracy on the task | Spearman |"
    yield "|---|---:|---:|"
    for name, each in found["correlations"].items():
        columns = [correlation(each, kind) for kind in ("pearson", "spearman")]
        yield f"| {name.replace('_', ' ')} | {' | '.join(columns)} |"


def cell(spread: dict[str, Any] | None, digits: int, factor: float = 1.0) -> str:
    """Write a mean with its interval.

    >>> cell({"mean": 0.5, "interval_95": [0.25, 0.75]}, 0, 100)
    '50 [25, 75]'
    """
    if spread is None:
        return ""
    interval = spread["interval_95"]
    bounds = "" if interval is None else f" [{', '.join(f'{factor * bound:.{digits}f}' for bound in interval)}]"
    return f"{factor * spread['mean']:.{digits}f}{bounds}"


def correlation(found: dict[str, Any], kind: str) -> str:
    """Write a coefficient with its interval; a dash if the quantity does not vary."""
    if found[kind] is None:
        return "–"
    interval = found[f"{kind}_interval_95"]
    bounds = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{found[kind]:.2f}{bounds}"


if __name__ == "__main__":
    main()
