"""Compute the factors of a block of samples, and compute kernel tiles from factors.

Each public name is imported when it is first used. Planning a computation therefore never imports torch.
"""

from typing import TYPE_CHECKING

from ntkgen.lazy import lazy_names

if TYPE_CHECKING:
    from ntkgen.jacobian.layers import LayerRule as LayerRule
    from ntkgen.jacobian.layers import dense_rule as dense_rule
    from ntkgen.jacobian.layers import register_rule as register_rule
    from ntkgen.jacobian.operator import NTKOperator as NTKOperator

__all__ = ["LayerRule", "NTKOperator", "dense_rule", "register_rule"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "LayerRule": "ntkgen.jacobian.layers",
            "NTKOperator": "ntkgen.jacobian.operator",
            "dense_rule": "ntkgen.jacobian.layers",
            "register_rule": "ntkgen.jacobian.layers",
        },
    )
