"""Checkpoints: trained parameters on disk, with the recipe of the training and the fingerprint of the data."""

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
from ntkgen.training.recipe import Recipe

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run after an epoch."""

    recipe: Recipe
    epoch: int  # finished epochs
    train_accuracy: float | None  # per cent, without augmentation, in evaluation mode
    train_loss: float | None
    is_finished: bool  # the target is reached or all epochs are done; training never continues
    state: dict[str, Tensor]  # parameters and buffers by name
    training: dict[str, Any]  # state for a resumed run: optimizer, scheduler, scaler, random generators


def save(place: File | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. It has only arrays and plain values, and loads with ``weights_only=True``."""
    file = file_of(place)
    buffer = io.BytesIO()  # torch would replace the error of a full disk by its own error
    torch.save(_plain({"format_version": FORMAT_VERSION, **_shallow_dict(checkpoint)}), buffer)
    file.folder.write(file.name, buffer.getvalue())


def _shallow_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**vars(checkpoint), "recipe": dataclasses.asdict(checkpoint.recipe)}


def _plain(value: Any) -> Any:
    """Rebuild containers, and intern strings. Pickle writes a shared object differently from two equal objects.

    The checkpoint of a resumed training then has the same bytes as that of an uninterrupted one.
    """
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return sys.intern(value) if isinstance(value, str) else value


def load(place: File | Path) -> Checkpoint:
    """Read a checkpoint into CPU memory.

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
            f"{' '.join(str(error).split())[:100]}): expected a file of `ntkgen train`. Was it copied only in part, or "
            "written by another program? Remove it to train the network again."
        ) from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{file} has format version {version}, and this program reads version {FORMAT_VERSION}. Was it written by "
            "a newer version of ntkgen? Use that version, or remove the file to train again."
        )
    return checkpoint


def _check_archive(file: io.BytesIO) -> None:
    """Compare the checksums of the archive. Torch does not compare them.

    Raises:
        ValueError: If a checksum does not match.
    """
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged} does not match its checksum")
    file.seek(0)


def check_recipe(path: File | Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse to continue a checkpoint of another recipe.

    Raises:
        FingerprintError: If the recipes differ. The message lists the fields.
    """
    if differences := checkpoint.recipe.differences(recipe):
        raise FingerprintError(
            f"The checkpoint {path} was trained in another way ({'; '.join(differences)}). Continuing would mix the "
            "two. Use another `out`, or the original settings, or remove the checkpoint."
        )


def load_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the parameters and buffers of a checkpoint into its network.

    Raises:
        FingerprintError: If the network has other parameters than the checkpoint.
    """
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        raise FingerprintError(
            f"The checkpoint does not fit {checkpoint.recipe.model} ({str(error).splitlines()[-1].strip()}). "
            "Has its code changed since? Use another `out` to train the new one."
        ) from error
