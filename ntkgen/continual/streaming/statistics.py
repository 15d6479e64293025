"""What is measured of stacked networks in a step: loss, accuracy, plasticity, inactive units, norms and ranks.

All functions are per member, the first axis. They compute the definitions of Elsayed and Mahmood (2024),
arXiv:2404.00781, and of their code.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ntkgen.continual.streaming.measures import SMALL_LOSS, THINNED


def losses(outputs: Tensor, targets: Tensor) -> Tensor:  # (k, classes), (k,) -> (k,)
    """Compute the cross-entropy of the sample of each member."""
    return F.cross_entropy(outputs, targets, reduction="none")


def accuracy(outputs: Tensor, targets: Tensor, loss: Tensor) -> Tensor:  # (k, classes), (k,), (k,) -> (k,)
    """Say whether the predicted class is right, as 1 or 0, and NaN if the network has diverged.

    >>> outputs = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    >>> accuracy(outputs, torch.tensor([1, 0]), torch.tensor([0.3, torch.nan])).tolist()
    [1.0, nan]
    """
    is_right = (outputs.argmax(1) == targets).to(loss.dtype)
    return where_finite(loss, is_right)


def where_finite(shown: Tensor, values: Tensor) -> Tensor:  # (k,), (k,) or () -> (k,)
    """Replace values by NaN where what is shown is not finite, such as the loss of a network that has diverged.

    >>> where_finite(torch.tensor([1.0, torch.inf]), torch.tensor(0.5)).tolist()
    [0.5, nan]
    """
    return torch.where(shown.isfinite(), values, torch.nan)


def plasticity(before: Tensor, after: Tensor) -> Tensor:  # (k,), (k,) -> (k,)
    """Compute which part of a loss a step takes away: 1 − L₊ / max(L, 1e-8), cut off at 0 and 1.

    A loss that is not finite stays visible as NaN.

    >>> plasticity(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([0.5, 3.0, 0.0])).tolist()
    [0.75, 0.0, 1.0]
    """
    return where_finite(before, (1 - after / before.clamp_min(SMALL_LOSS)).clamp(0, 1))


def inactive_units(rectified: Sequence[Tensor]) -> Tensor:  # of (k, units) -> (k,)
    """Compute which part of the outputs of all ReLUs is exactly 0. Without a ReLU it is NaN.

    Of a single sample these are inactive units. They need not be dead units, which are 0 for all samples.
    """
    if not rectified:
        return torch.tensor(torch.nan)
    zeros = torch.stack([(each == 0).sum(1) for each in rectified]).sum(0)
    return zeros / sum(each.shape[1] for each in rectified)


def weights_of(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """List the weights: parameters whose name ends with ``weight``."""
    return [values for name, values in parameters.items() if name.endswith("weight")]


def thinned_measures(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:  # each (k,)
    """Compute norms and ranks of weights and gradients."""
    flat_grads = [each.flatten(1) for each in grads]
    size = sum(each.shape[1] for each in flat_grads)
    found = {"weight_rank": weight_rank(weights)}
    for name, parts in (("weight", [each.detach().flatten(1) for each in weights]), ("grad", flat_grads)):
        found[f"{name}_l2"] = torch.stack([part.square().sum(1) for part in parts]).sum(0).sqrt()
        found[f"{name}_l1"] = torch.stack([part.abs().sum(1) for part in parts]).sum(0)
    found["grad_l0"] = where_finite(
        found["grad_l1"], torch.stack([(part != 0).sum(1) for part in flat_grads]).sum(0) / size
    )
    return {name: found[name] for name in THINNED}


@torch.no_grad()
def weight_rank(weights: Sequence[Tensor]) -> Tensor:  # of (k, …) -> (k,)
    """Compute Σ rank(W) / Σ max rank(W). The rank of a convolution is the mean of those of its kernels.

    Ranks have torch's default tolerance, max(rows, columns) · ε · σ_max. A stack with a number that is not finite has
    NaN.
    """
    ranks, largest = [], 0
    for weight in weights:
        if weight.ndim < 3:
            continue
        is_finite = weight.flatten(1).isfinite().all(1)
        finite = torch.where(is_finite.reshape(-1, *[1] * (weight.ndim - 1)), weight, torch.zeros_like(weight))
        rank = torch.linalg.matrix_rank(finite).double().view(len(weight), -1).mean(1)
        ranks.append(torch.where(is_finite, rank, torch.nan))
        largest += min(weight.shape[-2:])
    if not ranks:
        return torch.full((len(weights[0]),), torch.nan)
    return torch.stack(ranks).sum(0) / largest
