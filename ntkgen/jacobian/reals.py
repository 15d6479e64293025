"""Complex parameters as pairs of real numbers."""

from collections.abc import Iterable

import torch
from torch import Tensor


def real_numbers(tensor: Tensor) -> Tensor:  # (numbers,)
    """Flatten a tensor. A complex number becomes two numbers, its real and its imaginary part.

    >>> real_numbers(torch.tensor([1.0, 2 + 3j]))
    tensor([1., 0., 2., 3.])
    """
    return torch.view_as_real(tensor.resolve_conj()).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)


def count_real_numbers(tensors: Iterable[Tensor]) -> int:
    """Count the real numbers in some tensors. A complex number counts as two.

    >>> count_real_numbers([torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64), torch.tensor(1.0)])
    11
    """
    return sum(tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors)
