"""One random generator per purpose, derived from the seed of a run and the name of the purpose.

Adding a use of chance for one purpose does not change what is drawn for the others. Two methods with the same seed see
the same classes, splits and probe samples.
"""

import zlib
from typing import Literal, get_args

import numpy as np

Purpose = Literal[
    "class_order",
    "split",
    "shift",
    "batches",
    "augment",
    "permutation",
    "probe",
    "init",
    "memory",
    "noise",
    "bootstrap",
    "target",
    "replacement",
    "perturbation",
    "optimizer",
]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def seed_of(seed: int, purpose: Purpose, *numbers: int) -> int:
    """Derive a seed of 63 bits for a purpose.

    Args:
        seed: The seed of the run.
        purpose: The purpose.
        numbers: What the draw belongs to, such as the number of a task.

    >>> seed_of(0, "split") == seed_of(0, "split"), seed_of(0, "split") == seed_of(0, "probe")
    (True, False)
    """
    assert purpose in PURPOSES
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def generator_of(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
    """Make NumPy's generator for a purpose; see `seed_of`."""
    return np.random.default_rng(seed_of(seed, purpose, *numbers))
