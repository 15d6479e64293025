"""Loading of the network and the samples of a store, and recomputation of its tiles or its certificate from them.

A certificate is the measured error bound of a kernel.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ntkgen.checks.certify import add_certificate
from ntkgen.checks.sampling import Sampling
from ntkgen.data import dataset as datasets
from ntkgen.data.dataset import Dataset
from ntkgen.engine.machine import memory_budget
from ntkgen.engine.recompute import Recomputed, Resources, draw_tiles, recompute
from ntkgen.errors import DataError, FingerprintError, InputError, StoreError
from ntkgen.files.folder import File, Folder, LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.files.paths import expanded
from ntkgen.inputs import Inputs
from ntkgen.jacobian.adapter import Target
from ntkgen.jacobian.samples import data_of
from ntkgen.plan.order import projected_flops
from ntkgen.plan.plan import Budget
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, ignore_report
from ntkgen.store.certificate import Certificate
from ntkgen.store.opening import open_store
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training import zoo
from ntkgen.training.checkpoint import Checkpoint

# Maximum number of operations of a tile that is recomputed by default. It takes about a minute on two cores.
QUICK_FLOPS = 10**13


@dataclass(frozen=True)
class Origin:
    """The network and the samples of a store. They match the identity of the store."""

    model: nn.Module
    inputs: Inputs


def load_origin(
    store: KernelStore, data_dir: Path | None = None, dataset: str | None = None, *, download: bool = True
) -> Origin:
    """Load the network from the checkpoint beside a store, and the samples from the data set of its provenance.

    Args:
        store: Store that `ntkgen compute` has written.
        data_dir: Folder of the data sets. An `.npz` file is searched there, in the current folder and beside the store.
        dataset: New path of the data set if it was moved, as PATH.npz.
        download: Whether a missing data set may be downloaded.

    Raises:
        StoreError: If the store has no provenance, or if its checkpoint is missing.
        DataError: If an `.npz` file is missing.
        FingerprintError: If network or samples are not those of the store.
    """
    source = _source(store)
    checkpoint = _checkpoint(store, source.checkpoint)
    name = dataset or _locate(source.dataset, [data_dir, Path(), _beside(store)])
    load = partial(datasets.load, name, data_dir=data_dir, any_form=True)
    load = load if download else partial(load, download=False)
    data = load()
    if checkpoint.recipe.num_epochs:
        data = _as_trained(data, checkpoint)
    elif source.raw_images:
        data = dataclasses.replace(data, zoo_sized=False)
    model = zoo.build(source.model, data.num_classes, seed=source.seed, width=source.width)
    checkpoints.load_state(model, checkpoint)
    against, columns = None, None
    if (split := source.against) is not None:
        against = dataclasses.replace(load(split=split), zoo_sized=data.zoo_sized)
        columns = _positions(store, "col_sample_index", against)
    inputs = take(data, _positions(store, "sample_index", data), against, columns)
    _check_samples(store, inputs)
    return Origin(*inputs.aimed(model, Target.of(None, source.select, source.params)))


@dataclass(frozen=True)
class _Source:
    """The entries of a store's provenance that are needed to load its network and its samples again."""

    model: str
    dataset: str
    seed: int
    width: int | None
    checkpoint: str
    against: str | None
    select: str | None
    params: Sequence[str] | None
    raw_images: bool | None


def _source(store: KernelStore) -> _Source:
    """Read the source of a kernel from the provenance of its store.

    Raises:
        StoreError: If an entry is missing.
    """
    known = store.manifest.provenance
    if known.model is None or known.dataset is None or known.seed is None or known.checkpoint is None:
        missing = [name for name in ("model", "dataset", "seed", "checkpoint") if getattr(known, name) is None]
        raise StoreError(
            f"The store at {store.name} does not name its network and its samples: expected the provenance that "
            f"`ntkgen compute` writes, found one without {', '.join(missing)}. Was it made in Python, with "
            "ntkgen.compute? Check it there, with ntkgen.checks.certify."
        )
    return _Source(
        known.model,
        known.dataset,
        known.seed,
        known.width,
        known.checkpoint,
        known.against,
        known.select,
        known.params,
        known.raw_images,
    )


def _checkpoint(store: KernelStore, name: str) -> Checkpoint:
    file = File(store.folder.parent, name)
    if not file.exists:
        raise StoreError(
            f"The network of {store.name} is missing: expected its checkpoint at {file}, found nothing. Was the store "
            "or the checkpoint moved or removed? Put the checkpoint beside the store."
        )
    return checkpoints.load(file)


def _beside(store: KernelStore) -> Path | None:
    return store.path.parent if isinstance(store.folder, LocalFolder) else None


def _locate(name: str, folders: list[Path | None]) -> str:
    """Find the file of a data set. The provenance holds its name without the folder. Other names are returned as given.

    Raises:
        DataError: If none of the folders holds the file.
    """
    if not name.endswith(".npz"):
        return name
    places = [expanded(folder / name) for folder in folders if folder is not None]
    for place in places:
        if place.exists():
            return str(place)
    raise DataError(
        f"The data set {name} is missing: expected it at one of {', '.join(map(str, places))}, found none. Was it "
        "moved? Give its folder as `data_dir`."
    )


def _as_trained(data: Dataset, checkpoint: Checkpoint) -> Dataset:
    """Choose the image size that the network was trained with, by the fingerprint in the checkpoint.

    Raises:
        FingerprintError: If the data set does not have this fingerprint in either size.
    """
    expected = checkpoint.recipe.data_fingerprint
    for candidate in (data, dataclasses.replace(data, zoo_sized=False)):
        if candidate.fingerprint() == expected:
            return candidate
    raise FingerprintError(
        f"The data set {data.name} is not the one of the checkpoint: expected the fingerprint {expected[:8]}…, found "
        f"{data.fingerprint()[:8]}…. Was the file changed, or is it another release? Use the release that the network "
        "was trained with."
    )


def _positions(store: KernelStore, name: str, data: Dataset) -> Tensor:
    index = torch.from_numpy(store.read(name).copy())
    if int(index.max()) >= data.num_samples:
        raise FingerprintError(
            f"The samples of {store.name} are not all in {data.name}: expected at least {int(index.max()) + 1}, found "
            f"{data.num_samples}. Is it another release of the data set? Use the release that the store was made with."
        )
    return index


def _check_samples(store: KernelStore, inputs: Inputs) -> None:
    stored, loaded = str(store.manifest.identity.get("samples")), inputs.fingerprint()
    if stored != loaded:
        raise FingerprintError(
            f"The loaded samples are not those of {store.name}: expected the fingerprint {stored[:8]}…, found "
            f"{loaded[:8]}…. Was the data set changed, or is it another one of the same name? Give the folder of the "
            "original data set as `data_dir`."
        )


def load_parts(folder: Folder, data_dir: Path | None, dataset: str | None) -> tuple[nn.Module, Inputs]:
    """Load the network and the samples of a store on a worker of a cluster."""
    origin = load_origin(open_store(folder), data_dir, dataset)
    return origin.model, origin.inputs


def take(data: Dataset, order: Tensor, against: Dataset | None = None, columns: Tensor | None = None) -> Inputs:
    """Select samples of a data set by their positions, and samples of another data set for the columns."""
    if data.arrays:
        samples = data_of(data.arguments(order))
        return Inputs(samples.numbers()[0], Samples(order.numpy(), data.labels[order].numpy()), data=samples)
    if against is None or columns is None:
        return Inputs(data.inputs(order), Samples(order.numpy(), data.labels[order].numpy()))
    other = Samples(columns.numpy(), against.labels[columns].numpy())
    return Inputs(
        data.inputs(order), Samples(order.numpy(), data.labels[order].numpy(), other), against.inputs(columns)
    )


def certify_again(
    folder: Folder, data_dir: Path | None, sampling: Sampling, device: torch.device, report: Report = ignore_report
) -> Certificate:
    """Certify a finished store again with its network and samples, and write the certificate into it, under its lock.

    Raises:
        FingerprintError: If network or samples are not those of the store.
        StoreError: If tiles are missing or damaged, or if the store has no provenance.
    """
    with write_lock(folder):
        store = open_store(folder, mode="r+")
        origin = load_origin(store, data_dir)
        return add_certificate(store, origin.model.to(device), origin.inputs, sampling, report=report)


@dataclass(frozen=True)
class RecomputeSettings:
    """The number of recomputed tiles, and the resources for them."""

    num_tiles: int | None  # None means one tile, if it is quick
    seed: int
    device: torch.device
    memory_bytes: int | None = None
    data_dir: Path | None = None
    download: bool = True  # whether a missing data set may be downloaded


def recompute_tiles(
    store: KernelStore, tiles: Sequence[Tile], settings: RecomputeSettings, report: Report = ignore_report
) -> list[Recomputed]:
    """Compute randomly chosen stored tiles again from the network and samples of the store, and compare them.

    Raises:
        FingerprintError: If network or samples are not those of the store.
        StoreError: If the store has no provenance, or if its checkpoint is missing.
        DataError: If the data set is missing.
        InputError: If no number of tiles is given and one tile would take more than about a minute.
        BudgetError: If the memory is too small for one tile.
    """
    drawn = draw_tiles(tiles, 1 if settings.num_tiles is None else settings.num_tiles, settings.seed)
    if not drawn:
        return []
    _source(store)  # raises an error for an incomplete provenance before anything is measured
    budget = memory_budget(settings.device, settings.memory_bytes)
    if settings.num_tiles is None:
        _require_quick(store, drawn, budget)
    origin = load_origin(store, settings.data_dir, download=settings.download)
    return recompute(store, origin.model, origin.inputs, drawn, Resources(settings.device, budget), report)


def _require_quick(store: KernelStore, tiles: Sequence[Tile], budget: Budget) -> None:
    plan = store.manifest.plan
    flops = projected_flops(plan, tiles, plan.cached_blocks(budget))
    if flops > QUICK_FLOPS:
        raise InputError(
            f"A tile of {store.name} takes {flops:.1e} operations: expected at most {QUICK_FLOPS:.0e} for the tile "
            "that is recomputed by default, about a minute on two cores. Is the network large? Request the tile with "
            "`num_tiles` 1."
        )
