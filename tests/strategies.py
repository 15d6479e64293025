"""Hypothesis strategies: grids of tiles, layers and devices, and the indices that NumPy knows."""

import dataclasses
import os

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from ntkgen.jacobian.cost import LayerShape, Rates, Sizes
from ntkgen.plan.tiles import TileGrid

# The same examples in every run, more where there is time, as in CI; none timed, nothing written into the checkout.
EXAMPLES = int(os.environ.get("NTKGEN_TEST_EXAMPLES", "6"))
settings.register_profile("ntkgen", deadline=None, derandomize=True, database=None, max_examples=EXAMPLES)
settings.load_profile("ntkgen")
# Where each example is a store.
few = settings(max_examples=max(3, EXAMPLES // 3))

grids = st.builds(
    lambda samples, outputs, tile: TileGrid(samples, outputs, min(tile, samples)),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 12),
)

rectangles = st.builds(
    lambda rows, columns, outputs, tile: TileGrid(rows, outputs, min(tile, max(rows, columns)), columns),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 12),
)


def layer_shapes(limit: int, groups: int = 64) -> st.SearchStrategy[LayerShape]:
    """Layers of all sizes up to a limit, some with windows of a few pixels that are moved in steps of one."""
    size, count = st.integers(1, limit), st.integers(1, groups)
    plain = st.builds(LayerShape, st.just("layer"), size, size, size, count, passes_back=st.booleans())
    windowed = st.builds(
        lambda t, channels, c, q, taps, pixels: LayerShape("layer", t, channels * taps, c, q, taps, pixels),
        *(size, st.integers(1, max(1, limit // 9)), size, count, st.integers(2, 9), size),
    )
    return plain | windowed


speeds = st.sampled_from([int(f"{digit}{'0' * zeros}") for digit in (1, 3, 7) for zeros in range(2, 8)])
rates = st.builds(Rates, st.just("mm"), speeds, speeds, speeds, speeds, speeds)


ROOMS = [field.name for field in dataclasses.fields(Sizes) if field.name.endswith("_numbers")]


def pieces_of(block: int, batch: int, panel: int, numbers: int) -> Sizes:
    """Return sizes for a few samples, with a maximum number of numbers in each intermediate."""
    return Sizes(block, batch, panel, **dict.fromkeys(ROOMS, numbers))


def pieces(samples: int, numbers: int) -> st.SearchStrategy[Sizes]:
    """Draw sizes for a few samples, with at most ``numbers`` numbers in each intermediate."""
    few, room = st.integers(1, samples), st.integers(1, numbers)
    return st.builds(Sizes, few, few, few, **dict.fromkeys(ROOMS, room))


def slices(length: int) -> st.SearchStrategy[slice]:
    """Slices of every kind: empty, negative, stepping, reversed, beyond the ends."""
    ends = st.none() | st.integers(-length - 3, length + 3)
    return st.builds(slice, ends, ends, st.none() | st.integers(-5, 5).filter(bool))


def index_arrays(length: int, shape: tuple[int, ...] | None = None) -> st.SearchStrategy[np.ndarray]:
    """Integer arrays with negative and repeated entries, of a shape or of any length."""
    entries = st.integers(-length, length - 1)
    if shape is not None:
        size = int(np.prod(shape))
        return st.lists(entries, min_size=size, max_size=size).map(lambda e: np.array(e, np.intp).reshape(shape))
    return st.lists(entries, max_size=6).map(lambda e: np.array(e, np.intp))


def masks(length: int) -> st.SearchStrategy[np.ndarray]:
    """Boolean masks of one axis."""
    return st.lists(st.booleans(), min_size=length, max_size=length).map(np.array)


def keys(length: int) -> st.SearchStrategy[object]:
    """Everything that may stand between the brackets of a square matrix."""
    number = st.integers(-length, length - 1)
    one_axis = number | slices(length) | index_arrays(length) | masks(length)
    alone_or_sliced = st.tuples(one_axis, slices(length)) | st.tuples(slices(length), one_axis)
    shapes = st.sampled_from([(3,), (1,), (0,), (2, 3), (2, 1)])
    paired = shapes.flatmap(lambda shape: st.tuples(index_arrays(length, shape), index_arrays(length, shape)))
    broadcast = st.tuples(index_arrays(length, (3, 1)), index_arrays(length, (2,)))
    crossed = st.tuples(index_arrays(length), index_arrays(length)).map(lambda pair: np.ix_(*pair))
    mixed = (
        st.tuples(number, number) | st.tuples(number, index_arrays(length)) | st.tuples(index_arrays(length), number)
    )
    dotted = st.just(Ellipsis) | st.tuples(st.just(Ellipsis), one_axis) | st.tuples(one_axis, st.just(Ellipsis))
    return one_axis | alone_or_sliced | paired | broadcast | crossed | mixed | dotted
