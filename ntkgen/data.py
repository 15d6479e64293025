"""Data set name → inputs and labels in one fixed sample order, with a fingerprint.

A data set is one tensor of raw images and one of labels, kept as they are stored. What a network sees is made from them
batch by batch: ``scale`` to [0, 1], ``resize`` to the zoo's 3×32×32, in training ``augment``, then ``normalise``.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgen.augment import Augmentation, augment
from ntkgen.errors import DataError, InputError, ShapeError, UnknownNameError

DATA_DIR_VARIABLE = "NTKGEN_DATA_DIR"
SPLITS = ("train", "test")
ZOO_SIZE = 32  # pixels: height and width of what the networks of the zoo take

_CROP = Augmentation(crop_padding=4)  # digits and letters change their meaning when flipped
_CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)
_CROP_AND_ROTATION = Augmentation(crop_padding=4, rotation_degrees=20)
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_MNIST_FILES = tuple(
    f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any file is touched."""

    name: str
    """The name that ``load`` takes and a store records."""
    title: str
    """The name people use."""
    num_samples: int
    """Images in the split ``train``."""
    num_test_samples: int
    """Images in the split ``test``; 0 where there is no such split."""
    num_classes: int
    image_shape: tuple[int, int, int]
    """Channels, height and width of a raw image."""
    augmentation: Augmentation
    """What training may do to an image of network size."""
    mean: tuple[float, ...] | None = None
    """Per channel, of images in [0, 1]; None leaves them in [0, 1]."""
    std: tuple[float, ...] | None = None
    """Per channel, of images in [0, 1]; None leaves them in [0, 1]."""
    folder: str = ""
    """Where in the data directory the files lie."""
    files: tuple[str, ...] = ()
    """Files needed in the folder, with ``{split}`` where a split has its own; none for what comes with a package."""
    source: str = ""
    """Where the files can be had by hand."""

    def file_names(self, split: str) -> tuple[str, ...]:
        """List the files in the folder that this split needs.

        >>> DATASETS["svhn"].file_names("test")
        ('test_32x32.mat',)
        """
        return tuple(file.format(split=split) for file in self.files)


_INFOS = (
    DatasetInfo(
        "cifar10", "CIFAR-10", 50_000, 10_000, 10, (3, 32, 32), _CROP_AND_FLIP, _CIFAR_MEAN, _CIFAR_STD,
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        source="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    DatasetInfo(
        "cifar100", "CIFAR-100", 50_000, 10_000, 100, (3, 32, 32), _CROP_AND_FLIP, _CIFAR_MEAN, _CIFAR_STD,
        folder="cifar-100-python",
        files=("train", "test", "meta"),
        source="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
    DatasetInfo(
        "mnist", "MNIST", 60_000, 10_000, 10, (1, 28, 28), _CROP_AND_ROTATION,
        folder="MNIST/raw",
        files=_MNIST_FILES,
        source="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    DatasetInfo(
        "kmnist", "Kuzushiji-MNIST", 60_000, 10_000, 10, (1, 28, 28), _CROP_AND_ROTATION,
        folder="KMNIST/raw",
        files=_MNIST_FILES,
        source="http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    ),
    DatasetInfo(
        "fmnist", "Fashion-MNIST", 60_000, 10_000, 10, (1, 28, 28), _CROP_AND_ROTATION,
        folder="FashionMNIST/raw",
        files=_MNIST_FILES,
        source="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    DatasetInfo(
        "svhn", "Street View House Numbers", 73_257, 26_032, 10, (3, 32, 32), _CROP,
        files=("{split}_32x32.mat",),
        source="http://ufldl.stanford.edu/housenumbers/",
    ),
    DatasetInfo(
        "emnist", "EMNIST, balanced", 112_800, 18_800, 47, (1, 28, 28), _CROP_AND_ROTATION,
        folder="EMNIST/raw",
        files=("emnist-balanced-{split}-images-idx3-ubyte", "emnist-balanced-{split}-labels-idx1-ubyte"),
        source="https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
    ),
    DatasetInfo(
        "digits", "scikit-learn's handwritten digits", 1_797, 0, 10, (1, 8, 8), _CROP_AND_ROTATION,
    ),
)  # fmt: skip

DATASETS: dict[str, DatasetInfo] = {info.name: info for info in _INFOS}
ALIASES: dict[str, str] = {"cifar": "cifar10"}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Raw images and their labels, and how a network's inputs are made from them."""

    name: str
    images: Tensor  # (samples, channels, height, width), uint8 or float32
    labels: Tensor  # (samples,), int64
    num_classes: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    """What ``batch`` does to an image of network size; ``inputs`` never does it."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    zoo_sized: bool = False
    """Whether a network sees 3×32×32, made by ``resize``, or the images in the size they have."""

    @property
    def num_samples(self) -> int:
        """Count the images."""
        return len(self.images)

    def raw(
        self,
        ids: Tensor | None = None,  # (selected,), int64; None: all
    ) -> Tensor:  # (selected, channels, height, width), float32
        """Return images in the size they have: uint8 is scaled to [0, 1], float32 used as it is, perhaps uncopied."""
        return scale(self.images if ids is None else self.images[ids.to(self.images.device)])

    def inputs(
        self,
        ids: Tensor | None = None,  # (selected,), int64; None: all
    ) -> Tensor:  # (selected, channels, height, width), float32; 3×32×32 for the zoo
        """Return what a network sees: sized and normalised. A sample's bytes do not depend on the other ids."""
        return normalise(self._sized(ids), self.mean, self.std)

    def batch(
        self,
        ids: Tensor,  # (selected,), int64
        generator: torch.Generator,
    ) -> Tensor:  # (selected, channels, height, width), float32; 3×32×32 for the zoo
        """Return what a network in training sees: ``inputs``, augmented at random before normalisation."""
        return normalise(augment(self._sized(ids), self.augmentation, generator), self.mean, self.std)

    def fingerprint(self) -> str:
        """Hash all that determines ``inputs`` and labels: images and labels with dtype and shape, size, normalisation.

        The same on every device. The name is left out: a renamed file is the same data.
        """
        digest = hashlib.sha256(repr((self.mean, self.std, self.zoo_sized)).encode())
        for tensor in (self.images, self.labels):
            array = tensor.cpu().numpy()
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Dataset":
        """Move images and labels to the device, each as one tensor."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def _sized(self, ids: Tensor | None) -> Tensor:
        return resize(self.raw(ids)) if self.zoo_sized else self.raw(ids)


def load(name: str, *, data_dir: Path | None = None, split: str = "train", download: bool = True) -> Dataset:
    """Load a data set of ``DATASETS`` by its name or alias, or the arrays x and y of a file ``NAME.npz``.

    Args:
        name: A key of ``DATASETS`` or ``ALIASES``, or a path that ends with ``.npz``: x is (samples, channels, height,
            width), float32 used as it is or uint8 divided by 255, and y holds one integer label for each sample.
        data_dir: The folder of the files; by default that in NTKGEN_DATA_DIR, else ``data`` in the current directory.
        split: ``train`` or ``test``; ``digits`` and ``.npz`` files have no ``test``.
        download: Whether what is not in the folder may be fetched from the network.

    Raises:
        UnknownNameError: If there is no such data set or no such split.
        InputError: If the data set has no test split.
        DataError: If the files are missing and cannot be fetched, or are not what they should be.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if name.endswith(".npz"):
        return _load_npz(name, split)
    info = dataset_info(name)
    if info.name == "digits":
        return _load_digits(info, split)
    images, labels = _load_official(info, data_directory(data_dir), split, download=download)
    return _named_dataset(info, images, labels)


def dataset_info(name: str) -> DatasetInfo:
    """Look up a data set by its name or alias.

    >>> dataset_info("cifar").title
    'CIFAR-10'

    Raises:
        UnknownNameError: If there is no such data set.
    """
    info = DATASETS.get(ALIASES.get(name, name))
    if info is None:
        raise UnknownNameError("data set", name, [*DATASETS, *ALIASES, "FILE.npz"])
    return info


def data_directory(data_dir: Path | None) -> Path:
    """Choose the folder of the data sets: the argument, NTKGEN_DATA_DIR, or ``data`` in the current directory."""
    return Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "data").expanduser().absolute()


def sample_order(
    num_samples: int, *, subsample: int | None, shuffle_seed: int | None
) -> Tensor:  # (subsample or num_samples,), int64
    """Choose the samples and their order: the first ``subsample`` of the data set, or of a seeded permutation of it.

    >>> sample_order(5, subsample=3, shuffle_seed=None)
    tensor([0, 1, 2])

    Raises:
        InputError: If the subsample is empty or larger than the data set.
    """
    if subsample is not None and not 1 <= subsample <= num_samples:
        raise InputError(
            f"The subsample does not fit the data set: expected 1 to {num_samples} samples, found {subsample}. "
            "It may be meant for another data set or split. Use a number in that range, or leave it out to take all."
        )
    if shuffle_seed is None:
        return torch.arange(num_samples)[:subsample]
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(shuffle_seed))[:subsample]


def check_labels(
    labels: Tensor,  # (samples,), int64
    num_outputs: int,
) -> None:
    """Refuse labels that are not the number of one of the network's outputs.

    Raises:
        DataError: If a label is below 0, or at least ``num_outputs``.
    """
    least, largest = int(labels.min()), int(labels.max())
    if least < 0 or largest >= num_outputs:
        raise DataError(
            f"The labels do not fit the network: expected 0 to {num_outputs - 1} for its {num_outputs} outputs, found "
            f"{least} to {largest}. The network may be made for fewer classes, or the labels do not start at 0. "
            f"Use a network with {largest + 1} outputs, or number the classes from 0."
        )


def network_inputs(
    images: Tensor,  # (samples, 1 or 3, height, width), uint8 or float32
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Tensor:  # (samples, 3, 32, 32), float32
    """Turn raw images into what the networks of the zoo see: scaled to [0, 1], sized, normalised."""
    return normalise(resize(scale(images)), mean, std)


def scale(
    images: Tensor,  # (samples, channels, height, width), uint8 or float32
) -> Tensor:  # (samples, channels, height, width), float32
    """Divide uint8 by 255; leave float32 as it is, uncopied."""
    if images.dtype != torch.uint8:
        return images.to(torch.float32)
    # CUDA multiplies by the reciprocal of a Python number; it divides, like the CPU to the last bit, by a tensor.
    return images.to(torch.float32).div_(torch.tensor(255.0, device=images.device))


def resize(
    images: Tensor,  # (samples, 1 or 3, height, width), float32
) -> Tensor:  # (samples, 3, 32, 32), float32
    """Bring images to the zoo's size: grey to three channels, 28×28 in a black frame, 8×8 scaled by 4, bilinearly.

    Raises:
        ShapeError: If the images have another size or number of channels.
    """
    _, channels, *size = images.shape
    if channels not in {1, 3} or size not in ([8, 8], [28, 28], [ZOO_SIZE, ZOO_SIZE]):
        raise ShapeError(
            "Images cannot be brought to the size of the zoo: expected 1 or 3 channels of 8×8, 28×28 or 32×32 pixels, "
            f"found {channels} of {'×'.join(map(str, size))}. They may be meant for a network of your own. "
            "Resize them to 3×32×32 beforehand, or save them in an .npz file, whose images keep their size."
        )
    if size == [28, 28]:
        images = F.pad(images, (2, 2, 2, 2))
    elif size == [8, 8]:
        images = F.interpolate(images, size=(ZOO_SIZE, ZOO_SIZE), mode="bilinear", align_corners=False)
    return images.repeat(1, 3, 1, 1) if channels == 1 else images


def normalise(
    images: Tensor,  # (samples, channels, height, width), float32
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Tensor:  # (samples, channels, height, width), float32
    """Subtract the mean and divide by the standard deviation, channel by channel; None leaves the images uncopied."""
    if mean is not None:
        images = images - torch.tensor(mean, device=images.device)[:, None, None]
    if std is not None:
        images = images / torch.tensor(std, device=images.device)[:, None, None]
    return images


def _named_dataset(info: DatasetInfo, images: Tensor, labels: Tensor) -> Dataset:
    return Dataset(
        name=info.name,
        images=images,
        labels=labels,
        num_classes=info.num_classes,
        augmentation=info.augmentation,
        mean=info.mean,
        std=info.std,
        zoo_sized=True,
    )


def _check_has_split(name: str, split: str) -> None:
    if split != "train":
        raise InputError(
            f"Data set {name} has no split {split!r}: expected 'train', which holds all its samples. It may have been "
            "taken for a data set with its own test images. Use the split 'train', or another data set."
        )


# scikit-learn


def _load_digits(info: DatasetInfo, split: str) -> Dataset:
    _check_has_split(info.name, split)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze(1)
    return _named_dataset(info, images, torch.from_numpy(bunch.target).to(torch.int64))


# torchvision

# What torchvision lets through from the network, from archives and from the parsers of its formats.
_UNREADABLE = (
    OSError, HTTPException, RuntimeError, ValueError, TypeError, AssertionError, LookupError, EOFError,
    pickle.UnpicklingError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _load_official(info: DatasetInfo, data_dir: Path, split: str, *, download: bool) -> tuple[Tensor, Tensor]:
    """Read the official files, fetched first if they are not there.

    Raises:
        DataError: If they are missing and cannot be fetched, or are damaged.
    """
    from torchvision import datasets  # outside of try: a broken installation is not a damaged file

    folder = data_dir / info.folder
    read = functools.partial(_read_official, datasets, info, data_dir, split)
    try:
        return read(download=False)
    except _UNREADABLE as error:
        if not download:
            raise DataError(_unavailable(info, folder, split, error, download=False)) from error
    try:
        with _leaving_no_empty_folder(folder), contextlib.redirect_stdout(io.StringIO()):
            return read(download=True)
    except _UNREADABLE as error:
        raise DataError(_unavailable(info, folder, split, error, download=True)) from error


def _read_official(
    datasets: Any, info: DatasetInfo, data_dir: Path, split: str, *, download: bool
) -> tuple[Tensor, Tensor]:
    """Read images and labels, and compare them with what is known: torchvision has no checksum for unpacked idx files.

    Raises:
        ValueError: If number, size or labels of the images are not those of the data set.
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
    """Read with the class that torchvision has for the data set, each of which keeps its images in another way."""
    train = split == "train"
    if name in {"cifar10", "cifar100"}:
        source = getattr(datasets, name.upper())(root, train=train, download=download)
        return torch.from_numpy(source.data).permute(0, 3, 1, 2), torch.tensor(source.targets)
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
    """Remove at the end the folders down to this one that were not there before and are empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # not empty, or never made
                path.rmdir()


def _unavailable(info: DatasetInfo, folder: Path, split: str, error: BaseException, *, download: bool) -> str:
    """Say which files are missing or damaged, and where to put them."""
    names = info.file_names(split)
    found = [name for name in names if (folder / name).is_file()]
    if len(found) == len(names):
        again = ", and a download did not mend it" if download else ""
        state, cause = f"is damaged{again} ({_one_line(error)})", "A download or a copy may have been cut short"
        remedy = "Delete them and run again, or put"
    elif download:
        state, cause = f"cannot be downloaded ({_one_line(error)})", "This machine may have no way to the network"
        remedy = "Put"
    else:
        state, cause = "is missing", "It may lie in another folder, or was never downloaded"
        remedy = "Allow the download, or put"
    return (
        f"Data set {info.name} {state}: expected in {folder} the files {', '.join(names)}, found "
        f"{', '.join(found) or 'none of them'}. {cause}. {remedy} the files into {folder} by hand, unpacked, from "
        f"{info.source}, or name the data directory that has them with --data-dir or {DATA_DIR_VARIABLE}."
    )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# .npz files


def _load_npz(name: str, split: str) -> Dataset:
    """Load a file of the user's own.

    Raises:
        DataError: If it is missing, or not what it should be.
    """
    _check_has_split(name, split)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"Data file {path} is missing: expected a file, found none from {Path.cwd()}. The path may be misspelt, or "
            f"relative to another directory. Give the path of a file, or the name of a data set: {', '.join(DATASETS)}."
        )
    x, y = _read_arrays(path)
    _check_images(x, path)
    _check_targets(y, path)
    if len(x) != len(y):
        raise DataError(
            f"x and y in {path} have different lengths: expected one label for each sample, found {len(x)} samples and "
            f"{len(y)} labels. They may come from different splits. Save the two that belong together."
        )
    labels = torch.from_numpy(y.astype(np.int64))
    return Dataset(name, torch.from_numpy(np.ascontiguousarray(x)), labels, num_classes=int(labels.max()) + 1)


def _read_arrays(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Read x and y.

    Raises:
        DataError: If the file is not an archive of arrays, or one of the two is not in it.
    """
    advice = "Write the file with numpy.savez(path, x=images, y=labels)."
    try:
        with zipfile.ZipFile(path):  # numpy.load would also take a single array
            pass
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            arrays = {name: archive[name] for name in ("x", "y") if name in found}
    except _UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read: expected an .npz file of arrays, found what gives {_one_line(error)}. "
            f"It may be of another format, be damaged, or hold Python objects. {advice}"
        ) from error
    missing = [name for name in ("x", "y") if not isinstance(arrays.get(name), np.ndarray)]
    if missing:
        raise DataError(
            f"{path} has no array {' and no array '.join(missing)}: expected x (images) and y (labels), found "
            f"{', '.join(map(repr, found)) or 'nothing'}. The arrays may have been saved under other names. {advice}"
        )
    return arrays["x"], arrays["y"]


def _check_images(x: np.ndarray[Any, Any], path: Path) -> None:
    """Refuse what are not images.

    Raises:
        DataError: If shape, dtype or values are not those of images.
    """
    if x.ndim != 4 or x.size == 0:
        raise DataError(
            f"x in {path} has the wrong shape: expected (samples, channels, height, width), none of them 0, found "
            f"{x.shape}. Grey images may lack their channel, or a selection left no sample. "
            "Reshape it; x[:, None] adds a channel."
        )
    if x.dtype not in {np.dtype(np.float32), np.dtype(np.uint8)}:
        raise DataError(
            f"x in {path} has the wrong dtype: expected float32 or uint8, found {x.dtype}. NumPy makes float64 unless "
            "told otherwise. Save x.astype('float32'), or uint8 images of 0 to 255."
        )
    finite = np.isfinite(x)
    if not finite.all():
        raise DataError(
            f"x in {path} has values that are not finite: expected none, found {int((~finite).sum())}, the first in "
            f"sample {int(np.argwhere(~finite)[0, 0])}. A division by zero or an overflow may have made them. "
            "Remove those samples, or repair them."
        )


def _check_targets(y: np.ndarray[Any, Any], path: Path) -> None:
    """Refuse what are not class labels.

    Raises:
        DataError: If shape, dtype or values are not those of labels.
    """
    if y.ndim != 1 or y.size == 0:
        raise DataError(
            f"y in {path} has the wrong shape: expected (samples,), at least one, found {y.shape}. "
            "It may be one-hot. Save one integer for each sample, such as y.argmax(axis=1)."
        )
    if y.dtype.kind not in "iu":
        raise DataError(
            f"y in {path} has the wrong dtype: expected integers, found {y.dtype}. Targets of a regression are not "
            "labels. Save y.astype('int64') if they are classes."
        )
    least, largest = int(y.min()), int(y.max())
    if least < 0 or largest >= np.iinfo(np.int64).max:
        raise DataError(
            f"y in {path} has labels out of range: expected 0 to the number of classes less one, found {least} to "
            f"{largest}. -1 may stand for a missing label. Remove those samples, or number the classes from 0."
        )
