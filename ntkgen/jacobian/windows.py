"""Convolutions of stride 1: their inputs as pixels, and the Gram matrix of windows from the Gram matrix of pixels."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ntkgen.jacobian.layers import Convolution, padded, padding_of


@dataclass(frozen=True)
class Axis:
    """The windows along one spatial axis. Tap d of window t is pixel t + d · dilation - padding, or zero outside."""

    pixels: int
    positions: int
    taps: int
    dilation: int
    padding: int

    @property
    def padding_after(self) -> int:
        """Zeros after the last pixel."""
        return self.positions + self.dilation * (self.taps - 1) - self.pixels - self.padding

    def overlaps(self) -> list[tuple[slice, slice]]:
        """List for each tap the windows whose tap is a pixel, and these pixels.

        >>> Axis(pixels=4, positions=4, taps=3, dilation=1, padding=1).overlaps()[0]
        (slice(1, 4, None), slice(0, 3, None))
        """
        ranges = []
        for tap in range(self.taps):
            shift = tap * self.dilation - self.padding
            first, last = max(0, -shift), min(self.positions, self.pixels - shift)
            if first < last:
                ranges.append((slice(first, last), slice(first + shift, last + shift)))
        return ranges


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution of stride 1, axis by axis."""

    axes: tuple[Axis, ...]

    @property
    def pixels(self) -> int:
        """Positions of the input, P."""
        return math.prod(axis.pixels for axis in self.axes)

    @property
    def taps(self) -> int:
        """Pixels per window, w."""
        return math.prod(axis.taps for axis in self.axes)

    def project(
        self,
        pixels: Tensor,  # (samples, groups, P, channels)
        directions: Tensor,  # (groups, channels · w, d)
    ) -> Tensor:  # (samples, groups, T, d)
        """Multiply each window with some vectors. This is a convolution of the pixels with the vectors as filters."""
        samples, groups, _, channels = pixels.shape
        images = pixels.mT.reshape(samples, groups * channels, *(axis.pixels for axis in self.axes))
        pads = [pad for axis in reversed(self.axes) for pad in (axis.padding, axis.padding_after)]
        filters = directions.mT.reshape(-1, channels, *(axis.taps for axis in self.axes))
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.axes)]
        dilation = [axis.dilation for axis in self.axes]
        products = convolve(F.pad(images, pads), filters, dilation=dilation, groups=groups)
        return products.reshape(samples, groups, directions.shape[2], -1).mT

    def gram(
        self,
        pixels: Tensor,  # (rows, P, columns, P)
    ) -> Tensor:  # (rows, T, columns, T)
        """Compute the Gram matrix of windows from that of pixels, A[t, t'] = Σ_δ X[t+δ, t'+δ], axis by axis."""
        rows, columns = pixels.shape[0], pixels.shape[2]
        sizes = [axis.pixels for axis in self.axes]
        grid = pixels.reshape(rows, *sizes, columns, *sizes)
        for number, axis in reversed(list(enumerate(self.axes))):
            shape = list(grid.shape)
            one, other = 1 + number, 2 + len(sizes) + number
            shape[one] = shape[other] = axis.positions
            total = grid.new_zeros(shape)
            for windows, inside in axis.overlaps():
                target = total.narrow(one, windows.start, windows.stop - windows.start)
                target = target.narrow(other, windows.start, windows.stop - windows.start)
                source = grid.narrow(one, inside.start, inside.stop - inside.start)
                target += source.narrow(other, inside.start, inside.stop - inside.start)
            grid = total
        positions = math.prod(axis.positions for axis in self.axes)
        return grid.reshape(rows, positions, columns, positions)


def windows_of(
    module: nn.Module,
    x: Tensor,  # (samples, channels, …): an input of the module
) -> Windows | None:
    """Describe the windows of a convolution. Return None if its stride is not 1, or its windows have one pixel."""
    if not isinstance(module, Convolution) or set(module.stride) != {1} or set(module.kernel_size) == {1}:
        return None
    axes = []
    for size, (before, after), taps, dilation in zip(
        x.shape[2:], padding_of(module), module.kernel_size, module.dilation, strict=True
    ):
        padded_size = size + before + after
        positions = padded_size - dilation * (taps - 1)
        zeros_around = module.padding_mode == "zeros"
        padding = before if zeros_around else 0
        axes.append(Axis(size if zeros_around else padded_size, positions, taps, dilation, padding))
    return Windows(tuple(axes))


def pixels_of(
    module: nn.Module,
    x: Tensor,  # (samples, channels, …)
) -> Tensor:  # (samples, groups, P, channels per group)
    """Return the pixels of a convolution's input. Padding with zeros is left out; other padding is added."""
    assert isinstance(module, Convolution)
    x = x if module.padding_mode == "zeros" else padded(module, x)
    return x.reshape(len(x), module.groups, x.shape[1] // module.groups, -1).mT
