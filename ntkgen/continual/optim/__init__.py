"""Optimizers that learn from a stream, one sample at a time: UPGD, its variants, and what it is compared with.

Each is a `torch.optim.Optimizer` for one network or for a stack of independent networks. Each public name imports its
module when it is first used, because the table of names and options is read without torch.
"""

from typing import TYPE_CHECKING

from ntkgen.lazy import lazy_names

if TYPE_CHECKING:
    from ntkgen.continual.optim.adaptive_upgd import AdaptiveUPGD as AdaptiveUPGD
    from ntkgen.continual.optim.consolidation import MAS as MAS
    from ntkgen.continual.optim.consolidation import SI as SI
    from ntkgen.continual.optim.consolidation import OnlineEWC as OnlineEWC
    from ntkgen.continual.optim.consolidation import RWalk as RWalk
    from ntkgen.continual.optim.descent import PGD as PGD
    from ntkgen.continual.optim.descent import SGD as SGD
    from ntkgen.continual.optim.descent import Adam as Adam
    from ntkgen.continual.optim.descent import ShrinkAndPerturb as ShrinkAndPerturb
    from ntkgen.continual.optim.feature_upgd import FeatureUPGD as FeatureUPGD
    from ntkgen.continual.optim.feature_upgd import Gate as Gate
    from ntkgen.continual.optim.feature_upgd import gated as gated
    from ntkgen.continual.optim.hesscale import hessian_diagonal as hessian_diagonal
    from ntkgen.continual.optim.names import NAMES as NAMES
    from ntkgen.continual.optim.names import OPTIONS as OPTIONS
    from ntkgen.continual.optim.names import checked_options as checked_options
    from ntkgen.continual.optim.registry import LEARNERS as LEARNERS
    from ntkgen.continual.optim.registry import Learner as Learner
    from ntkgen.continual.optim.registry import make_optimizer as make_optimizer
    from ntkgen.continual.optim.stacked import StackedOptimizer as StackedOptimizer
    from ntkgen.continual.optim.upgd import UPGD as UPGD

_EXPORTS = {
    "adaptive_upgd": ("AdaptiveUPGD",),
    "consolidation": ("MAS", "OnlineEWC", "RWalk", "SI"),
    "descent": ("PGD", "SGD", "Adam", "ShrinkAndPerturb"),
    "feature_upgd": ("FeatureUPGD", "Gate", "gated"),
    "hesscale": ("hessian_diagonal",),
    "names": ("NAMES", "OPTIONS", "checked_options"),
    "registry": ("LEARNERS", "Learner", "make_optimizer"),
    "stacked": ("StackedOptimizer",),
    "upgd": ("UPGD",),
}

__all__ = [
    "LEARNERS",
    "MAS",
    "NAMES",
    "OPTIONS",
    "PGD",
    "SGD",
    "SI",
    "UPGD",
    "Adam",
    "AdaptiveUPGD",
    "FeatureUPGD",
    "Gate",
    "Learner",
    "OnlineEWC",
    "RWalk",
    "ShrinkAndPerturb",
    "StackedOptimizer",
    "checked_options",
    "gated",
    "hessian_diagonal",
    "make_optimizer",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, {name: f"ntkgen.continual.optim.{module}" for module, names in _EXPORTS.items() for name in names}
    )
