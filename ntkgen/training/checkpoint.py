"""Trained parameters on disk, with the recipe and fingerprint that made them."""

import dataclasses
import io
import pickle
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.errors import FingerprintError, StoreError
from ntkgen.files.folder import File, file_of

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run but the device."""

    model: str
    dataset: str
    data_fingerprint: str
    seed: int = 0
    width: int | None = None
    num_epochs: int = 200
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def differences(self, other: "Recipe") -> list[str]:
        """Name the fields that differ, with both values."""
        pairs = zip(dataclasses.asdict(self).items(), dataclasses.asdict(other).values(), strict=True)
        return [f"{name} {str(mine)[:40]}, now {str(theirs)[:40]}" for (name, mine), theirs in pairs if mine != theirs]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run after an epoch."""

    recipe: Recipe
    epoch: int  # epochs done
    train_accuracy: float | None  # per cent, without augmentation, in evaluation mode
    train_loss: float | None
    is_finished: bool  # it has reached the target it was trained for, or used up its epochs: it is never trained on
    state: dict[str, Tensor]  # parameters and buffers by name
    training: dict[str, Any]  # optimizer, scheduler, scaler, random states: what a resumed run needs


def save(place: File | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all: arrays and plain values only, loadable with ``weights_only=True``."""
    file = file_of(place)
    buffer = io.BytesIO()  # torch would turn the error of a full disk into one of its own
    torch.save(_plain({"format_version": FORMAT_VERSION, **_shallow_dict(checkpoint)}), buffer)
    file.folder.write(file.name, buffer.getvalue())


def _shallow_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**vars(checkpoint), "recipe": dataclasses.asdict(checkpoint.recipe)}


def _plain(value: Any) -> Any:
    """Rebuild containers, and make equal strings one: pickle writes equal values differently where they are shared.

    A checkpoint of a training that went on from a file has then the bytes of one that did not.
    """
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def load(place: File | Path) -> Checkpoint:
    """Read a checkpoint, onto the CPU.

    Raises:
        StoreError: If the file is not a checkpoint of this format.
    """
    file = file_of(place)
    try:
        archive = io.BytesIO(file.folder.read(file.name) or b"")
        _check_archive(archive)
        values = torch.load(archive, map_location="cpu", weights_only=True)
        version = values.pop("format_version")
        recipe = Recipe(**values.pop("recipe"))
        checkpoint = Checkpoint(recipe=recipe, **values)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise StoreError(
            f"{file} is not a checkpoint of this program, or a damaged one ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:100]}): expected one written by `ntkgen train`. Was it copied in part, or "
            "written by something else? Remove it, and the network is trained again."
        ) from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{file} has format version {version}, and this program reads version {FORMAT_VERSION}. Was it written by "
            "a newer one? Use that, or remove the file to train again."
        )
    return checkpoint


def _check_archive(file: io.BytesIO) -> None:
    """Compare the checksums of the archive, which torch does not.

    Raises:
        ValueError: If one of them does not match.
    """
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged} does not match its checksum")
    file.seek(0)


def check_recipe(path: File | Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse to continue a checkpoint of another recipe.

    Raises:
        FingerprintError: If they differ; the message names the fields.
    """
    if differences := checkpoint.recipe.differences(recipe):
        raise FingerprintError(
            f"The checkpoint {path} was trained in another way ({'; '.join(differences)}). Continuing would mix the "
            "two. Use another --out, or the original settings, or remove the checkpoint."
        )


def load_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's parameters and buffers into the network that it was made from.

    Raises:
        FingerprintError: If the network has other parameters than the checkpoint.
    """
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise FingerprintError(
            f"The checkpoint does not fit {checkpoint.recipe.model} ({str(error).splitlines()[-1].strip()}). "
            "Has its code changed since? Use another --out to train the new one."
        ) from error
