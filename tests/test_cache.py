"""The cache of blocks: held blocks stay, other blocks are dropped in order, and the capacity is never exceeded."""

import gc
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkgen.blocks import Block
from ntkgen.jacobian.cache import BlockCache, count_samples

BLOCKS = Block(0, 15).pieces(2)  # eight of them, the last with one sample


class Made:
    """The value of a block. A weak reference shows whether it is in memory."""

    def __init__(self, block):
        self.block = block


class Watch:
    """Compute values of blocks. Record the blocks, and the maximum number of values in memory."""

    def __init__(self):
        self.made, self.alive, self.peak = [], [], 0

    def __call__(self, block):
        self.alive = [reference for reference in self.alive if reference() is not None]
        made = Made(block)
        self.alive.append(weakref.ref(made))
        self.made.append(block)
        self.peak = max(self.peak, len(self.alive))
        return made


class Model:
    """The same by brute force: a list of what is there, the next to leave first, and what may not leave."""

    def __init__(self, capacity):
        self.capacity, self.there, self.held, self.made = capacity, [], [], []

    def hold(self, blocks):
        released = [block for block in self.held if block not in blocks]
        for block in released:  # as if they had streamed past just now
            self.there.remove(block)
            self.there.append(block)
        kept = [block for block in self.held if block in blocks]  # who was held first is the first to leave, later
        self.held = [*kept, *(block for block in blocks if block in self.there and block not in kept)]
        for block in blocks:
            if block not in self.there:
                self.make(block)
            if block not in self.held:
                self.held.append(block)

    def ask(self, block):
        if block not in self.there:
            self.make(block)
        if block not in self.held:
            self.there.remove(block)
            self.there.append(block)

    def make(self, block):
        while len(self.there) >= self.capacity:
            self.there.remove(next(other for other in self.there if other not in self.held))
        self.there.append(block)
        self.made.append(block)


@st.composite
def histories(draw):
    """A capacity, and what is held and asked for: never a further block where the held ones fill it."""
    capacity, steps = draw(st.integers(1, 9)), []
    block = st.sampled_from(BLOCKS)
    for _ in range(draw(st.integers(1, 5))):
        held = draw(st.lists(block, unique=True, max_size=min(capacity, len(BLOCKS))))
        askable = st.sampled_from(held) if len(held) == capacity else block
        steps.append((held, draw(st.lists(askable, max_size=15))))
    return capacity, steps


@given(histories())
def test_the_cache_keeps_what_is_held_and_what_was_used_last_and_no_more(history):
    capacity, steps = history
    watch, model = Watch(), Model(capacity)
    cache = BlockCache(watch, capacity)
    gc.disable()  # nothing may wait for it
    try:
        for held, asked in steps:
            cache.hold(held)
            model.hold(held)
            for block in asked:
                assert cache(block).block == block
                model.ask(block)
                assert watch.made == model.made
            for block in held:
                assert cache(block).block == block
            assert watch.made == model.made  # what is held is never made again
    finally:
        gc.enable()
    assert watch.peak <= capacity


@given(histories())
def test_samples_are_counted_as_they_are_made(history):
    capacity, steps = history
    model = Model(capacity)
    for held, asked in steps:
        model.hold(held)
        for block in asked:
            model.ask(block)
    assert count_samples(capacity, steps) == sum(map(len, model.made))


@given(st.lists(st.sampled_from(BLOCKS), max_size=40), st.integers(1, 8))
def test_with_nothing_held_it_keeps_the_blocks_used_last(asked, capacity):
    recent, misses = [], 0
    for block in asked:
        misses += block not in recent[:capacity]
        recent = [block, *(other for other in recent if other != block)]
    watch = Watch()
    cache = BlockCache(watch, capacity)
    for block in asked:
        cache(block)
    assert len(watch.made) == misses


@given(st.lists(st.sampled_from(BLOCKS), max_size=40), st.integers(1, 8))
def test_a_larger_cache_never_makes_more(asked, capacity):
    smaller, larger = (count_samples(size, [([], asked)]) for size in (capacity, capacity + 1))
    assert larger <= smaller


def test_holding_something_else_makes_room_only_when_it_is_needed():
    watch = Watch()
    cache = BlockCache(watch, capacity=3)
    cache.hold(BLOCKS[:2])
    cache.hold(BLOCKS[1:3])
    assert watch.made == [BLOCKS[0], BLOCKS[1], BLOCKS[2]]
    cache(BLOCKS[0])  # it is still there
    assert len(watch.made) == 3
    cache(BLOCKS[3])  # now it is not
    cache(BLOCKS[0])
    assert watch.made[3:] == [BLOCKS[3], BLOCKS[0]]


def test_more_than_there_is_room_for_is_our_mistake():
    with pytest.raises(AssertionError):
        BlockCache(Made, capacity=2).hold(BLOCKS[:3])
    with pytest.raises(AssertionError):
        BlockCache(Made, capacity=0)


def test_a_further_block_beside_held_ones_that_fill_the_cache_is_our_mistake():
    """The cache is full. One value more than projected would be in memory."""
    cache = BlockCache(Made, capacity=2)
    cache.hold(BLOCKS[:2])
    with pytest.raises(AssertionError):
        cache(BLOCKS[2])


def test_what_could_not_be_made_is_asked_for_again():
    def fail_once(block):
        attempts.append(block)
        if len(attempts) == 1:
            raise InterruptedError
        return block

    attempts = []
    cache = BlockCache(fail_once, capacity=1)
    with pytest.raises(InterruptedError):
        cache(BLOCKS[0])
    assert cache(BLOCKS[0]) == BLOCKS[0]
