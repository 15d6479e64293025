"""The comparison of layer rules with autograd, by the value of the gradient of Σ_io w_io f_o(x_i).

The weights w are Gaussian, one for each sample and output. The gradient is linear in the rows of the Jacobian, so a
wrong row changes it. A row that belongs to another sample changes it too, because the samples have different weights.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkgen.jacobian.capture import weighted_sum

# Maximum difference between the rows of a rule and those of autograd, relative to their norm, for each dtype of the
# factors. Wrong rules differ by at least a few per cent. Both sides use the same forward pass, so no unit changes its
# sign between them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}
# Minimum scale of a comparison, as a fraction of the norm of the gradient of all parameters. Without a minimum, the
# rounding of a gradient that should be zero would count as a difference.
SCALE_FLOOR = 1e-3
# Number of random vectors with which the gradient of a weight matrix is multiplied before the comparison. A comparison
# of the whole matrix costs as much as a backward pass. With two vectors, a wrong matrix of rank one is missed
# once in a million times.
NUM_DIRECTIONS = 2
# Maximum number of parameters whose gradients are computed and compared together.
SMALL_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Claim:
    """The gradient of one parameter that follows from its rule.

    ``value`` is the flattened gradient. With ``directions`` it is the product of a weight matrix's gradient with these
    vectors.
    """

    value: Tensor  # (parameter,), or (groups, channels, directions)
    directions: Tensor | None = None  # (groups, inputs, directions)

    def difference(self, grad: Tensor) -> Tensor | None:
        """Subtract autograd's gradient, or its product with the directions; None if the shapes do not fit."""
        expected = grad.flatten()
        if self.directions is not None:
            groups, channels, _ = self.value.shape
            expected = grad.reshape(groups, channels, -1) @ self.directions
        return self.value - expected if self.value.shape == expected.shape else None

    @property
    def norm_factor(self) -> float:
        """Expected norm of the products of a gradient with the directions, divided by the norm of the gradient."""
        return 1.0 if self.directions is None else math.sqrt(self.directions.shape[2])

    def compare(self, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the norm of the difference from autograd's gradient, and the norm of autograd's gradient."""
        if grad is None:
            return self.value.norm(), torch.zeros_like(self.value.norm())
        difference, norm = self.difference(grad), grad.norm() * self.norm_factor
        return (torch.full_like(norm, torch.inf) if difference is None else difference.norm()), norm


def draw_weights(outputs: Tensor, count: int) -> Tensor:  # (samples, outputs)
    """Draw a weight for each of the first ``count`` samples and each output. The weights of the padding are zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(count, outputs.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(outputs)
    weights[:count] = drawn.to(weights)
    return weights


def draw_directions(groups: int, inputs: int, like: Tensor) -> Tensor:  # (groups, inputs, directions)
    """Draw the vectors with which the gradient of a weight matrix is multiplied."""
    generator = torch.Generator("cpu").manual_seed(1)
    drawn = torch.randn(groups, inputs, NUM_DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(like.device, like.dtype)


def rows_product(
    cotangents: Tensor,  # (samples, groups, channels, positions), weighted and summed over the outputs
    projected: Tensor,  # (samples, groups, positions, directions)
) -> Tensor:  # (groups, channels, directions)
    """Multiply the weighted sum of all rows with the directions, Σ_i Σ_t g_i[t] (a_i[t] · v)."""
    return (cotangents @ projected).sum(0)


@dataclass(frozen=True)
class Findings:
    """The result of one backward pass through the whole network."""

    reached: frozenset[str]  # parameters that get a gradient
    disproved: frozenset[str]  # parameters whose rule disagrees with autograd


def hold_against_autograd(
    outputs: Tensor,  # (samples, outputs), in the graph
    weights: Tensor,  # (samples, outputs)
    params: Mapping[str, nn.Parameter],
    claims: Mapping[str, Claim],
    tolerance: float,
) -> Findings:
    """Compare the claims with the gradients of Σ w f with respect to some parameters, and free the graph."""
    if not outputs.requires_grad or not params:
        compared = {name: claim.compare(None) for name, claim in claims.items()}
        return Findings(frozenset(), frozenset(_exceeding(compared, tolerance)))
    is_small = sum(param.numel() for param in params.values()) <= SMALL_NUMBERS
    reached, compared = (_compare_together if is_small else _compare_one_by_one)(
        weighted_sum(outputs, weights), params, claims
    )
    compared |= {name: claim.compare(None) for name, claim in claims.items() if name not in compared}
    return Findings(frozenset(reached), frozenset(_exceeding(compared, tolerance)))


def _compare_together(
    target: Tensor, params: Mapping[str, nn.Parameter], claims: Mapping[str, Claim]
) -> tuple[set[str], dict[str, tuple[Tensor, Tensor]]]:
    """Compute all gradients, and compare them in a few calls. A small network spends most of its time on calls."""
    found = torch.autograd.grad(target, list(params.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(params, found, strict=True) if grad is not None}
    differences = {name: claims[name].difference(grads[name]) for name in grads if name in claims}
    fitting = {name: difference for name, difference in differences.items() if difference is not None}
    compared = {name: claims[name].compare(grads[name]) for name in differences.keys() - fitting.keys()}
    if fitting:
        errors = torch._foreach_norm(list(fitting.values()))
        norms = torch._foreach_norm([grads[name] for name in fitting])
        for name, error, norm in zip(fitting, errors, norms, strict=True):
            compared[name] = error, norm * claims[name].norm_factor
    return set(grads), compared


def _compare_one_by_one(
    target: Tensor, params: Mapping[str, nn.Parameter], claims: Mapping[str, Claim]
) -> tuple[set[str], dict[str, tuple[Tensor, Tensor]]]:
    """Compare each gradient as soon as autograd has it, and free it. All together are as large as the network."""
    compared: dict[str, tuple[Tensor, Tensor]] = {}
    reached = set()
    with ExitStack() as stack:
        for name, param in params.items():

            def compare(param: Tensor, name: str = name) -> None:
                reached.add(name)
                if name in claims:
                    compared[name] = claims[name].compare(param.grad)
                param.grad = None

            stack.callback(param.register_post_accumulate_grad_hook(compare).remove)
        target.backward(inputs=list(params.values()))
    return reached, compared


def _exceeding(compared: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> Iterator[str]:
    """List the parameters that differ by more than the tolerance, relative to their norm or the norm of all."""
    if not compared:
        return
    errors, norms = (torch.stack(each).cpu().double() for each in zip(*compared.values(), strict=True))
    scale = torch.maximum(norms, SCALE_FLOOR * norms.norm())
    holds: list[bool] = (errors <= tolerance * scale).tolist()  # false for NaN
    yield from (name for name, is_close in zip(compared, holds, strict=True) if not is_close)
