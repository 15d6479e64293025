"""Errors that a user's network raises, explained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ntkgen.errors import ModelError, NtkgenError

# The part of an error that says that a graph was freed. `without_kept_graphs` explains it.
FREED = "backward through the graph a second time"


class NotInThisDtypeError(ModelError):
    """The network raised an error or returned another dtype. It may work in another dtype."""


@contextmanager
def explained_errors(samples: Tensor) -> Iterator[None]:
    """Explain an error that is raised in the user's network, which may be of any type.

    Raises:
        NotInThisDtypeError: If the network raises an error.
        Exception: If memory is exhausted, or the error explains itself or is explained by others.
    """
    try:
        yield
    except Exception as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if is_memory or isinstance(error, NtkgenError) or FREED in str(error):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "dtype" in text or "same type" in text or "Float" in text or "Double" in text:
            other = "float32" if samples.dtype == torch.float64 else "float64"
            cause = (
                f"Does it run only in {other}, because of a cast in its forward pass or a tensor that is not a buffer? "
                f"Choose the precision {other}, or remove the cast and use register_buffer."
            )
            if not samples.is_floating_point():
                cause = "Does the network need floating-point numbers instead of integers? Convert them, as x.float()."
        else:
            cause = "Does the network expect another size, number of channels or dtype? Pass samples that it accepts."
        raise NotInThisDtypeError(
            f"The network does not accept these samples, of shape {tuple(samples.shape[1:])} and {samples.dtype} each "
            f"({text}). {cause}"
        ) from error


@contextmanager
def explained_by(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Explain an error of the user's code, which may be of any type.

    Raises:
        NotInThisDtypeError: If there is an error.
        Exception: If memory is exhausted, or the error is one that others explain.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, NtkgenError | MemoryError | torch.OutOfMemoryError) or FREED in str(error):
            raise
        raise NotInThisDtypeError(explain(error)) from error
