"""Groups of parameters with a kernel each: `per_layer`. The kernels of all groups add up to the whole kernel."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ntkgen.errors import InputError
from ntkgen.jacobian.cost import JacobianPlan
from ntkgen.jacobian.factors import FactorGroup
from ntkgen.jacobian.layers import Layer
from ntkgen.jacobian.network import Network
from ntkgen.jacobian.patterns import as_patterns, matched, named_parameters
from ntkgen.jacobian.reals import count_real_numbers
from ntkgen.jacobian.reference import trainable

# What a user may give: true for one group per module, patterns, or patterns by the name of their group.
PerLayer = bool | str | Sequence[str] | Mapping[str, str | Sequence[str]]
# The name and the patterns of each group. If there are none, each module that has parameters is a group.
GroupPatterns = tuple[tuple[str, tuple[str, ...]], ...]
# Name of the group of the parameters that no pattern matches.
OTHER = "other"


def as_groups(per_layer: PerLayer | None) -> GroupPatterns | None:
    """Convert what a user gives to names with patterns. None means that there are no groups.

    >>> as_groups({"attention": "*attn*", "mlp": ["*mlp*", "!*bias"]})
    (('attention', ('*attn*',)), ('mlp', ('*mlp*', '!*bias')))
    >>> as_groups(["head.*", "body.*"]), as_groups(True), as_groups(False)
    ((('head.*', ('head.*',)), ('body.*', ('body.*',))), (), None)

    Raises:
        InputError: If it is something else, or if a name is empty.
    """
    if per_layer is None or isinstance(per_layer, bool):
        return () if per_layer else None
    if isinstance(per_layer, Mapping):
        given = {name: [] if patterns is None else patterns for name, patterns in per_layer.items()}
        groups = tuple((name, as_patterns(patterns, "per_layer")) for name, patterns in given.items())
    else:
        groups = tuple((pattern, (pattern,)) for pattern in as_patterns(per_layer, "per_layer"))
    if not groups or not all(isinstance(name, str) and name.strip() for name, _ in groups):
        raise InputError(
            f"`per_layer` names groups of parameters: expected a dictionary such as {{'head': 'head.*'}}, a list of "
            f"patterns, or True for one group per module, found {per_layer!r}. Is a name missing? Give each group one."
        )
    return groups


@dataclass(frozen=True)
class ParameterGroup:
    """The name of a group, and the names of its trainable parameters, each once."""

    name: str
    params: tuple[str, ...]


def groups_of(module: nn.Module, patterns: GroupPatterns) -> tuple[ParameterGroup, ...]:
    """Divide the trainable parameters of a network among groups.

    Without patterns each module is a group of the parameters that it has itself, in the order of the modules. With
    patterns, the parameters that no group matches are the last group, `other`.

    Raises:
        InputError: If a pattern matches nothing, if a group has no trainable parameter, or if two groups have the same
            parameter.
    """
    members: dict[str, list[str]] = {name: [] for name, _ in patterns}
    group_of = _matching_groups(module, patterns) if patterns else {}
    rest: list[str] = []
    for param in trainable(module):
        if not patterns:
            members.setdefault(param.rpartition(".")[0], []).append(param)
        else:
            members.get(group_of.get(param, ""), rest).append(param)
    for name, params in members.items():
        if not params:
            raise InputError(
                f"The group {name!r} has no trainable parameter: expected at least one that is trained and belongs to "
                "the kernel, found none among those that its patterns match. Are they frozen, or left out by `params`? "
                "Leave this group out, or choose others."
            )
    if rest and OTHER in members:
        raise InputError(
            f"The name {OTHER!r} is that of the parameters that no group has: expected another name for a group, or "
            f"that all parameters have a group, found {len(rest)} without one, such as {rest[0]}. Should they belong "
            "to this group? Add patterns that match them, or use another name."
        )
    if rest:
        members[OTHER] = rest
    return tuple(ParameterGroup(name, tuple(params)) for name, params in members.items())


def _matching_groups(module: nn.Module, patterns: GroupPatterns) -> dict[str, str]:
    """Find the group of each parameter that is matched. A tied parameter is matched by any of its names.

    Raises:
        InputError: If a pattern matches nothing, or if two groups have the same trainable parameter.
    """
    named = named_parameters(module)
    taken = [(group, matched(named, each)) for group, each in patterns]
    found: dict[str, str] = {}
    for name, param in named.items():
        groups = [group for group, chosen in taken if id(param) in chosen]
        if len(groups) > 1 and param.requires_grad:
            raise InputError(
                f"The parameter {name} belongs to two groups, {groups[0]!r} and {groups[1]!r}: expected one, so that "
                "the kernels of the groups add up to the kernel. Do two patterns match it, or is it tied to another "
                "parameter? Take it out of one group with a pattern that begins with !."
            )
        if groups:
            found[name] = groups[0]
    return found


# the factors of a group -----------------------------------------------------------------------------------------------


def keep_apart(network: Network, groups: Sequence[ParameterGroup]) -> Network:
    """Forbid to join a bias to its matrix where the two belong to different groups."""
    if not groups:
        return network
    group_of = {param: group.name for group in groups for param in group.params}

    def is_one(layer: Layer) -> bool:
        return len({group_of[name] for name in _of_matrix(layer.with_joined_bias())}) <= 1

    layers = (layer if is_one(layer) else dataclasses.replace(layer, may_join=False) for layer in network.layers)
    return dataclasses.replace(network, layers=tuple(layers))


def factor_groups(network: Network, plan: JacobianPlan, groups: Sequence[ParameterGroup]) -> list[FactorGroup]:
    """Find the factors of each group. The stored rows have the order of the layers, and end with those of autograd."""
    if not groups:
        return []
    group_of = {param: group.name for group in groups for param in group.params}
    own, in_pairs = trainable(network.module), {layer.shape.name for layer in plan.layers if not layer.keeps_rows}
    columns: dict[str, list[slice]] = {group.name: [] for group in groups}
    layers: dict[str, set[str]] = {group.name: set() for group in groups}
    start = 0

    def add(param: str, numbers: int) -> None:
        nonlocal start
        parts = columns[group_of[param]]
        begin = parts.pop().start if parts and parts[-1].stop == start else start
        start += numbers
        parts.append(slice(begin, start))

    for layer in network.layers:
        if layer.has_matrix:
            joined = _of_matrix(layer)
            assert len({group_of[name] for name in joined}) == 1
            if layer.name in in_pairs:
                layers[group_of[joined[0]]].add(layer.name)
            else:
                of_matrix = own[joined[0]].numel() if layer.positions is None else len(layer.positions)
                add(joined[0], of_matrix + sum(own[name].numel() for name in joined[1:]))
        for vector in layer.vectors:
            add(layer.full_name(vector), own[layer.full_name(vector)].numel())
    for name in network.fallback:
        add(name, count_real_numbers([own[name]]))
    assert start * plan.num_outputs == plan.row_numbers
    return [FactorGroup(tuple(columns[group.name]), frozenset(layers[group.name])) for group in groups]


def _of_matrix(layer: Layer) -> list[str]:
    """List the full names of the matrix of a layer and of the bias that is joined to it."""
    return [layer.full_name(name) for name in layer.of_matrix]
