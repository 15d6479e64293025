"""The rows of parameters without a rule: for many samples at once, or one sample after the other."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from ntkgen.jacobian.cost import FALLBACK_WAYS, FallbackWay
from ntkgen.jacobian.evaluation import outputs_of
from ntkgen.jacobian.modes import parameter_aliases
from ntkgen.jacobian.precision import default_dtype_of
from ntkgen.jacobian.reals import real_numbers
from ntkgen.jacobian.reference import jacobian_rows
from ntkgen.jacobian.together import pull_together, zeros_for

# Numbers that the passes of one chunk of samples may keep.
CHUNK_NUMBERS = 1 << 25
# The same for one backward pass of all outputs of all samples of a chunk, which has a square number of parts.
SQUARE_NUMBERS = 1 << 18
# Number of single backward passes from which on there is a warning, and of parameters that it names.
MANY_PASSES, NAMED = 1000, 3
# Maximum difference between two ways, relative to the norm of the rows, by their dtype.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


class SlowParametersWarning(UserWarning):
    """Some parameters take most of the time of a kernel, because nothing quicker than single backward passes fits."""


def warn_of_single_passes(names: Sequence[str], way: FallbackWay, num_samples: int, num_logits: int) -> None:
    """Warn that autograd computes rows one by one, if there are many."""
    passes = num_samples * num_logits
    if not names or way != "one by one" or passes < MANY_PASSES:
        return
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    warnings.warn(
        f"The rows of {', '.join(names[:NAMED])}{more} take {passes:,} backward passes, one per sample and output: no "
        "rule fits these parameters, and torch.func refuses the network. Does it have an autograd.Function of its own? "
        "Write it with setup_context and generate_vmap_rule = True, or register a rule (`ntkgen manual extending`).",
        SlowParametersWarning,
        stacklevel=2,
    )


def chunk_samples(way: FallbackWay, activation_numbers: int, num_outputs: int, num_params: int) -> int:
    """Choose the number of samples whose rows are computed at once.

    Args:
        way: How they are computed.
        activation_numbers: Numbers that the graph of one sample keeps for its backward passes.
        num_outputs: Number of outputs.
        num_params: Number of parameters without a rule.
    """
    if way == "one by one":
        return 1
    at_once = max(1, CHUNK_NUMBERS // (num_outputs * (activation_numbers + num_params)))
    if way == "function":
        return at_once
    return max(1, min(at_once, math.isqrt(SQUARE_NUMBERS // max(1, num_outputs * activation_numbers))))


def fallback_rows(
    module: nn.Module,
    names: Sequence[str],
    samples: Tensor,  # (samples, …)
    transform: Tensor | None,  # (outputs, logits)
    way: FallbackWay,
) -> Tensor:  # (samples, outputs, parameters)
    """Compute the rows of some parameters.

    Args:
        module: The network.
        names: The parameters.
        samples: The samples.
        transform: The output map A, if the rows are those of A f.
        way: ``function`` differentiates a function of the parameters by `torch.func`, for all samples and outputs at
            once. ``backward`` runs one batch, and all its backward passes at once. Each of them goes through the whole
            batch, so batches are small. ``one by one`` is one backward pass per sample and output.
    """
    return WAYS[way](module, names, samples, transform)


def _one_by_one(module: nn.Module, names: Sequence[str], samples: Tensor, transform: Tensor | None) -> Tensor:
    rows = jacobian_rows(module, names, samples)
    return rows if transform is None else transform @ rows


def _by_backward(module: nn.Module, names: Sequence[str], samples: Tensor, transform: Tensor | None) -> Tensor:
    known, outputs = dict(module.named_parameters()), outputs_of(module, samples)
    params = tuple(known[name] for name in names)
    count, num_logits = outputs.shape
    maps = torch.eye(num_logits, dtype=outputs.dtype, device=outputs.device) if transform is None else transform
    weights = torch.einsum("ij,ol->iojl", torch.eye(count, dtype=outputs.dtype, device=outputs.device), maps)

    found = zip(params, pull_together([outputs], [weights.flatten(0, 1)], params), strict=True)
    passes = count * len(maps)
    rows = [(zeros_for(param, passes) if grad is None else grad).unflatten(0, (count, -1)) for param, grad in found]
    return torch.cat([_flat(each) for each in rows], 2).detach()


def _by_function(module: nn.Module, names: Sequence[str], samples: Tensor, transform: Tensor | None) -> Tensor:
    """Compute the rows of some samples by `torch.func`, with one forward pass and one backward pass of all outputs."""
    known = dict(module.named_parameters())
    params = {name: known[name].detach() for name in names}
    aliases = {alias: name for alias, name in parameter_aliases(module).items() if name in params}

    def rows(sample: Tensor) -> dict[str, Tensor]:  # each (outputs, *parameter)
        def logits(values: dict[str, Tensor]) -> Tensor:
            by_alias = {alias: values[name] for alias, name in aliases.items()}
            found: Tensor = functional_call(module, by_alias, (sample.clone()[None],), tie_weights=False)
            return found[0]

        found, pull, *_ = vjp(logits, params)
        cotangents = torch.eye(len(found), dtype=found.dtype, device=found.device) if transform is None else transform
        by_name: dict[str, Tensor] = vmap(lambda cotangent: pull(cotangent)[0])(cotangents)
        return by_name

    # an operation without a rule of its own is only slower
    with torch.no_grad(), default_dtype_of(module), warnings.catch_warnings(action="ignore"):
        found = vmap(rows)(samples)
    flat = [_flat(found[name]) for name in names]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 2)


def _flat(rows: Tensor) -> Tensor:  # (samples, outputs, *parameter) → (samples, outputs, numbers)
    return real_numbers(rows).reshape(*rows.shape[:2], -1)


WAYS = {"function": _by_function, "backward": _by_backward, "one by one": _one_by_one}


def choose_way(module: nn.Module, names: Sequence[str], samples: Tensor) -> FallbackWay:
    """Choose the first way that gives the rows of single backward passes for some samples."""
    expected = _one_by_one(module, names, samples, None)
    allowed = TOLERANCES[expected.dtype] * expected.norm()
    for way in FALLBACK_WAYS[:-1]:
        try:
            found = WAYS[way](module, names, samples, None)
        except Exception:  # noqa: BLE001, S112 - such a network is refused with any error
            continue
        if found.shape == expected.shape and bool((found - expected).norm() <= allowed):
            return way
    return "one by one"
