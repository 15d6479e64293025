"""The streaming learners by name."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ntkgen.continual import optim
from ntkgen.continual.optim.names import NAMES, LearnerNames, Option, checked_options
from ntkgen.continual.optim.stacked import Params, StackedOptimizer
from ntkgen.errors import UnknownNameError


@dataclass(frozen=True)
class Learner:
    """A streaming learner.

    Attributes:
        name: Its name.
        make: Makes its optimizer from parameters, options, ``members`` and ``generators``.
        options: Its options by name.
        defaults: Their defaults.
        is_second_order: Whether its steps need the diagonal of the Hessian; see `hessian_diagonal`.
        has_gates: Whether it needs the named parameters of a network with gates; see `gated`.
        source: Where it is from.
    """

    name: str
    make: Callable[..., StackedOptimizer]
    options: Mapping[str, Option]
    defaults: Mapping[str, Any]
    is_second_order: bool
    has_gates: bool
    source: str


def _learner(names: LearnerNames) -> Learner:
    make = functools.partial(getattr(optim, names.optimizer), **names.fixed)
    return Learner(
        names.name, make, names.options, names.defaults, names.is_second_order, names.has_gates, names.source
    )


LEARNERS: dict[str, Learner] = {name: _learner(names) for name, names in NAMES.items()}
"""The learners by name."""


def make_optimizer(
    name: str,
    params: Params,
    members: int | None = None,
    generators: Sequence[torch.Generator] | None = None,
    *,
    compat: bool = False,
    **options: Any,
) -> StackedOptimizer:
    """Make the optimizer of a learner.

    Args:
        name: A key of `LEARNERS`.
        params: Parameters, named parameters, or groups of them.
        members: Number of networks of a stack; None for one network.
        generators: A source of noise per network; None for torch's global one.
        compat: Whether the published code is followed where it deviates: twice the step for utilities per kernel, the
            largest utility before the correction of its bias, and the importances of SI and RWalk.
        options: Options of the learner. Words such as ``"1e-2"`` are read as numbers.

    Raises:
        UnknownNameError: If there is no such learner, option or choice.
        InputError: If a value is out of range.
        ShapeError: If a parameter or an option does not have one row per network.

    >>> params = [torch.nn.Parameter(torch.ones(3))]
    >>> make_optimizer("entire_kernel", params, lr="1e-3", compat=True).param_groups[0]["step_scale"]
    2.0
    """
    if name not in LEARNERS:
        raise UnknownNameError("learner", name, LEARNERS)
    chosen = {**LEARNERS[name].defaults, **(NAMES[name].quirks if compat else {}), **checked_options(name, options)}
    return LEARNERS[name].make(params, members=members, generators=generators, **chosen)
