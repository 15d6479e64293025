"""Gradient descent: plain, with noise, with noise and shrinking weights, and Adam."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkgen.continual.optim.segments import Number, Segment, add, add_scaled, average, is_zero, scale
from ntkgen.continual.optim.stacked import Params, StackedOptimizer


def decay(segment: Segment, name: str = "weight_decay") -> None:
    """Shrink the weights, w ← (1 − αλ) w."""
    rate = segment.number(name)
    if not is_zero(rate):
        scale(segment.w, 1 - segment.number("lr") * rate)


def add_noise(segment: Segment, x: Tensor) -> None:  # (rows, numbers)
    """Add the noise, x ← x + σ N(0, 1)."""
    if segment.noise is not None:
        add_scaled(x, segment.noise, segment.number("sigma"))


def descend(segment: Segment, direction: Tensor, factor: Number = 1.0) -> None:  # (rows, numbers)
    """Take a step, w ← w − factor · α · direction."""
    add_scaled(segment.w, direction, -segment.number("lr") * factor)


class SGD(StackedOptimizer):
    """Stochastic gradient descent, w ← w − α (g + λ w).

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        weight_decay: Weight decay λ.
        members: Number of networks of a stack; None for one network.
        generators: Not used.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        weight_decay: float | Tensor = 0.0,
        *,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            if not is_zero(rate := segment.number("weight_decay")):
                add_scaled(segment.g, segment.w, rate)
            descend(segment, segment.g)


class PGD(StackedOptimizer):
    """Perturbed gradient descent, w ← w − α (g + ξ) with ξ ~ N(0, σ²).

    References:
        Zhou et al. (2019), ICML, arXiv:1909.03172; as in Elsayed, Mahmood (2024), arXiv:2404.00781.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        sigma: Standard deviation σ of the noise.
        members: Number of networks of a stack; None for one network.
        generators: A source of noise per network; None for torch's global one.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        sigma: float | Tensor = 0.005,
        *,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "sigma": sigma}, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            add_noise(segment, segment.g)
            descend(segment, segment.g)


class ShrinkAndPerturb(StackedOptimizer):
    """Shrink and perturb in each step, w ← (1 − αλ) w − α (g + ξ) with ξ ~ N(0, σ²).

    References:
        Ash, Adams (2020), NeurIPS, arXiv:1910.08475; in each step as in Elsayed, Mahmood (2024), arXiv:2404.00781.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        sigma: Standard deviation σ of the noise.
        decay: Weight decay λ.
        members: Number of networks of a stack; None for one network.
        generators: A source of noise per network; None for torch's global one.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        sigma: float | Tensor = 0.005,
        decay: float | Tensor = 0.001,
        *,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "sigma": sigma, "decay": decay}, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            decay(segment, "decay")
            add_noise(segment, segment.g)
            descend(segment, segment.g)


class Adam(StackedOptimizer):
    """Adam with decoupled weight decay, w ← (1 − αλ) w − α m̂ / (√v̂ + ε).

    m and v are running means of g and g², m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ). This is `torch.optim.AdamW` for
    stacks.

    References:
        Kingma, Ba (2015), arXiv:1412.6980; Loshchilov, Hutter (2019), arXiv:1711.05101.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        weight_decay: Weight decay λ.
        beta1: Decay rate β₁ of the running mean of g.
        beta2: Decay rate β₂ of the running mean of g².
        eps: The number ε.
        members: Number of networks of a stack; None for one network.
        generators: Not used.
    """

    traces = ("mean", "square")

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.001,
        weight_decay: float | Tensor = 0.0,
        *,
        beta1: float | Tensor = 0.9,
        beta2: float | Tensor = 0.999,
        eps: float | Tensor = 1e-8,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(params, defaults, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            decay(segment)
            descend(segment, adam_direction(segment))


def adam_direction(segment: Segment) -> Tensor:  # (rows, numbers)
    """Update the running means of Adam, and return m̂ / (√v̂ + ε), which takes the place of the gradient."""
    g, mean, square, (room, *_) = segment.g, segment.traces["mean"], segment.traces["square"], segment.scratch
    beta1, beta2 = segment.number("beta1"), segment.number("beta2")
    average(mean, g, beta1)
    average(square, torch.mul(g, g, out=room), beta2)
    torch.sqrt(square, out=room)
    scale(room, segment.correction(beta2) ** 0.5)
    add(room, segment.number("eps"))
    torch.div(mean, room, out=g)
    scale(g, segment.correction(beta1))
    return g
