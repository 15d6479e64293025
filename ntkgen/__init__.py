"""Large empirical neural tangent kernels: exact, fast, resumable.

The public names load what they need when they are first used, so that reading a stored kernel never imports torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkgen.engine.compute import compute as compute
    from ntkgen.jacobian.dense import ntk as ntk
    from ntkgen.jacobian.operator import NTKOperator as NTKOperator
    from ntkgen.jacobian.reference import reference_ntk as reference_ntk
    from ntkgen.store.opening import open_kernel as open  # noqa: A004
    from ntkgen.store.store import KernelStore as KernelStore

__version__ = "0.1.0"

_HOMES = {
    "NTKOperator": ("ntkgen.jacobian.operator", "NTKOperator"),
    "compute": ("ntkgen.engine.compute", "compute"),
    "KernelStore": ("ntkgen.store.store", "KernelStore"),
    "ntk": ("ntkgen.jacobian.dense", "ntk"),
    "open": ("ntkgen.store.opening", "open_kernel"),
    "reference_ntk": ("ntkgen.jacobian.reference", "reference_ntk"),
}

__all__ = ["KernelStore", "NTKOperator", "compute", "ntk", "open", "reference_ntk"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562).

    Raises:
        AttributeError: If there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'ntkgen' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *_HOMES})
