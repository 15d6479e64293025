"""`ntkgen cl-grid`: learners of streams with many values of their options."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.cl_stream_plans import show_grid_plan
from ntkgen.cli.cl_stream_results import show_all_scores
from ntkgen.cli.cl_streaming import learn_stream
from ntkgen.cli.messages import note, show
from ntkgen.cli.options import (
    Command,
    WholeNumber,
    data_dir_option,
    device_option,
    dry_run_option,
    json_option,
    out_option,
    quiet_option,
    scheduler_option,
)
from ntkgen.cli.session import start_process
from ntkgen.continual.streaming.grid import ARRAY, COMMANDS, NETWORKS, is_finished, read_grid, write_commands
from ntkgen.files.place import folder_of

if TYPE_CHECKING:
    from ntkgen.continual.streaming.settings import StreamingSettings


@click.command("cl-grid", cls=Command)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--networks",
    type=WholeNumber(min=1),
    default=NETWORKS,
    show_default=True,
    help="Largest number of networks that learn side by side in one run.",
)
@click.option(
    "--commands",
    is_flag=True,
    help=f"Do not learn: write a command per run to {COMMANDS}, and a script for an array of SLURM jobs, {ARRAY}.",
)
@scheduler_option("Learn on a running dask cluster, a run per job: address or scheduler file.")
@data_dir_option
@out_option(default="runs/grid", show_default=True, metavar="FOLDER", help="Folder of the runs.")
@device_option("auto, cpu, cuda, cuda:1, … or mps.")
@dry_run_option
@json_option("run")
@quiet_option
def cl_grid(
    *, file: Path, networks: int, commands: bool, client: str | None, out: str, device: str, **others: Any
) -> None:
    """Learn a stream by several learners with several values of their options.

    FILE.json, FILE.toml or FILE.yaml has the settings of all runs, as `cl-run` takes them, and `learners` with lists of
    values of the options of each. Finished runs are skipped, and an interrupted one continues. The table has every
    combination; a network that has diverged is never the best. `ntkgen manual streams` has an example.
    """
    runs = read_grid(file, networks)
    folder = folder_of(out, fsync=False)
    data_dir = others["data_dir"]
    if others["dry_run"]:
        start_process()
        show_grid_plan(runs, data_dir, device, as_json=others["as_json"])
        return
    if commands:
        folder.require_writable()
        places = [] if data_dir is None else ["--data-dir", str(data_dir)]
        lines = write_commands(folder, runs, [*places, "--device", device])
        show(json.dumps({"commands": lines}) if others["as_json"] else "\n".join(lines))
        return
    missing = {name: settings for name, settings in runs.items() if not is_finished(folder / name, settings)}
    if len(missing) < len(runs):
        note(f"Note: {len(runs) - len(missing)} of {len(runs)} runs are finished already")
    start_process()
    if client is None:
        _learn_here(missing, out, data_dir, device, quiet=others["quiet"])
    else:
        _learn_on_cluster(missing, out, data_dir, device, client)
    show_all_scores([f"{out}/{name}" for name in runs], None, as_json=others["as_json"])


def _learn_here(
    runs: "dict[str, StreamingSettings]", out: str, data_dir: Path | None, device: str, *, quiet: bool
) -> None:
    from ntkgen.cli.progress import progress_bars

    for number, (name, settings) in enumerate(runs.items(), 1):
        with progress_bars(f"{name} ({number}/{len(runs)})", quiet=quiet) as report:
            learn_stream(settings, data_dir, f"{out}/{name}", device, report)


def _learn_on_cluster(
    runs: "dict[str, StreamingSettings]", out: str, data_dir: Path | None, device: str, scheduler: str
) -> None:
    from ntkgen.engine.cluster import connected

    with connected(scheduler) as client:
        jobs = [
            client.submit(learn_stream, settings, data_dir, f"{out}/{name}", device, pure=False)
            for name, settings in runs.items()
        ]
        client.gather(jobs)
