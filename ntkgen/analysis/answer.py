"""Base classes of all questions about a kernel: their settings and their answers."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all questions share.

    Attributes:
        memory_bytes: Memory limit of the whole process in bytes. None allows 80 % of the memory that is free.
    """

    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Fields that all answers share; each question adds its own.

    In JSON each field is a key of the same name. A field whose default is None is left out of the JSON while it is
    None.

    Attributes:
        store: Path of the store.
        dtype: Data type of the stored kernel that was analysed. A store may hold kernels of several data types.
        rows: Number of rows of the matrix.
        seconds: Duration of the computation in seconds.
        peak_bytes: Largest memory of the process until the end of the computation, in bytes.
        remembered: Whether the answer was read from a file beside the store instead of being computed.
        not_kept: Reason why the answer could not be saved beside the store; None if it was saved.
    """

    store: str = ""
    dtype: str = ""
    rows: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    remembered: bool = False
    not_kept: str | None = None

    # Name of the command, and first part of the names of the files beside the store.
    QUESTION: ClassVar[str]
    # Fields that are computed at each call and are not saved beside the store.
    VOLATILE: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what the command prints with ``--json``: a dictionary from field names to plain values."""
        fields = dataclasses.fields(self)
        names = [field.name for field in fields if field.default is not None or getattr(self, field.name) is not None]
        return {name: _plain(getattr(self, name)) for name in sorted(names, key=self._order)}

    @classmethod
    def _order(cls, name: str) -> int:
        """Return the rank of a key: first the results, then the fields about the run, then those that are not saved."""
        about_the_run = {"seconds", "peak_bytes", "remembered", "not_kept"}
        return 2 if name in cls.VOLATILE else int(name in about_the_run)

    def to_keep(self) -> dict[str, Any]:
        """Return the dictionary that is saved beside the store."""
        return {name: value for name, value in self.to_json().items() if name not in self.VOLATILE}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Build an answer from a dictionary that `to_json` or `to_keep` returned; ignore keys that are not fields.

        Raises:
            TypeError: If the dictionary lacks a field that has no default.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in names})

    @classmethod
    def from_kept(cls, found: Mapping[str, Any], asked: Mapping[str, Any]) -> Self:  # noqa: ARG003 - for subclasses
        """Build an answer from a dictionary that `to_keep` returned and the settings that were saved with it."""
        return cls.from_json(found)


def _plain(value: Any) -> Any:
    """Turn a value that is a dataclass itself into a dictionary; return any other value unchanged."""
    return dict(vars(value)) if dataclasses.is_dataclass(value) else value
