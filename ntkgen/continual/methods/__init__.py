"""The methods of continual learning: what a network learns in each task, and how it predicts."""

from collections.abc import Callable

from ntkgen.continual.methods.ewc import EWC
from ntkgen.continual.methods.finetune import Finetune
from ntkgen.continual.methods.icarl import ICaRL
from ntkgen.continual.methods.joint import Joint
from ntkgen.continual.methods.lwf import LwF, LwFMC
from ntkgen.continual.methods.method import Method, Situation
from ntkgen.continual.methods.replay import Replay, ReplayMixed, ReplayTwoPass
from ntkgen.errors import UnknownNameError

METHODS: dict[str, Callable[[Situation], Method]] = {
    "finetune": Finetune,
    "joint": Joint,
    "replay": Replay,
    "replay-mixed": ReplayMixed,
    "replay-two-pass": ReplayTwoPass,
    "lwf": LwF,
    "lwf-mc": LwFMC,
    "icarl": ICaRL,
    "ewc": EWC,
}


def make_method(name: str, situation: Situation) -> Method:
    """Make a method by name.

    Raises:
        UnknownNameError: If there is no method of that name.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name](situation)
