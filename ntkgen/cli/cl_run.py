"""`ntkgen cl-run`: continual learning, with the kernel of the network as a time series."""

from pathlib import Path
from typing import Any

import click

from ntkgen.cli.cl_learners import LearnerCommand, with_learner_options
from ntkgen.cli.cl_preset import chosen_runs, preset_options, require_one_worker
from ntkgen.cli.cl_regression import run_slow_regression, show_slow_regression_plan, slow_regression_settings
from ntkgen.cli.cl_settings import with_settings
from ntkgen.cli.cl_stream_plans import show_streaming_plan
from ntkgen.cli.cl_streaming import (
    require_no_stream_options,
    run_streaming,
    streaming_settings,
)
from ntkgen.cli.messages import note
from ntkgen.cli.options import (
    SEED,
    ManyOption,
    WholeNumber,
    data_dir_option,
    device_option,
    dry_run_option,
    given_options,
    json_option,
    out_option,
    quiet_option,
)
from ntkgen.cli.session import start_process
from ntkgen.continual.published_config import PublishedConfig

# The folder of the experiments of published configurations that name none.
RESULTS = Path("runs")


@click.command("cl-run", cls=LearnerCommand)
@with_settings
@with_learner_options
@preset_options
@click.option(
    "--samples",
    "num_samples",
    type=WholeNumber(min=1),
    help="Samples of a stream of single samples [1,000,000].",
)
@click.option("--seeds", cls=ManyOption, type=SEED, metavar="SEED...", help="Seeds: one run per seed [0].")
@click.option(
    "--workers",
    type=WholeNumber(min=1),
    default=1,
    show_default=True,
    help="Number of runs side by side, each in a process of its own with its share of the threads.",
)
@data_dir_option
@out_option(default="runs/cl", show_default=True, metavar="FOLDER", help="Folder of the runs.")
@device_option("auto, cpu, cuda, cuda:1, … or mps.")
@dry_run_option
@json_option("run, and one for all if there are several")
@click.option(
    "--verbose",
    is_flag=True,
    help="Print the training accuracy of every 25 iterations, and the accuracies and the time of each epoch, in place "
    "of progress bars.",
)
@quiet_option
def cl_run(*, data_dir: Path | None, out: str, device: str, workers: int, **options: Any) -> int:
    """Train a network on a sequence of tasks, and record its accuracy and its kernel over time.

    The run of seed S is stored in the folder OUT/seedS, or in OUT/widthW/seedS if there are several widths. The same
    command continues an interrupted run. On a CPU, the result has the same bytes as that of an uninterrupted run.
    `ntkgen manual continual` describes the results.
    """
    as_json, quiet, dry_run, verbose = (options.pop(name) for name in ("as_json", "quiet", "dry_run", "verbose"))
    given = [name for name in given_options() if name != "device" or device not in {"auto", "cpu"}]
    if (streaming := streaming_settings(options, given_options())) is not None:
        start_process()
        if dry_run:
            return show_streaming_plan(streaming, data_dir, device, as_json=as_json)
        return run_streaming(streaming, data_dir, out, device, as_json=as_json, quiet=quiet)
    if (slow := slow_regression_settings(options, given)) is not None:
        if dry_run:
            return show_slow_regression_plan(slow, as_json=as_json)
        start_process()
        return run_slow_regression(slow, out, as_json=as_json, quiet=quiet)
    require_no_stream_options(given)
    options.pop("grid")
    preset, compat, config, index = (options.pop(name) for name in ("preset", "compat", "config", "experiment_index"))
    chosen = chosen_runs(preset, compat, config, options, index)
    if verbose:
        require_one_worker(workers)
    if chosen.published is not None:
        data_dir, out = _published_places(chosen.published, data_dir, out)
    start_process()
    from ntkgen.cli.cl_sweep import Session, show_plans, show_runs
    from ntkgen.continual.plan import Plan, load_data, remarks
    from ntkgen.continual.side_by_side import Job, require_possible

    runs = chosen.sweep.runs
    data = load_data(chosen.sweep.settings, data_dir)
    plans = {name: Plan.of(settings, data) for name, settings in runs.items()}
    jobs = [Job(name, settings, out, data_dir, device, chosen.index) for name, settings in runs.items()]
    for remark in dict.fromkeys(remark for plan in plans.values() for remark in remarks(plan)):
        note(f"Note: {remark}")
    session = Session(chosen, workers, as_json=as_json, quiet=quiet, verbose=verbose)
    if dry_run:
        show_plans(session, plans, device)
        return 0
    require_possible(jobs, data)
    return show_runs(session, jobs, data)


def _published_places(config: PublishedConfig, data_dir: Path | None, out: str) -> tuple[Path | None, str]:
    """Choose the folders of the data and of the runs. Those of a published configuration precede the defaults."""
    for line in config.ignored:
        note(f"Note: ignored in the configuration: {line}")
    if "out" not in given_options():
        out = str((config.results or RESULTS) / config.name)
    return data_dir or config.data_path, out
