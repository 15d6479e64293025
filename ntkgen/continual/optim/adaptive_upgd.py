"""UPGD with the direction of Adam, AdaptiveUPGD."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkgen.continual.optim.descent import adam_direction, add_noise, decay, descend
from ntkgen.continual.optim.segments import Segment
from ntkgen.continual.optim.stacked import Params, StackedOptimizer
from ntkgen.continual.optim.utility import accumulate, largest_utility, unprotected


class AdaptiveUPGD(StackedOptimizer):
    """UPGD with the direction of Adam in place of the gradient, w ← (1 − αλ) w − k α (m̂ / (√v̂ + ε) + ξ) (1 − s).

    m̂ and v̂ are the means of Adam, ξ = σ N(0, 1), and s is the scaled utility of first order, divided by the largest
    one; see `UPGD`. The published code takes k = ``step_scale`` = 2, and ``largest`` = ``raw``.

    References:
        Elsayed, Mahmood (2024), ICLR, arXiv:2404.00781; for reinforcement learning in
        https://github.com/mohmdelsayed/upgd, AdaptiveUPGD.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        beta_utility: Decay rate of the running mean of the utilities.
        sigma: Standard deviation σ of the noise.
        weight_decay: Weight decay λ.
        step_scale: Factor k of the step along direction and noise.
        beta1: Decay rate of the running mean of the gradients.
        beta2: Decay rate of the running mean of the squared gradients.
        eps: The number ε.
        largest: Whether utilities are divided by the largest ``corrected`` or the largest ``raw`` one.
        members: Number of networks of a stack; None for one network.
        generators: A source of noise per network; None for torch's global one.
    """

    traces = ("utility", "mean", "square")
    num_scratch = 2

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        beta_utility: float | Tensor = 0.999,
        sigma: float | Tensor = 0.001,
        weight_decay: float | Tensor = 0.0,
        *,
        step_scale: float | Tensor = 1.0,
        beta1: float | Tensor = 0.9,
        beta2: float | Tensor = 0.999,
        eps: float | Tensor = 1e-5,
        largest: str = "corrected",
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta_utility": beta_utility,
            "sigma": sigma,
            "weight_decay": weight_decay,
            "step_scale": step_scale,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "largest": largest,
        }
        super().__init__(params, defaults, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            accumulate(segment)
        largest = largest_utility(segments, self.defaults["largest"])
        for segment in segments:
            gate = unprotected(segment, largest, segment.scratch[1])
            direction = adam_direction(segment)
            add_noise(segment, direction)
            decay(segment)
            descend(segment, direction.mul_(gate), segment.number("step_scale"))
