"""Convolutions in steps of one: their inputs as pixels, and the Gram matrix of windows from that of pixels."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ntkgen.jacobian.layers import Convolution, padded, padding_of


@dataclass(frozen=True)
class Axis:
    """How windows lie along one spatial axis: tap d of window t is pixel t + d · dilation - padding, zero outside."""

    pixels: int
    positions: int
    taps: int
    dilation: int
    padding: int

    @property
    def padding_after(self) -> int:
        """Zeros behind the last pixel."""
        return self.positions + self.dilation * (self.taps - 1) - self.pixels - self.padding

    def overlaps(self) -> list[tuple[slice, slice]]:
        """List, tap by tap, the windows whose tap lies within the axis, and the pixels that these taps are.

        >>> Axis(pixels=4, positions=4, taps=3, dilation=1, padding=1).overlaps()[0]
        (slice(1, 4, None), slice(0, 3, None))
        """
        found = []
        for tap in range(self.taps):
            shift = tap * self.dilation - self.padding
            first, last = max(0, -shift), min(self.positions, self.pixels - shift)
            if first < last:
                found.append((slice(first, last), slice(first + shift, last + shift)))
        return found


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution in steps of one, axis by axis."""

    axes: tuple[Axis, ...]

    @property
    def pixels(self) -> int:
        """Positions of the input, P."""
        return math.prod(axis.pixels for axis in self.axes)

    @property
    def taps(self) -> int:
        """Pixels of a window, w."""
        return math.prod(axis.taps for axis in self.axes)

    def project(
        self,
        pixels: Tensor,  # (samples, groups, P, channels)
        directions: Tensor,  # (groups, channels · w, d)
    ) -> Tensor:  # (samples, groups, T, d)
        """Multiply each window with some vectors: a convolution of the pixels, with the vectors as its filters."""
        samples, groups, _, channels = pixels.shape
        images = pixels.mT.reshape(samples, groups * channels, *(axis.pixels for axis in self.axes))
        pads = [pad for axis in reversed(self.axes) for pad in (axis.padding, axis.padding_after)]
        filters = directions.mT.reshape(-1, channels, *(axis.taps for axis in self.axes))
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.axes)]
        dilation = [axis.dilation for axis in self.axes]
        found = convolve(F.pad(images, pads), filters, dilation=dilation, groups=groups)
        return found.reshape(samples, groups, directions.shape[2], -1).mT

    def gram(
        self,
        pixels: Tensor,  # (rows, P, columns, P)
    ) -> Tensor:  # (rows, T, columns, T)
        """Sum the Gram matrix of pixels to that of windows, A[t, t'] = Σ_δ X[t+δ, t'+δ], one axis after the other."""
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
    """Describe the windows of a convolution, or None where they are not moved in steps of one, or hold one pixel."""
    if not isinstance(module, Convolution) or set(module.stride) != {1} or set(module.kernel_size) == {1}:
        return None
    axes = []
    for size, (before, after), taps, dilation in zip(
        x.shape[2:], padding_of(module), module.kernel_size, module.dilation, strict=True
    ):
        whole = size + before + after
        positions = whole - dilation * (taps - 1)
        zeros_around = module.padding_mode == "zeros"
        axes.append(Axis(size if zeros_around else whole, positions, taps, dilation, before if zeros_around else 0))
    return Windows(tuple(axes))


def pixels_of(
    module: nn.Module,
    x: Tensor,  # (samples, channels, …)
) -> Tensor:  # (samples, groups, P, channels per group)
    """Give the pixels of a convolution's input; zeros around it are left out, other padding is made."""
    assert isinstance(module, Convolution)
    x = x if module.padding_mode == "zeros" else padded(module, x)
    return x.reshape(len(x), module.groups, x.shape[1] // module.groups, -1).mT
