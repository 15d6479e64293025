"""`ntkgen info`: the content of a store, and its missing tiles."""

import json
from typing import TYPE_CHECKING

import click

from ntkgen.cli.certificate import certificate_lines
from ntkgen.cli.messages import complain, show
from ntkgen.cli.options import Command, aligned, json_option
from ntkgen.units import human_bytes

if TYPE_CHECKING:
    from ntkgen.store.describe import StoreDescription


@click.command(cls=Command)
@click.argument("path", metavar="PATH")
@json_option()
def info(path: str, *, as_json: bool) -> int:
    """Describe the kernel store at PATH: its kernel, its accuracy and its missing tiles.

    The exit code is 1 if the kernel is wrong according to its certificate (a measured bound on its error).
    """
    from ntkgen.store.describe import describe
    from ntkgen.store.opening import open_store

    found = describe(open_store(path))
    show(json.dumps(found.to_json()) if as_json else _page(found))
    if found.inaccuracy is None:
        return 0
    complain(found.inaccuracy)
    return 1


def _page(found: "StoreDescription") -> str:
    there = found.tiles - found.tiles_missing
    is_imported = found.provenance.imported_from is not None
    lines = {
        "status": found.status,
        **_origin(found),
        "output": _output(found),
        "kernel": f"{found.quantity}, {found.rows:,} × {found.cols:,}, outputs per sample: {found.num_outputs}",
        "arrays": ", ".join(
            f"{name} (scale_factor {found.scale_factors[name]:g})" if name in found.scale_factors else name
            for name in found.arrays
        ),
        **({"layers": ", ".join(name or "(the network itself)" for name in found.layers)} if found.layers else {}),
        **_underflow(found),
        "layout": found.layout,
        "computed in": found.precision + _hint(found),
        "tiles": f"{there:,} of {found.tiles:,}, {found.tile_side:,} rows each",
        "size": human_bytes(found.stored_bytes),
        **({} if is_imported else certificate_lines(found)),
        **_predecessor(found),
        "fingerprint": found.fingerprint,
    }
    page = [found.store, *aligned(lines)]
    if found.tiles_missing:
        first = ", ".join(f"({tile.row}, {tile.col})" for tile in found.first_missing)
        command = "ntkgen import" if is_imported else "ntkgen compute"
        page.append(f"  missing     {found.tiles_missing:,} tiles, from {first}; finish with the same `{command}`")
    return "\n".join(page)


def _origin(found: "StoreDescription") -> dict[str, str]:
    """Write the network and the data of a kernel, or the file that it was imported from."""
    made = found.provenance
    if made.imported_from is not None:
        return {"imported": f"from {made.imported_from}", "data": _samples(found)}
    trained = "without training" if made.train_accuracy is None else f"trained to {made.train_accuracy:.2f} %"
    return {
        "network": f"{made.model}, {found.num_params:,} parameters, {trained}",
        **({} if made.select is None else {"selected": made.select}),
        **({} if made.params is None else {"parameters": ", ".join(made.params)}),
        "data": f"{made.dataset}, {_samples(found)}",
    }


def _predecessor(found: "StoreDescription") -> dict[str, str]:
    if not found.num_params:  # an imported kernel without --params
        return {}
    return {"1/√P": f"{found.predecessor_factor:.6g} (the predecessor of this program stored J Jᵀ/√P)"}


def _samples(found: "StoreDescription") -> str:
    rows, cols, split = found.num_samples, found.num_col_samples, found.provenance.against
    if cols is None:
        return f"{rows:,} samples"
    return f"{rows:,} samples against {cols:,} {'others' if split is None else f'of its {split} split'}"


def _output(found: "StoreDescription") -> str:
    meaning = {
        "full": "every output",
        "sum": "the sum of the outputs",
        "centered": "contrasts of the outputs, without their common shift",
        "trace": "the trace of the block of each pair of samples",
        "diagonal": "the diagonal of the block of each pair of samples, one matrix per output",
    }
    return f"{found.output}: {meaning.get(found.output, 'this output alone')}"


def _underflow(found: "StoreDescription") -> dict[str, str]:
    counts = found.float16_underflow
    if counts is None:
        return {}
    fewer, vanished = counts.with_fewer_bits, counts.vanished
    return {"in float16": f"{fewer:,} computed entries have fewer bits than usual; {vanished:,} of them became zero"}


def _hint(found: "StoreDescription") -> str:
    from ntkgen.store.describe import loses_precision

    dtypes = [name.removeprefix("ntk_") for name in found.arrays]
    if not loses_precision(found.precision, dtypes):
        return ""
    floor = "1e-7" if "float32" in dtypes else "5e-4"
    return f" (storing adds an error of about {floor} of the largest eigenvalue, unless --dtype is float64)"
