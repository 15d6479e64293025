"""A store described in plain values, to be printed or read by scripts."""

from collections.abc import Iterable, Sequence
from typing import Any

from ntkgen.errors import InaccurateKernelError
from ntkgen.store.certificate import StoredError, tiles_to_check
from ntkgen.store.store import KernelStore

FIRST_MISSING = 5
# What is written of these precisions has an error floor again where it is stored in less.
CAREFUL_PRECISIONS = ("float64", "float64-accumulate")


def describe(store: KernelStore) -> dict[str, Any]:
    """Say what a store holds and what it lacks."""
    manifest = store.manifest
    missing = store.missing_tiles()
    scales = {name: store.scale_factor(name) for name in store.array_names}
    certificate = None if missing else manifest.certificate  # of a kernel that is no longer whole it says nothing
    return {
        "store": store.name,
        "arrays": [f"ntk_{dtype}" for dtype in manifest.dtypes],
        "quantity": manifest.quantity,
        "model": manifest.provenance.model,
        "dataset": manifest.provenance.dataset,
        "num_samples": store.grid.num_samples,
        "num_col_samples": store.grid.num_col_samples,
        "num_outputs": store.grid.num_outputs,
        "num_logits": manifest.num_logits,
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
        "certificate": None if certificate is None else certificate.to_json(),
        "inaccuracy": None if missing else inaccuracy(store),
        "suspicious_tiles": suspicious_tiles(store),
        # what the predecessor of this program stored of this kernel; an imported one whose scale is unknown is that
        "predecessor_factor": max(1, manifest.plan.profile.num_params) ** -0.5,
        "provenance": manifest.provenance.to_json(),
        "fingerprint": manifest.fingerprint,
    }


def suspicious_tiles(store: KernelStore) -> dict[str, list[list[int]]]:
    """List for each store dtype the tiles in which the certificate suspects an error, the likeliest first."""
    certificate = store.manifest.certificate
    errors = () if certificate is None else certificate.errors
    found = {error.dtype: tiles_to_check(store.grid, error.suspicious) for error in errors}
    return {dtype: [[tile.row, tile.col] for tile in tiles] for dtype, tiles in found.items() if tiles}


def inaccuracy(store: KernelStore) -> str | None:
    """Say in one line what a certificate finds wrong with a kernel; None where it finds nothing, or there is none."""
    certificate = store.manifest.certificate
    if certificate is None or certificate.is_good:
        return None
    tiles = suspicious_tiles(store)
    found = "; ".join(_fault(error, tiles.get(error.dtype, [])) for error in certificate.errors if not error.is_good)
    return (
        f"The kernel at {store.name} differs from the exact one by more than rounding explains: expected an error "
        f"within what {store.manifest.plan.precision} and the stored dtype allow, and of one size for all blocks of "
        f"samples, found {found}. Is a disk or a memory damaged, is the network too deep for this precision, or is "
        f"it a mistake in ntkgen? `ntkgen verify --repair --recompute N` computes N tiles again and removes those that "
        "differ, for the same command to make anew; a kernel made with --precision float64 tells whether it is "
        "rounding. If it is neither, please report it."
    )


def _fault(error: StoredError, tiles: Sequence[Sequence[int]]) -> str:
    blocks = f", in blocks {first_few(map(str, error.wrong_blocks))} of samples" if error.wrong_blocks else ""
    where = f", in some of the tiles {first_few(f'({i}, {j})' for i, j in tiles)}" if tiles else ""
    return (
        f"in {error.dtype} {error.relative_error:.2g} of ‖K‖_F, at most {error.relative_bound:.2g} with 95 % "
        f"confidence, with {error.allowed:.2g} allowed{blocks}{where}"
    )


def require_accurate(store: KernelStore) -> None:
    """Refuse to take a kernel for good that its certificate finds wrong.

    Raises:
        InaccurateKernelError: If it does; the store stays, and can be opened.
    """
    if (wrong := inaccuracy(store)) is not None:
        raise InaccurateKernelError(wrong)


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
