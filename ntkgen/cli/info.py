"""`ntkgen info`: what a store is, and what it still lacks."""

import json
from typing import Any

import click

from ntkgen.cli.certificate import certificate_lines
from ntkgen.cli.options import aligned
from ntkgen.units import human_bytes


@click.command()
@click.argument("path", metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def info(path: str, *, as_json: bool) -> int:
    """Say what the kernel store at PATH is, how many tiles are there and what is missing.

    Exit code 1: its certificate finds the kernel wrong.
    """
    from ntkgen.store.describe import describe
    from ntkgen.store.opening import open_store

    result = describe(open_store(path))
    click.echo(json.dumps(result) if as_json else _page(result))
    if result["inaccuracy"] is None:
        return 0
    click.echo(f"Error: {result['inaccuracy']}", err=True)
    return 1


def _page(values: dict[str, Any]) -> str:
    there = values["tiles"] - values["tiles_missing"]
    is_imported = "imported_from" in values["provenance"]
    lines = {
        "status": values["status"],
        **_origin(values),
        "output": _output(values),
        "kernel": f"{values['quantity']}, {values['rows']:,} × {values['cols']:,}, {values['num_outputs']} per sample "
        "(sample-major)",
        "arrays": ", ".join(
            f"{name} (scale_factor {values['scale_factors'][name]:g})" if name in values["scale_factors"] else name
            for name in values["arrays"]
        ),
        **_underflow(values),
        "layout": values["layout"],
        "computed in": values["precision"] + _hint(values),
        "tiles": f"{there:,} of {values['tiles']:,}, {values['tile_side']:,} rows each",
        "size": human_bytes(values["stored_bytes"]),
        **({} if is_imported else certificate_lines(values)),
        **_predecessor(values),
        "fingerprint": values["fingerprint"],
    }
    page = [values["store"], *aligned(lines)]
    if values["tiles_missing"]:
        first = ", ".join(str(tuple(tile)) for tile in values["first_missing"])
        page.append(
            f"  missing     {values['tiles_missing']:,} tiles, from {first}; finish with the same `ntkgen compute`"
        )
    return "\n".join(page)


def _origin(values: dict[str, Any]) -> dict[str, str]:
    """Write what the kernel was computed of, or what file it was imported from."""
    made = values["provenance"]
    if "imported_from" in made:
        return {"imported": f"from {made['imported_from']}", "data": _samples(values)}
    accuracy = made.get("train_accuracy")
    trained = "taken as built" if accuracy is None else f"trained to {accuracy:.2f} %"
    return {
        "network": f"{values['model']}, {values['num_params']:,} parameters, {trained}",
        "data": f"{values['dataset']}, {_samples(values)}",
    }


def _predecessor(values: dict[str, Any]) -> dict[str, str]:
    if not values["num_params"]:  # imported, and not known
        return {}
    return {"1/√P": f"{values['predecessor_factor']:.6g} (the predecessor of this program stored J Jᵀ/√P)"}


def _samples(values: dict[str, Any]) -> str:
    rows, cols = values["num_samples"], values["num_col_samples"]
    if cols is None:
        return f"{rows:,} samples"
    split = values["provenance"].get("against")
    return f"{rows:,} samples against {cols:,} {'others' if split is None else f'of its {split} split'}"


def _output(values: dict[str, Any]) -> str:
    meaning = {
        "full": "every output",
        "sum": "the sum of the outputs",
        "centered": "the contrasts of the outputs, without their common shift",
        "trace": "the trace of each pair's block",
        "diagonal": "the diagonal of each pair's block, a matrix per output",
    }
    return f"{values['output']}: {meaning.get(values['output'], 'this output alone')}"


def _underflow(values: dict[str, Any]) -> dict[str, str]:
    counts = values["float16_underflow"]
    if counts is None:
        return {}
    fewer, vanished = counts["with_fewer_bits"], counts["vanished"]
    return {"in float16": f"{fewer:,} computed entries with fewer bits than usual, {vanished:,} of them stored as zero"}


def _hint(values: dict[str, Any]) -> str:
    from ntkgen.store.describe import loses_precision

    dtypes = [name.removeprefix("ntk_") for name in values["arrays"]]
    if not loses_precision(values["precision"], dtypes):
        return ""
    floor = "1e-7" if "float32" in dtypes else "5e-4"
    return f" (as stored, with an error floor of about {floor} of the largest eigenvalue; --dtype float64 has none)"
