"""Compute the factors of a block of samples, and multiply factors to kernel tiles.

Each public name is imported when it is first used. Planning therefore never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkgen.jacobian.layers import LayerRule as LayerRule
    from ntkgen.jacobian.layers import register_rule as register_rule
    from ntkgen.jacobian.operator import NTKOperator as NTKOperator

_HOMES = {
    "LayerRule": "ntkgen.jacobian.layers",
    "NTKOperator": "ntkgen.jacobian.operator",
    "register_rule": "ntkgen.jacobian.layers",
}

__all__ = ["LayerRule", "NTKOperator", "register_rule"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562).

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'ntkgen.jacobian' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, whether they are loaded or not."""
    return sorted({*globals(), *_HOMES})
