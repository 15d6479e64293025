"""`ntkgen info`: what a store is, and what it still lacks."""

import json
from pathlib import Path
from typing import Any

import click

from ntkgen.cli.options import aligned
from ntkgen.units import human_bytes


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def info(path: Path, *, as_json: bool) -> None:
    """Say what the kernel store at PATH is, how many tiles are there and what is missing."""
    from ntkgen.kernel.report import describe
    from ntkgen.kernel.store import open_store

    result = describe(open_store(path))
    click.echo(json.dumps(result) if as_json else _page(result))


def _page(values: dict[str, Any]) -> str:
    accuracy = values["provenance"].get("train_accuracy")
    there = values["tiles"] - values["tiles_missing"]
    lines = {
        "status": values["status"],
        "network": f"{values['model']}, {values['num_params']:,} parameters, "
        + ("taken as built" if accuracy is None else f"trained to {accuracy:.2f} %"),
        "data": f"{values['dataset']}, {values['num_samples']:,} samples",
        "kernel": f"J Jᵀ, {values['rows']:,} × {values['rows']:,} ({values['num_outputs']} outputs, sample-major rows)",
        "arrays": ", ".join(
            f"{name} (scale_factor {values['scale_factors'][name]:g})" if name in values["scale_factors"] else name
            for name in values["arrays"]
        ),
        "layout": values["layout"],
        "computed in": values["precision"],
        "tiles": f"{there:,} of {values['tiles']:,}, {values['tile_side']:,} rows each",
        "size": human_bytes(values["stored_bytes"]),
        "1/√P": f"{values['predecessor_factor']:.6g} (the predecessor of this program stored J Jᵀ/√P)",
        "fingerprint": values["fingerprint"],
    }
    page = [values["store"], *aligned(lines)]
    if values["tiles_missing"]:
        first = ", ".join(str(tuple(tile)) for tile in values["first_missing"])
        page.append(
            f"  missing     {values['tiles_missing']:,} tiles, from {first}; finish with the same `ntkgen compute`"
        )
    return "\n".join(page)
