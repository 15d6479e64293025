"""The comparison of layer rules with autograd, by the value of the gradient of Σ_io w_io f_o(x_i).

The weights w are Gaussian, one for each sample and output. The gradient is linear in the rows of the Jacobian, so a
wrong row changes it. A row that belongs to another sample changes it too, because the samples have different weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkgen.jacobian.capture import weighted_sum
from ntkgen.jacobian.reals import real_numbers

# Maximum difference between the rows of a rule and those of autograd, relative to their norm, for each dtype of the
# factors. Wrong rules differ by at least a few per cent. Both sides use the same forward pass, so no unit changes its
# sign between them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2}
# Minimum scale of a comparison, as a fraction of the norm of the gradient of all parameters. Without a minimum, the
# rounding of a gradient that should be zero would count as a difference.
SCALE_FLOOR = 1e-3
# The same for numbers that cancel in a gradient, as a fraction of the largest gradient of a parameter of the module.
CANCELLED = 1e-2
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
    vectors. With ``positions`` the matrix consists of these entries of the parameter.
    """

    value: Tensor  # (parameter,), or (groups, channels, directions)
    directions: Tensor | None = None  # (groups, inputs, directions)
    positions: Tensor | None = None

    def difference(self, grad: Tensor) -> Tensor | None:
        """Subtract autograd's gradient, or its product with the directions; None if the shapes do not fit."""
        expected = real_numbers(grad)
        expected = expected if self.positions is None else expected[self.positions]
        if self.directions is not None:
            groups, channels, _ = self.value.shape
            expected = expected.reshape(groups, channels, -1) @ self.directions
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


# What the rules claim about each parameter. The matrices of its parts have one claim each.
Claims = Mapping[str, Sequence[Claim]]
# The norms of differences and of gradients.
Compared = list[tuple[Tensor, Tensor]]


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
    claims: Claims,
    tolerance: float,
) -> Findings:
    """Compare the claims with the gradients of Σ w f with respect to some parameters, and free the graph."""
    if not outputs.requires_grad or not params:
        compared = {name: _compare(each, None) for name, each in claims.items()}
        return Findings(frozenset(), frozenset(_exceeding(compared, tolerance)))
    reached, compared = _compare_all(weighted_sum(outputs, weights), params, claims)
    return Findings(frozenset(reached), frozenset(_exceeding(compared, tolerance)))


def relative_difference(
    outputs: Tensor,  # (samples, outputs), in the graph
    weights: Tensor,  # (samples, outputs)
    params: Mapping[str, nn.Parameter],
    claims: Claims,
) -> float:
    """Compare the claims for all parameters together with the gradients of Σ w f, relative to their norm."""
    if not outputs.requires_grad or not params:
        return 0.0
    _, compared = _compare_all(weighted_sum(outputs, weights), params, claims)
    pairs = [pair for each in compared.values() for pair in each]
    errors, norms = (torch.stack(each).cpu().double().norm() for each in zip(*pairs, strict=True))
    return float(errors / norms) if norms > 0 else float(errors > 0)


def _compare_all(
    target: Tensor, params: Mapping[str, nn.Parameter], claims: Claims
) -> tuple[set[str], dict[str, Compared]]:
    is_small = sum(param.numel() for param in params.values()) <= SMALL_NUMBERS
    reached, compared = (_compare_together if is_small else _compare_one_by_one)(target, params, claims)
    return reached, compared | {name: _compare(each, None) for name, each in claims.items() if name not in compared}


def _compare(claims: Sequence[Claim], grad: Tensor | None) -> Compared:
    return [claim.compare(grad) for claim in claims]


def _compare_together(
    target: Tensor, params: Mapping[str, nn.Parameter], claims: Claims
) -> tuple[set[str], dict[str, Compared]]:
    """Compute all gradients, and compare them in a few calls. A small network spends most of its time on calls."""
    found = torch.autograd.grad(target, list(params.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(params, found, strict=True) if grad is not None}
    pairs = [(name, claim) for name in grads for claim in claims.get(name, ())]
    differences = [claim.difference(grads[name]) for name, claim in pairs]
    compared: dict[str, Compared] = {name: [] for name, _ in pairs}
    fitting = [number for number, difference in enumerate(differences) if difference is not None]
    for (name, claim), difference in zip(pairs, differences, strict=True):
        if difference is None:
            compared[name].append(claim.compare(grads[name]))
    if fitting:
        errors = torch._foreach_norm([difference for difference in differences if difference is not None])
        norms = torch._foreach_norm([grads[pairs[number][0]] for number in fitting])
        for number, error, norm in zip(fitting, errors, norms, strict=True):
            name, claim = pairs[number]
            compared[name].append((error, norm * claim.norm_factor))
    return set(grads), compared


def _compare_one_by_one(
    target: Tensor, params: Mapping[str, nn.Parameter], claims: Claims
) -> tuple[set[str], dict[str, Compared]]:
    """Compare each gradient as soon as autograd has it, and free it. All together are as large as the network."""
    compared: dict[str, Compared] = {}
    reached = set()
    with ExitStack() as stack:
        for name, param in params.items():

            def compare(param: Tensor, name: str = name) -> None:
                reached.add(name)
                if name in claims:
                    compared[name] = _compare(claims[name], param.grad)
                param.grad = None

            stack.callback(param.register_post_accumulate_grad_hook(compare).remove)
        target.backward(inputs=list(params.values()))
    return reached, compared


def _exceeding(compared: Mapping[str, Compared], tolerance: float) -> Iterator[str]:
    """List the parameters that differ by more than the tolerance, relative to their norm or the norm of all.

    The true gradient of a parameter may be zero, such as that of the bias of the keys in attention. It is then a sum of
    numbers that cancel up to rounding. These numbers are as large as the gradients of the other parameters of its
    module.
    """
    names = [name for name, each in compared.items() for _ in each]
    if not names:
        return
    pairs = [pair for each in compared.values() for pair in each]
    errors, norms = (torch.stack(each).cpu().double() for each in zip(*pairs, strict=True))
    scale = torch.maximum(norms, SCALE_FLOOR * norms.norm())
    of_module: dict[str, float] = {}
    for name, norm in zip(names, norms.tolist(), strict=True):
        module = name.rpartition(".")[0]
        of_module[module] = max(of_module.get(module, 0.0), norm)
    cancelled = norms.new_tensor([of_module[name.rpartition(".")[0]] for name in names])
    holds: list[bool] = (errors <= tolerance * (scale + CANCELLED * cancelled)).tolist()  # false for NaN
    yield from dict.fromkeys(name for name, is_close in zip(names, holds, strict=True) if not is_close)
