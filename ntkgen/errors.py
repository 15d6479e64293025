"""The exceptions that a caller may want to catch.

Every message has four parts: what is wrong, what was expected and found, the likely cause, and what to do. Every error
is a subclass of a built-in exception. For example, ``except ValueError`` catches an `InputError` without an import of
this module.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class NtkgenError(Exception):
    """The base class of all errors of this package. ``exit_code`` is the exit status of the command line."""

    exit_code = 1


class InputError(NtkgenError, ValueError):
    """An argument has an invalid value."""

    exit_code = 2


class UnknownNameError(InputError, LookupError):
    """A name is unknown."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(kind, name, list(known))

    def __str__(self) -> str:
        """Build the message with the name, similar names, and all known names.

        >>> print(UnknownNameError("model", "resnt18", ["resnet18", "vgg11"]))
        Unknown model 'resnt18'. Did you mean resnet18? Known: resnet18, vgg11.
        """
        kind, name, known = self.args
        close = difflib.get_close_matches(str(name), known, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."


class ShapeError(InputError):
    """A tensor or an array has the wrong shape."""


class ModelError(InputError):
    """The kernel of a network is not defined, for example because it mixes samples or has no trainable parameter."""


class RuleError(ModelError):
    """For a batch of samples, the layer rules of some parameters disagree with autograd.

    Attributes:
        params: The full names of these parameters.
        advice: What to do, the last sentences of the message.
    """

    advice: ClassVar[str] = (
        "If a store exists, remove it and run the same command again. These parameters are then computed sample by "
        "sample."
    )

    def __init__(self, params: Iterable[str]) -> None:
        super().__init__(tuple(params))

    @property
    def params(self) -> tuple[str, ...]:
        """The full names of the parameters."""
        names: tuple[str, ...] = self.args[0]
        return names

    def __str__(self) -> str:
        """Build the message.

        >>> print(RuleError(["fc.weight"]))  # doctest: +ELLIPSIS
        The network treats a batch differently from the first samples: the gradients of fc.weight ...
        """
        return (
            f"The network treats a batch differently from the first samples: the gradients of {', '.join(self.params)} "
            "were expected to follow from the inputs and outputs of their layers, and do not. Does the network route, "
            f"sort or replace samples by their content? {self.advice}"
        )


class PreparedRuleError(RuleError):
    """A `RuleError` of a network that was prepared with other parameters."""

    advice = "Prepare a new KernelFunction from the network as it is now, or compute its kernel with ntkgen.ntk."


class FingerprintError(InputError):
    """A stored result was computed from other parameters, other data or other settings."""


class PlanError(InputError):
    """The stored plan cannot be repeated on this machine."""


class BudgetError(InputError, MemoryError):
    """The memory budget is too small for one tile."""


class DiskSpaceError(InputError, OSError):
    """The disk does not have enough free space."""


class DataError(InputError):
    """A data set is missing or invalid."""


class StoreError(NtkgenError, OSError):
    """A path has no store, or a damaged store."""

    exit_code = 2


class DamagedTileError(StoreError):
    """The contents of a store differ from the data that was written."""

    exit_code = 1


class StoreLockedError(NtkgenError, BlockingIOError):
    """Another process is writing this store or this checkpoint."""

    exit_code = 2


class NotConvergedError(NtkgenError, RuntimeError):
    """Training finished all epochs without reaching the target accuracy."""


class DivergedError(NtkgenError, FloatingPointError):
    """A loss or a kernel entry is not finite."""


class NotPositiveError(NtkgenError, ArithmeticError):
    """A kernel is not positive definite within the accuracy of its numbers, but the computation needs it to be."""


class InaccurateKernelError(NtkgenError, ArithmeticError):
    """The error of a finished kernel is larger than its precision allows. Its store is kept."""


class InaccurateKernelWarning(UserWarning):
    """An opened kernel is inaccurate according to its certificate, which is its measured error bound."""


class WorkerError(NtkgenError, RuntimeError):
    """The workers of a cluster failed to do their work."""


class Terminated(SystemExit):
    """The process received SIGTERM. As after Ctrl-C, finished work is kept."""
