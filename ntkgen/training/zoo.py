"""Construction of networks by name, from the package `models` (the zoo) or by an import string such as mylab.nets:wide.

Only this module imports `models`.
"""

import copy
import importlib
import importlib.util
import inspect
import math
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

# Name of the zoo's package, and its folder, which is beside the folder of this package.
ZOO_NAME = "models"
ZOO = Path(__file__).resolve().parents[2] / ZOO_NAME


def build(name: str, num_classes: int, *, seed: int, width: int | None = None, **others: str | int) -> nn.Module:
    """Build a network by name, with random parameters from a seed.

    Args:
        name: Name of a network of the zoo, or ``package.module:factory`` for another network. The factory takes the
            argument ``num_classes`` or no arguments, and may return a trained network. Instead of a factory, the import
            string may also name an instance of a module.
        num_classes: Number of outputs, for factories with this argument.
        seed: Seed of torch's random generator while the factory runs.
        width: Width, for networks of the zoo that have one.
        others: Other options of a network of the zoo, such as ``parametrization``.

    Raises:
        UnknownNameError: If the name is unknown.
        InputError: If the network has no width, if the import string does not name a factory, or if Python imports
            another package with the name `models`.
    """
    options: dict[str, Any] = others | ({} if width is None else {"width": width})
    if ":" in name:
        factory = _imported(name)
        if options:
            option = next(iter(options))
            raise InputError(
                f"`{option}` was given for {name}: expected it only for networks of the zoo, found another network. "
                f"Does the factory have this option? Leave `{option}` out, and set it in the factory."
            )
    elif name in (zoo := _zoo()):
        factory = zoo[name]
        if width is not None and not zoo[name].has_width:
            scalable = ", ".join(other for other, entry in zoo.items() if entry.has_width)
            raise InputError(
                f"`width` was given for {name}, whose width is fixed: expected it only for {scalable}. Was another "
                "network meant? Leave `width` out, or choose one of these networks."
            )
        if missing := [option for option in others if option not in zoo[name].options]:
            raise InputError(
                f"`{missing[0]}` was given for {name}: expected one of its options "
                f"({', '.join(zoo[name].options) or 'none'}). Was another network meant? Leave it out."
            )
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


def image_options(name: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Give the options by which a network of the zoo fits images of another shape; none if it has no such options.

    >>> [image_options(name, (1, 28, 28)) for name in ("lenet-stream", "mlp-stream", "vgg11")]
    [{'channels': 1, 'size': 28}, {'inputs': 784}, {}]
    """
    entry = None if ":" in name else _zoo().get(name)
    values = {"channels": shape[0], "size": shape[-1], "inputs": math.prod(shape)}
    return {} if entry is None else {option: values[option] for option in entry.options if option in values}


def file_name(model: str) -> str:
    """Convert the name of a model to a part of a file name.

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
    """Import the zoo.

    The zoo is not imported for an import string, because the package of the string may have the same name as the zoo.

    Raises:
        InputError: If Python finds another module or package of that name first.
    """
    file = _zoo_file()
    if file is None or file.resolve() != ZOO / "__init__.py":
        raise InputError(
            f"The zoo cannot be imported: expected ntkgen's own package {ZOO_NAME!r} at {ZOO}, found "
            f"{'none' if file is None else f'another of this name at {file}'}. Is the other package in the current "
            "directory or on PYTHONPATH, which Python searches first? Run from another directory, rename the other "
            "package, or name your own network as package.module:factory."
        )
    from models import MODELS

    return MODELS


def _zoo_file() -> Path | None:
    """Return the file or folder that an import of the zoo's name would load, without loading it."""
    module = sys.modules.get(ZOO_NAME)
    spec = importlib.util.find_spec(ZOO_NAME) if module is None else None
    file = getattr(module, "__file__", None) if spec is None else spec.origin
    folders = getattr(module, "__path__", ()) if spec is None else spec.submodule_search_locations or ()
    place = file or next(iter(folders), None)  # a package without __init__.py has no file
    return None if place is None else Path(place)


def _imported(name: str) -> Callable[..., Any] | nn.Module:
    """Import the factory of an import string. The current directory is searched too, as with ``python -m``.

    Raises:
        InputError: If the module cannot be imported, or if the object is not a factory.
        UnknownNameError: If the module has no object of this name.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # user code may raise any error, and the name may be invalid
        raise InputError(
            f"Cannot import {module_name!r} for the model {name} ({type(error).__name__}: {error}). "
            "Expected package.module:factory, with a module on PYTHONPATH or in the current directory. Is the name "
            "misspelt, or is a dependency of the module missing? Correct the name, or install the dependency."
            f"{_hint_of_the_zoo(error)}"
        ) from error
    place = getattr(target, "__file__", None) or module_name
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise UnknownNameError(f"factory in {place}", attribute, _own_names(target))
        target = getattr(target, part)
    if not callable(target):
        raise InputError(
            f"{name} is a {type(target).__name__}: expected a function that returns a network. Does the name denote "
            "another object? Give the name of a function."
        )
    return target  # type: ignore[no-any-return]


def _own_names(target: Any) -> list[str]:
    """List the functions, classes and networks that a module defines itself; of other objects all public names."""
    public = {name: value for name, value in vars(target).items() if not name.startswith("_")}
    if not inspect.ismodule(target):
        return list(public)
    return [
        name
        for name, value in public.items()
        if isinstance(value, nn.Module)
        or ((inspect.isroutine(value) or inspect.isclass(value)) and value.__module__ == target.__name__)
    ]


def _hint_of_the_zoo(error: Exception) -> str:
    """Return a hint that the zoo hides a package of the same name, if this can be the cause of a failed import."""
    missing = getattr(error, "name", None) or ""
    if missing.partition(".")[0] != ZOO_NAME or _zoo_file() != ZOO / "__init__.py":
        return ""
    return f" ntkgen's own zoo at {ZOO} has the name {ZOO_NAME!r} too: rename your package."


def _call(name: str, factory: Callable[..., Any] | nn.Module, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)  # training changes a network, and each seed must start from the same network
    try:
        parameters = inspect.signature(factory).parameters.values()
        takes = {p.name for p in parameters} | {"num_classes" for p in parameters if p.kind is p.VAR_KEYWORD}
        network = factory(**({"num_classes": num_classes} if "num_classes" in takes else {}), **options)
    except Exception as error:  # user code may raise any error
        raise ModelError(
            f"The factory {name} failed: expected a network from a call with num_classes={num_classes} if it has this "
            f"argument, and otherwise without arguments, found an error ({type(error).__name__}: {error}). Does it "
            "need other arguments? Call it in Python to find the cause."
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"The factory {name} returned a {type(network).__name__}: expected a torch.nn.Module. Is a return missing? "
            "Return the network."
        )
    return network
