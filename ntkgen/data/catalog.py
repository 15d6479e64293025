"""The catalogue of data sets: their sizes, files and preprocessing, without reading any file."""

from dataclasses import dataclass

from ntkgen.data.augment import Augmentation
from ntkgen.errors import UnknownNameError

_CROP = Augmentation(crop_padding=4)  # digits and letters change their meaning when flipped
_CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)
_CROP_AND_ROTATION = Augmentation(crop_padding=4, rotation_degrees=20)
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_MNIST_FILES = tuple(
    f"{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
)


@dataclass(frozen=True)
class DatasetInfo:
    """The properties of a data set that are known without reading its files."""

    name: str
    """The name in ``load`` and in the metadata of a store."""
    title: str
    """The usual name, for display."""
    num_samples: int
    """Images in the split ``train``."""
    num_test_samples: int
    """Images in the split ``test``; 0 if there is no such split."""
    num_classes: int
    image_shape: tuple[int, int, int]
    """Channels, height and width of a raw image."""
    augmentation: Augmentation
    """The augmentation of an image of network size in training."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel of images in [0, 1]. None: images are not normalised."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel of images in [0, 1]. None: images are not normalised."""
    folder: str = ""
    """The folder of the files within the data directory."""
    files: tuple[str, ...] = ()
    """Names of the files in the folder, with ``{split}`` for files of one split. Empty for data of a package."""
    source: str = ""
    """The address from which the files can be downloaded by hand."""

    def file_names(self, split: str) -> tuple[str, ...]:
        """List the files of a split.

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
