"""Data sets: images and labels in one fixed sample order, with a fingerprint.

A data set has one tensor of raw images and one of labels. The inputs of a network are computed from the raw images
batch by batch: ``scale`` to [0, 1], ``resize`` to 3×32×32 for the zoo, ``augment`` in training, and ``normalise``.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgen.data.arrays import are_images, load_arrays, names_in
from ntkgen.data.augment import Augmentation, augment
from ntkgen.data.catalog import DatasetInfo, dataset_info
from ntkgen.data.npz import load_npz
from ntkgen.data.official import data_directory, load_official
from ntkgen.errors import DataError, InputError, ShapeError, UnknownNameError
from ntkgen.files.paths import expanded

SPLITS = ("train", "test")
ZOO_SIZE = 32  # height and width of the inputs of the zoo's networks, in pixels


@dataclass(frozen=True, eq=False)
class Dataset:
    """Raw images and their labels, and the settings that convert them to inputs of a network."""

    name: str
    images: Tensor  # (samples, channels, height, width), uint8 or float32
    labels: Tensor  # (samples,), int64
    num_classes: int
    augmentation: Augmentation = field(default_factory=Augmentation)
    """The random transformations in ``batch``. ``inputs`` has none."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    zoo_sized: bool = False
    """Whether inputs are resized to 3×32×32, or keep the size of the images."""
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    """Samples of another form than images: the inputs of a network by name. ``images`` is then the first of them."""

    @property
    def num_samples(self) -> int:
        """Count the images."""
        return len(self.images)

    @property
    def is_trainable(self) -> bool:
        """Whether a network can be trained on it: it has images, and the number of a class for each."""
        return not self.arrays and int(self.labels.min()) >= 0

    def arguments(
        self,
        ids: Tensor,  # (selected,), int64
    ) -> Tensor | dict[str, Tensor]:
        """Return what a network gets: inputs made from images, one array ``x`` as it is, or keyword arguments."""
        if not self.arrays:
            return self.inputs(ids)
        chosen = {name: array[ids] for name, array in self.arrays.items()}
        return chosen["x"] if list(chosen) == ["x"] else chosen

    def raw(
        self,
        ids: Tensor | None = None,  # (selected,), int64; None: all
    ) -> Tensor:  # (selected, channels, height, width), float32
        """Return images in their own size. uint8 is scaled to [0, 1]. float32 is unchanged, and may share memory."""
        return scale(self.images if ids is None else self.images[ids.to(self.images.device)])

    def inputs(
        self,
        ids: Tensor | None = None,  # (selected,), int64; None: all
    ) -> Tensor:  # (selected, channels, height, width), float32; 3×32×32 for the zoo
        """Return inputs of a network, resized and normalised. The bytes of a sample do not depend on the other ids."""
        return normalise(self._sized(ids), self.mean, self.std)

    def batch(
        self,
        ids: Tensor,  # (selected,), int64
        generator: torch.Generator,
    ) -> Tensor:  # (selected, channels, height, width), float32; 3×32×32 for the zoo
        """Return inputs for training. They are those of ``inputs``, augmented at random before normalisation."""
        return normalise(augment(self._sized(ids), self.augmentation, generator), self.mean, self.std)

    def fingerprint(self) -> str:
        """Hash images and labels with their dtypes and shapes, the resizing, and the normalisation.

        The hash is the same on every device. It does not include the name, because a renamed file has the same data.
        """
        digest = hashlib.sha256(repr((self.mean, self.std, self.zoo_sized)).encode())
        for name in self.arrays:
            digest.update(f"{name}|".encode())
        for tensor in (*(self.arrays.values() or [self.images]), self.labels):
            array = tensor.cpu().numpy()
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Dataset":
        """Move images and labels to a device, each as one tensor."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def _sized(self, ids: Tensor | None) -> Tensor:
        return resize(self.raw(ids)) if self.zoo_sized else self.raw(ids)


def load(
    name: str, *, data_dir: Path | None = None, split: str = "train", download: bool = True, any_form: bool = False
) -> Dataset:
    """Load a data set of ``DATASETS`` by its name or alias, or the arrays x and y of a file ``NAME.npz``.

    Args:
        name: A key of ``DATASETS`` or ``ALIASES``, or a path that ends with ``.npz``. In such a file, x is (samples,
            channels, height, width) and y has one integer label per sample. float32 images are not changed, and uint8
            images are divided by 255.
        data_dir: The folder of the files. By default it is the folder in the environment variable NTKGEN_DATA_DIR, or
            ``data`` in the current directory.
        split: ``train`` or ``test``. ``digits`` and ``.npz`` files have no ``test``.
        download: Whether missing files may be downloaded.
        any_form: Whether an ``.npz`` file may hold samples of any form (`ntkgen.data.arrays`).

    Raises:
        UnknownNameError: If the data set or the split has an unknown name.
        InputError: If the data set has no test split.
        DataError: If the files are missing and cannot be downloaded, or are not valid.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if name.endswith(".npz"):
        _check_has_split(name, split)
        path = expanded(name)
        if any_form and path.is_file() and not are_images(names_in(path)):
            arrays, labels, num_classes = load_arrays(path)
            return Dataset(name, next(iter(arrays.values())), labels, num_classes, arrays=arrays)
        images, labels = load_npz(name)
        return Dataset(name, images, labels, num_classes=int(labels.max()) + 1)
    info = dataset_info(name)
    if info.name == "digits":
        return _load_digits(info, split)
    images, labels = load_official(info, data_directory(data_dir), split, download=download)
    return _named_dataset(info, images, labels)


def has_test_split(name: str) -> bool:
    """Say whether a data set has test samples of its own.

    >>> has_test_split("mnist"), has_test_split("digits"), has_test_split("mine.npz")
    (True, False, False)

    Raises:
        UnknownNameError: If there is no such data set.
    """
    return not name.endswith(".npz") and dataset_info(name).num_test_samples > 0


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
        return torch.arange(num_samples, device="cpu")[:subsample]
    generator = torch.Generator("cpu").manual_seed(shuffle_seed)
    return torch.randperm(num_samples, generator=generator, device="cpu")[:subsample]


def check_labels(
    labels: Tensor,  # (samples,), int64
    num_outputs: int,
) -> None:
    """Refuse labels that are not the number of an output of the network.

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
    """Convert raw images to inputs of the zoo's networks: scaled to [0, 1], resized, normalised."""
    return normalise(resize(scale(images)), mean, std)


def scale(
    images: Tensor,  # (samples, channels, height, width), uint8 or float32
) -> Tensor:  # (samples, channels, height, width), float32
    """Divide uint8 by 255. Return float32 unchanged, without a copy."""
    if images.dtype != torch.uint8:
        return images.to(torch.float32)
    # For a Python number CUDA multiplies by the reciprocal. For a tensor it divides, with the same bits as the CPU.
    return images.to(torch.float32).div_(torch.tensor(255.0, device=images.device))


def resize(
    images: Tensor,  # (samples, 1 or 3, height, width), float32
) -> Tensor:  # (samples, 3, 32, 32), float32
    """Resize images to 3×32×32: repeat grey channels, pad 28×28 with black, and interpolate 8×8 bilinearly.

    Raises:
        ShapeError: If the images have another size or number of channels.
    """
    _, channels, *size = images.shape
    if channels not in {1, 3} or size not in ([8, 8], [28, 28], [ZOO_SIZE, ZOO_SIZE]):
        raise ShapeError(
            "Images cannot be resized to 3×32×32 for the zoo: expected 1 or 3 channels of 8×8, 28×28 or 32×32 pixels, "
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
    """Subtract the mean and divide by the standard deviation, channel by channel. None skips a step."""
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
            f"Data set {name} has no split {split!r}: expected 'train', which has all its samples. Was a data set with "
            "separate test images meant? Use the split 'train', or another data set."
        )


def _load_digits(info: DatasetInfo, split: str) -> Dataset:
    _check_has_split(info.name, split)
    images, labels = _digits()
    return _named_dataset(info, images.clone(), labels.clone())


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Read the digits once per process. Parsing their text file takes longer than training on them."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze(1)
    return images, torch.from_numpy(bunch.target).to(torch.int64)
