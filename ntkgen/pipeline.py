"""Name and data set → checkpoint → kernel: what the command `compute` calls."""

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ntkgen import checkpoint as checkpoints
from ntkgen import training, zoo
from ntkgen.checkpoint import Checkpoint, Recipe, array_fingerprint, parameter_fingerprint
from ntkgen.data import Dataset, check_labels, sample_order
from ntkgen.errors import DiskSpaceError, InputError
from ntkgen.jacobian.network import Network, prepare
from ntkgen.jacobian.precision import policy
from ntkgen.kernel import engine
from ntkgen.kernel.arrays import Samples
from ntkgen.kernel.manifest import Manifest, check_identity, resolve_layout
from ntkgen.kernel.plan import Budget, Plan, count_factor_samples, make_plan
from ntkgen.kernel.report import describe
from ntkgen.kernel.store import KernelStore, create_store, open_store
from ntkgen.kernel.tiles import make_grid
from ntkgen.lock import write_lock
from ntkgen.units import human_bytes

# So many samples of the data set are looked at for two different ones to try a network on.
PROBE_SAMPLES = 16


@dataclass(frozen=True)
class TrainingRequest:
    """Which network to train, and how. None takes what the checkpoint has, or else the default."""

    model: str
    seed: int = 0
    width: int | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    target_accuracy: float = 99.5
    allow_unconverged: bool = False


@dataclass(frozen=True)
class KernelRequest:
    """Which kernel to compute of it, and how it is to be stored."""

    subsample: int | None = None
    shuffle_seed: int | None = None
    precision: str = "float32"
    dtypes: tuple[str, ...] = ("float16", "float32")
    layout: str = "auto"
    tile_side: int | None = None
    memory_bytes: int | None = None
    replan: bool = False


@dataclass(frozen=True)
class Place:
    """Where everything happens."""

    out: Path
    device: torch.device


class Report(Protocol):
    """Called as the stages ``training``, ``diagonal`` and ``tiles`` proceed, with a note for people."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Tell how far a stage has come."""


def ignore_report(stage: str, done: int, total: int, note: str = "") -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Job:
    """One network and one kernel, checked and planned but not begun."""

    training: TrainingRequest
    kernel: KernelRequest
    place: Place
    data: Dataset
    order: Tensor
    model: nn.Module
    recipe: Recipe
    plan: Plan
    budget: Budget

    @property
    def checkpoint_path(self) -> Path:
        """Where the network is kept."""
        return _checkpoint_path(self.training, self.data, self.place)

    @property
    def store_path(self) -> Path:
        """Where the kernel is kept."""
        return _store_path(self.training, self.kernel, self.place, self.data, len(self.order))

    @property
    def layout(self) -> str:
        """One triangle or both."""
        return resolve_layout(self.kernel.layout, self.plan.grid.num_rows, self.kernel.dtypes)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the finished kernel arrays."""
        return kernel_bytes(self.plan, self.kernel.dtypes, self.layout)

    @property
    def missing_bytes(self) -> int:
        """Bytes of it that are not on disk yet."""
        there = open_store(self.store_path).stored_bytes if self.store_path.exists() else 0
        return max(0, self.disk_bytes - there)


def kernel_bytes(plan: Plan, dtypes: tuple[str, ...], layout: str) -> int:
    """Count the bytes of all tiles in all dtypes; edge tiles are stored at full size."""
    grid = plan.grid
    chunks = grid.num_blocks**2 if layout == "full" else grid.num_tiles
    return chunks * sum(grid.side**2 * np.dtype(dtype).itemsize + 4 for dtype in dtypes)


def _dataset_name(data: Dataset) -> str:
    """Name a data set; of a file, without the folder, from wherever the command is run."""
    return os.path.basename(data.name) if data.name.endswith(".npz") else data.name


def _stem(request: TrainingRequest, data: Dataset) -> str:
    """Name what belongs to one network: nothing is read from it, it is for people."""
    width = f"-w{request.width}" if request.width is not None else ""
    built = "-untrained" if request.num_epochs == 0 else ""
    dataset = _dataset_name(data).removesuffix(".npz")
    return f"{zoo.file_name(request.model)}{width}-{zoo.file_name(dataset)}{built}-seed{request.seed}"


def _checkpoint_path(request: TrainingRequest, data: Dataset, place: Place) -> Path:
    return place.out / f"{_stem(request, data)}.pt"


def _store_path(request: TrainingRequest, kernel: KernelRequest, place: Place, data: Dataset, n: int) -> Path:
    shuffled = "" if kernel.shuffle_seed is None else f"-shuffled{kernel.shuffle_seed}"
    precision = "" if kernel.precision == "float32" else f"-{kernel.precision}"
    return place.out / f"{_stem(request, data)}-n{n}{shuffled}{precision}.zarr"


def plan_training(request: TrainingRequest, data: Dataset, place: Place) -> tuple[nn.Module, Recipe]:
    """Build the network and fix its recipe; settings left open are the checkpoint's, where there is one.

    Raises:
        FingerprintError: If there is a checkpoint of another recipe.
    """
    model = zoo.build(request.model, data.num_classes, seed=request.seed, width=request.width)
    path = _checkpoint_path(request, data, place)
    found = checkpoints.load(path) if path.exists() else None
    default = Recipe(
        model=request.model,
        dataset=_dataset_name(data),
        data_fingerprint=data.fingerprint(),
        seed=request.seed,
        width=request.width,
        learning_rate=training.LEARNING_RATE[training.has_batch_norm(model)],
    )
    asked = {name: getattr(request, name) for name in ("num_epochs", "batch_size", "learning_rate")}
    given = {name: value for name, value in asked.items() if value is not None}
    kept = {} if found is None else {name: getattr(found.recipe, name) for name in asked}
    recipe = dataclasses.replace(default, **{**kept, **given})
    if found is not None:
        checkpoints.check_recipe(path, found, recipe)
    return model, recipe


def run_training(
    request: TrainingRequest,
    data: Dataset,
    place: Place,
    planned: tuple[nn.Module, Recipe],
    report: Report = ignore_report,
) -> tuple[Checkpoint, Path]:
    """Train a network to its target, or take it from its checkpoint, under the lock of that checkpoint.

    Raises:
        NotConvergedError: If it has not reached the target and the request does not allow that.
    """
    model, recipe = planned
    path = _checkpoint_path(request, data, place)

    def tell(epoch: int, step: int, num_steps: int, accuracy: float | None) -> None:
        report(
            "training", epoch * num_steps + step * (accuracy is None), recipe.num_epochs * num_steps, _note(accuracy)
        )

    with write_lock(path):
        checkpoint = training.train(
            model.to(place.device), data, recipe, path, target_accuracy=request.target_accuracy, report=tell
        )
    if not request.allow_unconverged:
        training.require_convergence(path, checkpoint, request.target_accuracy)
    return checkpoint, path


def _note(accuracy: float | None) -> str:
    return "" if accuracy is None else f"accuracy {accuracy:.2f} %"


def plan_job(request: TrainingRequest, kernel: KernelRequest, place: Place, data: Dataset) -> Job:
    """Check everything that can be wrong, and plan the kernel, before anything runs or is written.

    Raises:
        DiskSpaceError: If the disk has no room for what is missing of the kernel.
        InputError: If the folder cannot be written.
        PlanError: If an unfinished store was begun on another kind of machine.
    """
    order = sample_order(data.num_samples, subsample=kernel.subsample, shuffle_seed=kernel.shuffle_seed)
    model, recipe = plan_training(request, data, place)
    require_writable(place.out)
    network = prepare(model, _probe(data), policy(kernel.precision), place.device)
    check_labels(data.labels, network.profile.num_outputs)
    budget = engine.memory_budget(place.device, kernel.memory_bytes)
    path = _store_path(request, kernel, place, data, len(order))
    store = open_store(path) if path.exists() else None
    is_complete = store is not None and store.is_complete
    if store is not None and (is_complete or not kernel.replan):
        plan = store.manifest.plan
    else:
        plan = _new_plan(network, kernel, len(order), budget)
    if not is_complete:
        engine.check_environment(plan, place.device)
        plan.cached_blocks(budget)  # raises where the budget is too small
    job = Job(request, kernel, place, data, order, model, recipe, plan, budget)
    require_disk(place, job.missing_bytes)
    return job


def _probe(data: Dataset) -> Tensor:
    """Take some samples to try a network on, whichever the kernel is of."""
    return data.inputs(torch.arange(min(PROBE_SAMPLES, data.num_samples)))


def require_writable(out: Path) -> None:
    """Refuse a folder that cannot be written, or made.

    Raises:
        InputError: If there is a file at the path or above it, or no permission.
    """
    nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"Nothing can be written below {nearest}: expected a folder with permission to write, found "
            f"{'one without' if nearest.is_dir() else 'a file'}. Is --out spelled right? Choose another."
        )


def _new_plan(network: Network, kernel: KernelRequest, num_samples: int, budget: Budget) -> Plan:
    grid = make_grid(num_samples, network.profile.num_outputs, kernel.tile_side)
    return make_plan(
        network.profile,
        grid,
        precision=kernel.precision,
        budget=budget,
        environment=engine.environment(network.device),
    )


def require_disk(place: Place, missing_bytes: int) -> None:
    """Refuse what the disk has no room for.

    Raises:
        DiskSpaceError: If it has not; the message has both numbers.
    """
    free = engine.free_disk_bytes(place.out)
    if missing_bytes > free:
        raise DiskSpaceError(
            f"The disk at {place.out} has no room for this: {human_bytes(missing_bytes)} are needed and "
            f"{human_bytes(free)} are free. Too many samples, dtypes or networks for it? Free some, choose another "
            "--out, fewer --dtype, --layout upper, or a smaller --subsample."
        )


def run_job(job: Job, report: Report = ignore_report) -> dict[str, Any]:
    """Train and compute what is missing, and describe the finished kernel."""
    started = time.monotonic()
    checkpoint, _ = run_training(job.training, job.data, job.place, (job.model, job.recipe), report)
    checkpoints.load_state(job.model, checkpoint)
    x = job.data.inputs(job.order)
    labels = job.data.labels[job.order]
    identity = {
        "parameters": parameter_fingerprint(job.model),
        "samples": array_fingerprint(x, labels, job.order),
        "precision": job.kernel.precision,
        "tile_side": make_grid(len(job.order), job.plan.grid.num_outputs, job.kernel.tile_side).side,
        "dtypes": list(job.kernel.dtypes),
        "layout": job.layout,
    }
    with write_lock(job.store_path):
        network = prepare(job.model, _probe(job.data), policy(job.kernel.precision), job.place.device)
        store = _open_or_create(job, network, identity, _provenance(job, checkpoint))
        if not store.is_complete:
            cached_blocks = store.manifest.plan.cached_blocks(job.budget)
            engine.run(network, x, store, cached_blocks=cached_blocks, report=report)
    return describe(store) | {
        "checkpoint": str(job.checkpoint_path),
        "train_accuracy": checkpoint.train_accuracy,
        "seconds": round(time.monotonic() - started, 3),
    }


def _open_or_create(
    job: Job, network: Network, identity: Mapping[str, Any], provenance: Mapping[str, Any]
) -> KernelStore:
    """Open the store to continue it, or create it with the plan for the network as it is after training."""
    path, samples = job.store_path, Samples(job.order.numpy(), job.data.labels[job.order].numpy())
    if not path.exists():
        plan = _new_plan(network, job.kernel, len(job.order), job.budget)
        manifest = Manifest(identity, provenance, plan, job.kernel.dtypes, job.layout)
        return create_store(path, manifest, samples)
    store = open_store(path, mode="r+")
    check_identity(path, store.manifest, identity)
    store.repair(samples)
    if job.kernel.replan and not store.is_complete:  # the tiles that are there stay, within the stated bound
        plan = _new_plan(network, job.kernel, len(job.order), job.budget)
        store.set_manifest(dataclasses.replace(store.manifest, plan=plan, replanned=store.manifest.replanned + 1))
    return store


def _provenance(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect what a reader of the store wants to know. No path and no time: two runs give equal bytes."""
    return {
        "model": job.training.model,
        "dataset": _dataset_name(job.data),
        "seed": job.training.seed,
        "width": job.training.width,
        "subsample": job.kernel.subsample,
        "shuffle_seed": job.kernel.shuffle_seed,
        "epochs": checkpoint.epoch,
        "train_accuracy": checkpoint.train_accuracy,
        "train_loss": checkpoint.train_loss,
        "learning_rate": job.recipe.learning_rate,
        "batch_size": job.recipe.batch_size,
        "checkpoint": job.checkpoint_path.name,
    }


def project(job: Job) -> dict[str, Any]:
    """Say what a job would do, as plain values."""
    plan, path = job.plan, job.store_path
    cached_blocks = plan.cached_blocks(job.budget)
    store = open_store(path) if path.exists() else None
    tiles = list(plan.grid.tiles()) if store is None else store.missing_tiles()
    diagonal = list(range(plan.grid.num_blocks)) if store is None else store.missing_blocks()
    return {
        "store": str(path),
        "model": job.training.model,
        "dataset": job.data.name,
        "num_samples": plan.grid.num_samples,
        "num_outputs": plan.grid.num_outputs,
        "num_params": plan.profile.num_params,
        "rows": plan.grid.num_rows,
        "dtypes": list(job.kernel.dtypes),
        "layout": job.layout,
        "tile_side": plan.grid.side,
        "tiles": plan.grid.num_tiles,
        "tiles_missing": len(tiles),
        "disk_bytes": job.disk_bytes,
        "projected_bytes": plan.projected_bytes(cached_blocks),
        "projected_flops": plan.projected_flops(tiles, cached_blocks, diagonal),
        "factor_samples": count_factor_samples(plan, tiles, cached_blocks, diagonal),
    }
