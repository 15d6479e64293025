"""`ntkgen import`: a kernel of this program's predecessor, as one of our stores."""

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
@click.option("--samples", "num_samples", required=True, type=ONE_OR_MORE, help="Samples that the kernel is of.")
@click.option("--outputs", "num_outputs", required=True, type=ONE_OR_MORE, help="Outputs of its network.")
@click.option("--params", "num_params", type=ONE_OR_MORE, help="Trainable parameters P, by whose root it was divided.")
@out_option("target", metavar="STORE", help="The new store [beside PATH, its name ending in .imported.zarr].")
@dtype_option(
    type=click.Choice(["float16", "float32", "float64"]),
    help="Of a raw file whose name does not tell [from the name].",
)
@tile_option
@json_option()
@quiet_option
def import_(path: str, *, target: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Read the kernel at PATH that this program's predecessor wrote: ntk_float32.zarr, or the raw ntk_float32.bin.

    The numbers stay as they are, J Jᵀ / √P in their dtype. With --params the new store says so in its scale_factor, and
    `ntkgen.open` gives J Jᵀ. An interrupted import goes on with the same command; PATH is only read.

    \b
    ntkgen import ckpt/cifar_resnet18_0/ntk_float32.zarr --samples 50000 --outputs 10 --params 11173962
    """  # noqa: D301 - \b is click's sign for lines that must not be wrapped
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
