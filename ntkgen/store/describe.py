"""A store described as a value, to be printed or read by scripts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ntkgen.errors import InaccurateKernelError
from ntkgen.plan.tiles import Tile
from ntkgen.store.certificate import Certificate, StoredError, tiles_to_check
from ntkgen.store.provenance import Provenance
from ntkgen.store.rounding import Underflow
from ntkgen.store.store import KernelStore

FIRST_MISSING = 5
# What is written of these precisions has an error floor again where it is stored in less.
CAREFUL_PRECISIONS = ("float64", "float64-accumulate")


@dataclass(frozen=True)
class StoreDescription:
    """What a store holds and what it lacks.

    Attributes:
        store: Where it lies.
        arrays: The names of its kernel arrays, also of those that are not there yet.
        quantity: What the kernel's values are.
        num_samples: Samples of the rows.
        num_col_samples: Samples of the columns, where they are others.
        num_outputs: Rows per sample.
        num_logits: Outputs of the network; 0 where the kernel was imported.
        num_params: Trainable parameters of the network; 0 where they are not known.
        rows: Rows of the kernel.
        cols: Columns of the kernel.
        output: The output map.
        layout: ``upper`` or ``full``.
        precision: What the kernel was computed in.
        tile_side: Rows of a tile.
        tiles: Tiles of the finished kernel.
        tiles_missing: Tiles that are not there.
        first_missing: The first of them.
        is_complete: Whether the store is finished, and nothing of it has gone since.
        stored_bytes: Bytes of all of its files.
        scale_factors: What an array is to be multiplied by, by its name, where that is not 1.
        float16_underflow: Entries that float16 cannot hold whole; None where they are not counted.
        certificate: How accurate the kernel is. None where it has no certificate, or is no longer whole.
        inaccuracy: What the certificate finds wrong; None where that is nothing.
        suspicious_tiles: For a store dtype, the tiles in which the certificate suspects an error.
        predecessor_factor: By what the predecessor of this program multiplied the kernel: 1/√P.
        provenance: What the kernel was made of.
        fingerprint: The hash of what the kernel is of.
    """

    store: str
    arrays: tuple[str, ...]
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
        """Whether the store is finished, in a word."""
        return "complete" if self.is_complete else "in_progress"

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values, as scripts read them."""
        underflow = self.float16_underflow
        return {
            "store": self.store,
            "arrays": list(self.arrays),
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
            "first_missing": [tile.to_json() for tile in self.first_missing],
            "status": self.status,
            "stored_bytes": self.stored_bytes,
            "scale_factors": dict(self.scale_factors),
            "float16_underflow": None if underflow is None else vars(underflow).copy(),
            "certificate": None if self.certificate is None else self.certificate.to_json(),
            "inaccuracy": self.inaccuracy,
            "suspicious_tiles": {
                dtype: [tile.to_json() for tile in tiles] for dtype, tiles in self.suspicious_tiles.items()
            },
            "predecessor_factor": self.predecessor_factor,
            "provenance": self.provenance.to_json(),
            "fingerprint": self.fingerprint,
        }


def describe(store: KernelStore) -> StoreDescription:
    """Say what a store holds and what it lacks."""
    manifest, grid = store.manifest, store.grid
    missing = store.missing_tiles()
    scales = {name: store.scale_factor(name) for name in store.array_names}
    return StoreDescription(
        store=store.name,
        arrays=tuple(f"ntk_{dtype}" for dtype in manifest.dtypes),
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
        certificate=None if missing else manifest.certificate,  # of a kernel that is no longer whole it says nothing
        inaccuracy=None if missing else inaccuracy(store),
        suspicious_tiles=suspicious_tiles(store),
        # what the predecessor of this program stored of this kernel; an imported one whose scale is unknown is that
        predecessor_factor=max(1, manifest.plan.profile.num_params) ** -0.5,
        provenance=manifest.provenance,
        fingerprint=manifest.fingerprint,
    )


def suspicious_tiles(store: KernelStore) -> dict[str, tuple[Tile, ...]]:
    """List for each store dtype the tiles in which the certificate suspects an error, the likeliest first."""
    certificate = store.manifest.certificate
    errors = () if certificate is None else certificate.errors
    found = {error.dtype: tuple(tiles_to_check(store.grid, error.suspicious)) for error in errors}
    return {dtype: tiles for dtype, tiles in found.items() if tiles}


def inaccuracy(store: KernelStore) -> str | None:
    """Say in one line what a certificate finds wrong with a kernel; None where it finds nothing, or there is none."""
    certificate = store.manifest.certificate
    if certificate is None or certificate.is_good:
        return None
    tiles = suspicious_tiles(store)
    found = "; ".join(_fault(error, tiles.get(error.dtype, ())) for error in certificate.errors if not error.is_good)
    return (
        f"The kernel at {store.name} differs from the exact one by more than rounding explains: expected an error "
        f"within what {store.manifest.plan.precision} and the stored dtype allow, and of one size for all blocks of "
        f"samples, found {found}. Is a disk or a memory damaged, is the network too deep for this precision, or is "
        f"it a mistake in ntkgen? `ntkgen verify --repair --recompute N` computes N tiles again and removes those that "
        "differ, for the same command to make anew; a kernel computed in float64 tells whether it is "
        "rounding. If it is neither, please report it."
    )


def _fault(error: StoredError, tiles: Sequence[Tile]) -> str:
    blocks = f", in blocks {first_few(map(str, error.wrong_blocks))} of samples" if error.wrong_blocks else ""
    where = f", in some of the tiles {first_few(f'({tile.row}, {tile.col})' for tile in tiles)}" if tiles else ""
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
