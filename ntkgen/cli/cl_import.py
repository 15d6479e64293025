"""`ntkgen cl-import`: published metrics of a predecessor → runs of ntkgen."""

import json
from pathlib import Path
from typing import Any

import click

from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, json_option, out_option
from ntkgen.units import counted


@click.command("cl-import", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@out_option(default="runs/imported", show_default=True, metavar="FOLDER", help="Folder of the runs.")
@click.option(
    "--method",
    type=click.Choice(["finetune", "replay"]),
    help="Method of the runs, which the file does not say [replay if the name of the file has this word].",
)
@click.option(
    "--iterations-per-epoch",
    type=click.IntRange(min=1),
    default=1,
    help="Iterations of an epoch, which the file does not say [1: iterations are counted in epochs].",
)
@json_option("run")
def cl_import(file: Path, *, out: str, method: str | None, iterations_per_epoch: int, as_json: bool) -> None:
    """Import the metrics in FILE.pkl, published by yufei118liu/ntk_continual, as runs.

    Each network and width becomes a run of its own, OUT/NAME/widthW/seed0, which cl-analyze and cl-plot read. A pickle
    can run programs. This command reads numbers alone: a file that names anything else is refused, and nothing in it is
    run.
    """
    from ntkgen.continual.importing import read_published, require_empty, write_run
    from ntkgen.files.place import folder_of

    runs = read_published(file, method, iterations_per_epoch)
    folders = [folder_of(out, fsync=False) / run.name for run in runs]
    require_empty(folders)  # before the first run is written
    for run, folder in zip(runs, folders, strict=True):
        write_run(run, folder, file)
        result: dict[str, Any] = {"run": str(folder), "tasks": run.num_tasks, "epochs": run.num_epochs}
        result |= {"kernels": run.num_tasks * run.num_epochs}
        tasks = f"{counted(run.num_tasks, 'task')} of {counted(run.num_epochs, 'epoch')}"
        page = f"{folder}: {tasks}, {counted(result['kernels'], 'kernel')}"
        show(json.dumps(result) if as_json else page)
