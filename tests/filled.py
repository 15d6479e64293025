"""Stores that hold a given matrix, made in no time: no network is computed."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from cases import make_job

from ntkgen.files.place import folder_of
from ntkgen.plan.tiles import TileGrid
from ntkgen.store.certificate import Certificate
from ntkgen.store.manifest import Manifest
from ntkgen.store.opening import create_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.store.schema import Samples, side_of
from ntkgen.store.store import KernelStore

# More than there is: everything fits.
MEMORY = 1 << 40
PROVENANCE = {
    "model": "lenet", "dataset": "digits", "seed": 0, "width": None, "subsample": 7, "shuffle_seed": None,
    "against": None, "against_subsample": None, "epochs": 3, "train_accuracy": 87.5, "train_loss": 0.4,
    "learning_rate": 0.02, "batch_size": 64, "checkpoint": "lenet-digits-seed0.pt",
}  # fmt: skip


def gram(num_rows: int, seed: int = 0) -> np.ndarray:
    """A positive definite matrix whose eigenvalues spread over some decades."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(num_rows, num_rows)))[0]
    K = (Q * np.logspace(2, -3, num_rows)) @ Q.T
    return (K + K.T) / 2


@dataclasses.dataclass(frozen=True)
class Content:
    """What is put into a store: a kernel, and what it is of."""

    kernel: np.ndarray  # (rows, cols), or (outputs, rows, cols)
    labels: np.ndarray  # (samples,)
    logits: np.ndarray  # (samples, classes)
    output: str = "full"
    tile_samples: int = 3
    layout: str = "upper"
    dtypes: tuple = ("float64",)
    precision: str = "float64"
    parameters: str = "3f2a"
    samples: str = "91bc"
    against: tuple | None = None  # labels and logits of the columns
    step: int = 2  # between the indices of its samples in the data set
    provenance: dict[str, Any] = dataclasses.field(default_factory=lambda: {"model": "small", "dataset": "noise"})
    certificate: dict[str, Any] | None = None

    @property
    def grid(self):
        planes = len(self.kernel) if self.kernel.ndim == 3 else 1
        n, columns = len(self.labels), None if self.against is None else len(self.against[0])
        return TileGrid(n, self.kernel.shape[-2] // n, self.tile_samples, columns, planes)


PLANS = {}


def plan_of(content):
    """A plan with this grid and number of logits; everything else of it is of no use here."""
    if "plan" not in PLANS:
        PLANS["plan"] = make_job().plan
    plan = PLANS["plan"]
    profile = dataclasses.replace(plan.profile, num_logits=content.logits.shape[1])
    return dataclasses.replace(plan, grid=content.grid, profile=profile)


def filled(path, content, skip=()):
    """Create a store with these numbers; without some tiles."""
    names = ("output", "precision", "parameters", "samples")
    identity = {name: getattr(content, name) for name in names} | {"dtypes": list(content.dtypes)}
    manifest = Manifest(identity, Provenance.of(content.provenance), plan_of(content), content.dtypes, content.layout)
    other = None
    if content.against is not None:
        other = Samples(np.arange(len(content.against[0])), np.asarray(content.against[0]))
    samples = Samples(np.arange(len(content.labels)) * content.step, np.asarray(content.labels), other)
    store = create_store(folder_of(path, fsync=False), manifest, samples)
    _fill(store, content, skip)
    if content.certificate is not None:
        store.set_manifest(dataclasses.replace(store.manifest, certificate=Certificate.from_json(content.certificate)))
    return open_store(path)


def _fill(store, content, skip):
    grid, m = store.grid, store.grid.num_outputs
    for index in store.missing_blocks():
        side = side_of(grid, index)
        block, rows = side.block, side.block.rows(m)
        diagonal = np.ones((*content.kernel.shape[:-2], rows.stop - rows.start))
        if grid.is_symmetric:
            diagonal = np.diagonal(content.kernel, axis1=-2, axis2=-1)[..., rows]
        values = content.logits if side.logits == "logits" else content.against[1]
        store.commit_block(index, diagonal, values[block.start : block.stop])
    store.create_kernels()
    for tile in grid.tiles():
        rows, cols = grid.block(tile.row).rows(m), grid.col_block(tile.col).rows(m)
        if (tile.row, tile.col) not in skip:
            store.commit(tile, content.kernel[..., rows, cols])
    if not skip:
        store.finalize()


def drawn(n=7, m=3, output="full", seed=0, **options):
    """A kernel that is positive definite, and what it is of."""
    rng = np.random.default_rng([seed, n, m])
    per_sample = {"centered": m - 1, "trace": 1, "diagonal": 1}.get(output, 1 if output.startswith("index") else m)
    planes = (m,) if output == "diagonal" else ()
    J = rng.normal(size=(*planes, n * per_sample, n * per_sample + 4)) + 0.3
    labels = rng.integers(0, m, n)
    return Content(J @ J.swapaxes(-1, -2), labels, rng.normal(size=(n, m)), output, **options)


def rectangle(content, num_test=5, seed=7, **changes):
    """A kernel of the same training samples with others."""
    rng = np.random.default_rng(seed)
    m = content.kernel.shape[-2] // len(content.labels)
    classes = content.logits.shape[1]
    kernel = rng.normal(size=(*content.kernel.shape[:-1], num_test * m))
    against = (rng.integers(0, classes, num_test), rng.normal(size=(num_test, classes)))
    made = dataclasses.replace(content, kernel=kernel, against=against, layout="full", samples="0777")
    return dataclasses.replace(made, **changes)


def one_hot(content):
    return np.eye(content.logits.shape[1])[content.labels]


def fill_store(
    path: Path,
    K: np.ndarray | None = None,
    *,
    labels: np.ndarray,
    num_outputs: int = 1,
    tile_samples: int = 3,
    layout: str = "full",
    dtypes: tuple[str, ...] = ("float64",),
    provenance: dict[str, Any] | None = None,
    certificate: dict[str, Any] | None = None,
) -> tuple[KernelStore, np.ndarray]:
    """Create a store of a symmetric matrix, one-hot logits and these labels; return both."""
    K = gram(len(labels) * num_outputs) if K is None else K
    content = Content(
        K,
        np.asarray(labels),
        np.zeros((len(labels), num_outputs)),
        tile_samples=tile_samples,
        layout=layout,
        dtypes=dtypes,
        samples=f"91bc{len(labels)}",
        step=1,
        provenance=PROVENANCE if provenance is None else provenance,
        certificate=certificate,
    )
    return filled(path, content), K


def certificate_of(dtype: str, bound: float) -> dict[str, Any]:
    """A certificate that finds a kernel good, with a bound on ‖E‖_F."""
    error = {
        "dtype": dtype,
        "error": bound / 2,
        "bound": bound,
        "relative_error": 0.0,
        "relative_bound": 0.0,
        "max_pair_error": 0.0,
        "block_errors": [],
        "suspicious": [],
    }
    return {"num_probes": 10, "num_pairs": 16, "seed": 0, "kernel_norm": 1.0, "errors": [error]}


def answer_of(kind, **known):
    """An answer that says some things, and of all others None."""
    unknown = dict.fromkeys(field.name for field in dataclasses.fields(kind))
    return kind(**{**unknown, **known})
