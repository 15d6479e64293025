"""What is known of each data set before any file is touched."""

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
