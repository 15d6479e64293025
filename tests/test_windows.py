"""The Gram matrix of windows from that of pixels, against windows cut out: every padding, size and dilation."""

import dataclasses
import warnings
from itertools import product

import pytest
import torch
from cases import CPU, relative_error
from hypothesis import given
from hypothesis import strategies as st
from strategies import pieces_of
from torch import nn

import ntkgen
from ntkgen.jacobian.choice import plan_jacobian
from ntkgen.jacobian.compute import compute_factors
from ntkgen.jacobian.contract import contract, exact_diagonal
from ntkgen.jacobian.layers import RULES, LayerRule, padding_of
from ntkgen.jacobian.network import prepare
from ntkgen.jacobian.precision import exact_arithmetic, policy
from ntkgen.jacobian.reference import reference_ntk
from ntkgen.jacobian.windows import Axis, Windows, pixels_of, windows_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")


def convolution(axes, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        return CONVOLUTIONS[axes](**options)


@st.composite
def convolutions(draw):
    """A convolution in steps of one and the size of the pictures that it takes, one to three axes."""
    axes = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(MODES))
    groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = draw(st.tuples(*(st.integers(1, 4) for _ in range(axes))).filter(lambda sizes: set(sizes) != {1}))
    dilation = draw(st.tuples(*(st.integers(1, 2) for _ in range(axes))))
    padding = draw(st.sampled_from(["same", "valid"]) | st.tuples(*(st.integers(0, 2) for _ in range(axes))))
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    sides = [0] * axes if padding == "valid" else [-(-span // 2) for span in spans] if padding == "same" else padding
    # large enough for one window, and for padding that is taken from the picture: reflected, it leaves the edge out
    least = [max(1, span + 1 - 2 * side, side + 1) for span, side in zip(spans, sides, strict=True)]
    sizes = [draw(st.integers(low, low + 2)) for low in least]
    layer = convolution(
        axes,
        in_channels=groups * channels,
        out_channels=groups,
        kernel_size=kernel,
        dilation=dilation,
        padding=padding,
        padding_mode=mode,
        groups=groups,
    )
    return layer.double(), sizes


def pictures(layer, sizes, samples=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, layer.in_channels, *sizes, generator=generator, dtype=torch.float64)


def gram_of_pixels(windows, left, right):
    """A[i, t, j, t'] for one group, from (samples, P, channels)."""
    return windows.gram(torch.einsum("ipk,jqk->ipjq", left, right))


@given(convolutions())
def test_the_gram_matrix_of_windows_follows_from_that_of_pixels(drawn):
    layer, sizes = drawn
    left, right = pictures(layer, sizes, 2), pictures(layer, sizes, 3, seed=1)
    windows = windows_of(layer, left)
    a, b = (RULES[type(layer)].inputs(layer, x) for x in (left, right))  # (samples, groups, T, k)
    p, q = (pixels_of(layer, x) for x in (left, right))  # (samples, groups, P, k / w)
    assert windows.taps * p.shape[3] == a.shape[3]
    assert windows.pixels == p.shape[2]
    for group in range(layer.groups):
        expected = torch.einsum("itk,juk->itju", a[:, group], b[:, group])
        assert relative_error(gram_of_pixels(windows, p[:, group], q[:, group]), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(convolutions())
def test_there_are_as_many_windows_as_outputs(drawn):
    layer, sizes = drawn
    x = pictures(layer, sizes)
    axes = windows_of(layer, x).axes
    assert [axis.positions for axis in axes] == list(layer(x).shape[2:])
    assert [axis.taps for axis in axes] == list(layer.kernel_size)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 12))
def test_overlaps_are_the_taps_within_the_axis(pixels, positions, taps, dilation, padding):
    found = []
    for windows, inside in Axis(pixels, positions, taps, dilation, padding).overlaps():
        assert windows.stop - windows.start == inside.stop - inside.start > 0
        found += zip(range(positions)[windows], range(pixels)[inside], strict=True)
    reached = [(t, t + d * dilation - padding) for d, t in product(range(taps), range(positions))]
    assert found == [(t, pixel) for t, pixel in reached if 0 <= pixel < pixels]


def test_windows_beside_all_pixels_are_zeros():
    windows = Windows((Axis(pixels=2, positions=3, taps=1, dilation=1, padding=9),))
    assert torch.equal(windows.gram(torch.ones(1, 2, 1, 2)), torch.zeros(1, 3, 1, 3))


OTHERS = {
    "strides": nn.Conv2d(2, 2, 3, stride=2),
    "a stride along one axis": nn.Conv2d(2, 2, 3, stride=(1, 2)),
    "one pixel": nn.Conv2d(2, 2, 1),
    "one pixel, padded": nn.Conv2d(2, 2, (1, 1), padding=1),
    "transposed": nn.ConvTranspose2d(2, 2, 3),
    "no convolution": nn.Linear(5, 2),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_layers_have_no_windows(what):
    assert windows_of(OTHERS[what], torch.zeros(1, 2, 5, 5)) is None


@pytest.mark.parametrize("kernel", [(1, 2), (3, 1)])
def test_windows_of_one_pixel_along_one_axis_are_windows(kernel):
    assert windows_of(nn.Conv2d(2, 2, kernel), torch.zeros(1, 2, 5, 5)).taps == kernel[0] * kernel[1]


# whole networks -------------------------------------------------------------------------------------------------------


def error_with_pixels(model, x):
    """The largest error of the kernels whose first layer is kept as pixels."""
    network, orders = prepare(model, x, policy("float64")), ("gram", "ordered")
    assert network.profile.layers[0].taps > 1
    errors = []
    for order in orders:
        plan = plan_jacobian(
            network.profile, pieces_of(9, 9, 9, 999), precision="float64", orders=[order] * len(network.profile.layers)
        )
        first = dataclasses.replace(plan.layers[0], uses_pixels=True)
        plan = dataclasses.replace(plan, layers=(first, *plan.layers[1:]))
        with exact_arithmetic(CPU):
            block = compute_factors(network, plan, x)
            errors.append(relative_error(contract(block, block, plan), reference_ntk(model, x)))
            diagonal = exact_diagonal(block).flatten()
            errors.append(relative_error(diagonal, reference_ntk(model, x).diagonal()))
    return max(errors)


def network_above(layer, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(x).flatten(1).shape[1], 2))


CHANGES = {
    "dilation": {"dilation": (2, 2)},
    "padding": {"padding": (2, 0)},
    "both": {"padding": (2, 2), "dilation": (2, 2)},
    "stride": {"stride": (1, 1)},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_a_convolution_that_was_changed_after_it_was_built(change, padding):
    """As dilated backbones are made: torch reads stride, padding and dilation when it is called."""
    layer = nn.Conv2d(2, 3, 3, padding=padding)
    for name, value in CHANGES[change].items():
        setattr(layer, name, value)
    x = pictures(layer, (5, 6), samples=3).float()
    assert [axis.positions for axis in windows_of(layer, x).axes] == list(layer(x).shape[2:])
    assert padding_of(layer) is not None
    assert error_with_pixels(network_above(layer, x), x) < 1e-10


class Mirrored(nn.Conv2d):
    """A convolution of the mirrored picture: its windows lie elsewhere than a convolution's."""

    def forward(self, x):
        return super().forward(x.flip(2))


def test_a_rule_of_the_users_for_a_kind_of_convolution_is_not_taken_for_a_convolutions(monkeypatch):
    """The inputs are what its rule says, and are kept as pixels only where those have the same Gram matrix."""
    plain = RULES[nn.Conv2d]

    def inputs(module, x):
        return plain.inputs(module, x.flip(2))

    monkeypatch.setitem(RULES, Mirrored, LayerRule("weight", inputs, plain.cotangents, plain.vectors))
    layer = Mirrored(2, 3, 3, padding=1)
    x = pictures(layer, (4, 5), samples=3).float()
    model = network_above(layer, x)
    for order in ("explicit", "gram", "ordered"):
        found = ntkgen.ntk(model, x, precision="float64", orders=[order] * 2)
        assert relative_error(found, reference_ntk(model, x)) < 1e-10


def test_a_layer_that_is_used_twice_keeps_its_windows_as_they_are():
    """Windows of two pictures multiply with one another, too; those of one picture follow from its pixels."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).flatten(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Twice(), torch.randn(3, 2, 4, 4)
    assert prepare(model, x, policy("float64")).windows == {}
    found = ntkgen.ntk(model, x, precision="float64", orders=["gram", "gram"])
    assert relative_error(found, reference_ntk(model, x)) < 1e-10
