"""Settings of runs from a JSON, TOML or YAML file, or from the config.json of a run."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from ntkgen.continual.configuration import ALIASES
from ntkgen.errors import InputError

# A number that YAML 1.2 reads as one, and the library, which follows YAML 1.1, as text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
FORMATS = (".json", ".toml", ".yaml", ".yml")


def read_settings(file: Path) -> dict[str, Any]:
    """Read names and values from a file. The ending of its name says how it is written.

    Raises:
        InputError: If the file is missing or damaged, or its name has another ending.
    """
    if not file.is_file():
        raise InputError(
            f"There is no file {file}: expected settings, found {'a folder' if file.is_dir() else 'nothing'}. Is the "
            "path misspelt, or relative to another folder? Correct it. A run has its settings in config.json."
        )
    if file.suffix.lower() not in FORMATS:
        raise InputError(
            f"The settings in {file} cannot be read: expected a file whose name ends with one of {', '.join(FORMATS)}, "
            f"found {file.suffix or 'no ending'}. Is it another file? Rename or convert it."
        )
    try:
        values = _parsed(file.read_text(encoding="utf-8"), file.suffix.lower())
    except (ValueError, OSError) as error:
        found = " ".join(str(error).split())
        raise InputError(
            f"The settings in {file} cannot be read: expected {file.suffix[1:].upper()}, found an error ({found}). Is "
            "it another file, or half written? Correct it."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(
            f"The settings in {file} cannot be read: expected names with values, found {type(values).__name__}. Is it "
            "another file? Correct it."
        )
    is_of_run = {"settings", "facts"} <= values.keys() and isinstance(values["settings"], dict)
    return values["settings"] if is_of_run else _renamed(values, file)


def _renamed(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Give settings their own names. They may also be named as their options, such as ``lr`` or ``lr-milestones``.

    Raises:
        InputError: If a setting occurs under two names.
    """
    found: dict[str, Any] = {}
    for written, value in values.items():
        name = written.replace("-", "_")
        name = ALIASES.get(name, name)
        if name in found:
            raise InputError(
                f"The settings in {file} have {name} twice: expected one value, found {written} beside another name "
                "of it. Are they parts of two files? Remove one of the two."
            )
        found[name] = value
    return found


def _parsed(text: str, suffix: str) -> Any:
    """Read the text of a file.

    Raises:
        ValueError: If it is damaged.
    """
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        return tomllib.loads(text)
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error
    if not isinstance(values, dict):
        return values
    return {name: float(value) if _is_number(value) else value for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and _EXPONENT.fullmatch(value) is not None
