"""From the store of a command back to its network and samples; and tiles or a certificate computed from them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ntkgen.checks.certify import add_certificate
from ntkgen.data import dataset as datasets
from ntkgen.data.dataset import Dataset
from ntkgen.engine.machine import memory_budget
from ntkgen.engine.recompute import Recomputed, Resources, draw_tiles, recompute
from ntkgen.errors import DataError, FingerprintError, InputError, StoreError
from ntkgen.files.folder import File, Folder, LocalFolder
from ntkgen.files.lock import write_lock
from ntkgen.files.paths import expanded
from ntkgen.inputs import Inputs
from ntkgen.plan.plan import Budget
from ntkgen.plan.tiles import Tile
from ntkgen.progress import Report, ignore_report
from ntkgen.store.certificate import Certificate, Sampling
from ntkgen.store.opening import open_store
from ntkgen.store.schema import Samples
from ntkgen.store.store import KernelStore
from ntkgen.training import checkpoint as checkpoints
from ntkgen.training import zoo
from ntkgen.training.checkpoint import Checkpoint

# Maximum operations of a tile that is recomputed without being asked for: about a minute on two cores.
QUICK_FLOPS = 10**13


@dataclass(frozen=True)
class Origin:
    """The network and the samples of a store, checked against its identity."""

    model: nn.Module
    inputs: Inputs


def load_origin(
    store: KernelStore, data_dir: Path | None = None, dataset: str | None = None, *, download: bool = True
) -> Origin:
    """Load the network and the samples of a store: the checkpoint beside it, and the data set of its provenance.

    Args:
        store: A store that `ntkgen compute` made.
        data_dir: The folder of the data sets. An `.npz` file is looked for there, in the current folder and beside the
            store.
        dataset: The new path of the data set if it was moved, as PATH.npz.
        download: Whether a missing data set may be downloaded.

    Raises:
        StoreError: If the store has no provenance, or its checkpoint is missing.
        DataError: If an `.npz` file is missing.
        FingerprintError: If network or samples are not those of the store.
    """
    made = _source(store)
    checkpoint = _checkpoint(store, made.checkpoint)
    name = dataset or _locate(made.dataset, [data_dir, Path(), _beside(store)])
    load = partial(datasets.load, name, data_dir=data_dir)
    load = load if download else partial(load, download=False)
    data = _as_trained(load(), checkpoint)
    model = zoo.build(made.model, data.num_classes, seed=made.seed, width=made.width)
    checkpoints.load_state(model, checkpoint)
    against, columns = None, None
    if (split := made.against) is not None:
        against = dataclasses.replace(load(split=split), zoo_sized=data.zoo_sized)
        columns = _positions(store, "col_sample_index", against)
    inputs = take(data, _positions(store, "sample_index", data), against, columns)
    _check_samples(store, inputs)
    return Origin(model, inputs)


@dataclass(frozen=True)
class _Source:
    """What a store must say of its network and its samples so that both can be loaded again."""

    model: str
    dataset: str
    seed: int
    width: int | None
    checkpoint: str
    against: str | None


def _source(store: KernelStore) -> _Source:
    """Read from a store what its network and its samples are.

    Raises:
        StoreError: If it does not say so.
    """
    made = store.manifest.provenance
    if made.model is None or made.dataset is None or made.seed is None or made.checkpoint is None:
        lacking = [name for name in ("model", "dataset", "seed", "checkpoint") if getattr(made, name) is None]
        raise StoreError(
            f"The store at {store.name} does not say what it was made of: expected the provenance of `ntkgen compute`, "
            f"found one without {', '.join(lacking)}. Was it made in Python, with ntkgen.compute? Compare it there, "
            "with ntkgen.checks.certify."
        )
    return _Source(made.model, made.dataset, made.seed, made.width, made.checkpoint, made.against)


def _checkpoint(store: KernelStore, name: str) -> Checkpoint:
    file = File(store.folder.parent, name)
    if not file.exists:
        raise StoreError(
            f"The network of {store.name} has gone: expected its checkpoint at {file}, found nothing. Was one of them "
            "moved or removed? Put the checkpoint beside the store."
        )
    return checkpoints.load(file)


def _beside(store: KernelStore) -> Path | None:
    return store.path.parent if isinstance(store.folder, LocalFolder) else None


def _locate(name: str, folders: list[Path | None]) -> str:
    """Find the file of a data set that is a file. A store keeps its name without the folder.

    Raises:
        DataError: If it is in none of the folders.
    """
    if not name.endswith(".npz"):
        return name
    places = [expanded(folder / name) for folder in folders if folder is not None]
    for place in places:
        if place.exists():
            return str(place)
    raise DataError(
        f"The data set {name} is not to be found: expected it at one of {', '.join(map(str, places))}. Was it moved? "
        "Say in which folder it lies with `data_dir`."
    )


def _as_trained(data: Dataset, checkpoint: Checkpoint) -> Dataset:
    """Choose the size of the images for which the network was made, by the fingerprint in the checkpoint.

    Raises:
        FingerprintError: If neither size has this fingerprint.
    """
    expected = checkpoint.recipe.data_fingerprint
    for candidate in (data, dataclasses.replace(data, zoo_sized=False)):
        if candidate.fingerprint() == expected:
            return candidate
    raise FingerprintError(
        f"The data set {data.name} is not the one of the checkpoint: expected the fingerprint {expected[:8]}…, found "
        f"{data.fingerprint()[:8]}…. Was the file changed, or is it another release? Use the one that the network was "
        "made with."
    )


def _positions(store: KernelStore, name: str, data: Dataset) -> Tensor:
    index = torch.from_numpy(store.read(name).copy())
    if int(index.max()) >= data.num_samples:
        raise FingerprintError(
            f"The samples of {store.name} are not all in {data.name}: expected at least {int(index.max()) + 1}, found "
            f"{data.num_samples}. Is it another release of the data set? Use the one that the store was made with."
        )
    return index


def _check_samples(store: KernelStore, inputs: Inputs) -> None:
    theirs, mine = str(store.manifest.identity.get("samples")), inputs.fingerprint()
    if theirs != mine:
        raise FingerprintError(
            f"The samples of {store.name} are not those found (expected the fingerprint {theirs[:8]}…, found "
            f"{mine[:8]}…). Was the data set changed, or is it another one of the same name? Say with `data_dir` where "
            "the one lies that the store was made with."
        )


def load_parts(folder: Folder, data_dir: Path | None, dataset: str | None) -> tuple[nn.Module, Inputs]:
    """Load network and samples of a store, as a worker of a cluster does."""
    origin = load_origin(open_store(folder), data_dir, dataset)
    return origin.model, origin.inputs


def take(data: Dataset, order: Tensor, against: Dataset | None = None, columns: Tensor | None = None) -> Inputs:
    """Take samples of a data set, by their positions in it, and those of the columns of another."""
    if against is None or columns is None:
        return Inputs(data.inputs(order), Samples(order.numpy(), data.labels[order].numpy()))
    other = Samples(columns.numpy(), against.labels[columns].numpy())
    return Inputs(
        data.inputs(order), Samples(order.numpy(), data.labels[order].numpy(), other), against.inputs(columns)
    )


def certify_again(
    folder: Folder, data_dir: Path | None, sampling: Sampling, device: torch.device, report: Report = ignore_report
) -> Certificate:
    """Certify a finished store again, from its origin, and write the certificate into it, under its lock.

    Raises:
        FingerprintError: If network or samples are not those of the store.
        StoreError: If tiles are missing or damaged, or the store has no provenance.
    """
    with write_lock(folder):
        store = open_store(folder, mode="r+")
        origin = load_origin(store, data_dir)
        return add_certificate(store, origin.model.to(device), origin.inputs, sampling, report=report)


@dataclass(frozen=True)
class RecomputeSettings:
    """How many tiles are recomputed, and with what."""

    num_tiles: int | None  # None: one tile, if that is quick
    seed: int
    device: torch.device
    memory_bytes: int | None = None
    data_dir: Path | None = None
    download: bool = True  # whether a missing data set may be downloaded


def recompute_tiles(
    store: KernelStore, tiles: Sequence[Tile], settings: RecomputeSettings, report: Report = ignore_report
) -> list[Recomputed]:
    """Compute some of the stored tiles again, drawn at random, from the origin of the store, and compare them.

    Raises:
        FingerprintError: If network or samples are not those of the store.
        StoreError: If the store has no provenance, or its checkpoint is missing.
        DataError: If the data set is missing.
        InputError: If no number is given and one tile would take long.
        BudgetError: If the memory is too small for one tile.
    """
    drawn = draw_tiles(tiles, 1 if settings.num_tiles is None else settings.num_tiles, settings.seed)
    if not drawn:
        return []
    _source(store)  # raises before anything is measured where the store does not say it
    budget = memory_budget(settings.device, settings.memory_bytes)
    if settings.num_tiles is None:
        _require_quick(store, drawn, budget)
    origin = load_origin(store, settings.data_dir, download=settings.download)
    return recompute(store, origin.model, origin.inputs, drawn, Resources(settings.device, budget), report)


def _require_quick(store: KernelStore, tiles: Sequence[Tile], budget: Budget) -> None:
    plan = store.manifest.plan
    flops = plan.projected_flops(tiles, plan.cached_blocks(budget))
    if flops > QUICK_FLOPS:
        raise InputError(
            f"A tile of {store.name} takes {flops:.1e} operations: expected at most {QUICK_FLOPS:.0e} "
            "for a tile that is recomputed unasked, about a minute on two cores. Is the network large? Ask for it with "
            "`num_tiles` 1."
        )
