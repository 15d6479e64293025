"""What every question about a kernel shares: the memory it may take, and the shape of its answer."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every question is asked with: the memory that the whole process may take; None: 80 % of what is free."""

    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer about one matrix; each question adds its own fields.

    In JSON a field is a key of the same name. A field whose default is None has no key while it is None.

    Attributes:
        store: Path of the store.
        dtype: Which of the stored kernels the answer is about.
        rows: Rows of the matrix.
        seconds: Time that the computation took.
        peak_bytes: Most memory that the process has held by the end of it.
        remembered: Whether the answer was read from beside the store.
        not_kept: Why the answer could not be written beside the store.
    """

    store: str = ""
    dtype: str = ""
    rows: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    remembered: bool = False
    not_kept: str | None = None

    # Name of the command, and of the files beside the store.
    QUESTION: ClassVar[str]
    # Fields that are found out each time, and not written beside the store.
    VOLATILE: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Turn into what the command prints: plain values, by the names of the fields."""
        fields = dataclasses.fields(self)
        names = [field.name for field in fields if field.default is not None or getattr(self, field.name) is not None]
        return {name: _plain(getattr(self, name)) for name in sorted(names, key=self._order)}

    @classmethod
    def _order(cls, name: str) -> int:
        """Order keys: what was found out, then what the run took, then what is not kept."""
        about_the_run = {"seconds", "peak_bytes", "remembered", "not_kept"}
        return 2 if name in cls.VOLATILE else int(name in about_the_run)

    def to_keep(self) -> dict[str, Any]:
        """Turn into what is written beside the store."""
        return {name: value for name, value in self.to_json().items() if name not in self.VOLATILE}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Read what `to_json` or `to_keep` has made; keys that are no fields are ignored.

        Raises:
            TypeError: If a field without a default has no key.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in names})

    @classmethod
    def from_kept(cls, found: Mapping[str, Any], asked: Mapping[str, Any]) -> Self:  # noqa: ARG003 - for subclasses
        """Read what `to_keep` has made, kept with the settings that the answer depends on."""
        return cls.from_json(found)


def _plain(value: Any) -> Any:
    """Turn a part of an answer that has fields of its own into a dictionary."""
    return dict(vars(value)) if dataclasses.is_dataclass(value) else value
