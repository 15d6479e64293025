"""Networks by name, from `models` or by an import string such as mylab.nets:wide.

Only this module imports `models`.
"""

import copy
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ntkgen.errors import InputError, ModelError, UnknownNameError

if TYPE_CHECKING:
    from models import Entry

# The name of the zoo's package, and its place: beside this package.
ZOO_NAME = "models"
ZOO = Path(__file__).resolve().parents[2] / ZOO_NAME


def build(name: str, num_classes: int, *, seed: int, width: int | None = None) -> nn.Module:
    """Build a network by name, with random parameters from a seed.

    Args:
        name: A name of the zoo, or ``package.module:factory`` for another network. Such a factory may have the argument
            ``num_classes`` or no arguments, and may return a trained network. It may also be an instance of a module.
        num_classes: Number of outputs, for factories with this argument.
        seed: Seed of torch's generator while the factory runs.
        width: Channels of the first stage, for ResNets.

    Raises:
        UnknownNameError: If the name is unknown.
        InputError: If the network has no width, the import string does not name a factory, or Python finds another
            package with the name of the zoo.
    """
    options = {} if width is None else {"width": width}
    if ":" in name:
        factory = _imported(name)
        if width is not None:
            raise InputError(f"`width` was given for {name}, but it scales the zoo's ResNets alone. Leave it out.")
    elif name in (zoo := _zoo()):
        factory = zoo[name]
        if width is not None and not zoo[name].has_width:
            scalable = ", ".join(other for other, entry in zoo.items() if entry.has_width)
            raise InputError(f"`width` was given for {name}, which has none: it scales {scalable}. Leave it out.")
    else:
        raise UnknownNameError("model", name, [*zoo, "package.module:factory"])
    if width is not None and width < 1:
        raise InputError(
            f"A width of {width} is not possible: expected a positive number of channels. Is the sign wrong? Use a "
            "positive number, or leave the width out for the default, 64."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _call(name, factory, num_classes, options)


def file_name(model: str) -> str:
    """Convert a model's name to a part of a file name.

    >>> file_name("mylab.nets:wide")
    'mylab.nets-wide'
    """
    return re.sub(r"[^\w.-]+", "-", model)


def listing() -> list[dict[str, Any]]:
    """List the zoo: name, number of parameters for ten classes, paper, and whether the width can be set."""
    rows = []
    for name, entry in _zoo().items():
        with torch.device("meta"):
            params = sum(param.numel() for param in entry(num_classes=10).parameters())
        rows.append({"model": name, "num_params": params, "paper": entry.paper, "takes_width": entry.has_width})
    return rows


def _zoo() -> "dict[str, Entry]":
    """Import the zoo. It is not imported for an import string, whose own package may have the zoo's name.

    Raises:
        InputError: If another module or package of that name is found first.
    """
    found = _found_as_zoo()
    if found is None or found.resolve() != ZOO / "__init__.py":
        raise InputError(
            f"The zoo cannot be imported: expected ntkgen's own package {ZOO_NAME!r} at {ZOO}, found "
            f"{'none' if found is None else f'another of this name at {found}'}. Is that one in the current directory "
            "or on PYTHONPATH, which are searched first? Run from another directory, rename it, or name your own "
            "network as package.module:factory."
        )
    from models import MODELS

    return MODELS


def _found_as_zoo() -> Path | None:
    """Find what an import of the zoo's name gives, without running it."""
    module = sys.modules.get(ZOO_NAME)
    spec = importlib.util.find_spec(ZOO_NAME) if module is None else None
    file = getattr(module, "__file__", None) if spec is None else spec.origin
    folders = getattr(module, "__path__", ()) if spec is None else spec.submodule_search_locations or ()
    place = file or next(iter(folders), None)  # a package without __init__.py has no file
    return None if place is None else Path(place)


def _imported(name: str) -> Callable[..., Any] | nn.Module:
    """Import the factory of an import string. The current directory is searched too, as for ``python -m``.

    Raises:
        InputError: If the module cannot be imported, or the object is not a factory.
        UnknownNameError: If the module does not have this name.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # user code may raise any error, and the name may be invalid
        raise InputError(
            f"Cannot import {module_name!r} for the model {name} ({type(error).__name__}: {error}). "
            "Expected package.module:factory, with a module on PYTHONPATH or in the current directory. Is the name "
            "misspelt, or is a dependency of the module missing? Correct the name, or install the dependency."
            f"{_hint_of_the_zoo(error)}"
        ) from error
    place = getattr(found, "__file__", None) or module_name
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UnknownNameError(f"factory in {place}", attribute, [n for n in vars(found) if n[0] != "_"])
        found = getattr(found, part)
    if not callable(found):
        raise InputError(
            f"{name} is a {type(found).__name__}: expected a function that returns a network. Is the name that of "
            "another object? Give the name of a function."
        )
    return found  # type: ignore[no-any-return]


def _hint_of_the_zoo(error: Exception) -> str:
    """Say that the zoo hides a package of the same name, if that may be why an import failed."""
    missing = getattr(error, "name", None) or ""
    if missing.partition(".")[0] != ZOO_NAME or _found_as_zoo() != ZOO / "__init__.py":
        return ""
    return f" ntkgen's own zoo at {ZOO} has the name {ZOO_NAME!r} too: rename the other one."


def _call(name: str, factory: Callable[..., Any] | nn.Module, num_classes: int, options: dict[str, int]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)  # training changes a network, and each seed must start from the same one
    try:
        parameters = inspect.signature(factory).parameters.values()
        takes = {p.name for p in parameters} | {"num_classes" for p in parameters if p.kind is p.VAR_KEYWORD}
        network = factory(**({"num_classes": num_classes} if "num_classes" in takes else {}), **options)
    except Exception as error:  # user code may raise any error
        raise ModelError(
            f"The factory {name} failed ({type(error).__name__}: {error}). It was called with "
            f"num_classes={num_classes} if it has this argument, otherwise without arguments. Does it need other "
            "arguments? Call it in Python to find the cause."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The factory {name} returned a {type(network).__name__}: expected a torch.nn.Module. Is a return missing? "
            "Return the network."
        )
    return network
