"""Data set name → inputs and labels in one fixed sample order, with a fingerprint.

A data set is one tensor of raw images and one of labels, kept as they are stored. What a network sees is made from them
batch by batch: ``scale`` to [0, 1], ``resize`` to the zoo's 3×32×32, in training ``augment``, then ``normalise``.
"""

import dataclasses
import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgen.data.augment import Augmentation, augment
from ntkgen.data.catalog import DatasetInfo, dataset_info
from ntkgen.data.npz import load_npz
from ntkgen.data.official import data_directory, load_official
from ntkgen.errors import DataError, InputError, ShapeError, UnknownNameError

SPLITS = ("train", "test")
ZOO_SIZE = 32  # pixels: height and width of what the networks of the zoo take


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
        _check_has_split(name, split)
        images, labels = load_npz(name)
        return Dataset(name, images, labels, num_classes=int(labels.max()) + 1)
    info = dataset_info(name)
    if info.name == "digits":
        return _load_digits(info, split)
    images, labels = load_official(info, data_directory(data_dir), split, download=download)
    return _named_dataset(info, images, labels)


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


def _load_digits(info: DatasetInfo, split: str) -> Dataset:
    _check_has_split(info.name, split)
    images, labels = _digits()
    return _named_dataset(info, images.clone(), labels.clone())


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Read the digits once in a process: they are a text file, which takes longer to parse than to train on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze(1)
    return images, torch.from_numpy(bunch.target).to(torch.int64)
