"""A batch of images → a randomly transformed one, on its device.

For training alone: a kernel is computed on images as they are. Images are float, (samples, channels, height, width),
with black at 0, hence not yet normalised. Every draw comes from the generator given, on the generator's own device, so
one seed makes the same draws wherever the images lie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgen.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image during training; by default nothing.

    >>> Augmentation(crop_padding=4, flip=True)
    Augmentation(crop_padding=4, flip=True, rotation_degrees=0.0)
    """

    crop_padding: int = 0
    """Pixels of black added on every side before a window of the original size is cut out at random."""
    flip: bool = False
    """Whether left and right are exchanged in half of the images; never for digits and letters."""
    rotation_degrees: float = 0.0
    """Largest angle, in degrees, of a rotation about the centre to either side."""

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise InputError(
                f"The padding of a random crop is negative: expected 0 pixels or more, found {self.crop_padding}. "
                "A sign may be wrong. Use 0 for no crop."
            )
        if not 0 <= self.rotation_degrees <= 180:
            raise InputError(
                "The largest angle of rotation is out of range: expected 0 to 180 degrees, found "
                f"{self.rotation_degrees}. The rotation goes to both sides, so it needs no sign. Use 0 for no rotation."
            )


def augment(
    images: Tensor,  # (samples, channels, height, width)
    augmentation: Augmentation,
    generator: torch.Generator,
) -> Tensor:  # (samples, channels, height, width)
    """Rotate, crop and flip each image at random, in this order; what is off draws nothing.

    Without any of the three the result is ``images`` itself, not a copy.
    """
    if augmentation.rotation_degrees > 0:
        images = rotate(images, _draw_angles(len(images), augmentation.rotation_degrees, generator))
    if augmentation.crop_padding > 0:
        images = crop(
            images, _draw_offsets(len(images), augmentation.crop_padding, generator), augmentation.crop_padding
        )
    if augmentation.flip:
        images = flip(images, _draw_choices(len(images), generator))
    return images


def rotate(
    images: Tensor,  # (samples, channels, height, width)
    degrees: Tensor,  # (samples,)
) -> Tensor:  # (samples, channels, height, width)
    """Turn each image counter-clockwise about its centre by its own angle, bilinearly; outside the image is black."""
    height, width = images.shape[2:]
    angles = torch.deg2rad(degrees).to(images)
    cos, sin, zero = torch.cos(angles), torch.sin(angles), torch.zeros_like(angles)
    # affine_grid measures both axes from -1 to 1, so the angle is kept only if the sides' ratio is taken out.
    rows = [cos, -sin * height / width, zero], [sin * width / height, cos, zero]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (samples, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def crop(
    images: Tensor,  # (samples, channels, height, width)
    offsets: Tensor,  # (samples, 2), int64: top and left edge of each window, 0..2 · padding
    padding: int,
) -> Tensor:  # (samples, channels, height, width)
    """Cut from each image, padded with black, the window at its own offset; ``padding`` is the offset of no shift."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (samples, channels, top, left, height, width)
    top, left = offsets.to(images.device).unbind(dim=1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(
    images: Tensor,  # (samples, channels, height, width)
    chosen: Tensor,  # (samples,), bool
) -> Tensor:  # (samples, channels, height, width)
    """Exchange left and right in the chosen images."""
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def _draw_angles(num_samples: int, largest: float, generator: torch.Generator) -> Tensor:  # (samples,), degrees
    uniform = torch.rand(num_samples, generator=generator, device=generator.device)
    return (2 * uniform - 1) * largest


def _draw_offsets(num_samples: int, padding: int, generator: torch.Generator) -> Tensor:  # (samples, 2)
    return torch.randint(2 * padding + 1, (num_samples, 2), generator=generator, device=generator.device)


def _draw_choices(num_samples: int, generator: torch.Generator) -> Tensor:  # (samples,), bool
    return torch.randint(2, (num_samples,), generator=generator, device=generator.device).bool()
