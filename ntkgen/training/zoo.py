"""The one door to `models`: a name, or an import string such as mylab.nets:wide, → nn.Module."""

import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models import MODELS
from ntkgen.errors import InputError, ModelError, UnknownNameError


def build(name: str, num_classes: int, *, seed: int, width: int | None = None) -> nn.Module:
    """Build a network by name, with parameters drawn from its own seed.

    Args:
        name: One of `MODELS`, or ``package.module:factory`` for anybody's network. Such a factory may take
            ``num_classes`` or nothing, and may return a trained network; it may also be a module instance.
        num_classes: Outputs, for factories that take it.
        seed: Seeds torch's generator for the factory alone.
        width: Channels of the first stage, for ResNets.

    Raises:
        UnknownNameError: If there is no such name.
        InputError: If the network has no width to set, or the import string leads nowhere.
    """
    options = {} if width is None else {"width": width}
    if ":" in name:
        factory = _imported(name)
        if width is not None:
            raise InputError(f"--width was given for {name}, but it scales the zoo's ResNets alone. Leave it out.")
    elif name in MODELS:
        factory = MODELS[name]
        if width is not None and not MODELS[name].has_width:
            scalable = ", ".join(other for other, entry in MODELS.items() if entry.has_width)
            raise InputError(f"--width was given for {name}, which has none: it scales {scalable}. Leave it out.")
    else:
        raise UnknownNameError("model", name, [*MODELS, "package.module:factory"])
    if width is not None and width < 1:
        raise InputError(f"A width of {width} leaves no channels: expected a positive number. The default is 64.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _call(name, factory, num_classes, options)


def file_name(model: str) -> str:
    """Turn a model's name into a part of a file name.

    >>> file_name("mylab.nets:wide")
    'mylab.nets-wide'
    """
    return re.sub(r"[^\w.-]+", "-", model)


def listing() -> list[dict[str, Any]]:
    """List the zoo: name, number of parameters at ten classes, paper."""
    rows = []
    for name, entry in MODELS.items():
        with torch.device("meta"):
            params = sum(param.numel() for param in entry(num_classes=10).parameters())
        rows.append({"model": name, "num_params": params, "paper": entry.paper, "takes_width": entry.has_width})
    return rows


def _imported(name: str) -> Callable[..., Any] | nn.Module:
    """Import what a string names; the current directory counts, as it does for ``python -m``.

    Raises:
        InputError: If the module cannot be imported, or the name is not a factory.
        UnknownNameError: If the module has no such name.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # somebody else's code, or no module name at all
        raise InputError(
            f"Cannot import {module_name!r} for the model {name} ({type(error).__name__}: {error}). "
            "Expected package.module:factory, found on PYTHONPATH or in the current directory. Is it spelled right, "
            "and are its own imports installed?"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UnknownNameError(f"factory in {module_name}", attribute, [n for n in vars(found) if n[0] != "_"])
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}: expected a function that returns a network. Name one.")
    return found  # type: ignore[no-any-return]


def _call(name: str, factory: Callable[..., Any] | nn.Module, num_classes: int, options: dict[str, int]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)  # training works in place, and every seed starts from the same network
    try:
        parameters = inspect.signature(factory).parameters.values()
        takes = {p.name for p in parameters} | {"num_classes" for p in parameters if p.kind is p.VAR_KEYWORD}
        network = factory(**({"num_classes": num_classes} if "num_classes" in takes else {}), **options)
    except Exception as error:  # somebody else's code: whatever it raises is its own error
        raise ModelError(
            f"The factory {name} failed ({type(error).__name__}: {error}). It is called with num_classes={num_classes} "
            "if it takes that, else with nothing. Try it in Python."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"The factory {name} returned a {type(network).__name__}: expected a torch.nn.Module. Fix it.")
    return network
