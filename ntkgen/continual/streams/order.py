"""Class orders: natural, drawn from the seed in two ways, that of iCaRL, or a given list."""

from collections.abc import Sequence

import numpy as np

from ntkgen.continual.chance import generator_of
from ntkgen.errors import InputError, UnknownNameError

ORDERS = ("natural", "random", "icarl", "numpy")
# The seed with which the authors of iCaRL shuffled the classes of CIFAR-100 (Rebuffi et al. 2017, arXiv:1611.07725).
ICARL_SEED = 1993


def class_order(order: str | Sequence[int], num_classes: int, seed: int) -> tuple[int, ...]:
    """List the classes in the order in which a stream presents them.

    Args:
        order: ``natural``, ``random``, ``icarl``, ``numpy``, or a list that has every class once. ``numpy`` is what
            `numpy.random.permutation` gives after `numpy.random.seed` with the seed of the run, as in the published
            code of Dohare et al. (2024, Nature 632).
        num_classes: Number of classes of the data set.
        seed: The seed of the run.

    Raises:
        UnknownNameError: If there is no order of that name.
        InputError: If a list lacks a class, or has one twice.

    >>> class_order("natural", 4, seed=0), class_order([3, 1, 0, 2], 4, seed=0)
    ((0, 1, 2, 3), (3, 1, 0, 2))
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise UnknownNameError("class order", order, ORDERS)
        return _named_order(order, num_classes, seed)
    given = tuple(order)
    if sorted(given) != list(range(num_classes)):
        raise InputError(
            f"The class order does not fit the data set: expected each of the classes 0 to {num_classes - 1} once, "
            f"found {', '.join(map(str, given[:10]))}{', …' if len(given) > 10 else ''}. Is it the order of another "
            "data set? Give a complete one, or one of the names {', '.join(ORDERS)}."
        )
    return given


def _named_order(order: str, num_classes: int, seed: int) -> tuple[int, ...]:
    if order == "natural":
        return tuple(range(num_classes))
    if order == "icarl":
        return tuple(np.random.RandomState(ICARL_SEED).permutation(num_classes).tolist())
    if order == "numpy":
        return tuple(np.random.RandomState(seed).permutation(num_classes).tolist())
    return tuple(generator_of(seed, "class_order").permutation(num_classes).tolist())
