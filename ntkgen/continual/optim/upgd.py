"""Utility-based perturbed gradient descent, UPGD."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkgen.continual.optim.descent import add_noise, decay, descend
from ntkgen.continual.optim.segments import Segment
from ntkgen.continual.optim.stacked import Params, StackedOptimizer
from ntkgen.continual.optim.utility import accumulate, largest_utility, share, unprotected

# What is added to each norm that multiplies the noise.
NORM_EPSILON = 1e-8


class UPGD(StackedOptimizer):
    """Utility-based perturbed gradient descent: useful weights get small steps and little noise.

    The utility U of a weight w is the change of the loss if the weight becomes 0, to first order −g w or to second
    order −g w + ½ h w². Its running mean is u ← β u + (1 − β) U, and û = u / (1 − βᵗ). With the sigmoid φ, the scaled
    utility is s = φ(û / η), where η is the largest û of all weights (``global``), or s = φ(û / ‖û‖) with the L2 norm
    along the last axis of each parameter (``local``). With ξ = σ n N(0, 1), a step is

        w ← (1 − αλ) w − k α (g + ξ) (1 − s)        protecting
        w ← (1 − αλ) w − k α (g + ξ (1 − s))        not protecting
        w ← (1 − αλ) w − k α (g (1 − s) + ξ)        protecting, without ``gate_noise`` (USGD)

    A weight without utility has s = ½, and therefore half the step of SGD if k = ``step_scale`` = 1. Published variants
    with a utility per kernel, and the stand-alone code of the authors, take k = 2. If no utility is positive, s = ½.

    References:
        Elsayed, Mahmood (2024), ICLR, arXiv:2404.00781, algorithm 1. Noise scaled by norms, utilities per kernel and
        USGD are from https://github.com/yumikim381/upgd-dl-project.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        beta_utility: Decay rate β of the running mean of the utilities.
        sigma: Standard deviation σ of the noise.
        weight_decay: Weight decay λ, decoupled from gradient and noise.
        step_scale: Factor k of the step along gradient and noise.
        order: ``first`` or ``second`` order of the utility; the second one needs ``curvature`` in `step`.
        normalisation: ``global`` or ``local``.
        largest: Whether η is the largest ``corrected`` utility û, as in the paper, or the largest ``raw`` one u, as in
            the published code. With ``raw``, û / η begins 1 / (1 − β) times as large.
        protecting: Whether useful weights are protected from the gradient too.
        gate_noise: Whether useful weights are protected from the noise.
        noise_scale: The factor n of the noise of each tensor: ``none``, 1; ``weight``, ‖w‖; ``grad``, ‖g‖; ``ratio``,
            ‖g‖ / ‖w‖. Norms are those of one parameter before the step, plus 1e-8.
        utility_shape: Which weights of a convolution share s: ``element``: each has its own; ``kernel``: the mean over
            each kernel; ``column``: the mean over each column of a kernel; ``convex``: a mixture of the first two.
        mixture: Share of the mean over the kernel in a ``convex`` mixture.
        members: Number of networks of a stack; None for one network.
        generators: A source of noise per network; None for torch's global one.

    Raises:
        InputError: If a hyper-parameter is out of range.
        UnknownNameError: If there is no such choice.
        ShapeError: If a parameter does not have one row per network.
    """

    traces = ("utility",)

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        beta_utility: float | Tensor = 0.999,
        sigma: float | Tensor = 0.001,
        weight_decay: float | Tensor = 0.0,
        *,
        step_scale: float | Tensor = 1.0,
        order: str = "first",
        normalisation: str = "global",
        largest: str = "corrected",
        protecting: bool = True,
        gate_noise: bool = True,
        noise_scale: str = "none",
        utility_shape: str = "element",
        mixture: float | Tensor = 0.2,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta_utility": beta_utility,
            "sigma": sigma,
            "weight_decay": weight_decay,
            "step_scale": step_scale,
            "order": order,
            "normalisation": normalisation,
            "largest": largest,
            "protecting": protecting,
            "gate_noise": gate_noise,
            "noise_scale": noise_scale,
            "utility_shape": utility_shape,
            "mixture": mixture,
        }
        super().__init__(params, defaults, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        choices = self.defaults
        for segment in segments:
            accumulate(segment)
        is_global = choices["normalisation"] == "global"
        largest = largest_utility(segments, choices["largest"]) if is_global else None
        for segment in segments:
            gate = unprotected(segment, largest, segment.scratch[0])
            share(segment, gate, choices["utility_shape"])
            scale_noise(segment, choices["noise_scale"])
            decay(segment)
            direction = gated_direction(
                segment, gate, protecting=choices["protecting"], gate_noise=choices["gate_noise"]
            )
            descend(segment, direction, segment.number("step_scale"))

    @torch.no_grad()
    def scaled_utilities(self) -> dict[int, Tensor]:
        """Compute the scaled utilities s of the last step, with the shape of each parameter.

        They are the same after `load_state_dict`.

        Returns:
            By the position of the parameter among all. Before the first step there are none.
        """
        found: dict[int, list[Tensor]] = {}
        layout = self._known_layout()
        for block in [] if layout is None else layout.blocks:
            is_global = self.defaults["normalisation"] == "global"
            largest = largest_utility(block.segments, self.defaults["largest"]) if is_global else None
            for segment in block.segments:
                gate = unprotected(segment, largest, segment.scratch[0])
                share(segment, gate, self.defaults["utility_shape"])
                for slot, part in zip(segment.slots, segment.tensors(gate), strict=True):
                    found.setdefault(slot.position, []).append(1 - part)
        stacked = {position: torch.cat(parts) for position, parts in found.items()}
        return {position: each if self.members is not None else each[0] for position, each in stacked.items()}


def scale_noise(segment: Segment, by: str) -> None:
    """Multiply the noise of each parameter by ‖w‖ (``weight``), ‖g‖ (``grad``) or ‖g‖ / ‖w‖ (``ratio``)."""
    if segment.noise is None or by == "none":
        return
    factor = norms(segment, segment.w if by == "weight" else segment.g)
    if by == "ratio":
        factor.div_(norms(segment, segment.w))
    torch._foreach_mul_(segment.parts(segment.noise), factor.split(1, 1))


def norms(segment: Segment, matrix: Tensor) -> Tensor:  # (rows, numbers) → (rows, parameters)
    """Compute the L2 norm of each parameter, plus 1e-8."""
    found = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in segment.parts(matrix)]
    return torch.cat(found, 1).add_(NORM_EPSILON)


def gated_direction(segment: Segment, gate: Tensor, *, protecting: bool, gate_noise: bool) -> Tensor:
    """Join gradient and noise, each multiplied by the gate if it is protected from. Overwrites both."""
    g, noise = segment.g, segment.noise
    if protecting and not (gate_noise and noise is not None):
        g.mul_(gate)
    if noise is not None:
        if gate_noise and not protecting:
            noise.mul_(gate)
        add_noise(segment, g)
        if gate_noise and protecting:
            g.mul_(gate)
    return g
