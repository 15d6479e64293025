"""Utilities of weights: how much the loss would rise if a weight were zero, and how much of a step it gets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkgen.continual.optim.segments import Number, Segment, add_scaled, scale

# The smallest norm that a row is divided by, as in torch.nn.functional.normalize.
SMALLEST_NORM = 1e-12
# Axes of a convolution's weight, (rows, out, in, height, width), over which utilities are averaged.
KERNEL, COLUMN = (-2, -1), (-2,)


def accumulate(segment: Segment) -> None:
    """Update the running mean of the utility, u ← β u + (1 − β) U.

    U = −g w to first order, and U = −g w + ½ h w² to second order, which is the change of the loss if w becomes 0.
    """
    utility, beta, (product, *_) = segment.traces["utility"], segment.number("beta_utility"), segment.scratch
    if segment.h is None:
        torch.mul(segment.g, segment.w, out=product)
    else:
        torch.mul(segment.h, segment.w, out=product)
        torch.sub(segment.g, product, alpha=0.5, out=product)
        product.mul_(segment.w)
    scale(utility, beta)
    add_scaled(utility, product, beta - 1)


def corrected(segment: Segment) -> Number:
    """Return the factor that makes the running mean û = u / (1 − βᵗ)."""
    return segment.correction(segment.number("beta_utility"))


def largest_utility(segments: Sequence[Segment], largest: str) -> Tensor:  # (rows, 1)
    """Find the largest utility of each network: of û (``corrected``) or of u (``raw``), in float64 on the CPU."""
    found = []
    for segment in segments:
        own = segment.traces["utility"].amax(1, keepdim=True).to("cpu", torch.float64)
        found.append(own * corrected(segment) if largest == "corrected" else own)
    return found[0] if len(found) == 1 else torch.stack(found).amax(0)


def unprotected(
    segment: Segment,
    largest: Tensor | None,  # (rows, 1)
    out: Tensor,  # (rows, numbers)
) -> Tensor:  # (rows, numbers)
    """Compute the share of the step that each weight gets, 1 − s.

    s = φ(û / η) with the sigmoid φ, where η is the largest utility of the network. Without η, û is divided by its
    L2 norm along the last axis of each parameter. If no utility is positive (η ≤ 0), all weights have s = ½.

    Args:
        segment: The weights.
        largest: η of each network, or None for the norms.
        out: Gets the result.
    """
    utility = segment.traces["utility"]
    if largest is None:
        torch.mul(utility, 1.0, out=out)
        scale(out, corrected(segment))
        for part, slot in zip(segment.tensors(out), segment.slots, strict=True):
            rows = part.view(len(part), -1, slot.shape[-1] if slot.shape else 1)
            rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=SMALLEST_NORM))
        return out.neg_().sigmoid_()
    limits = torch.finfo(utility.dtype)
    factor = torch.where(largest > limits.tiny, corrected(segment) / largest, 0.0)
    torch.mul(utility, -factor.clamp(max=limits.max).to(utility), out=out)
    return out.sigmoid_()


def share(segment: Segment, shares: Tensor, shape: str) -> None:  # (rows, numbers)
    """Give the weights of a convolution a common share in place; other parameters keep theirs.

    Args:
        segment: The weights.
        shares: The share of the step that each weight gets.
        shape: ``element``: nothing changes; ``kernel``: the mean over each kernel, between an input and an output
            channel; ``column``: the mean over each column of a kernel; ``convex``: a mixture of the weight's own share
            and that of its kernel.
    """
    if shape == "element":
        return
    mixture = segment.number("mixture") if shape == "convex" else 1.0
    for part in segment.tensors(shares):
        if part.ndim != 5:
            continue
        mean = part.mean(COLUMN if shape == "column" else KERNEL, keepdim=True).expand_as(part)
        part.lerp_(mean, mixture if isinstance(mixture, float) else mixture.to(part).view(-1, 1, 1, 1, 1))
