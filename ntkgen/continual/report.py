"""The report on recorded runs: metrics and pictures → one HTML page, by the page of `ntkgen.analysis.report`."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkgen.analysis.plots.style import Picture
from ntkgen.analysis.report.content import Code, Facts, Figure, Paragraph, Part, Section, Table
from ntkgen.analysis.report.page import write_page
from ntkgen.analysis.report.reproduce import citation
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.metrics.confusion import class_accuracy
from ntkgen.continual.metrics.definitions import OF_ACCURACY, OF_COURSES, OF_KERNELS, OF_PREDICTIONS, Definition
from ntkgen.continual.metrics.spread import spreads_by_width
from ntkgen.continual.plots.draw import draw_run
from ntkgen.continual.plots.overlay import draw_collection
from ntkgen.continual.reading import RunCollection, RunReader
from ntkgen.continual.record import CONFIG

Run = RunReader | RunCollection
LEAD = (
    "A network learns tasks one after another. Its empirical neural tangent kernel K = J Jᵀ is recorded during the "
    "training on fixed samples, the probe. The Jacobian J has the derivatives of the network’s outputs on these "
    "samples with respect to its parameters."
)
SCORES = "Class-incremental scores choose among all outputs, task-incremental scores among the outputs of the task."
WORST = "The lowest accuracies are those of the recorded evaluations; between two of them the accuracy may be lower."
KINDS_OF_SCORES = ("class-incremental", "task-incremental")
# Metrics of kernels in the table of the ends of the tasks.
SHOWN = (
    "frobenius_norm", "largest", "smallest", "condition_bound", "effective_rank", "numerical_rank", "distance",
    "centred_alignment", "lazy_error_from_start", "leave_one_out_accuracy", "held_out_accuracy",
)  # fmt: skip
# Pictures by the section in which they stand.
WITH_MATRIX, WITH_ACCURACY = ("matrix", "confusion"), ("accuracy", "loss", "progress")


@dataclass(frozen=True)
class RunReport:
    """A finished report.

    Attributes:
        page: The page in HTML.
        left_out: For each run the reason for each missing picture, by its kind.
    """

    page: bytes
    left_out: tuple[dict[str, str], ...]


def report_runs(runs: Sequence[Run]) -> RunReport:
    """Write a report on recorded runs: single ones, and collections of several seeds and widths."""
    names = [str(run.folder) for run in runs]
    made = [_of_run(run) if isinstance(run, RunReader) else _of_collection(run) for run in runs]
    if len(runs) == 1:
        title, sections = _title(runs[0].settings), list(made[0][0])
    else:
        title, sections = f"{len(runs)} runs of continual learning", [_overview(runs, names)]
        each = zip(names, runs, made, strict=True)
        sections += [Section(name, [Paragraph(_title(run.settings))], parts) for name, run, (parts, _) in each]
    sections.append(_definitions())
    return RunReport(write_page(title, [Paragraph(LEAD, "soft")], sections), tuple(why for _, why in made))


def _title(settings: RunSettings) -> str:
    return f"{settings.method} with {settings.model} on {settings.dataset}, split {settings.split}"


# one run --------------------------------------------------------------------------------------------------------------


def _of_run(run: RunReader) -> tuple[list[Section], dict[str, str]]:
    drawn, left_out = draw_run(run)
    pictures = {picture.kind: picture for picture in drawn}
    missing = [Paragraph(f"There is no picture of {kind}: {why}.", "soft") for kind, why in left_out.items()]
    sections = [
        Section("Tasks", [_tasks(run)]),
        Section(
            "Accuracy",
            [Paragraph(_about_scores(run)), _scores(run), Paragraph(WORST, "soft"), *_figures(pictures, WITH_ACCURACY)],
        ),
        Section("Accuracy matrix", [_matrix(run), *_figures(pictures, WITH_MATRIX), *_classes(run)]),
        Section("Kernel", [*_kernels(run), *_others(pictures), *missing]),
        Section("Settings", [Facts(run.settings.to_json(), "settings")]),
        _repeat([run], run),
    ]
    return sections, left_out


def _about_scores(run: Run) -> str:
    first = run if isinstance(run, RunReader) else next(iter(run.runs.values()))
    return f"{SCORES} All are measured on {first.evaluated_on}."


def _tasks(run: RunReader) -> Table:
    """Write what each task consists of."""
    data, kernels = run.evaluations, run.kernels
    tasks, labels, order = kernels.row_task.values, kernels.row_label.values, data.class_order.values
    rows = []
    for task in range(run.num_tasks):
        targets = np.unique(labels[tasks == task])
        classes = ", ".join(str(order[target]) for target in targets if target >= 0)
        sizes = [int(data.sizes.get(f"{part}_of_{task}", 0)) for part in ("train", "validation", "test")]
        rows.append([task, classes, *sizes, "yes" if task < run.num_finished else "no"])
    columns = ("task", "classes", "training samples", "validation samples", "test samples", "finished")
    return Table(columns, rows, "tasks")


def _scores(run: RunReader) -> Table:
    found = {kind: run.metrics().get(kind.replace("-", "_")) for kind in KINDS_OF_SCORES}
    shown = {kind: values for kind, values in found.items() if values is not None}  # imported runs have one
    rows = [
        [definition.title, *(values[name] for values in shown.values())] for name, definition in OF_ACCURACY.items()
    ]
    return Table(("metric", *shown), rows, "metrics of accuracy")


def _matrix(run: RunReader) -> Table:
    found = run.matrix()
    columns = ("after task", *(f"task {task}" for task in range(run.num_tasks)), OF_COURSES["seen_accuracy"].title)
    rows = [
        [task, *(float(value) for value in row), float(seen)]
        for task, (row, seen) in enumerate(zip(found.values, found.seen_accuracy, strict=True))
    ]
    return Table(columns, rows, "accuracy matrix, class-incremental")


def _classes(run: RunReader) -> list[Part]:
    """Write the accuracy on each class after the last finished task."""
    if (confusion := run.confusion) is None:
        return []
    order = run.evaluations.class_order.values
    values = class_accuracy(confusion[-1])
    rows = [
        [str(order[target]), int(confusion[-1][target].sum()), float(value)]
        for target, value in enumerate(values)
        if np.isfinite(value)
    ]
    return [Table(("class", "samples", "accuracy"), rows, "accuracy on each class after the last finished task")]


def _kernels(run: RunReader) -> list[Part]:
    """Write the metrics of the kernel at the beginning, and at the end of each finished task."""
    found = run.kernel_metrics()
    names = [name for name in SHOWN if name in found]
    trained = found.trained_task.values
    times = [0, *(int(np.flatnonzero(trained == task)[-1]) for task in range(run.num_finished))]
    rows = [
        ["the beginning" if not row else f"task {row - 1}", *(_number(found[name].values[time]) for name in names)]
        for row, time in enumerate(times)
    ]
    settings = run.settings
    words = (
        f"The kernel has the output map {settings.output} and the precision {settings.precision}, with ε = "
        f"{found.attrs['rounding']:.2g}. Velocities are of kernels that are {found.attrs['dt']:,} iterations apart."
    )
    columns = ("at the end of", *(OF_KERNELS[name].title for name in names))
    return [Paragraph(words), Table(columns, rows, "metrics of the kernel of the whole probe")]


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _figures(pictures: dict[str, Picture], kinds: Sequence[str]) -> list[Figure]:
    return [Figure(pictures[kind]) for kind in kinds if kind in pictures]


def _others(pictures: dict[str, Picture]) -> list[Figure]:
    return [Figure(picture) for kind, picture in pictures.items() if kind not in {*WITH_MATRIX, *WITH_ACCURACY}]


# several runs ---------------------------------------------------------------------------------------------------------


def _of_collection(runs: RunCollection) -> tuple[list[Section], dict[str, str]]:
    columns, rows = ["metric", "scores"], [[OF_ACCURACY[name].title, kind] for kind, name in _KEYS]
    for width, seeds, found in spreads_by_width(runs):
        listed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        columns.append(f"{'default width' if width is None else f'width {width}'}, {listed}")
        for row, (kind, name) in zip(rows, _KEYS, strict=True):
            row.append(str(found.get(kind.replace("-", "_"), {}).get(name, "–")))
    members = [[run.settings.seed, run.settings.width, run.num_finished, _average(run)] for run in runs.runs.values()]
    words = f"{_about_scores(runs)} The table has mean ± standard deviation over the seeds."
    sections = [
        Section("Accuracy", [Paragraph(words), Table(columns, rows, "metrics of accuracy")]),
        Section("Pictures", [Figure(picture) for picture in draw_collection(runs)]),
        Section("Runs", [Table(("seed", "width", "finished tasks", "average accuracy"), members, "runs")]),
        Section("Settings", [Facts(runs.config["settings"], "settings")]),
        _repeat(list(runs.runs.values()), runs),
    ]
    return sections, {}


_KEYS = [(kind, name) for kind in KINDS_OF_SCORES for name in OF_ACCURACY]


def _average(run: RunReader) -> float | None:
    return run.matrix().average_accuracy if run.num_finished else None


def _overview(runs: Sequence[Run], names: Sequence[str]) -> Section:
    """Write a table with a row per run; those of several seeds have their mean."""
    rows: list[list[Any]] = []
    for run, name in zip(runs, names, strict=True):
        members = [run] if isinstance(run, RunReader) else list(run.complete.values())
        found = [member.metrics()["class_incremental"] for member in members]
        values = [[each[key] for each in found] for key in OF_ACCURACY]
        means = [None if None in column else float(np.mean(column)) for column in values]
        rows.append([name, len(members), *means])
    columns = ("run", "seeds and widths", *(definition.title for definition in OF_ACCURACY.values()))
    return Section(
        "Overview", [Paragraph(f"{SCORES} All are measured on held-out samples."), Table(columns, rows, "runs")]
    )


# the end of each page -------------------------------------------------------------------------------------------------


def _definitions() -> Section:
    words = (
        "R[i, j] is the accuracy on task j after task i. Tasks are counted from 1 in these definitions, and T is the "
        "number of finished tasks. K has N rows and the eigenvalues λ₁ ≥ … ≥ λ_N. All metrics of K are of the training "
        "samples of the probe, where nothing else is said."
    )
    tables = [
        Table.of(found.values(), _COLUMNS, title)
        for title, found in (
            ("metrics of accuracy", {**OF_ACCURACY, **OF_COURSES}),
            ("metrics of kernels", OF_KERNELS),
            ("predicted forgetting", OF_PREDICTIONS),
        )
    ]
    return Section("Definitions", [Paragraph(words), *tables])


_COLUMNS: dict[str, Callable[[Definition], Any]] = {
    "metric": lambda definition: definition.title,
    "definition": lambda definition: definition.formula,
    "source": lambda definition: definition.source or None,
}


def _repeat(members: Sequence[RunReader], run: Run) -> Section:
    """Write the commands that repeat some runs and draw them again, and the citation."""
    by_width = {member.settings.width: member for member in members}
    commands = []
    for width, member in by_width.items():
        seeds = [str(each.settings.seed) for each in members if each.settings.width == width]
        out = "repeated" if len(by_width) == 1 else f"repeated/width{width}"
        config = f"{member.folder}/{CONFIG}"
        commands.append(shlex.join(["ntkgen", "cl-run", "--config", config, "--seeds", *seeds, "--out", out]))
    commands += [shlex.join(["ntkgen", name, str(run.folder)]) for name in ("cl-analyze", "cl-plot", "report")]
    words = "The file config.json of a run has all its settings. The same settings give the same run on a CPU."
    return Section("Reproduce", [Paragraph(words), Code(commands), Code(citation())])
