"""Settings as plain values: written, read and checked by the types of a frozen dataclass."""

import dataclasses
import difflib
import json
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

from ntkgen.errors import InputError, UnknownNameError

Part = TypeVar("Part")


class Settings:
    """The base of the settings of a run, each a frozen dataclass of plain values and tuples of them."""

    other_names: ClassVar[tuple[str, ...]] = ()
    """Names that a file may use in place of those of the settings."""
    subject: ClassVar[str] = "a run"
    """What the settings are of, for errors."""

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
                close = difflib.get_close_matches(name, [*known, *cls.other_names], n=3)
                hint = f" Did you mean {' or '.join(close)}?" if close else ""
                raise InputError(f"There is no setting {name!r} of {cls.subject}.{hint} Known: {', '.join(known)}.")
        kinds = typing.get_type_hints(cls)
        for name, value in values.items():
            if not _is_of_kind(value, kinds[name]):
                raise InputError(
                    f"The setting {name} has a value of the wrong kind: expected {_named(kinds[name])}, found "
                    f"{json.dumps(value, default=str)}. Was a number written in quotes, or a word without them? "
                    "Correct it."
                )
        return cls(**values)

    def part(self, kind: type[Part], **others: Any) -> Part:
        """Make settings of a part from the settings that have the same names.

        Args:
            kind: The dataclass of the part.
            others: Values of the fields that have other names here.
        """
        names = [field.name for field in dataclasses.fields(kind) if field.name not in others]  # type: ignore[arg-type]
        return kind(**{name: getattr(self, name) for name in names}, **others)

    def differences(self, other: "Settings") -> list[str]:
        """List the settings that differ, with both values. This one is that of the record."""
        pairs = zip(self.to_json().items(), other.to_json().values(), strict=True)
        return [f"{name} {stored}, now {current}" for (name, stored), current in pairs if stored != current]


def freeze_lists(settings: Settings) -> None:
    """Replace lists by tuples, so that the settings can be compared and hashed."""
    for name, value in list(vars(settings).items()):
        if isinstance(value, list):
            object.__setattr__(settings, name, tuple(value))


def require_numbers(settings: Settings, positive: Iterable[str], not_negative: Iterable[str]) -> None:
    """Require that no number is too small.

    Args:
        settings: The settings.
        positive: Names of those that must be above 0.
        not_negative: Names of those that may also be 0.

    Raises:
        InputError: If one is.
    """
    for names, expected in ((positive, "a number above 0"), (not_negative, "0 or more")):
        for name in names:
            value = getattr(settings, name)
            if value is None or value > 0 or (value == 0 and expected == "0 or more"):
                continue
            question = "Was it meant to switch something off?" if value == 0 else "Is the sign wrong?"
            raise InputError(
                f"`{name}` is {value:g}: expected {expected}. {question} Give another number, or leave it out for the "
                f"default, {getattr(type(settings), name)}."
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
        found = f"{repeated[0]} more than once in {' '.join(map(str, values))}" if repeated else "none"
        raise InputError(
            f"`{name}` {'repeats a value' if repeated else 'has no value'}: expected each value once, found {found}. "
            f"{reason} Is it a mistake in typing? Give different values."
        )


def _named(kind: Any) -> str:
    """Say in words which values a setting has.

    >>> _named(int | None), _named(str | tuple[int, ...]), _named(tuple[str, ...])
    ('a whole number', 'a word or a list of whole numbers', 'a list of words')
    """
    if isinstance(kind, types.UnionType):
        return " or ".join(_named(each) for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is tuple:
        return {int: "a list of whole numbers", float: "a list of numbers", str: "a list of words"}[
            typing.get_args(kind)[0]
        ]
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[kind]


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
