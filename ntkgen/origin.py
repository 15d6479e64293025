"""What the kernel store of a command was made of, found again: the network, the samples, and a new certificate."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen import checkpoint as checkpoints
from ntkgen import data as datasets
from ntkgen import zoo
from ntkgen.checkpoint import Checkpoint
from ntkgen.data import Dataset
from ntkgen.errors import DataError, FingerprintError, StoreError
from ntkgen.kernel.certificate import Certificate, Sampling
from ntkgen.kernel.certify import add_certificate
from ntkgen.kernel.inputs import Inputs
from ntkgen.kernel.store import KernelStore, open_store
from ntkgen.lock import write_lock
from ntkgen.pipeline import Report, ignore_report, take


@dataclass(frozen=True)
class Origin:
    """The network and the samples of a store, as its identity says they were."""

    model: nn.Module
    inputs: Inputs


def load_origin(store: KernelStore, data_dir: Path | None = None, dataset: str | None = None) -> Origin:
    """Load what a store was made of: the checkpoint beside it, and the data set that its provenance names.

    Args:
        store: A store that `ntkgen compute` made.
        data_dir: The folder of the data sets. An `.npz` file is looked for there, in the current folder and beside the
            store.
        dataset: Where the data set has moved to, as PATH.npz.

    Raises:
        StoreError: If the store does not say what it was made of, or the checkpoint has gone.
        DataError: If an `.npz` file has gone.
        FingerprintError: If network or samples are not those that the store was made of.
    """
    made = _provenance(store)
    checkpoint = _checkpoint(store, made["checkpoint"])
    name = dataset or _locate(made["dataset"], [data_dir, Path(), store.path.parent])
    data = _as_trained(datasets.load(name, data_dir=data_dir), checkpoint)
    model = zoo.build(made["model"], data.num_classes, seed=made["seed"], width=made["width"])
    checkpoints.load_state(model, checkpoint)
    against, columns = None, None
    if (split := made.get("against")) is not None:
        against = dataclasses.replace(datasets.load(name, data_dir=data_dir, split=split), zoo_sized=data.zoo_sized)
        columns = _positions(store, "col_sample_index", against)
    inputs = take(data, _positions(store, "sample_index", data), against, columns)
    _check_samples(store, inputs)
    return Origin(model, inputs)


def _provenance(store: KernelStore) -> dict[str, Any]:
    made = dict(store.manifest.provenance)
    if lacking := [name for name in ("model", "dataset", "seed", "width", "checkpoint") if name not in made]:
        raise StoreError(
            f"The store at {store.path} does not say what it was made of: expected the provenance of `ntkgen compute`, "
            f"found one without {', '.join(lacking)}. Was it made in Python, with ntkgen.compute? Compare it there, "
            "with ntkgen.kernel.certify."
        )
    return made


def _checkpoint(store: KernelStore, name: str) -> Checkpoint:
    path = store.path.parent / name
    if not path.exists():
        raise StoreError(
            f"The network of {store.path} has gone: expected its checkpoint at {path}, found nothing. Was one of them "
            "moved or removed? Put the checkpoint beside the store."
        )
    return checkpoints.load(path)


def _locate(name: str, folders: list[Path | None]) -> str:
    """Find the file of a data set that is one; a store keeps its name without the folder.

    Raises:
        DataError: If it is in none of the folders.
    """
    if not name.endswith(".npz"):
        return name
    places = [folder / name for folder in folders if folder is not None]
    for place in places:
        if place.exists():
            return str(place)
    raise DataError(
        f"The data set {name} is not to be found: expected it at one of {', '.join(map(str, places))}. Was it moved? "
        "Say in which folder it lies with --data-dir."
    )


def _as_trained(data: Dataset, checkpoint: Checkpoint) -> Dataset:
    """Take the images in the size that the network was made for, which the checkpoint tells by their fingerprint.

    Raises:
        FingerprintError: If they are others in either size.
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
            f"The samples of {store.path} are not all in {data.name}: expected at least {int(index.max()) + 1}, found "
            f"{data.num_samples}. Is it another release of the data set? Use the one that the store was made with."
        )
    return index


def _check_samples(store: KernelStore, inputs: Inputs) -> None:
    theirs, mine = str(store.manifest.identity.get("samples")), inputs.fingerprint()
    if theirs != mine:
        raise FingerprintError(
            f"The samples of {store.path} are not those found (expected the fingerprint {theirs[:8]}…, found "
            f"{mine[:8]}…). Was the data set changed, or is it another one of the same name? Say with --data-dir where "
            "the one lies that the store was made with."
        )


def certify_again(
    path: Path, data_dir: Path | None, sampling: Sampling, device: torch.device, report: Report = ignore_report
) -> Certificate:
    """Certify a finished store anew, from what it was made of, and write the certificate into it, under its lock.

    Raises:
        FingerprintError: If network or samples are not those that the store was made of.
        StoreError: If tiles are missing or damaged, or the store does not say what it was made of.
    """
    with write_lock(path):
        store = open_store(path, mode="r+")
        origin = load_origin(store, data_dir)
        return add_certificate(store, origin.model.to(device), origin.inputs, sampling, report=report)
