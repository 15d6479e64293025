"""The rows of parameters without a rule: for many samples at once, or one sample after the other."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from ntkgen.jacobian.modes import parameter_aliases
from ntkgen.jacobian.precision import default_dtype_of
from ntkgen.jacobian.reals import real_numbers
from ntkgen.jacobian.reference import jacobian_rows

# Numbers that the passes of one chunk of samples may keep.
CHUNK_NUMBERS = 1 << 25
# Maximum difference between the two ways, relative to the norm of the rows of a parameter, by the dtype of the rows.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


def chunk_samples(activation_numbers: int, num_outputs: int, num_params: int) -> int:
    """Choose the number of samples whose rows are computed at once.

    Args:
        activation_numbers: Numbers that the graph of one sample keeps for its backward passes.
        num_outputs: Number of outputs.
        num_params: Number of parameters without a rule.
    """
    return max(1, CHUNK_NUMBERS // (num_outputs * (activation_numbers + num_params)))


def fallback_rows(
    module: nn.Module,
    names: Sequence[str],
    samples: Tensor,  # (samples, …)
    transform: Tensor | None,  # (outputs, logits)
    chunk: int,
) -> Tensor:  # (samples, outputs, parameters)
    """Compute the rows of some parameters.

    Args:
        module: The network.
        names: The parameters.
        samples: The samples.
        transform: The output map A, if the rows are those of A f.
        chunk: Number of samples at once; 0 for one after the other, by plain calls of autograd.
    """
    if chunk:
        return torch.cat([_together(module, names, part, transform) for part in samples.split(chunk)])
    rows = jacobian_rows(module, names, samples)
    return rows if transform is None else transform @ rows


def _together(module: nn.Module, names: Sequence[str], samples: Tensor, transform: Tensor | None) -> Tensor:
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


def works_together(module: nn.Module, names: Sequence[str], samples: Tensor) -> bool:
    """Say whether the rows of some samples are the same at once as one after the other."""
    expected = jacobian_rows(module, names, samples)
    try:
        found = _together(module, names, samples, None)
    except Exception:  # noqa: BLE001 - torch.func refuses some networks, with any error
        return False
    allowed = TOLERANCES[expected.dtype] * expected.norm()
    return found.shape == expected.shape and bool((found - expected).norm() <= allowed)
