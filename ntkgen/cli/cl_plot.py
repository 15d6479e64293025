"""`ntkgen cl-plot`: pictures of recorded runs."""

import json
from pathlib import Path
from typing import Any

import click

from ntkgen.cli.cl_collection import file_stem
from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, format_option, json_option, out_option
from ntkgen.cli.plot import write_pictures


@click.command("cl-plot", cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@format_option
@out_option("-o", default="plots", show_default=True, metavar="FOLDER", help="Folder of the pictures.")
@json_option("run")
def cl_plot(runs: tuple[str, ...], *, formats: tuple[str, ...], out: str, as_json: bool) -> None:
    """Draw the accuracy and the kernels of the runs at RUN...

    Each RUN is the folder of one seed, such as runs/cl/seed0. The pictures show the accuracy, the loss and the kernels
    over time, the accuracy matrix, and the interference of each pair of tasks. If RUN is the folder of several seeds
    and widths, such as runs/cl, fewer pictures show means over seeds with bands: the accuracy on each task for each
    width, and with all widths in one picture the average accuracy, and the norm, distance and velocity of the kernel.
    """
    from ntkgen.continual.plots.draw import draw_run
    from ntkgen.continual.plots.overlay import draw_collection
    from ntkgen.continual.reading import RunReader, open_run
    from ntkgen.files.folder import LocalFolder

    folder = LocalFolder(Path(out))
    folder.require_writable()
    opened = [open_run(run) for run in runs]  # wrong input is reported before anything is drawn
    for place, run in zip(runs, opened, strict=True):
        pictures, left_out = draw_run(run) if isinstance(run, RunReader) else (draw_collection(run), {})
        files: list[dict[str, Any]] = write_pictures(folder, file_stem(place), pictures, formats)
        result = {"run": place, "pictures": files, "left_out": left_out}
        page = [f"  {made['file']}" for made in files] + [f"  no {kind}: {why}" for kind, why in left_out.items()]
        show(json.dumps(result) if as_json else "\n".join([place, *page]))
