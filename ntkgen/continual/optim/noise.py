"""Normal numbers for a stack of networks: each network has a source of its own, and may draw while others compute."""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Numbers of a network from which on threads draw. Below, handing work to a thread takes longer than drawing.
SHARED = 2**13


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    """Start threads that draw numbers."""
    return ThreadPoolExecutor(count, "noise")


@dataclass(frozen=True, eq=False)
class _Ahead:
    """Numbers of the next step.

    Attributes:
        matrix: Where they are.
        is_noisy: Whether a network has noise.
        states: The states of the generators before them.
        rows: The drawing of each row.
    """

    matrix: Tensor
    is_noisy: Sequence[bool]
    states: Sequence[Tensor]
    rows: Sequence[Future[Any]]

    def finish(self) -> None:
        """Wait until all rows are drawn."""
        for row in self.rows:
            row.result()


class Noise:
    """Draws standard normal numbers, a row per network.

    A row is drawn by ``row.normal_(generator=…)``. Its numbers depend on its generator alone, and not on the threads.

    Drawing takes as long as the rest of an optimizer's step, and torch draws in one thread. So other threads can draw
    the rows of the next step ahead, while the networks compute. The generators are then ahead of the numbers that were
    used, until `rewind`.

    Args:
        generators: A source per row; None for torch's global one.
    """

    def __init__(self, generators: Sequence[torch.Generator] | None) -> None:
        self._generators = generators
        self._ahead: _Ahead | None = None

    def take(self, matrix: Tensor, is_noisy: Sequence[bool]) -> None:  # (networks, numbers)
        """Fill a matrix with the next numbers. Networks without noise get 0, and nothing is drawn for them."""
        ahead = self._ahead
        if ahead is not None and ahead.matrix is matrix and ahead.is_noisy == is_noisy:
            ahead.finish()
            self._ahead = None
            return
        self.rewind()
        if torch.get_num_threads() > 1 and self._can_share(matrix):
            for row in self._begin(matrix, is_noisy):
                row.result()
        else:
            for k in range(len(matrix)):
                self._fill(matrix, is_noisy, k)

    def draw_ahead(self, matrix: Tensor, is_noisy: Sequence[bool]) -> None:  # (networks, numbers)
        """Begin to draw the numbers of the next step. Nothing else may use the matrix until `take`."""
        if self._generators is None or not self._can_share(matrix):
            return
        self.rewind()
        states = [generator.get_state() for generator in self._generators]
        self._ahead = _Ahead(matrix, is_noisy, states, self._begin(matrix, is_noisy))

    def rewind(self) -> None:
        """Forget what was drawn ahead: the generators stand behind the last numbers that were used."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.finish()
            for generator, state in zip(self._generators or (), ahead.states, strict=True):
                generator.set_state(state)

    def _can_share(self, matrix: Tensor) -> bool:
        return self._generators is not None and matrix.device.type == "cpu" and matrix.shape[1] >= SHARED

    def _begin(self, matrix: Tensor, is_noisy: Sequence[bool]) -> list[Future[Any]]:
        threads = _threads(torch.get_num_threads())
        return [threads.submit(self._fill, matrix, is_noisy, k) for k in range(len(matrix))]

    def _fill(self, matrix: Tensor, is_noisy: Sequence[bool], k: int) -> None:
        if is_noisy[k]:
            matrix[k].normal_(generator=None if self._generators is None else self._generators[k])
        else:
            matrix[k].zero_()
