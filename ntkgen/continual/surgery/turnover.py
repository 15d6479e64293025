"""How many units of a layer are replaced at each step; no tensors."""

from collections import Counter, deque
from collections.abc import Callable, Iterable

from ntkgen.continual.surgery.options import SurgeryOptions


class Turnover:
    """Counts the units of one layer that are eligible for replacement, and says how many are replaced at each step.

    All ages grow by one at each step, and the age of a replaced unit becomes zero. How many units are eligible, with an
    age above the maturity, therefore follows from how many were replaced at which step, whichever units they were. The
    host counts, and never waits for a device.

    At each step at which a unit is eligible, ρ times the number of eligible units (or of all units) is added to an
    accumulator. Its whole part is replaced, and subtracted. With draws instead, the fraction is the probability of one
    more unit, and nothing accumulates.

    >>> turnover = Turnover(10, SurgeryOptions(replacement_rate=0.05, maturity=2))
    >>> [turnover.advance() for _ in range(8)]
    [0, 0, 0, 1, 0, 0, 1, 0]

    Args:
        num_units: Number of units.
        options: Rate, maturity, and what is counted.
        draw: Draws from the uniform distribution on [0, 1), for draws.
    """

    def __init__(self, num_units: int, options: SurgeryOptions, draw: Callable[[], float] = lambda: 0.0) -> None:
        self.accumulated = 0.0
        self.num_units = num_units
        self._rate = options.replacement_rate
        self._maturity = options.maturity
        self._counts_all = options.replacement_count == "all"
        self._draw = draw if options.replacement_draw == "bernoulli" else None
        self.begin([0] * num_units)

    def begin(self, ages: Iterable[int], accumulated: float = 0.0) -> None:
        """Begin with units of some ages."""
        self.accumulated = accumulated
        self._step, self._eligible = 0, 0
        due = Counter(max(self._maturity + 1 - age, 0) for age in ages)  # steps until they are eligible
        self._young = deque(sorted(due.items()))

    def advance(self) -> int:
        """Take a step, and say how many units are to be replaced now."""
        self._step += 1
        while self._young and self._young[0][0] <= self._step:
            self._eligible += self._young.popleft()[1]
        if not self._eligible:
            return 0
        expected = self._rate * (self.num_units if self._counts_all else self._eligible)
        count = self._drawn(expected) if self._draw else self._accumulate(expected)
        if count:
            self._eligible -= count
            self._young.append((self._step + self._maturity + 1, count))
        return count

    def _accumulate(self, expected: float) -> int:
        self.accumulated += expected
        count = min(int(self.accumulated), self._eligible)
        self.accumulated -= count
        return count

    def _drawn(self, expected: float) -> int:
        assert self._draw is not None
        whole = int(expected)
        return min(whole + (self._draw() < expected - whole), self._eligible)
