"""What acts on the units of a network after a step, or on its parameters at a boundary.

Each public name imports its module when it is first used, because the options are read without torch.
"""

from typing import TYPE_CHECKING

from ntkgen.lazy import lazy_names

if TYPE_CHECKING:
    from ntkgen.continual.surgery.options import SURGERY_NAMES as SURGERY_NAMES
    from ntkgen.continual.surgery.options import SurgeryOptions as SurgeryOptions
    from ntkgen.continual.surgery.registry import SURGERIES as SURGERIES
    from ntkgen.continual.surgery.registry import make_surgeries as make_surgeries
    from ntkgen.continual.surgery.surgery import Subject as Subject
    from ntkgen.continual.surgery.surgery import Surgery as Surgery

_EXPORTS = {
    "options": ("SURGERY_NAMES", "SurgeryOptions"),
    "registry": ("SURGERIES", "make_surgeries"),
    "surgery": ("Subject", "Surgery"),
}

__all__ = ["SURGERIES", "SURGERY_NAMES", "Subject", "Surgery", "SurgeryOptions", "make_surgeries"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__, {name: f"ntkgen.continual.surgery.{module}" for module, names in _EXPORTS.items() for name in names}
    )
