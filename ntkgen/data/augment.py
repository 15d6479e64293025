"""Random transformations of a batch of images, on its device.

They are used only in training. A kernel is computed on the images without augmentation. Images are float, (samples,
channels, height, width), with black at 0, and are normalised later. All random numbers are drawn on the device of the
given generator. A seed therefore gives the same numbers for images on any device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgen.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """The random transformations of an image in training. By default there are none.

    >>> Augmentation(crop_padding=4, flip=True)
    Augmentation(crop_padding=4, flip=True, rotation_degrees=0.0, reflect=False, one_direction=False)
    """

    crop_padding: int = 0
    """Black pixels added on every side before a window of the original size is cut out at random."""
    flip: bool = False
    """Whether each image is mirrored (left and right) with probability 1/2. Not suitable for digits and letters."""
    rotation_degrees: float = 0.0
    """Maximum angle of a random rotation about the centre, in degrees and in both directions."""
    reflect: bool = False
    """Whether the pixels that are added on every side are the mirrored ones of the image, and not black."""
    one_direction: bool = False
    """Whether a rotation is always counter-clockwise."""

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise InputError(
                f"The padding of a random crop is negative: expected 0 pixels or more, found {self.crop_padding}. "
                "The sign may be wrong. Use 0 for no crop."
            )
        if not 0 <= self.rotation_degrees <= 180:
            raise InputError(
                "The largest angle of rotation is out of range: expected 0 to 180 degrees, found "
                f"{self.rotation_degrees}. Was it given a sign? Rotations have both directions. Use 0 for no rotation."
            )


def augment(
    images: Tensor,  # (samples, channels, height, width)
    augmentation: Augmentation,
    generator: torch.Generator,
) -> Tensor:  # (samples, channels, height, width)
    """Rotate, crop and flip each image at random, in this order. A disabled transformation draws no random numbers.

    If all three are disabled, the result is ``images`` itself, not a copy.
    """
    if augmentation.rotation_degrees > 0:
        angles = _draw_angles(len(images), augmentation.rotation_degrees, generator)
        images = rotate(images, angles.abs() if augmentation.one_direction else angles)
    if (padding := augmentation.crop_padding) > 0:
        mode = "reflect" if augmentation.reflect else "constant"
        images = crop(images, _draw_offsets(len(images), padding, generator), padding, mode)
    if augmentation.flip:
        images = flip(images, _draw_choices(len(images), generator))
    return images


def rotate(
    images: Tensor,  # (samples, channels, height, width)
    degrees: Tensor,  # (samples,)
) -> Tensor:  # (samples, channels, height, width)
    """Rotate each image counter-clockwise about its centre by its own angle, bilinearly. Pixels outside are black."""
    height, width = images.shape[2:]
    angles = torch.deg2rad(degrees).to(images)
    cos, sin, zero = torch.cos(angles), torch.sin(angles), torch.zeros_like(angles)
    # affine_grid scales both axes to [-1, 1], so a rotation must be corrected for the ratio of the sides
    rows = [cos, -sin * height / width, zero], [sin * width / height, cos, zero]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (samples, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def crop(
    images: Tensor,  # (samples, channels, height, width)
    offsets: Tensor,  # (samples, 2), int64: top and left edge of each window, 0..2 · padding
    padding: int,
    mode: str = "constant",
) -> Tensor:  # (samples, channels, height, width)
    """Pad each image, and cut out the window at its offset. The offset ``padding`` is no shift.

    Args:
        images: The images.
        offsets: The offsets of the windows.
        padding: Pixels added on every side.
        mode: ``constant``: they are black; ``reflect``: they are the mirrored ones of the image.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding, padding, padding, padding), mode)
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
