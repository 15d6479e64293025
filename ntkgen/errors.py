"""The exceptions a caller may want to catch.

Every message has four parts: what is wrong, what was expected and found, the likely cause, what to do. Every error is
also the built-in kind it is, so that ``except ValueError`` works for a caller who does not know this module.
"""

import difflib
from collections.abc import Iterable


class NtkgenError(Exception):
    """What every error of this package is; ``exit_code`` is the command line's exit status for it."""

    exit_code = 1


class InputError(NtkgenError, ValueError):
    """An argument has a value that cannot be meant."""

    exit_code = 2


class UnknownNameError(InputError, LookupError):
    """A name is not in the list of those that exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(kind, name, list(known))

    def __str__(self) -> str:
        """Build the message: the name, the close matches, and all there are.

        >>> print(UnknownNameError("model", "resnt18", ["resnet18", "vgg11"]))
        Unknown model 'resnt18'. Did you mean resnet18? Known: resnet18, vgg11.
        """
        kind, name, known = self.args
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."


class ShapeError(InputError):
    """A tensor or an array has the wrong shape."""


class ModelError(InputError):
    """The network is one whose kernel is not defined: it mixes samples, or it has no trainable parameter."""


class RuleError(ModelError):
    """For a batch of samples, the rules of some parameters do not give what autograd gives.

    Attributes:
        params: The full names of these parameters.
    """

    def __init__(self, params: Iterable[str]) -> None:
        super().__init__(tuple(params))

    @property
    def params(self) -> tuple[str, ...]:
        """Name the parameters."""
        names: tuple[str, ...] = self.args[0]
        return names

    def __str__(self) -> str:
        """Build the message.

        >>> print(RuleError(["fc.weight"]))  # doctest: +ELLIPSIS
        The network treats the samples of some batch otherwise than the first ones: the gradients of fc.weight ...
        """
        return (
            f"The network treats the samples of some batch otherwise than the first ones: the gradients of "
            f"{', '.join(self.params)} were expected to follow from what goes in and out of their layers, and do not. "
            "Does it route, sort or replace samples by their content? Where a store is there, remove it and run the "
            "same command again: these parameters are then computed sample by sample."
        )


class FingerprintError(InputError):
    """What is on disk was made from other parameters, other data or other settings."""


class PlanError(InputError):
    """The stored plan cannot be repeated on this machine."""


class BudgetError(InputError, MemoryError):
    """The memory budget is too small for one tile."""


class DiskSpaceError(InputError, OSError):
    """The disk has no room for what would be written."""


class DataError(InputError):
    """A data set is missing, or is not what it should be."""


class StoreError(NtkgenError, OSError):
    """What lies at a path is not a store, or is a damaged one."""

    exit_code = 2


class DamagedTileError(StoreError):
    """What a store holds is not what was written."""

    exit_code = 1


class StoreLockedError(NtkgenError, BlockingIOError):
    """Another process is writing this store or this checkpoint."""

    exit_code = 2


class NotConvergedError(NtkgenError, RuntimeError):
    """Training used up its epochs before it reached the target accuracy."""


class DivergedError(NtkgenError, FloatingPointError):
    """A loss or a kernel entry is not finite."""


class NotPositiveError(NtkgenError, ArithmeticError):
    """A kernel that should be positive definite is not, to the accuracy of its numbers."""


class InaccurateKernelError(NtkgenError, ArithmeticError):
    """A finished kernel differs from the exact one by more than its precision policy explains; its store stays."""


class InaccurateKernelWarning(UserWarning):
    """A kernel was opened whose certificate says that it is wrong."""


class WorkerError(NtkgenError, RuntimeError):
    """The workers of a cluster could not do what they were told."""


class Terminated(SystemExit):
    """The process was told to end, by SIGTERM: as after Ctrl-C, what is finished is kept."""
