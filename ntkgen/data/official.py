"""The published data sets, read and downloaded by torchvision, and compared with the catalogue."""

import contextlib
import functools
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkgen.data.catalog import DatasetInfo
from ntkgen.errors import DataError
from ntkgen.files.paths import absolute

DATA_DIR_VARIABLE = "NTKGEN_DATA_DIR"

# Exceptions of torchvision for failures of the network, of archives, and of the parsers of its formats.
UNREADABLE = (
    OSError, HTTPException, RuntimeError, ValueError, TypeError, AssertionError, LookupError, EOFError,
    pickle.UnpicklingError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def data_directory(data_dir: Path | None) -> Path:
    """Choose the folder of the data sets: the argument, NTKGEN_DATA_DIR, or ``data`` in the current directory."""
    return absolute(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data")


def load_official(info: DatasetInfo, data_dir: Path, split: str, *, download: bool) -> tuple[Tensor, Tensor]:
    """Read the official files. Download them first if they are missing and ``download`` is set.

    Raises:
        DataError: If the files are missing and cannot be downloaded, or are damaged.
    """
    from torchvision import datasets  # outside of try, because a broken installation is not a damaged file

    folder = data_dir / info.folder
    read: Callable[..., tuple[Tensor, Tensor]] = functools.partial(_read_official, datasets, info, data_dir, split)
    try:
        return read(download=False)
    except UNREADABLE as error:
        if not download:
            raise DataError(_unavailable(info, folder, split, error, download=False)) from error
    try:
        with _leaving_no_empty_folder(folder), contextlib.redirect_stdout(io.StringIO()):
            return read(download=True)
    except UNREADABLE as error:
        raise DataError(_unavailable(info, folder, split, error, download=True)) from error


def _read_official(
    datasets: Any, info: DatasetInfo, data_dir: Path, split: str, *, download: bool
) -> tuple[Tensor, Tensor]:
    """Read images and labels, and compare them with the catalogue. Torchvision has no checksums of unpacked idx files.

    Raises:
        ValueError: If the number or size of the images, or the labels, do not match.
    """
    images, labels = _open_torchvision(datasets, info.name, str(data_dir), split, download=download)
    num_samples = info.num_samples if split == "train" else info.num_test_samples
    expected = (num_samples, *info.image_shape)
    if images.shape != expected or labels.shape != (num_samples,):
        raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)} instead of images {expected}")
    if not 0 <= labels.min() <= labels.max() < info.num_classes:
        raise ValueError(f"labels {labels.min()} to {labels.max()} instead of 0 to {info.num_classes - 1}")
    return images.contiguous(), labels


def _open_torchvision(
    datasets: Any, name: str, root: str, split: str, *, download: bool
) -> tuple[Tensor, Tensor]:  # (samples, channels, height, width), uint8; (samples,), int64
    """Read with the class of torchvision for the data set. Each class stores its images in its own layout."""
    train = split == "train"
    if name in {"cifar10", "cifar100"}:
        source = getattr(datasets, name.upper())(root, train=train, download=download)
        return torch.from_numpy(source.data).permute(0, 3, 1, 2), torch.tensor(source.targets, device="cpu")
    if name == "svhn":
        source = datasets.SVHN(root, split=split, download=download)
        return torch.from_numpy(source.data), torch.from_numpy(source.labels)
    if name == "emnist":
        source = datasets.EMNIST(root, split="balanced", train=train, download=download)
        return source.data.transpose(1, 2).unsqueeze(1), source.targets  # stored with rows and columns exchanged
    kind = {"mnist": "MNIST", "kmnist": "KMNIST", "fmnist": "FashionMNIST"}[name]
    source = getattr(datasets, kind)(root, train=train, download=download)
    return source.data.unsqueeze(1), source.targets


@contextlib.contextmanager
def _leaving_no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove a folder and its parents at the end, if they were created meanwhile and are empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # not empty, or never created
                path.rmdir()


def _unavailable(info: DatasetInfo, folder: Path, split: str, error: BaseException, *, download: bool) -> str:
    """Write the error message about missing or damaged files, with their folder."""
    names = info.file_names(split)
    found = [name for name in names if (folder / name).is_file()]
    if len(found) == len(names):
        again = ", and a download did not repair it" if download else ""
        state, cause = f"is damaged{again} ({one_line(error)})", "A download or a copy may have been interrupted"
        remedy = "Delete them and run again, or put"
    elif download:
        state, cause = f"cannot be downloaded ({one_line(error)})", "This machine may have no connection to the network"
        remedy = "Put"
    else:
        state, cause = "is missing", "It may be in another folder, or was never downloaded"
        remedy = "Allow the download, or put"
    return (
        f"Data set {info.name} {state}: expected in {folder} the files {', '.join(names)}, found "
        f"{', '.join(found) or 'none of them'}. {cause}. {remedy} the files into {folder} by hand, unpacked, from "
        f"{info.source}, or name the data directory that has them with `data_dir` or {DATA_DIR_VARIABLE}."
    )


def one_line(error: BaseException) -> str:
    """Format an error with its type, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
