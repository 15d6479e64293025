"""A store described in plain values, for people and for scripts."""

from collections.abc import Iterable, Sequence
from typing import Any

from ntkgen.kernel.certificate import tiles_to_check
from ntkgen.kernel.store import KernelStore

FIRST_MISSING = 5
# What is written of these precisions has an error floor again where it is stored in less.
CAREFUL_PRECISIONS = ("float64", "float64-accumulate")


def describe(store: KernelStore) -> dict[str, Any]:
    """Say what a store holds and what it lacks."""
    manifest = store.manifest
    missing = store.missing_tiles()
    scales = {name: store.scale_factor(name) for name in store.array_names}
    return {
        "store": store.name,
        "arrays": [f"ntk_{dtype}" for dtype in manifest.dtypes],
        "quantity": manifest.provenance.get("quantity", "J Jᵀ"),
        "model": manifest.provenance.get("model"),
        "dataset": manifest.provenance.get("dataset"),
        "num_samples": store.grid.num_samples,
        "num_col_samples": store.grid.num_col_samples,
        "num_outputs": store.grid.num_outputs,
        "num_params": manifest.plan.profile.num_params,
        "rows": store.grid.num_rows,
        "cols": store.grid.num_cols,
        "output": manifest.identity.get("output", "full"),
        "layout": manifest.layout,
        "precision": manifest.plan.precision,
        "tile_side": store.grid.side,
        "tiles": store.grid.num_tiles,
        "tiles_missing": len(missing),
        "first_missing": [[tile.row, tile.col] for tile in missing[:FIRST_MISSING]],
        "status": "complete" if store.is_complete else "in_progress",
        "stored_bytes": store.stored_bytes,
        "scale_factors": {name: scale for name, scale in scales.items() if scale != 1},
        "float16_underflow": store.float16_underflow,
        "certificate": None if missing else manifest.certificate,  # of a kernel that is no longer whole it says nothing
        "suspicious_tiles": suspicious_tiles(store),
        # what the predecessor of this program stored of this kernel; an imported one whose scale is unknown is that
        "predecessor_factor": max(1, manifest.plan.profile.num_params) ** -0.5,
        "provenance": dict(manifest.provenance),
        "fingerprint": manifest.fingerprint,
    }


def suspicious_tiles(store: KernelStore) -> dict[str, list[list[int]]]:
    """List for each store dtype the tiles in which the certificate suspects an error, the likeliest first."""
    errors = (store.manifest.certificate or {}).get("errors", [])
    found = {error["dtype"]: tiles_to_check(store.grid, error["suspicious"]) for error in errors}
    return {dtype: [[tile.row, tile.col] for tile in tiles] for dtype, tiles in found.items() if tiles}


def suspicion(store: KernelStore) -> str | None:
    """Say which tiles a certificate suspects, in one line; None where it suspects none."""
    if not (tiles := suspicious_tiles(store)):
        return None
    dtypes = "; ".join(f"{dtype}: {first_few(f'({i}, {j})' for i, j in each)}" for dtype, each in tiles.items())
    return (
        f"The kernel at {store.name} differs from the exact one by more than rounding explains: expected errors of one "
        f"size for all blocks of samples, found larger ones in some tiles ({dtypes}). A damaged disk or memory, or a "
        "mistake in ntkgen? `ntkgen verify --repair --recompute N` computes N tiles again and removes those that "
        "differ; then run the same command again. If it says this again, please report it."
    )


def first_few(names: Iterable[str]) -> str:
    """Join names with commas, the first of them where they are many.

    >>> first_few("abcdefg")
    'a, b, c, d, e, … (7)'
    """
    every = list(names)
    shown = ", ".join(every[:FIRST_MISSING])
    return shown if len(every) <= FIRST_MISSING else f"{shown}, … ({len(every)})"


def loses_precision(precision: str, dtypes: Sequence[str]) -> bool:
    """Say whether a kernel is computed more precisely than it is stored.

    >>> loses_precision("float64-accumulate", ["float16", "float32"]), loses_precision("float32", ["float32"])
    (True, False)
    """
    return precision in CAREFUL_PRECISIONS and "float64" not in dtypes
