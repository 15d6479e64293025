"""The choice of parameters by patterns of their names: `params`."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ntkgen.errors import InputError

COMPILED = "_orig_mod."  # the prefix that `torch.compile` adds to the names of what it wraps


def as_patterns(params: str | Sequence[str] | None, setting: str = "params") -> tuple[str, ...]:
    """Convert what a user gives to patterns.

    >>> as_patterns("head.*"), as_patterns(["head.*", "!*bias"]), as_patterns(None)
    (('head.*',), ('head.*', '!*bias'), ())

    Raises:
        InputError: If it is not text or a list of texts, or if the list is empty.
    """
    if params is None:
        return ()
    patterns = (params,) if isinstance(params, str) else tuple(params) if isinstance(params, Iterable) else ()
    if not patterns or not all(isinstance(pattern, str) and pattern.strip("! ") for pattern in patterns):
        raise InputError(
            f"`{setting}` chooses parameters by patterns of their names: expected text such as 'head.*', or a list of "
            f"such texts, found {_kind(params)}. Were parameters themselves passed? Pass their names, or None for all."
        )
    return patterns


def _kind(given: object) -> str:
    """Name what was given by its type, because tensors have many numbers.

    >>> _kind(["a", 3]), _kind([]), _kind("!"), _kind(True)
    ('a list of int and str', 'an empty list', "'!'", 'something of type bool')
    """
    if isinstance(given, str):
        return repr(given)
    name = type(given).__name__
    if not isinstance(given, Sequence | Mapping):
        return f"something of type {name}"
    parts = sorted({type(part).__name__ for part in given})
    return f"a {name} of {' and '.join(parts)}" if parts else f"an empty {name}"


def chosen_names(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """List the names of the parameters that some patterns choose.

    A pattern that begins with ``!`` takes parameters out. If all patterns do, the others of the network are chosen. A
    tied parameter is chosen by any of its names, and all of them are listed.

    Raises:
        InputError: If a pattern matches no name, or if no chosen parameter is trainable.
    """
    named = named_parameters(model)
    taken = matched(named, patterns)
    chosen = frozenset(name for name, param in named.items() if id(param) in taken)
    if not any(named[name].requires_grad for name in chosen):
        found = "none" if not chosen else f"only frozen ones, such as {min(chosen)}"
        raise InputError(
            f"The patterns {', '.join(patterns)} choose no trainable parameter: expected at least one with "
            f"requires_grad, found {found}. Was the network frozen, or is everything excluded? Call "
            "requires_grad_(True) on these parameters, or choose others."
        )
    return chosen


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """List the parameters of a network by name. A tied parameter has several names."""
    return {plain(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def matched(named: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> set[int]:
    """Find the parameters that some patterns choose, by identity. A tied parameter is chosen by any of its names.

    Raises:
        InputError: If a pattern matches no name.
    """
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    for pattern in (*wanted, *unwanted):
        if not any(fnmatchcase(name, pattern) for name in named):
            raise InputError(_unmatched(pattern, named))
    taken = {id(param) for name, param in named.items() if not wanted or _matches(name, wanted)}
    return taken - {id(param) for name, param in named.items() if _matches(name, unwanted)}


def plain(name: str) -> str:
    """Remove what `torch.compile` adds to a name."""
    return name.replace(COMPILED, "")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched(pattern: str, names: Iterable[str]) -> str:
    known = list(names)
    modules = {f"{name.rpartition('.')[0]}.*" for name in known if "." in name}
    inside = [name for name in known if pattern.strip("*") in name]
    close = inside or difflib.get_close_matches(pattern, [*known, *sorted(modules)], n=3, cutoff=0.4) or known
    return (
        f"No parameter matches the pattern {pattern!r}: expected a pattern of the {len(known)} names of the network's "
        f"parameters, found none that fits. Names that are close: {', '.join(close[:3])}. Is it misspelt, or is a * "
        "missing? Write a whole name, or * for any characters, such as head.* or *bias."
    )
