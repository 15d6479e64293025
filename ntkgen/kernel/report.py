"""A store described in plain values, for people and for scripts."""

from typing import Any

from ntkgen.kernel.store import KernelStore

FIRST_MISSING = 5


def describe(store: KernelStore) -> dict[str, Any]:
    """Say what a store holds and what it lacks."""
    manifest = store.manifest
    missing = store.missing_tiles()
    scales = {name: store.scale_factor(name) for name in store.array_names}
    return {
        "store": str(store.path),
        "arrays": [f"ntk_{dtype}" for dtype in manifest.dtypes],
        "model": manifest.provenance["model"],
        "dataset": manifest.provenance["dataset"],
        "num_samples": store.grid.num_samples,
        "num_outputs": store.grid.num_outputs,
        "num_params": manifest.plan.profile.num_params,
        "rows": store.grid.num_rows,
        "layout": manifest.layout,
        "precision": manifest.plan.precision,
        "tile_side": store.grid.side,
        "tiles": store.grid.num_tiles,
        "tiles_missing": len(missing),
        "first_missing": [[tile.row, tile.col] for tile in missing[:FIRST_MISSING]],
        "status": "complete" if store.is_complete else "in_progress",
        "stored_bytes": store.stored_bytes,
        "scale_factors": {name: scale for name, scale in scales.items() if scale != 1},
        "predecessor_factor": manifest.plan.profile.num_params**-0.5,
        "provenance": dict(manifest.provenance),
        "fingerprint": manifest.fingerprint,
    }
