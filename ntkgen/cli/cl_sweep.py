"""What `ntkgen cl-run` does with its runs, and what it prints about them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ntkgen.cli.cl_collection import summary, summary_page
from ntkgen.cli.cl_preset import Chosen, compared, settings_page
from ntkgen.cli.messages import complain, show
from ntkgen.errors import NtkgenError
from ntkgen.units import counted, human_bytes, human_seconds

if TYPE_CHECKING:
    from ntkgen.continual.plan import Data, Plan
    from ntkgen.continual.reading import RunReader
    from ntkgen.continual.side_by_side import Job, Outcome

# Seconds for which --dry-run measures, over all widths.
MEASURING_SECONDS = 4.0


@dataclass(frozen=True)
class Session:
    """What the command was asked for."""

    chosen: Chosen
    workers: int
    as_json: bool
    quiet: bool
    verbose: bool = False


def show_runs(session: Session, jobs: "Sequence[Job]", data: "Data") -> int:
    """Train all runs and print their results. Return the exit code, which is that of the first run that failed.

    Raises:
        NtkgenError: If the only run fails.
    """
    from ntkgen.continual.reading import RunCollection, open_seed
    from ntkgen.files.place import folder_of

    if not session.as_json:
        show(settings_page(session.chosen.sweep, None))
    out = folder_of(jobs[0].out, fsync=False)
    finished: dict[tuple[int | None, int], RunReader] = {}
    failed: list[BaseException] = []
    for outcome in _trained(session, jobs, data):
        if outcome.error is not None:
            failed.append(outcome.error)
            continue
        settings = outcome.job.settings
        run = finished[settings.width, settings.seed] = open_seed(out / outcome.job.name)
        _show_run(session, run, outcome.seconds)
    if failed and (len(jobs) == 1 or not isinstance(failed[0], NtkgenError)):
        raise failed[0]
    if len(finished) > 1:
        runs = RunCollection(out, dict(sorted(finished.items(), key=lambda item: (item[0][0] or 0, item[0][1]))))
        whole = {"run": str(out), **runs.config, "summary": summary(runs)}
        show(json.dumps(whole) if session.as_json else "\n".join([str(out), *summary_page(runs)]))
    return failed[0].exit_code if failed and isinstance(failed[0], NtkgenError) else 0


def _trained(session: Session, jobs: "Sequence[Job]", data: "Data") -> "Iterator[Outcome]":
    """Train the runs. If there are several, the message of a run that fails is printed at once."""
    from ntkgen.cli.progress import progress_bars
    from ntkgen.continual.run import say_nothing
    from ntkgen.continual.side_by_side import train_in_turn, train_side_by_side

    told: dict[str, str] = {}
    if session.workers == 1 or len(jobs) == 1:
        bars = partial(progress_bars, quiet=session.quiet or session.verbose)
        outcomes = train_in_turn(jobs, data, bars, show if session.verbose else say_nothing)
        for outcome in outcomes:
            _complain(outcome, jobs, told)
            yield outcome
        return
    done = []  # printed after the bars, which take what is printed meanwhile
    with progress_bars("", quiet=session.quiet) as report:
        for outcome in train_side_by_side(jobs, session.workers, report):
            _complain(outcome, jobs, told)
            done.append(outcome)
    yield from done


def _complain(outcome: "Outcome", jobs: "Sequence[Job]", told: dict[str, str]) -> None:
    """Print why a run failed. A reason that another run had before is not repeated.

    Args:
        outcome: The run.
        jobs: All runs.
        told: The first run of each reason.
    """
    if outcome.error is None or len(jobs) == 1:
        return
    name, reason = outcome.job.name, str(outcome.error)
    complain(f"{name}: {reason}" if reason not in told else f"{name}: the same as {told[reason]}.")
    told.setdefault(reason, name)


def _show_run(session: Session, run: "RunReader", seconds: float) -> None:
    result = {"run": str(run.folder), "seed": run.settings.seed, "width": run.settings.width, "seconds": seconds}
    result |= {"settings": run.settings.to_json(), "kernels": int(run.kernels.sizes["time"])}
    result |= {"evaluated_on": run.evaluated_on, **run.metrics()}
    published, lines = compared(session.chosen.preset, run)
    show(json.dumps(result | published) if session.as_json else _run_page(result) + lines)


def _run_page(result: Mapping[str, Any]) -> str:
    found = result["class_incremental"]
    lines = [f"{result['run']}: {counted(result['kernels'], 'kernel')}, {result['seconds']:.1f} s"]
    for task, row in enumerate(found["accuracy_matrix"]):
        lines.append(f"  after task {task}: " + " ".join(f"{value:5.2f}" for value in row))
    lines.append(
        f"  average accuracy {found['average_accuracy']:.3f}, average incremental accuracy "
        f"{found['average_incremental_accuracy']:.3f}"
    )
    if found["forgetting"] is not None:
        lines.append(f"  forgetting {found['forgetting']:.3f}, backward transfer {found['backward_transfer']:.3f}")
    lines.append(f"  evaluated on {result['evaluated_on']}")
    return "\n".join(lines)


def show_plans(session: Session, plans: "Mapping[str, Plan]", device: str) -> None:
    """Print what the runs would do, and what they are projected to take. Each width is measured once."""
    from ntkgen.continual.forecast import Forecast, forecast
    from ntkgen.continual.plan import describe
    from ntkgen.engine.machine import choose_device

    measured: dict[int | None, Forecast] = {}
    total = 0.0
    if not session.as_json:
        show(settings_page(session.chosen.sweep, session.chosen.preset))
    for name, plan in plans.items():
        width = plan.settings.width
        if width not in measured:
            measured[width] = forecast(
                plan, choose_device(device), MEASURING_SECONDS / len(session.chosen.sweep.widths)
            )
        described = describe(plan)
        described |= measured[width].to_json(described)
        total += described["projected_seconds"]["total"]
        show(json.dumps(described) if session.as_json else f"{name}: {_plan_page(described)}")
    if len(plans) > 1 and not session.as_json:
        show(f"{len(plans)} runs, one after another: projected {human_seconds(total)}")


def _plan_page(described: dict[str, Any]) -> str:
    counts = [counted(len(described["tasks"]), "task")]
    counts += [counted(described[name], name.removesuffix("s")) for name in ("iterations", "evaluations")]
    kernels = f"{counted(described['kernels'], 'kernel')} of {counted(described['probe_samples'], 'probe sample')}"
    lines = [", ".join([*counts, kernels])]
    for task in described["tasks"]:
        sizes = ", ".join(f"{task[part]:,} {part}" for part in ("train", "validation", "test"))
        lines.append(f"  task {task['task']}: classes {', '.join(map(str, task['classes']))}; {sizes}")
    lines.append(f"  evaluated on {described['evaluated_on']}")
    seconds = {name: human_seconds(value) for name, value in described["projected_seconds"].items()}
    stored = {name: human_bytes(value) for name, value in described["bytes"].items()}
    probe = f"{described['measured']['measured_probe']:,} of {described['probe_samples']:,}"
    lines += [
        f"  projected: {seconds['total']} on this machine (training {seconds['training']}, evaluations "
        f"{seconds['evaluations']}, kernels {seconds['kernels']})",
        f"    from iterations, an evaluation and a kernel of {probe} probe samples, measured now;",
        "    without the start of the program, which takes some seconds",
        f"  on the disk: kernels {stored['kernels']}, parameters and state {stored['checkpoints']}",
    ]
    return "\n".join(lines)
