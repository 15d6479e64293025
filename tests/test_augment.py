"""What may happen to an image in training, and that nothing else does."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from ntkgen.data.augment import Augmentation, augment, crop, flip, rotate
from ntkgen.errors import InputError

ALL = Augmentation(crop_padding=4, flip=True, rotation_degrees=20)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(num_samples: int, channels: int = 2, height: int = 5, width: int = 6) -> torch.Tensor:
    """Images whose pixels all have different nonzero values."""
    shape = (num_samples, channels, height, width)
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).reshape(shape)


def radius(size: int = 32) -> torch.Tensor:  # (size, size): distance of each pixel from the centre
    axis = torch.arange(size) - (size - 1) / 2
    return torch.hypot(axis[:, None], axis[None, :])


def test_without_any_transformation_the_images_and_the_generator_are_untouched():
    images, generator = numbered(3), seeded()
    before = generator.get_state()
    assert augment(images, Augmentation(), generator) is images
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(crop_padding=4), Augmentation(flip=True), Augmentation(rotation_degrees=20), ALL],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_stay_and_the_input_is_not_written_to(augmentation, dtype):
    images = numbered(16).to(dtype)
    before = images.clone()
    result = augment(images, augmentation, seeded())
    assert (result.shape, result.dtype) == (images.shape, dtype)
    assert not torch.equal(result, images)
    assert torch.equal(images, before)


def test_one_seed_gives_one_result_and_another_seed_another():
    images = numbered(16)
    result = augment(images, ALL, seeded(1))
    assert torch.equal(result, augment(images, ALL, seeded(1)))
    assert not torch.equal(result, augment(images, ALL, seeded(2)))


def test_draws_come_from_the_given_generator_alone():
    before = torch.get_rng_state()
    augment(numbered(4), ALL, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_is_a_shifted_copy_with_black_beyond_the_edge_and_every_shift_occurs():
    padding = 2
    images = numbered(600)
    height, width = images.shape[2:]
    padded = F.pad(images, [padding] * 4)
    shifts = list(itertools.product(range(2 * padding + 1), repeat=2))
    windows = torch.stack([padded[:, :, top : top + height, left : left + width] for top, left in shifts], dim=1)

    result = augment(images, Augmentation(crop_padding=padding), seeded())

    is_window = (windows == result[:, None]).flatten(2).all(dim=2)  # (samples, shifts)
    assert torch.equal(is_window.sum(dim=1), torch.ones(len(images), dtype=torch.int64))
    assert is_window.any(dim=0).all()


def test_crop_reads_offsets_as_top_and_left():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    offsets = torch.tensor([[1, 1], [0, 1], [1, 0], [2, 2]])
    result = crop(image.expand(4, 1, 2, 2), offsets, 1)
    assert result[:, 0].tolist() == [[[1, 2], [3, 4]], [[0, 0], [1, 2]], [[0, 1], [0, 3]], [[4, 0], [0, 0]]]


def test_flip_mirrors_the_chosen_images_exactly():
    images = numbered(3)
    result = flip(images, torch.tensor([True, False, True]))
    assert torch.equal(result[[0, 2]], images[[0, 2]].flip(-1))
    assert torch.equal(result[1], images[1])


def test_about_half_of_the_images_are_flipped_and_the_others_untouched():
    images = numbered(400)
    result = augment(images, Augmentation(flip=True), seeded())
    flipped = (result == images.flip(-1)).flatten(1).all(dim=1)
    untouched = (result == images).flatten(1).all(dim=1)
    assert torch.equal(flipped, ~untouched)
    assert 150 < int(flipped.sum()) < 250


def test_rotation_by_nothing_is_the_identity():
    images = torch.rand(4, 3, 32, 32, generator=seeded())
    torch.testing.assert_close(rotate(images, torch.zeros(4)), images, rtol=0, atol=1e-6)


def test_rotation_by_a_right_angle_is_counter_clockwise():
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    result = rotate(images, torch.tensor([90.0, -90.0]))
    torch.testing.assert_close(result[0], images[0].rot90(1, (1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(result[1], images[1].rot90(-1, (1, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [-20.0, 7.0, 20.0, 45.0])
def test_rotation_keeps_a_centred_disc(degrees):
    image = (radius() <= 10).float()
    result = rotate(image[None, None], torch.tensor([degrees]))[0, 0]
    assert not torch.equal(result, image)
    torch.testing.assert_close(result[radius() < 8.5], image[radius() < 8.5], rtol=0, atol=1e-6)
    torch.testing.assert_close(result[radius() > 11.5], image[radius() > 11.5], rtol=0, atol=1e-6)
    torch.testing.assert_close(result, result.rot90(2), rtol=0, atol=1e-5)  # still about the centre


def test_rotation_of_an_oblong_image_keeps_the_angle():
    image = torch.zeros(1, 1, 17, 33)
    image[0, 0, 8, 12:21] = 1  # a horizontal bar through the centre
    result = rotate(image, torch.tensor([90.0]))
    expected = torch.zeros(1, 1, 17, 33)
    expected[0, 0, 4:13, 16] = 1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_angles_fill_the_range_to_both_sides():
    """A bar from the centre to the right: its far end lies above the middle where the image was turned to the left."""
    image = torch.zeros(300, 1, 33, 33)
    image[:, 0, 16, 30] = 1
    result = augment(image, Augmentation(rotation_degrees=20), seeded())
    rows = torch.arange(33.0) - 16
    height = -(result[:, 0].sum(dim=2) * rows).sum(dim=1) / result[:, 0].sum(dim=(1, 2))
    reach = 14 * math.sin(math.radians(20))
    assert -reach - 0.5 < float(height.min()) < -0.9 * reach
    assert 0.9 * reach < float(height.max()) < reach + 0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"crop_padding": -1}, "expected 0 pixels or more, found -1"),
        ({"rotation_degrees": -20.0}, "expected 0 to 180 degrees, found -20.0"),
        ({"rotation_degrees": 181.0}, "expected 0 to 180 degrees, found 181.0"),
        ({"rotation_degrees": math.nan}, "expected 0 to 180 degrees, found nan"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, expected):
    with pytest.raises(InputError, match=expected):
        Augmentation(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cpu_generator_makes_the_same_draws_for_images_on_the_gpu():
    images = torch.rand(16, 3, 32, 32, generator=seeded())
    result = augment(images.cuda(), ALL, seeded())
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), augment(images, ALL, seeded()), rtol=0, atol=1e-4)


def test_a_border_can_be_mirrored():
    images = numbered(2)
    offsets = torch.tensor([[0, 2], [2, 4]])
    expected = F.pad(images, (2, 2, 2, 2), "reflect")
    found = crop(images, offsets, 2, "reflect")
    assert torch.equal(found[0], expected[0, :, 0:5, 2:8])
    assert torch.equal(found[1], expected[1, :, 2:7, 4:10])
    reflected = augment(images + 1, Augmentation(crop_padding=2, reflect=True), seeded())
    assert (reflected > 0).all()  # no black


def test_a_rotation_can_have_one_direction(monkeypatch):
    angles = []
    monkeypatch.setattr("ntkgen.data.augment.rotate", lambda images, degrees: angles.append(degrees) or images)
    augment(numbered(200), Augmentation(rotation_degrees=15, one_direction=True), seeded())
    augment(numbered(200), Augmentation(rotation_degrees=15), seeded())
    assert 0 <= angles[0].min() < 1
    assert 14 < angles[0].max() <= 15
    assert angles[1].min() < -14
