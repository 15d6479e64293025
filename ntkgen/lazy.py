"""Lazy public names of a package. Each name imports its module on first use (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: Name of the package.
        homes: Module of each public name, or ``module:attribute`` if the name differs in the module.

    >>> load, names = lazy_names("ntkgen", {"root": "math:sqrt", "cos": "math"})
    >>> load("root")(4.0), load("cos")(0.0), {"root", "__name__"} <= set(names())
    (2.0, 1.0, True)
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = homes[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names
