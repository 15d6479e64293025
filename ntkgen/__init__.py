"""Large empirical neural tangent kernels: exact, fast, resumable.

Each public name imports its modules when it is first used. Reading a stored kernel therefore never imports torch.
"""

from typing import TYPE_CHECKING

from ntkgen.lazy import lazy_names

if TYPE_CHECKING:
    from ntkgen.continual.reading import open_run as open_run
    from ntkgen.continual.snapshots import Snapshots as Snapshots
    from ntkgen.engine.compute import compute as compute
    from ntkgen.jacobian.dense import ntk as ntk
    from ntkgen.jacobian.kernel_function import KernelFunction as KernelFunction
    from ntkgen.jacobian.operator import NTKOperator as NTKOperator
    from ntkgen.jacobian.reference import reference_ntk as reference_ntk
    from ntkgen.store.opening import open_kernel as open  # noqa: A004
    from ntkgen.store.store import KernelStore as KernelStore

__version__ = "0.1.0"

__all__ = [
    "KernelFunction",
    "KernelStore",
    "NTKOperator",
    "Snapshots",
    "compute",
    "ntk",
    "open",
    "open_run",
    "reference_ntk",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "KernelFunction": "ntkgen.jacobian.kernel_function",
            "KernelStore": "ntkgen.store.store",
            "NTKOperator": "ntkgen.jacobian.operator",
            "Snapshots": "ntkgen.continual.snapshots",
            "compute": "ntkgen.engine.compute",
            "ntk": "ntkgen.jacobian.dense",
            "open": "ntkgen.store.opening:open_kernel",
            "open_run": "ntkgen.continual.reading",
            "reference_ntk": "ntkgen.jacobian.reference",
        },
    )
