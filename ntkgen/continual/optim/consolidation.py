"""Gradient descent with a penalty that holds important weights near their running mean: EWC, MAS, SI and RWalk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkgen.continual.optim.descent import descend
from ntkgen.continual.optim.segments import Segment, add, add_scaled, average, scale
from ntkgen.continual.optim.stacked import Params, StackedOptimizer


class OnlineEWC(StackedOptimizer):
    """Online elastic weight consolidation, w ← w − α [g + κ F̂ (w − w̄)].

    F̂ is the running mean of g², the diagonal of the empirical Fisher matrix, with the decay rate β_F, and w̄ that of w
    with β_w, both without the bias of their beginning. There are no tasks.

    References:
        Kirkpatrick et al. (2017), arXiv:1612.00796; Schwarz et al. (2018), arXiv:1805.06370; this form: Elsayed,
        Mahmood (2024), arXiv:2404.00781.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        beta_weight: Decay rate β_w.
        beta_fisher: Decay rate β_F.
        kappa: Weight κ of the penalty.
        members: Number of networks of a stack; None for one network.
        generators: Not used.
    """

    traces = ("weight", "fisher")
    num_scratch = 2

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        beta_weight: float | Tensor = 0.999,
        beta_fisher: float | Tensor = 0.9999,
        kappa: float | Tensor = 10.0,
        *,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {"lr": lr, "beta_weight": beta_weight, "beta_fisher": beta_fisher, "kappa": kappa}
        super().__init__(params, defaults, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            room = segment.scratch[0]
            average(segment.traces["fisher"], torch.mul(segment.g, segment.g, out=room), segment.number("beta_fisher"))
            hold(segment, mean_of(segment, "fisher", "beta_fisher", room))


class MAS(StackedOptimizer):
    """Memory-aware synapses, w ← w − α [g + κ F̂ (w − w̄)], where F̂ is the running mean of |g|.

    g is the gradient of the loss, as in the published code; the paper takes that of the squared norm of the outputs.

    References:
        Aljundi et al. (2018), arXiv:1711.09601; this form: Elsayed, Mahmood (2024), arXiv:2404.00781.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        beta_weight: Decay rate of w̄.
        beta_fisher: Decay rate of F̂.
        kappa: Weight κ of the penalty.
        members: Number of networks of a stack; None for one network.
        generators: Not used.
    """

    traces = ("weight", "fisher")
    num_scratch = 2

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        beta_weight: float | Tensor = 0.999,
        beta_fisher: float | Tensor = 0.9999,
        kappa: float | Tensor = 10.0,
        *,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {"lr": lr, "beta_weight": beta_weight, "beta_fisher": beta_fisher, "kappa": kappa}
        super().__init__(params, defaults, members=members, generators=generators)

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            room = segment.scratch[0]
            average(segment.traces["fisher"], torch.abs(segment.g, out=room), segment.number("beta_fisher"))
            hold(segment, mean_of(segment, "fisher", "beta_fisher", room))


class SI(StackedOptimizer):
    """Synaptic intelligence, w ← w − α [g + κ Ω (w − w̄)] with Ω = ω̂ / (δ̂² + ε).

    ω̂ and δ̂ are the running means of g (w' − w) and of w' − w, where w' are the weights before the last step, with the
    decay rate β_Ω and without the bias of their beginning. At the first step w' = w.

    References:
        Zenke, Poole, Ganguli (2017), arXiv:1703.04200; this form: Elsayed, Mahmood (2024), arXiv:2404.00781.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        beta_weight: Decay rate of w̄.
        beta_importance: Decay rate β_Ω.
        kappa: Weight κ of the penalty.
        eps: The number ε.
        published: Whether w' = 0 at the first step, as in the published code.
        members: Number of networks of a stack; None for one network.
        generators: Not used.
    """

    traces = ("weight", "previous", "product", "difference")
    num_scratch = 2

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.001,
        beta_weight: float | Tensor = 0.999,
        beta_importance: float | Tensor = 0.9,
        kappa: float | Tensor = 1.0,
        eps: float | Tensor = 1e-3,
        *,
        published: bool = False,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta_weight": beta_weight,
            "beta_importance": beta_importance,
            "kappa": kappa,
            "eps": eps,
            "published": published,
        }
        super().__init__(params, defaults, members=members, generators=generators)

    def beginning(self, trace: str, param: Tensor) -> Tensor | None:
        """Begin with w' = w."""
        return param if trace == "previous" and not self.defaults["published"] else None

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            traces, (room, other), beta = segment.traces, segment.scratch, segment.number("beta_importance")
            move(segment, room)
            average(traces["difference"], room, beta)
            average(traces["product"], room.mul_(segment.g), beta)
            mean_of(segment, "difference", "beta_importance", other)
            add(other.mul_(other), segment.number("eps"))
            hold(segment, mean_of(segment, "product", "beta_importance", room).div_(other))


class RWalk(StackedOptimizer):
    """Riemannian walk, w ← w − α [g + κ (F̂ + S) (w − w̄)].

    F̂ is the running mean of g² with the decay rate β_Ω, without the bias of its beginning. The score S begins with 0,
    and each step makes it the mean of itself and of the positive part of g (w' − w) / (½ F̂ (w' − w)² + ε), where w' are
    the weights before the last step.

    References:
        Chaudhry et al. (2018), arXiv:1801.10112; this form: Elsayed, Mahmood (2024), arXiv:2404.00781.

    Args:
        params: Parameters, named parameters, or groups of them.
        lr: Learning rate α.
        beta_weight: Decay rate of w̄.
        beta_importance: Decay rate β_Ω.
        kappa: Weight κ of the penalty.
        eps: The number ε.
        published: Whether deviations of the published code are reproduced: w' = 0 at the first step; F̂ is the mean of
            w²; the score has the mean F before the step, without the correction of its bias; and S is half of the
            present score, which is not kept.
        members: Number of networks of a stack; None for one network.
        generators: Not used.
    """

    traces = ("weight", "previous", "fisher", "score")
    num_scratch = 2

    def __init__(  # noqa: PLR0913 - explicit keywords, so that editors and type checkers know them
        self,
        params: Params,
        lr: float | Tensor = 0.01,
        beta_weight: float | Tensor = 0.999,
        beta_importance: float | Tensor = 0.999,
        kappa: float | Tensor = 0.1,
        eps: float | Tensor = 1e-3,
        *,
        published: bool = False,
        members: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta_weight": beta_weight,
            "beta_importance": beta_importance,
            "kappa": kappa,
            "eps": eps,
            "published": published,
        }
        super().__init__(params, defaults, members=members, generators=generators)

    def beginning(self, trace: str, param: Tensor) -> Tensor | None:
        """Begin with w' = w."""
        return param if trace == "previous" and not self.defaults["published"] else None

    def advance(self, segments: Sequence[Segment]) -> None:
        """Take a step."""
        for segment in segments:
            if self.defaults["published"]:
                self._hold_as_published(segment)
                continue
            fisher, score, (room, other) = segment.traces["fisher"], segment.traces["score"], segment.scratch
            average(fisher, torch.mul(segment.g, segment.g, out=other), segment.number("beta_importance"))
            move(segment, room)
            score_of(segment, mean_of(segment, "fisher", "beta_importance", other))
            score.add_(room).mul_(0.5)
            hold(segment, mean_of(segment, "fisher", "beta_importance", room).add_(score))

    @staticmethod
    def _hold_as_published(segment: Segment) -> None:
        fisher, (room, other), beta = segment.traces["fisher"], segment.scratch, segment.number("beta_importance")
        move(segment, room)
        score_of(segment, other.copy_(fisher))
        average(fisher, torch.mul(segment.w, segment.w, out=other), beta)
        room.mul_(0.5)
        add_scaled(room, fisher, segment.correction(beta))
        hold(segment, room)


def mean_of(segment: Segment, trace: str, beta: str, out: Tensor) -> Tensor:  # (rows, numbers)
    """Return a running mean without the bias of its beginning, trace / (1 − βᵗ)."""
    out.copy_(segment.traces[trace])
    scale(out, segment.correction(segment.number(beta)))
    return out


def move(segment: Segment, out: Tensor) -> None:  # (rows, numbers)
    """Compute w' − w, and keep w as w' of the next step."""
    previous = segment.traces["previous"]
    torch.sub(previous, segment.w, out=out)
    previous.copy_(segment.w)


def score_of(segment: Segment, fisher: Tensor) -> None:  # (rows, numbers)
    """Replace w' − w in the first matrix by the positive part of g (w' − w) / (½ F (w' − w)² + ε). Overwrites F."""
    moved = segment.scratch[0]
    add(fisher.mul_(moved).mul_(moved).mul_(0.5), segment.number("eps"))
    moved.mul_(segment.g).div_(fisher).clamp_(min=0)


def hold(segment: Segment, importance: Tensor) -> None:  # (rows, numbers)
    """Take the step w ← w − α [g + κ Ω (w − w̄)]. Overwrites the importances Ω, and the second matrix."""
    beta, mean, distance = segment.number("beta_weight"), segment.traces["weight"], segment.scratch[1]
    average(mean, segment.w, beta)
    distance.copy_(segment.w)
    add_scaled(distance, mean, -segment.correction(beta))
    add_scaled(segment.g, importance.mul_(distance), segment.number("kappa"))
    descend(segment, segment.g)
