"""The surgeries by name."""

from collections.abc import Iterable

from ntkgen.continual.surgery.continual_backprop import ContinualBackprop
from ntkgen.continual.surgery.perturb import Perturb
from ntkgen.continual.surgery.redo import ReDo
from ntkgen.continual.surgery.resets import ResetHead, ResetNetwork
from ntkgen.continual.surgery.surgery import Subject, Surgery
from ntkgen.errors import UnknownNameError

SURGERIES: dict[str, type[Surgery]] = {
    "continual-backprop": ContinualBackprop,
    "redo": ReDo,
    "perturb": Perturb,
    "reset-head": ResetHead,
    "reset-network": ResetNetwork,
}

# Those that draw parameters anew at a boundary.
RESETS = ("reset-head", "reset-network")


def need_features(names: Iterable[str]) -> bool:
    """Say whether any of some surgeries needs the activations of the hidden layers."""
    return any(SURGERIES[name].needs_features for name in names if name in SURGERIES)


def make_surgeries(names: Iterable[str], subject: Subject) -> dict[str, Surgery]:
    """Make surgeries by name, in the order of `SURGERIES`, in which they act.

    Raises:
        UnknownNameError: If there is no surgery of a name.
    """
    names = set(names)
    for name in sorted(names - SURGERIES.keys()):
        raise UnknownNameError("surgery", name, SURGERIES)
    made = {name: make(subject) for name, make in SURGERIES.items() if name in names}
    for surgery in made.values():
        if isinstance(surgery, ResetNetwork):
            surgery.others = list(made.values())
    return made
