"""The options `--preset`, `--compat` and `--config` of `ntkgen cl-run`, and what they print."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.options import Function, stacked
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.presets import PRESETS, Preset, preset_of
from ntkgen.errors import InputError

if TYPE_CHECKING:
    from ntkgen.files.folder import Folder

preset_options: Callable[[Function], Function] = stacked(
    click.option(
        "--preset", help=f"Settings of a published experiment: {', '.join(PRESETS)}. Files and options override them."
    ),
    click.option(
        "--compat",
        type=click.Choice(["published"]),
        help="Also reproduce what the published code of the preset does in another way. --dry-run lists it.",
    ),
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Read settings from FILE.json. Options override them.",
    ),
)


def chosen_settings(
    preset: str | None, compat: str | None, config: Path | None, options: dict[str, Any]
) -> tuple[RunSettings, Preset | None]:
    """Combine preset, file and options; each overrides what is before it.

    Raises:
        InputError: If a name is unknown, the file has no object, or `compat` is given without a preset.
    """
    values = {} if config is None else _read(config)
    given = {name: value for name, value in options.items() if value is not None}
    if "," in str(given.get("class_order", "")):
        given["class_order"] = [int(label) for label in given["class_order"].split(",")]
    values |= given
    if preset is None:
        if compat is not None:
            raise InputError(
                "`compat` reproduces the published code of a preset: expected a `preset`, found none. Was it "
                "forgotten? Give one, or leave `compat` out."
            )
        return RunSettings.from_json(values), None
    found = preset_of(preset)
    return RunSettings.from_json(found.values(values, compatible=compat is not None)), found


def _read(config: Path) -> dict[str, Any]:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"The settings in {config} cannot be read: expected a JSON object, found an error ({error}). Is it another "
            "file? Correct it."
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"The settings in {config} cannot be read: expected a JSON object, found {type(values).__name__}. Is it "
            "another file? Correct it."
        )
    return values


def preset_page(preset: Preset | None, settings: RunSettings) -> str:
    """List all settings, and describe the preset and which of its quirks they have."""
    lines = ["settings: " + ", ".join(f"{name} {value}" for name, value in settings.to_json().items())]
    if preset is None:
        return lines[0]
    lines += [f"preset {preset.name}: {preset.source}. {preset.note}"]
    for quirk in preset.quirks_of(settings.method):
        is_on = "on" if getattr(settings, quirk.setting) == quirk.value else "off"
        lines.append(f"  {quirk.setting} {quirk.value} ({is_on}): {quirk.source}")
    return "\n".join(lines)


def compared(preset: Preset | None, place: "str | Folder") -> tuple[dict[str, Any], str]:
    """Compare a finished run with the published numbers, as JSON and as lines; both are empty without a preset."""
    if preset is None:
        return {}, ""
    from ntkgen.continual.comparison import compare
    from ntkgen.continual.reading import open_seed

    run = open_seed(place)
    found = compare(preset, run)
    if found is not None:
        return {"published": found.to_json()}, "".join(f"\n  {line}" for line in found.lines())
    known = sorted({f"{each.model} {each.width or ''} {each.method}".replace("  ", " ") for each in preset.runs})
    line = f"published by {preset.source}: no numbers of this network and method, but of {', '.join(known) or 'none'}"
    return {"published": None}, f"\n  {line}"
