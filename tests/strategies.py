"""Hypothesis strategies: grids of tiles, and the indices that NumPy knows."""

import numpy as np
from hypothesis import strategies as st

from ntkgen.kernel.tiles import TileGrid

grids = st.builds(
    lambda samples, outputs, tile: TileGrid(samples, outputs, min(tile, samples)),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 12),
)


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
