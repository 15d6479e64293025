"""The steps of the command `compute`: train a named network on a data set, and compute its kernel."""

import dataclasses
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkgen.data.dataset import Dataset, check_labels, sample_order
from ntkgen.engine.computation import LOCAL, Computation, Execution, layout_of, prepare_kernel
from ntkgen.engine.compute import make
from ntkgen.engine.machine import check_plan
from ntkgen.errors import InaccurateKernelError, InputError
from ntkgen.files.folder import File, Folder, LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.files.room import require_room
from ntkgen.inputs import Inputs
from ntkgen.jacobian.adapter import Target
from ntkgen.jacobian.probe import PROBE_SAMPLES
from ntkgen.origin import load_parts, take
from ntkgen.plan.plan import Budget, Plan
from ntkgen.plan.spec import KernelSpec
from ntkgen.plan.tiles import Part
from ntkgen.progress import Report, ignore_report
from ntkgen.store.describe import StoreDescription, describe
from ntkgen.store.opening import has_store, open_store
from ntkgen.store.provenance import Provenance
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training import fit as training
from ntkgen.training import zoo
from ntkgen.training.checkpoint import Checkpoint
from ntkgen.training.recipe import LEARNING_RATE, Recipe, TrainingRequest


@dataclass(frozen=True)
class KernelRequest:
    """The samples of a kernel, and the settings for its computation and storage."""

    subsample: int | None = None
    shuffle_seed: int | None = None
    against: str | None = None  # split of the columns; None means the samples of the rows
    against_subsample: int | None = None
    spec: KernelSpec = field(default_factory=KernelSpec)
    target: Target = field(default_factory=Target)


@dataclass(frozen=True)
class RunSetup:
    """The folder of the results, and the device and execution of the computation."""

    out: Folder
    device: torch.device
    execution: Execution = LOCAL
    data_dir: Path | None = None


@dataclass(frozen=True)
class PlannedKernel:
    """One network and its kernel, checked and planned but not started."""

    training: TrainingRequest
    kernel: KernelRequest
    setup: RunSetup
    data: Dataset
    inputs: Inputs
    model: nn.Module
    recipe: Recipe
    plan: Plan
    budget: Budget

    @property
    def checkpoint(self) -> File:
        """File of the trained network."""
        return _checkpoint_file(self.training, self.data, self.setup)

    @property
    def store(self) -> Folder:
        """Folder of the kernel's store."""
        return _store_folder(self.training, self.kernel, self.setup, self.data, self.inputs.counts)

    @property
    def layout(self) -> str:
        """Layout of the store, ``upper`` or ``full``."""
        return layout_of(self.kernel.spec, self.plan.grid)

    @property
    def disk_bytes(self) -> int:
        """Size of the finished kernel arrays in bytes."""
        return kernel_bytes(self.plan, self.kernel.spec.dtypes, self.layout)

    @property
    def missing_bytes(self) -> int:
        """Number of bytes that are not stored yet."""
        stored = open_store(self.store).stored_bytes if has_store(self.store) else 0
        return max(0, self.disk_bytes - stored)


def kernel_bytes(plan: Plan, dtypes: tuple[str, ...], layout: str) -> int:
    """Compute the size of all tiles in all dtypes, in bytes. Tiles at the edge are stored at full size."""
    grid = plan.grid
    chunks = grid.num_blocks * grid.num_col_blocks if layout == "full" else grid.num_tiles
    kernel = sum(grid.side**2 * np.dtype(dtype).itemsize + 4 for dtype in dtypes)
    layer = grid.side**2 * max(np.dtype(dtype).itemsize for dtype in dtypes) + 4
    return chunks * grid.num_planes * (kernel + grid.num_groups * layer)


def _dataset_name(data: Dataset) -> str:
    """Return the name of a data set. For a file this is the name without the folder, so that runs can be compared."""
    return os.path.basename(data.name) if data.name.endswith(".npz") else data.name


def _stem(request: TrainingRequest, data: Dataset) -> str:
    """Return the common part of the file names of one network. No code parses this name."""
    width = f"-w{request.width}" if request.width is not None else ""
    untrained = "-untrained" if request.num_epochs == 0 else ""
    dataset = _dataset_name(data).removesuffix(".npz")
    return f"{zoo.file_name(request.model)}{width}-{zoo.file_name(dataset)}{untrained}-seed{request.seed}"


def _checkpoint_file(request: TrainingRequest, data: Dataset, setup: RunSetup) -> File:
    return File(setup.out, f"{_stem(request, data)}.pt")


def _store_folder(
    request: TrainingRequest, kernel: KernelRequest, setup: RunSetup, data: Dataset, counts: tuple[int, int | None]
) -> Folder:
    n, against = counts
    shuffled = "" if kernel.shuffle_seed is None else f"-shuffled{kernel.shuffle_seed}"
    other = "" if against is None else f"-{kernel.against}{against}"
    output = "" if kernel.spec.output == "full" else f"-{kernel.spec.output.replace(':', '')}"
    precision = "" if kernel.spec.precision == "float32" else f"-{kernel.spec.precision}"
    of = f"-{_short_hash(kernel.target.described())}" if not kernel.target.is_plain else ""
    layers = ""
    if (groups := kernel.spec.per_layer) is not None:
        layers = f"-layers{f'-{_short_hash(groups)}' if groups else ''}"
    return setup.out / f"{_stem(request, data)}-n{n}{shuffled}{other}{output}{precision}{of}{layers}.zarr"


def _short_hash(values: Any) -> str:
    """Name a selection of outputs and parameters, or groups of parameters, in a path."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def plan_training(request: TrainingRequest, data: Dataset, setup: RunSetup) -> tuple[nn.Module, Recipe]:
    """Build the network and determine its recipe. Settings that the request leaves open come from the checkpoint.

    Raises:
        FingerprintError: If the checkpoint has another recipe.
    """
    model = zoo.build(request.model, data.num_classes, seed=request.seed, width=request.width)
    path = _checkpoint_file(request, data, setup)
    checkpoint = checkpoints.load(path) if path.exists else None
    num_epochs = Recipe.num_epochs if data.is_trainable else _epochs_without_labels(request, data)
    default = Recipe(
        num_epochs=num_epochs,
        model=request.model,
        dataset=_dataset_name(data),
        data_fingerprint=data.fingerprint(),
        seed=request.seed,
        width=request.width,
        learning_rate=LEARNING_RATE[training.has_batch_norm(model)],
    )
    requested = {name: getattr(request, name) for name in ("num_epochs", "batch_size", "learning_rate")}
    given = {name: value for name, value in requested.items() if value is not None}
    recorded = {} if checkpoint is None else {name: getattr(checkpoint.recipe, name) for name in requested}
    recipe = dataclasses.replace(default, **{**recorded, **given})
    if checkpoint is not None:
        checkpoints.check_recipe(path, checkpoint, recipe)
    return model, recipe


def _epochs_without_labels(request: TrainingRequest, data: Dataset) -> int:
    """Return zero epochs for data that no network can be trained on. A network of one's own may be trained already.

    Raises:
        InputError: If the network is to be trained.
    """
    if request.num_epochs or (request.num_epochs is None and ":" not in request.model):
        raise InputError(
            f"{request.model} cannot be trained on {data.name}: expected images x with the number of a class y for "
            "each sample, found samples of another form, or without such labels. Is the network trained already, or is "
            "the kernel at its initialisation meant? Set `num_epochs` 0."
        )
    return 0


def run_training(
    request: TrainingRequest,
    data: Dataset,
    setup: RunSetup,
    planned: tuple[nn.Module, Recipe],
    report: Report = ignore_report,
) -> tuple[Checkpoint, File]:
    """Train a network to its target, or load it from its checkpoint, under the lock of the checkpoint.

    If several parts of one kernel start at the same time, the first one trains, and the others wait.

    Raises:
        NotConvergedError: If the network has not reached the target, and the request does not allow that.
    """
    model, recipe = planned
    path, is_part = _checkpoint_file(request, data, setup), setup.execution.part is not None
    _require_trained(path, setup)

    def tell(epoch: int, step: int, num_steps: int, accuracy: float | None) -> None:
        report(
            "training", epoch * num_steps + step * (accuracy is None), recipe.num_epochs * num_steps, _note(accuracy)
        )

    waiting = partial(report, "waiting", 0, 1) if is_part else None
    with write_lock(path.folder / path.name, is_short=is_part, waiting=waiting):
        path.folder.sweep(f"{path.name}.*")
        checkpoint = training.train(
            model.to(setup.device), data, recipe, path, target_accuracy=request.target_accuracy, report=tell
        )
    if not request.allow_unconverged:
        training.require_convergence(path, checkpoint, request.target_accuracy)
    return checkpoint, path


def _require_trained(file: File, setup: RunSetup) -> None:
    """Require a trained network if several parts run with an object store, where no lock prevents repeated training.

    Raises:
        InputError: If the checkpoint is missing.
    """
    if setup.execution.part is not None and not isinstance(file.folder, LocalFolder) and not file.exists:
        raise InputError(
            f"There is no trained network at {file}: expected its checkpoint, found nothing. Several parts compute "
            "this kernel, and an object store has no lock, so that each part would train the network. Was the training "
            "left out? Run `ntkgen train` with the same options first."
        )


def _note(accuracy: float | None) -> str:
    return "" if accuracy is None else f"accuracy {accuracy:.2f} %"


def plan_kernel(
    request: TrainingRequest, kernel: KernelRequest, setup: RunSetup, data: Dataset, against: Dataset | None = None
) -> PlannedKernel:
    """Check a request and plan its kernel, before anything is computed or written.

    With a data set ``against`` the kernel is rectangular, and its columns are samples of that data set.

    Raises:
        DiskSpaceError: If the disk has no space for the missing part of the kernel.
        InputError: If the folder cannot be written.
        PlanError: If an unfinished store was begun on another kind of machine.
    """
    inputs = _inputs(kernel, data, against)
    setup.out.require_writable()
    model, recipe = plan_training(request, data, setup)
    network, aimed = inputs.aimed(model, kernel.target)
    requested = Computation(network, aimed, _probe(aimed, data), kernel.spec, setup.device, execution=setup.execution)
    prepared = prepare_kernel(requested)
    if data.is_trainable and kernel.target.select is None:
        check_labels(data.labels, prepared.network.profile.num_logits)
    machine = requested.machine()
    folder = _store_folder(request, kernel, setup, data, inputs.counts)
    store = open_store(folder) if has_store(folder) else None
    is_complete = store is not None and store.is_complete
    plan = store.manifest.plan if store is not None and (is_complete or not kernel.spec.replan) else prepared.plan()
    layout_of(kernel.spec, plan.grid)  # raises if the layout does not fit the grid
    if not is_complete:
        check_plan(plan, machine.environment)
        plan.cached_blocks(machine.budget)  # raises if the budget is too small
    planned = PlannedKernel(request, kernel, setup, data, inputs, model, recipe, plan, machine.budget)
    require_disk(setup, planned.missing_bytes)
    return planned


def _inputs(kernel: KernelRequest, data: Dataset, against: Dataset | None) -> Inputs:
    """Select the samples of a request, in its order.

    Raises:
        InputError: If the number of samples in the columns is given without their split.
    """
    if against is None and kernel.against_subsample is not None:
        raise InputError(
            f"`against_subsample` {kernel.against_subsample} was given without `against`: expected the split of the "
            "columns too, for example `against` test, which gives a rectangular kernel. Was `subsample` meant? Give "
            "both, or neither."
        )
    order = sample_order(data.num_samples, subsample=kernel.subsample, shuffle_seed=kernel.shuffle_seed)
    if against is None:
        return take(data, order)
    return take(
        data, order, against, sample_order(against.num_samples, subsample=kernel.against_subsample, shuffle_seed=None)
    )


def _probe(inputs: Inputs, data: Dataset) -> Tensor:
    """Choose samples for trial runs of a network, from the kernel and, because it can have few, from the data set."""
    if inputs.data is not None:
        return inputs.probe
    few = torch.arange(min(PROBE_SAMPLES, data.num_samples), device="cpu")
    return torch.cat([inputs.probe, data.inputs(few)])


def require_disk(setup: RunSetup, missing_bytes: int) -> None:
    """Require disk space for the missing parts of one or several kernels."""
    advice = (
        "Are there too many samples, dtypes or networks? Free disk space, choose another `out`, fewer `dtypes`, "
        "`layout` upper, or a smaller `subsample`."
    )
    require_room(setup.out, missing_bytes, "the missing parts of the kernels", advice)


@dataclass(frozen=True)
class FinishedKernel:
    """The result of a run: a finished kernel, or one part of it."""

    described: StoreDescription
    part: Part | None
    checkpoint: File
    train_accuracy: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values for scripts."""
        return self.described.to_json() | {
            "part": None if self.part is None else str(self.part),
            "checkpoint": str(self.checkpoint),
            "train_accuracy": self.train_accuracy,
            "seconds": self.seconds,
        }


def run_kernel(planned: PlannedKernel, report: Report = ignore_report) -> FinishedKernel:
    """Train the network, compute and certify the kernel, as far as missing, and describe the store.

    To certify a kernel means to measure its error. A kernel with a large error is described too.
    """
    started = time.monotonic()
    checkpoint, _ = run_training(planned.training, planned.data, planned.setup, (planned.model, planned.recipe), report)
    checkpoints.load_state(planned.model, checkpoint)
    kernel = computation_of(planned, _provenance(planned, checkpoint))
    load = partial(load_parts, planned.store, planned.setup.data_dir, planned.data.name)
    with suppress(InaccurateKernelError):  # the description contains the error, and the next kernels are computed
        make(planned.store, kernel, load, report)
    return FinishedKernel(
        described=describe(open_store(planned.store)),
        part=planned.setup.execution.part,
        checkpoint=planned.checkpoint,
        train_accuracy=checkpoint.train_accuracy,
        seconds=round(time.monotonic() - started, 3),
    )


def computation_of(planned: PlannedKernel, provenance: Provenance | None = None) -> Computation:
    """Collect network, samples and settings of a planned kernel for its computation."""
    model, inputs = planned.inputs.aimed(planned.model, planned.kernel.target)
    return Computation(
        model=model,
        inputs=inputs,
        probe=_probe(inputs, planned.data),
        spec=planned.kernel.spec,
        device=planned.setup.device,
        provenance=provenance or Provenance(),
        execution=planned.setup.execution,
    )


def _provenance(planned: PlannedKernel, checkpoint: Checkpoint) -> Provenance:
    """Collect the provenance of a store, without paths and times, so that two runs give equal bytes."""
    values = {
        "model": planned.training.model,
        "dataset": _dataset_name(planned.data),
        "seed": planned.training.seed,
        "width": planned.training.width,
        "subsample": planned.kernel.subsample,
        "shuffle_seed": planned.kernel.shuffle_seed,
        "against": planned.kernel.against,
        "against_subsample": planned.kernel.against_subsample,
        **planned.kernel.target.described(),
        **({} if int(planned.data.labels.min()) >= 0 else {"has_labels": False}),
        "raw_images": not (planned.data.zoo_sized or planned.data.name.endswith(".npz")),  # files have one size only
        "num_epochs": planned.recipe.num_epochs,
        "target_accuracy": planned.training.target_accuracy,
        "epochs": checkpoint.epoch,
        "train_accuracy": checkpoint.train_accuracy,
        "train_loss": checkpoint.train_loss,
        "learning_rate": planned.recipe.learning_rate,
        "batch_size": planned.recipe.batch_size,
        "checkpoint": planned.checkpoint.name,
    }
    return Provenance.of(values)
