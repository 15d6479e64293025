"""`ntkgen import`: a kernel of this program's predecessor → a store of ntkgen."""

import json
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.messages import show
from ntkgen.cli.options import Command, aligned, dtype_option, json_option, out_option, quiet_option, tile_option
from ntkgen.cli.session import start_process
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from ntkgen.store.describe import StoreDescription

ONE_OR_MORE = click.IntRange(min=1)


@click.command("import", cls=Command)
@click.argument("path")
@click.option("--samples", "num_samples", required=True, type=ONE_OR_MORE, help="Number of samples of the kernel.")
@click.option("--outputs", "num_outputs", required=True, type=ONE_OR_MORE, help="Number of outputs of the network.")
@click.option("--params", "num_params", type=ONE_OR_MORE, help="Number P of trainable parameters [not known].")
@out_option("target", metavar="STORE", help="Path of the new store [PATH with the ending .imported.zarr].")
@dtype_option(
    type=click.Choice(["float16", "float32", "float64"]),
    help="Dtype of the numbers in a raw file [from its name].",
)
@tile_option
@json_option()
@quiet_option
def import_(path: str, *, target: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Import a kernel of this program's predecessor from PATH, such as ntk_float32.zarr or ntk_float32.bin.

    The predecessor stored J Jᵀ / √P. The import keeps these numbers and their dtype. With --params, the new store
    records the factor √P, and `ntkgen.open` gives J Jᵀ. After an interruption, the same command continues. The files at
    PATH are not changed.

    \b
    ntkgen import ckpt/cifar_resnet18_0/ntk_float32.zarr --samples 50000 --outputs 10 --params 11173962
    """  # noqa: D301 - \b tells click not to wrap the lines
    start_process()
    from ntkgen.cli.progress import progress_bars
    from ntkgen.store.describe import describe
    from ntkgen.store.foreign import SourceDescription
    from ntkgen.store.importing import default_target, import_kernel

    target = default_target(path) if target is None else target
    with progress_bars(path, quiet=quiet) as report:
        store = import_kernel(path, target, SourceDescription(**given), report)
    found = describe(store)
    show(json.dumps(found.to_json()) if as_json else _page(found))


def _page(found: "StoreDescription") -> str:
    name = found.arrays[0]
    scale = found.scale_factors.get(name)
    lines = {
        "kernel": f"{found.quantity}, {found.rows:,} × {found.cols:,}",
        "array": name if scale is None else f"{name} (scale_factor {scale:g})",
        "from": str(found.provenance.imported_from),
        "tiles": f"{found.tiles:,}, {found.tile_side:,} rows each, layout {found.layout}",
        "size": human_bytes(found.stored_bytes),
    }
    return "\n".join([found.store, *aligned(lines)])
