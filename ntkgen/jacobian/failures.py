"""Errors that a user's network raises, explained."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ntkgen.errors import ModelError, NtkgenError

# The part of an error that says that a graph was freed. `without_kept_graphs` explains it.
FREED = "backward through the graph a second time"


class NotInThisDtypeError(ModelError):
    """The network raised an error or returned another dtype. It may work in another dtype."""


@contextmanager
def explained_by(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Explain an error of the user's code, which may be of any type.

    Raises:
        NotInThisDtypeError: If there is an error.
        Exception: If memory is exhausted, or the error explains itself or is explained by others.
    """
    try:
        yield
    except Exception as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if is_memory or isinstance(error, NtkgenError) or FREED in str(error):
            raise
        raise NotInThisDtypeError(explain(error)) from error


def explained_errors(samples: Tensor) -> AbstractContextManager[None]:
    """Explain an error that a network raises for some samples, as `explained_by` does."""
    return explained_by(lambda error: _refusal(samples, error))


def _refusal(samples: Tensor, error: Exception) -> str:
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
    return (
        f"The network does not accept these samples, of shape {tuple(samples.shape[1:])} and {samples.dtype} each "
        f"({text}). {cause}"
    )
