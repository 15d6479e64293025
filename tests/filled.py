"""Stores that hold a given matrix, made in no time: no network is computed."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from cases import make_job

from ntkgen.kernel.arrays import Samples
from ntkgen.kernel.manifest import Manifest
from ntkgen.kernel.opening import create_store, open_store
from ntkgen.kernel.store import KernelStore
from ntkgen.kernel.tiles import TileGrid

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
    n = len(labels)
    K = gram(n * num_outputs) if K is None else K
    grid = TileGrid(n, num_outputs, tile_samples)
    job = make_job()
    profile = dataclasses.replace(job.plan.profile, num_logits=num_outputs)
    plan = dataclasses.replace(job.plan, grid=grid, profile=profile)
    identity = {"parameters": "3f2a", "samples": f"91bc{n}", "output": "full", "precision": "float64"}
    manifest = Manifest(identity, PROVENANCE if provenance is None else provenance, plan, dtypes, layout)
    store = create_store(path, manifest, Samples(np.arange(n), np.asarray(labels)))
    for index in store.missing_blocks():
        block = grid.block(index)
        rows = block.rows(num_outputs)
        store.commit_block(index, np.diag(K)[rows], np.zeros((block.stop - block.start, num_outputs)))
    store.create_kernels()
    for tile in grid.tiles():
        rows, cols = (grid.block(at).rows(num_outputs) for at in (tile.row, tile.col))
        store.commit(tile, K[rows, cols])
    store.finalize()
    if certificate is not None:
        store.set_manifest(dataclasses.replace(store.manifest, certificate=certificate))
    return open_store(path), K
