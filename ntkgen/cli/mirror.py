"""`ntkgen mirror`: one stored triangle → the full matrix."""

import json
from typing import Any

import click

from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, json_option, quiet_option
from ntkgen.cli.session import start_process
from ntkgen.units import human_bytes


@click.command(cls=Command)
@click.argument("path")
@json_option()
@quiet_option
def mirror(path: str, *, as_json: bool, quiet: bool) -> None:
    """Write the missing triangle of the finished kernel store at PATH.

    Afterwards the store has the layout `full`, takes about twice the disk space, and plain Zarr, dask and xarray read
    the whole matrix. After an interruption, the same command continues. A store with both triangles is not changed.
    """
    start_process()
    from ntkgen.cli.progress import progress_bars
    from ntkgen.store import mirror as mirroring
    from ntkgen.store.opening import open_store

    store = open_store(path)
    was_full = store.manifest.layout == "full"
    with progress_bars(path, quiet=quiet) as report:
        num_written = mirroring.mirror(store, report)
    store = open_store(path)
    result = {
        "store": store.name,
        "layout": store.manifest.layout,
        "was_full": was_full,
        "tiles_mirrored": num_written,
        "stored_bytes": store.stored_bytes,
    }
    show(json.dumps(result) if as_json else _summary(result))


def _summary(result: dict[str, Any]) -> str:
    what = "unchanged" if result["was_full"] else f"{result['tiles_mirrored']:,} tiles mirrored"
    return f"{result['store']}\n  layout {result['layout']}, {what}, {human_bytes(result['stored_bytes'])} in all"
