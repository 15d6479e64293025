"""A cache of the values of blocks of samples. Held blocks stay. Other blocks are dropped, least recently used first."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from ntkgen.blocks import Block

T = TypeVar("T")


class BlockCache(Generic[T]):
    """The values of blocks, computed on request. The cache never has more than ``capacity`` values at a time.

    >>> cache = BlockCache(lambda block: block.start, capacity=2)
    >>> first, second, third = Block(0, 3).pieces(1)
    >>> cache.hold([first])
    >>> [cache(block) for block in (second, third, first)]
    [1, 2, 0]
    """

    def __init__(self, make: Callable[[Block], T], capacity: int) -> None:
        assert capacity >= 1
        self._make, self._capacity = make, capacity
        self._held: dict[Block, T] = {}
        self._passing: OrderedDict[Block, T] = OrderedDict()

    def hold(self, blocks: Sequence[Block]) -> None:
        """Keep these blocks until the next call. Blocks that were held before and are not listed may be dropped."""
        assert len(blocks) <= self._capacity
        for block in [block for block in self._held if block not in blocks]:
            self._passing[block] = self._held.pop(block)
        for block in blocks:
            if block in self._passing:
                self._held[block] = self._passing.pop(block)
        for block in blocks:
            if block not in self._held:
                self._make_room()
                self._held[block] = self._make(block)

    def __call__(self, block: Block) -> T:
        """Return the value of a block. If it is missing, drop the least recently used value and compute this one."""
        if block in self._held:
            return self._held[block]
        if block not in self._passing:
            self._make_room()
            self._passing[block] = self._make(block)
        self._passing.move_to_end(block)
        return self._passing[block]

    def _make_room(self) -> None:
        while self._passing and len(self._held) + len(self._passing) >= self._capacity:
            self._passing.popitem(last=False)
        assert len(self._held) + len(self._passing) < self._capacity


def count_samples(capacity: int, steps: Iterable[tuple[Sequence[Block], Iterable[Block]]]) -> int:
    """Count the samples whose values are computed in some steps. A step has blocks to hold and blocks to request.

    >>> blocks = Block(0, 6).pieces(2)
    >>> count_samples(2, [([], blocks), (blocks[:1], blocks)])
    12
    """
    computed = 0

    def make(block: Block) -> None:
        nonlocal computed
        computed += len(block)

    cache = BlockCache(make, capacity)
    for held, requested in steps:
        cache.hold(held)
        for block in requested:
            cache(block)
    return computed
