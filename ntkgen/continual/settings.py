"""Settings as plain values: written, read and checked by the types of a frozen dataclass."""

import dataclasses
import difflib
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from ntkgen.errors import InputError, UnknownNameError


class Settings:
    """The base of the settings of a run, each a frozen dataclass of plain values and tuples of them."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, defaults included."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` or a user has written.

        Raises:
            InputError: If a key is unknown, or a value has the wrong kind.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f" Did you mean {' or '.join(close)}?" if close else ""
                raise InputError(f"There is no setting {name!r} of a run.{hint} Known: {', '.join(known)}.")
        kinds = typing.get_type_hints(cls)
        for name, value in values.items():
            if not _is_of_kind(value, kinds[name]):
                kind = str(getattr(known[name].type, "__name__", known[name].type)).replace(" | None", " or nothing")
                raise InputError(
                    f"The setting {name} has a value of the wrong kind: expected {kind}, found {value!r}. Was a number "
                    "written in quotes, or a word without them? Correct it."
                )
        return cls(**values)

    def differences(self, other: "Settings") -> list[str]:
        """List the settings that differ, with both values. This one is that of the record."""
        pairs = zip(self.to_json().items(), other.to_json().values(), strict=True)
        return [f"{name} {stored}, now {current}" for (name, stored), current in pairs if stored != current]


def freeze_lists(settings: Settings) -> None:
    """Replace lists by tuples, so that the settings can be compared and hashed."""
    for name, value in list(vars(settings).items()):
        if isinstance(value, list):
            object.__setattr__(settings, name, tuple(value))


def wrong_signs(settings: Settings, positive: Iterable[str], not_negative: Iterable[str]) -> list[str]:
    """List the settings that must be positive, or not negative, and are not, as ``name value``."""
    wrong = [f"`{name}` {getattr(settings, name):g}" for name in positive if not getattr(settings, name) > 0]
    return wrong + [f"`{name}` {getattr(settings, name):g}" for name in not_negative if getattr(settings, name) < 0]


def require_none_wrong(wrong: Sequence[str]) -> None:
    """Refuse settings if any have a wrong sign.

    Raises:
        InputError: If there are any.
    """
    if wrong:
        raise InputError(
            f"There is no such run: found {wrong[0]}, expected positive numbers. Is a sign wrong? Correct it."
        )


def require_known_names(settings: Settings, choices: Mapping[str, Sequence[str]]) -> None:
    """Refuse settings that are not one of a few names.

    Raises:
        UnknownNameError: If a name is unknown.
    """
    for name, known in choices.items():
        if getattr(settings, name) not in known:
            raise UnknownNameError(f"`{name}`", getattr(settings, name), known)


def require_each_once(name: str, values: Sequence[Any], reason: str) -> None:
    """Refuse a list that is empty, or has something twice.

    Args:
        name: Name of the list.
        values: The list.
        reason: Why each value must occur once, for the error.

    Raises:
        InputError: If a value occurs twice, or there is none.
    """
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated or not values:
        found = f"{repeated[0]} more than once" if repeated else "none"
        raise InputError(
            f"`{name}` does not list the runs: expected each value once, found {found}. {reason} Is it a mistake in "
            "typing? Give different values."
        )


def _is_of_kind(value: Any, kind: Any) -> bool:
    """Say whether a value has the kind of a setting. A whole number is also a number; a truth value is not.

    >>> _is_of_kind(3, float | None), _is_of_kind(True, int), _is_of_kind([1, 0], str | tuple[int, ...])
    (True, False, True)
    """
    if isinstance(kind, types.UnionType):
        return any(_is_of_kind(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_of_kind(each, typing.get_args(kind)[0]) for each in value)
    if kind in {int, float}:
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)
