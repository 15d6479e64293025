"""Description of a store for printing and for scripts, and the judgement of its certificate (measured error bound)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ntkgen.errors import InaccurateKernelError
from ntkgen.plan.tiles import Tile
from ntkgen.store.certificate import Certificate, StoredError, tiles_to_check
from ntkgen.store.provenance import Provenance
from ntkgen.store.rounding import Underflow
from ntkgen.store.store import KernelStore

# Maximum number of names in a message, and of missing tiles in a description.
FIRST_MISSING = 5
# Precision policies whose result loses accuracy when it is stored in less than float64.
CAREFUL_PRECISIONS = ("float64", "float64-accumulate")


@dataclass(frozen=True)
class StoreDescription:
    """The contents of a store and its missing tiles.

    Attributes:
        store: Path or URL of the store.
        arrays: Names of the kernel arrays, including those that do not exist yet.
        layers: Names of the groups of parameters whose kernels are stored too.
        quantity: Meaning of the kernel's values.
        num_samples: Number of samples in the rows.
        num_col_samples: Number of samples in the columns, if they are other samples.
        num_outputs: Number of rows per sample.
        num_logits: Number of network outputs. It is 0 for an imported kernel.
        num_params: Number of trainable parameters of the network. It is 0 if unknown.
        rows: Number of rows of the kernel.
        cols: Number of columns of the kernel.
        output: Name of the output map.
        layout: ``upper`` or ``full``.
        precision: Precision policy of the computation.
        tile_side: Number of rows of a tile.
        tiles: Number of tiles of the finished kernel.
        tiles_missing: Number of missing tiles.
        first_missing: First missing tiles.
        is_complete: Whether the store is marked complete and nothing of it is missing.
        stored_bytes: Size of all files in bytes.
        scale_factors: Factor by which a stored array is multiplied, by its name, if it is not 1.
        float16_underflow: Numbers of entries that float16 stores with fewer bits, and as zero. None if not counted.
        certificate: Measured error of the kernel, with an upper bound. None if it was not measured, or if tiles are
            missing now.
        inaccuracy: Errors that the certificate shows, in one line. None if it shows none.
        suspicious_tiles: Tiles in which the certificate suspects an error, by store dtype.
        predecessor_factor: Factor by which the predecessor of this program multiplied the kernel, 1/√P.
        provenance: Network, data and training that the kernel was computed from.
        fingerprint: Hash of the kernel's identity.
    """

    store: str
    arrays: tuple[str, ...]
    layers: tuple[str, ...]
    quantity: str
    num_samples: int
    num_col_samples: int | None
    num_outputs: int
    num_logits: int
    num_params: int
    rows: int
    cols: int
    output: str
    layout: str
    precision: str
    tile_side: int
    tiles: int
    tiles_missing: int
    first_missing: tuple[Tile, ...]
    is_complete: bool
    stored_bytes: int
    scale_factors: Mapping[str, float]
    float16_underflow: Underflow | None
    certificate: Certificate | None
    inaccuracy: str | None
    suspicious_tiles: Mapping[str, tuple[Tile, ...]]
    predecessor_factor: float
    provenance: Provenance
    fingerprint: str

    @property
    def status(self) -> str:
        """State of the store, ``complete`` or ``in_progress``."""
        return "complete" if self.is_complete else "in_progress"

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for scripts."""
        underflow = self.float16_underflow
        return {
            "store": self.store,
            "arrays": list(self.arrays),
            "layers": list(self.layers),
            "quantity": self.quantity,
            "model": self.provenance.model,
            "dataset": self.provenance.dataset,
            "num_samples": self.num_samples,
            "num_col_samples": self.num_col_samples,
            "num_outputs": self.num_outputs,
            "num_logits": self.num_logits,
            "num_params": self.num_params,
            "rows": self.rows,
            "cols": self.cols,
            "output": self.output,
            "layout": self.layout,
            "precision": self.precision,
            "tile_side": self.tile_side,
            "tiles": self.tiles,
            "tiles_missing": self.tiles_missing,
            "first_missing": [list(tile) for tile in self.first_missing],
            "status": self.status,
            "stored_bytes": self.stored_bytes,
            "scale_factors": dict(self.scale_factors),
            "float16_underflow": None if underflow is None else vars(underflow).copy(),
            "certificate": None if self.certificate is None else self.certificate.to_json(),
            "inaccuracy": self.inaccuracy,
            "suspicious_tiles": {
                dtype: [list(tile) for tile in tiles] for dtype, tiles in self.suspicious_tiles.items()
            },
            "predecessor_factor": self.predecessor_factor,
            "provenance": self.provenance.to_json(),
            "fingerprint": self.fingerprint,
        }


def describe(store: KernelStore) -> StoreDescription:
    """Describe the contents of a store and its missing tiles."""
    manifest, grid = store.manifest, store.grid
    missing = store.missing_tiles()
    scales = {name: store.scale_factor(name) for name in store.array_names}
    return StoreDescription(
        store=store.name,
        arrays=tuple(array.name for array in store.arrays() if array.role == "kernel"),
        layers=tuple(manifest.layers),
        quantity=manifest.quantity,
        num_samples=grid.num_samples,
        num_col_samples=grid.num_col_samples,
        num_outputs=grid.num_outputs,
        num_logits=manifest.num_logits,
        num_params=manifest.plan.profile.num_params,
        rows=grid.num_rows,
        cols=grid.num_cols,
        output=manifest.output,
        layout=manifest.layout,
        precision=manifest.plan.precision,
        tile_side=grid.side,
        tiles=grid.num_tiles,
        tiles_missing=len(missing),
        first_missing=tuple(missing[:FIRST_MISSING]),
        is_complete=store.is_complete,
        stored_bytes=store.stored_bytes,
        scale_factors={name: scale for name, scale in scales.items() if scale != 1},
        float16_underflow=store.float16_underflow,
        certificate=None if missing else manifest.certificate,  # it does not hold for a kernel with missing tiles
        inaccuracy=None if missing else inaccuracy(store),
        suspicious_tiles=suspicious_tiles(store),
        # The predecessor stored this kernel divided by √P. With an unknown P the factor is 1.
        predecessor_factor=max(1, manifest.plan.profile.num_params) ** -0.5,
        provenance=manifest.provenance,
        fingerprint=manifest.fingerprint,
    )


def suspicious_tiles(store: KernelStore) -> dict[str, tuple[Tile, ...]]:
    """List for each store dtype the tiles in which the certificate suspects an error, in descending likelihood."""
    certificate = store.manifest.certificate
    errors = () if certificate is None else certificate.errors
    suspicious = {error.dtype: tuple(tiles_to_check(store.grid, error.suspicious)) for error in errors}
    return {dtype: tiles for dtype, tiles in suspicious.items() if tiles}


def inaccuracy(store: KernelStore) -> str | None:
    """Describe in one line the errors that a certificate shows. Return None if it shows none, or if there is none."""
    certificate = store.manifest.certificate
    if certificate is None or certificate.is_good:
        return None
    tiles = suspicious_tiles(store)
    faults = "; ".join(
        _fault(error, tiles.get(error.dtype, ()), is_exact=certificate.is_exact)
        for error in certificate.errors
        if not error.is_good
    )
    return (
        f"The kernel at {store.name} differs from the exact one by more than rounding explains: expected an error "
        f"within the limit of {store.manifest.plan.precision} and the stored dtype, and of similar size in all blocks "
        f"of samples, found {faults}. Is a disk or a memory damaged, is the network too deep for this precision, or is "
        "it a mistake in ntkgen? Run `ntkgen verify --repair --recompute N`, which computes N tiles again and removes "
        "those that differ, and then the command of the kernel again. Compute the kernel in float64 to see whether "
        "rounding is the cause. If neither helps, please report it."
    )


def _fault(error: StoredError, tiles: Sequence[Tile], *, is_exact: bool) -> str:
    bound = "" if is_exact else f", at most {error.relative_bound:.2g} with 95 % confidence"
    blocks = f", in blocks {first_few(map(str, error.wrong_blocks))} of samples" if error.wrong_blocks else ""
    where = f", in some of the tiles {first_few(f'({tile.row}, {tile.col})' for tile in tiles)}" if tiles else ""
    return (
        f"in {error.dtype} {error.relative_error:.2g} of ‖K‖_F{bound}, with {error.allowed:.2g} allowed{blocks}{where}"
    )


def require_accurate(store: KernelStore) -> None:
    """Refuse a kernel whose certificate (its measured error bound) shows errors.

    Raises:
        InaccurateKernelError: If the certificate shows errors. The store is kept and can be opened.
    """
    if (wrong := inaccuracy(store)) is not None:
        raise InaccurateKernelError(wrong)


def first_few(names: Iterable[str]) -> str:
    """Join names with commas. Of a long list, join the first names and give the total number.

    >>> first_few("abcdefg")
    'a, b, c, d, e, … (7)'
    """
    listed = list(names)
    shown = ", ".join(listed[:FIRST_MISSING])
    return shown if len(listed) <= FIRST_MISSING else f"{shown}, … ({len(listed)})"


def loses_precision(precision: str, dtypes: Sequence[str]) -> bool:
    """Tell whether a kernel is computed more precisely than it is stored.

    >>> loses_precision("float64-accumulate", ["float16", "float32"]), loses_precision("float32", ["float32"])
    (True, False)
    """
    return precision in CAREFUL_PRECISIONS and "float64" not in dtypes
