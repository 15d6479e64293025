"""Data sets: the order, the bytes and the fingerprint of what a network sees, and every error on the way there."""

import dataclasses
import os
import pickle
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch

from ntkgen.data import catalog, official
from ntkgen.data.augment import Augmentation
from ntkgen.data.catalog import DATASETS
from ntkgen.data.dataset import Dataset, check_labels, load, network_inputs, resize, sample_order, scale
from ntkgen.errors import DataError, InputError, ShapeError, UnknownNameError

REAL_DATA = Path(os.environ.get("NTKGEN_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
OFFICIAL = [name for name in DATASETS if name != "digits"]


def needs(file: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL_DATA / file).exists(), reason=f"{file} is not in the test data directory")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture
def no_network(monkeypatch):
    """Let every request fail as on a machine without network, in torchvision's own code."""

    def refuse(*args, **kwargs):
        raise URLError("no network\nin this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write the format of MNIST: two zero bytes, dtype, number of dimensions, sizes, values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def shrink(monkeypatch, name: str, num_samples: int) -> None:
    """Let a data set be so small that a test can write its files."""
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], num_samples=num_samples))


def write_mnist(data_dir: Path, num_samples: int = 3) -> np.ndarray:
    images = np.arange(num_samples * 28 * 28).reshape(num_samples, 28, 28) % 256
    for part in ("train", "t10k"):
        write_idx(data_dir / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(data_dir / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", np.arange(num_samples))
    return images


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value)


# names


@pytest.mark.slow
def test_importing_data_imports_neither_torchvision_nor_sklearn():
    code = "import sys, ntkgen.data; print([m for m in ('torchvision', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_data_sets_and_what_training_may_do_to_them():
    rotated, cropped = Augmentation(crop_padding=4, rotation_degrees=20), Augmentation(crop_padding=4)
    natural = Augmentation(crop_padding=4, flip=True)
    assert {name: (info.num_classes, info.image_shape, info.augmentation) for name, info in DATASETS.items()} == {
        "cifar10": (10, (3, 32, 32), natural),
        "cifar100": (100, (3, 32, 32), natural),
        "mnist": (10, (1, 28, 28), rotated),
        "kmnist": (10, (1, 28, 28), rotated),
        "fmnist": (10, (1, 28, 28), rotated),
        "svhn": (10, (3, 32, 32), cropped),
        "emnist": (47, (1, 28, 28), rotated),
        "digits": (10, (1, 8, 8), rotated),
    }
    assert all(info.name == name for name, info in DATASETS.items())


def test_cifar_is_cifar10():
    assert catalog.dataset_info("cifar") is DATASETS["cifar10"]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"'mnst'\. Did you mean .*mnist.*Known: cifar10, .*FILE\.npz"):
        load("mnst")


def test_an_unknown_split_is_refused():
    with pytest.raises(UnknownNameError, match=r"Unknown split 'validation'.*Known: train, test"):
        load("digits", split="validation")


@pytest.mark.parametrize("name", ["digits", "mine.npz"])
def test_what_has_no_test_split_says_so(name):
    with pytest.raises(InputError, match=f"{name} has no split 'test': expected 'train'"):
        load(name, split="test")


def test_the_data_directory_is_the_argument_then_the_environment_then_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NTKGEN_DATA_DIR", raising=False)
    assert official.data_directory(None) == tmp_path / "data"
    monkeypatch.setenv("NTKGEN_DATA_DIR", "elsewhere")
    assert official.data_directory(None) == tmp_path / "elsewhere"
    assert official.data_directory(tmp_path / "here") == tmp_path / "here"


# inputs


def test_digits(digits):
    info = DATASETS["digits"]
    assert digits.images.shape == (info.num_samples, *info.image_shape) == (1797, 1, 8, 8)
    assert (digits.images.dtype, digits.labels.dtype) == (torch.float32, torch.int64)
    assert digits.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert (digits.images[0, 0, 0] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert torch.equal(digits.raw(), digits.images)
    inputs = digits.inputs()
    assert (inputs.shape, inputs.dtype) == ((1797, 3, 32, 32), torch.float32)
    assert (float(inputs.min()), float(inputs.max())) == (0, 1)


def test_inputs_of_some_ids_are_those_of_the_whole_in_their_order(digits):
    ids = torch.tensor([5, 0, 1796, 5])
    assert torch.equal(digits.inputs(ids), digits.inputs()[ids])
    assert torch.equal(digits.raw(ids), digits.images[ids])


def test_grey_images_of_28_pixels_get_three_channels_and_a_black_frame():
    images = torch.randint(256, (2, 1, 28, 28), generator=seeded(), dtype=torch.uint8)
    result = network_inputs(images, None, None)
    assert result.shape == (2, 3, 32, 32)
    assert torch.equal(result[:, :, 2:30, 2:30], (images.float() / 255).expand(-1, 3, -1, -1))
    result[:, :, 2:30, 2:30] = 0
    assert not result.any()


def test_images_of_8_pixels_are_scaled_bilinearly():
    ramp = torch.arange(8.0).expand(8, 8).reshape(1, 1, 8, 8)
    row = network_inputs(ramp, None, None)[0, 0, 0]
    assert row[:6].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875]
    assert row[-3:].tolist() == [6.875, 7, 7]


def test_normalisation_is_channel_by_channel():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    result = network_inputs(images, (0.5, 0.2, 0.1), (0.5, 0.1, 0.3))
    assert result[0, :, 7, 9].tolist() == pytest.approx([-1, 0, 3], abs=1e-6)


def test_the_images_are_not_written_to():
    images = torch.rand(2, 3, 32, 32, generator=seeded())
    before = images.clone()
    network_inputs(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 2, 32, 32), (1, 1, 28, 32)])
def test_another_size_does_not_fit_the_zoo(shape):
    with pytest.raises(ShapeError, match=r"expected 1 or 3 channels .*, found \d of \d+×\d+"):
        resize(torch.zeros(shape))


def test_a_batch_without_augmentation_equals_the_inputs(digits):
    ids = torch.tensor([3, 1, 4, 1, 5])
    plain = dataclasses.replace(digits, augmentation=Augmentation(), mean=(0.4,), std=(0.3,))
    assert torch.equal(plain.batch(ids, seeded()), plain.inputs(ids))


def test_a_batch_is_augmented_at_network_size_and_before_normalisation():
    """An all-white image cropped beyond its edge shows black, which normalisation by (x - 1) / 2 makes -0.5."""
    white = torch.ones(64, 1, 8, 8)
    dataset = Dataset("white", white, torch.zeros(64, dtype=torch.int64), 1, mean=(1.0,), std=(2.0,), zoo_sized=True)
    dataset = dataclasses.replace(dataset, augmentation=Augmentation(crop_padding=4))
    batch = dataset.batch(torch.arange(64), seeded())
    assert batch.shape == (64, 3, 32, 32)
    assert batch.unique().tolist() == [-0.5, 0]
    assert int((batch[:, 0] == -0.5).any(dim=2).sum(dim=1).max()) == 32  # a whole column is black
    assert torch.equal(batch, dataset.batch(torch.arange(64), seeded()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inputs_are_the_same_to_the_last_bit_on_the_gpu(digits):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 3, 32, 32)
    cifar = Dataset(
        "pixels", pixels, torch.zeros(1, dtype=torch.int64), 1, mean=(0.49, 0.48, 0.45), std=(0.2, 0.2, 0.3)
    )
    for dataset in (digits, cifar):
        assert torch.equal(dataset.to("cuda").inputs().cpu(), dataset.inputs())
        assert dataset.to("cuda").fingerprint() == dataset.fingerprint()


# order


def test_without_a_seed_the_order_is_that_of_the_data_set():
    assert sample_order(5, subsample=None, shuffle_seed=None).tolist() == [0, 1, 2, 3, 4]
    assert sample_order(5, subsample=2, shuffle_seed=None).tolist() == [0, 1]


def test_a_seed_gives_one_permutation_whose_start_is_the_subsample():
    order = sample_order(1000, subsample=None, shuffle_seed=7)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(1000))
    assert not torch.equal(order, torch.arange(1000))
    assert torch.equal(sample_order(1000, subsample=10, shuffle_seed=7), order[:10])
    assert not torch.equal(sample_order(1000, subsample=None, shuffle_seed=8), order)


def test_the_permutation_of_a_seed_is_the_recorded_one_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    assert sample_order(10, subsample=5, shuffle_seed=0).tolist() == [4, 1, 7, 5, 3]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("subsample", [0, -1, 11])
@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_a_subsample_that_does_not_fit_is_refused_with_both_numbers(subsample, shuffle_seed):
    with pytest.raises(InputError, match=f"expected 1 to 10 samples, found {subsample}\\."):
        sample_order(10, subsample=subsample, shuffle_seed=shuffle_seed)


# labels and fingerprint


@pytest.mark.parametrize(("labels", "found"), [([0, 10], "found 0 to 10"), ([-1, 2], "found -1 to 2")])
def test_labels_that_no_output_stands_for_are_refused(labels, found):
    with pytest.raises(DataError, match=f"expected 0 to 9 for its 10 outputs, {found}"):
        check_labels(torch.tensor(labels), 10)


def test_labels_may_leave_outputs_unused():
    check_labels(torch.tensor([0, 3]), 10)


def small() -> Dataset:
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    return Dataset("small", images, torch.tensor([0, 1]), 2)


def changed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] += 1
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        {"images": changed(small().images)},
        {"images": small().images.reshape(2, 3, 4, 1)},
        {"labels": changed(small().labels)},
        {"mean": (0.5,)},
        {"std": (0.5,)},
        {"zoo_sized": True},
    ],
    ids=["one pixel", "shape", "one label", "mean", "std", "size"],
)
def test_the_fingerprint_changes_with(change):
    assert dataclasses.replace(small(), **change).fingerprint() != small().fingerprint()


def test_the_fingerprint_changes_with_the_dtype_of_the_same_bytes():
    floats = dataclasses.replace(small(), images=small().images.float())
    integers = dataclasses.replace(small(), images=floats.images.view(torch.int32))
    assert floats.fingerprint() != integers.fingerprint()


def test_the_fingerprint_is_of_the_content_not_of_name_or_memory_layout():
    fingerprint = small().fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    strided = small().images.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert dataclasses.replace(small(), name="renamed", images=strided).fingerprint() == fingerprint


def test_to_moves_images_and_labels():
    moved = small().to("meta")
    assert (moved.images.device.type, moved.labels.device.type, moved.name) == ("meta", "meta", "small")


# files of the user


X, Y = np.random.default_rng(0).random((4, 2, 3, 5), dtype=np.float32), np.array([2, 0, 1, 2])


def with_value(value: float) -> np.ndarray:
    x = X.copy()
    x[2, 1, 0, 0] = value
    return x


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_an_npz_of_float32_is_used_as_it_is(tmp_path):
    dataset = load(save(tmp_path / "mine.npz", x=X, y=Y.astype(np.uint8)))
    assert torch.equal(dataset.inputs(), torch.from_numpy(X))
    assert torch.equal(dataset.raw(), torch.from_numpy(X))
    assert (dataset.labels.tolist(), dataset.labels.dtype) == ([2, 0, 1, 2], torch.int64)
    assert (dataset.num_classes, dataset.num_samples) == (3, 4)
    assert torch.equal(dataset.batch(torch.tensor([2, 1]), seeded()), torch.from_numpy(X[[2, 1]]))


def test_an_npz_of_uint8_is_divided_by_255_and_keeps_its_size(tmp_path):
    x = np.random.default_rng(0).integers(256, size=(4, 1, 28, 28), dtype=np.uint8)
    dataset = load(save(tmp_path / "mine.npz", x=np.asfortranarray(x), y=Y))
    assert (dataset.images.dtype, dataset.images.is_contiguous()) == (torch.uint8, True)
    assert torch.equal(dataset.inputs(), torch.from_numpy(x) / 255)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "no array y: expected x .*, found 'x'"),
        ({"images": X, "y": Y}, "no array x: expected x .*, found 'images', 'y'"),
        ({}, "no array x and no array y: expected x .*, found nothing"),
        ({"x": X[0], "y": Y}, r"x .* wrong shape: expected \(samples, .*found \(2, 3, 5\)"),
        ({"x": X[:0], "y": Y[:0]}, r"x .* wrong shape: expected .*, all at least 1, found \(0, 2, 3, 5\)"),
        ({"x": X.astype(np.float64), "y": Y}, "x .* expected float32 or uint8, found float64"),
        ({"x": X.astype(">f4"), "y": Y}, "x .* expected float32 or uint8, found >f4"),
        ({"x": with_value(np.nan), "y": Y}, "not finite: expected none, found 1, the first in sample 2"),
        ({"x": with_value(-np.inf), "y": Y}, "not finite: expected none, found 1, the first in sample 2"),
        ({"x": X, "y": Y[:3]}, "different lengths: .*found 4 samples and 3 labels"),
        ({"x": X, "y": np.eye(4)}, r"y .* wrong shape: expected \(samples,\), at least one, found \(4, 4\)"),
        ({"x": X, "y": Y[:0]}, r"y .* wrong shape: expected \(samples,\), at least one, found \(0,\)"),
        ({"x": X, "y": Y.astype(np.float32)}, "y .* expected integers, found float32"),
        ({"x": X, "y": Y > 0}, "y .* expected integers, found bool"),
        ({"x": X, "y": Y - 1}, "y .* out of range: expected 0 to .*, found -1 to 1"),
        ({"x": X, "y": Y.astype(np.uint64) + np.uint64(2**63)}, f"y .* out of range: .*found {2**63} to {2**63 + 2}"),
        ({"x": X, "y": np.array([None] * 4)}, "cannot be read: expected an .npz file of arrays, .*Object arrays"),
    ],
)
def test_an_npz_that_is_not_what_it_should_be_is_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message) as error:
        load(save(tmp_path / "mine.npz", **arrays))
    assert_one_line(error)
    assert str(tmp_path / "mine.npz") in str(error.value)


def test_a_missing_npz_says_from_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"mine\.npz is missing: .*{re.escape(str(tmp_path))}.*cifar10, ") as error:
        load("mine.npz")
    assert_one_line(error)


@pytest.mark.parametrize("content", ["nothing", "text", "one array", "half", "one byte changed", "a text named x"])
def test_what_is_not_an_npz_is_refused(tmp_path, content):
    path = tmp_path / "mine.npz"
    save(path, x=X, y=Y)
    whole = path.read_bytes()
    if content == "one array":
        with path.open("wb") as file:
            np.save(file, X)
    elif content == "a text named x":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x", "not an array")
            archive.writestr("y", "not an array")
    else:
        middle = whole.index(X[2, 0].tobytes())
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes(
            {"nothing": b"", "text": b"x,y\n", "half": whole[:middle], "one byte changed": flipped}[content]
        )
    with pytest.raises(
        DataError, match=r"cannot be read: expected an \.npz file|has no array x and no array y"
    ) as error:
        load(str(path))
    assert_one_line(error)


# official files, written small


def test_mnist_is_read_from_its_files(tmp_path, monkeypatch):
    shrink(monkeypatch, "mnist", 3)
    images = write_mnist(tmp_path)
    dataset = load("mnist", data_dir=tmp_path, download=False)
    assert (dataset.images.dtype, dataset.images.is_contiguous()) == (torch.uint8, True)
    assert torch.equal(dataset.images, torch.from_numpy(images.astype(np.uint8))[:, None])
    assert dataset.labels.tolist() == [0, 1, 2]
    assert torch.equal(dataset.raw(), scale(dataset.images))
    assert torch.equal(dataset.inputs(), network_inputs(dataset.images, None, None))


@pytest.mark.parametrize(("name", "folder"), [("kmnist", "KMNIST"), ("fmnist", "FashionMNIST")])
def test_the_relatives_of_mnist_have_folders_of_their_own(tmp_path, monkeypatch, name, folder):
    shrink(monkeypatch, name, 3)
    write_mnist(tmp_path)
    (tmp_path / "MNIST").rename(tmp_path / folder)
    assert load(name, data_dir=tmp_path, download=False).labels.tolist() == [0, 1, 2]


def test_emnist_is_set_upright(tmp_path, monkeypatch):
    shrink(monkeypatch, "emnist", 2)
    images = np.zeros((2, 28, 28))
    images[:, 20, 3] = 255  # in the file: row 20, column 3
    write_idx(tmp_path / "EMNIST" / "raw" / "emnist-balanced-train-images-idx3-ubyte", images)
    write_idx(tmp_path / "EMNIST" / "raw" / "emnist-balanced-train-labels-idx1-ubyte", np.array([46, 0]))
    dataset = load("emnist", data_dir=tmp_path, download=False)
    assert dataset.images.nonzero().tolist() == [[0, 0, 3, 20], [1, 0, 3, 20]]
    assert (dataset.images.is_contiguous(), dataset.labels.tolist(), dataset.num_classes) == (True, [46, 0], 47)


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch):
    shrink(monkeypatch, "cifar100", 2)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    rows = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    batch = {"data": rows, "fine_labels": [99, 0], "coarse_labels": [1, 1]}
    for file, content in {"train": batch, "test": batch, "meta": {"fine_label_names": ["apple"]}}.items():
        (folder / file).write_bytes(pickle.dumps(content))
    dataset = load("cifar100", data_dir=tmp_path, download=False)
    assert torch.equal(dataset.images, torch.from_numpy(rows).reshape(2, 3, 32, 32))
    assert (dataset.images.is_contiguous(), dataset.labels.tolist()) == (True, [99, 0])


def test_svhn_counts_its_digits_from_zero_and_has_a_file_for_each_split(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "svhn", dataclasses.replace(DATASETS["svhn"], num_samples=3, num_test_samples=2))
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5=None: Path(path).is_file())
    images = np.random.default_rng(0).integers(256, size=(32, 32, 3, 3), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": images, "y": np.array([[10], [1], [9]], dtype=np.uint8)})
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": images[..., :2], "y": np.array([[3], [10]], dtype=np.uint8)})
    dataset = load("svhn", data_dir=tmp_path, download=False)
    assert dataset.labels.tolist() == [0, 1, 9]
    assert torch.equal(dataset.images, torch.from_numpy(images).permute(3, 2, 0, 1))
    assert dataset.images.is_contiguous()
    assert load("svhn", data_dir=tmp_path, download=False, split="test").labels.tolist() == [3, 0]


def cut_images(raw: Path) -> None:
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])


def empty_images(raw: Path) -> None:
    (raw / "train-images-idx3-ubyte").write_bytes(b"")


def foreign_images(raw: Path) -> None:
    (raw / "train-images-idx3-ubyte").write_text("<html>Not found</html>")


def fewer_labels(raw: Path) -> None:
    write_idx(raw / "train-labels-idx1-ubyte", np.array([0, 1]))


def larger_label(raw: Path) -> None:
    write_idx(raw / "train-labels-idx1-ubyte", np.array([0, 1, 10]))


@pytest.mark.parametrize("damage", [cut_images, empty_images, foreign_images, fewer_labels, larger_label])
@pytest.mark.parametrize("download", [True, False])
def test_damaged_files_are_told_from_missing_ones(tmp_path, monkeypatch, no_network, damage, download):
    shrink(monkeypatch, "mnist", 3)
    write_mnist(tmp_path)
    damage(tmp_path / "MNIST" / "raw")
    with pytest.raises(
        DataError, match=r"mnist is damaged\b.* interrupted\. Delete them and run again, or put the"
    ) as error:
        load("mnist", data_dir=tmp_path, download=download)
    assert_one_line(error)


def test_a_damaged_file_that_cannot_be_downloaded_again_says_both(tmp_path, no_network):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file in DATASETS["cifar100"].file_names("train"):
        (folder / file).write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"is damaged, and a download did not repair it .*no network in this test"):
        load("cifar100", data_dir=tmp_path)


def test_a_broken_installation_of_torchvision_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="torchvision"):
        load("mnist", data_dir=tmp_path)


# downloads


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_failed_download_says_what_to_put_where_and_leaves_nothing(tmp_path, no_network, capsys, name):
    data_dir = tmp_path / "new" / "data"
    with pytest.raises(DataError) as error:
        load(name, data_dir=data_dir)
    message, info = str(error.value), DATASETS[name]
    assert f"Data set {name} cannot be downloaded" in message
    assert "no network in this test" in message
    assert (
        f"expected in {data_dir / info.folder} the files {', '.join(info.file_names('train'))}, found none" in message
    )
    assert f"by hand, unpacked, from {info.source}, or name the data directory" in message
    assert "`data_dir` or NTKGEN_DATA_DIR" in message
    assert_one_line(error)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("failure", [URLError("unreachable"), RuntimeError("File not found or corrupted.")])
def test_a_download_that_fails_halfway_keeps_what_was_there(tmp_path, monkeypatch, failure):
    class Failing:
        def __init__(self, root, train, download):
            if download:
                print("Downloading")
                (Path(root) / "MNIST" / "raw").mkdir(parents=True)
                (Path(root) / "MNIST" / "raw" / "train-labels-idx1-ubyte").touch()
                (Path(root) / "empty").mkdir()
            raise failure

    monkeypatch.setattr("torchvision.datasets.MNIST", Failing)
    (tmp_path / "empty-before").mkdir()
    with pytest.raises(
        DataError, match=r"found train-labels-idx1-ubyte\. This machine may have no connection to the network"
    ):
        load("mnist", data_dir=tmp_path)
    assert (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").exists()
    assert (tmp_path / "empty-before").is_dir()


def test_what_is_there_is_not_downloaded_and_what_is_not_is_downloaded_silently(tmp_path, monkeypatch, capsys):
    asked = []

    class Fetched:
        def __init__(self, root, train, download):
            asked.append(download)
            if not download:
                raise RuntimeError("Dataset not found.")
            print("Downloading")
            self.data, self.targets = torch.zeros(3, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2])

    shrink(monkeypatch, "mnist", 3)
    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.MNIST", Fetched)
        assert load("mnist", data_dir=tmp_path).num_samples == 3
    assert asked == [False, True]
    assert capsys.readouterr().out == ""

    write_mnist(tmp_path)
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: pytest.fail("downloaded what is there"))
    assert load("mnist", data_dir=tmp_path).num_samples == 3


def test_without_leave_to_download_a_missing_data_set_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: pytest.fail("downloaded without leave"))
    with pytest.raises(DataError, match=r"mnist is missing: .* Allow the download, or put the files into") as error:
        load("mnist", data_dir=tmp_path, download=False)
    assert_one_line(error)


def test_a_data_directory_that_is_a_file_is_an_error(tmp_path, no_network):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Data set svhn cannot be downloaded"):
        load("svhn", data_dir=tmp_path / "file")


# real files, where there are any


@pytest.fixture(scope="module")
def cifar10():
    return load("cifar", data_dir=REAL_DATA, download=False)


@needs("cifar-10-batches-py/data_batch_1")
def test_cifar10(cifar10):
    assert (cifar10.name, cifar10.num_classes) == ("cifar10", 10)
    assert (cifar10.images.shape, cifar10.images.dtype) == ((50_000, 3, 32, 32), torch.uint8)
    assert cifar10.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert cifar10.images[0, :, 0, 0].tolist() == [59, 62, 63]
    inputs = cifar10.inputs(torch.tensor([0]))
    expected = [(59 / 255 - 0.4914) / 0.2023, (62 / 255 - 0.4822) / 0.1994, (63 / 255 - 0.4465) / 0.2010]
    assert inputs[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert cifar10.raw(torch.tensor([0]))[0, :, 0, 0].tolist() == pytest.approx([59 / 255, 62 / 255, 63 / 255])


@needs("cifar-10-batches-py/data_batch_1")
def test_the_mean_of_cifar10_is_that_of_its_images(cifar10):
    assert cifar10.raw(torch.arange(0, 50_000, 10)).mean(dim=(0, 2, 3)).tolist() == pytest.approx(
        cifar10.mean, abs=0.01
    )


@needs("MNIST/raw/train-images-idx3-ubyte")
@pytest.mark.parametrize(
    ("split", "num_samples", "labels"), [("train", 60_000, [5, 0, 4]), ("test", 10_000, [7, 2, 1])]
)
def test_mnist(split, num_samples, labels):
    mnist = load("mnist", data_dir=REAL_DATA, split=split, download=False)
    assert (mnist.images.shape, mnist.images.dtype) == ((num_samples, 1, 28, 28), torch.uint8)
    assert mnist.labels[:3].tolist() == labels
    inputs = mnist.inputs(torch.arange(3))
    assert inputs.shape == (3, 3, 32, 32)
    assert (float(inputs.min()), float(inputs.max())) == (0, 1)
    assert torch.equal(mnist.raw(torch.arange(3)), mnist.images[:3] / 255)


@needs("cifar100-subset.npz")
def test_a_real_npz():
    dataset = load(str(REAL_DATA / "cifar100-subset.npz"))
    assert (dataset.images.shape, dataset.num_classes) == ((3000, 3, 32, 32), 100)
    assert torch.equal(dataset.inputs(torch.tensor([7])), dataset.images[[7]] / 255)
