"""The options `--preset`, `--compat` and `--config` of `ntkgen cl-run`, and what they print."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.options import Function, stacked
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.presets import PRESETS, Preset, preset_of
from ntkgen.continual.settings_file import read_settings
from ntkgen.continual.sweep import Sweep, in_words
from ntkgen.errors import InputError

if TYPE_CHECKING:
    from ntkgen.continual.reading import RunReader

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
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Read settings from FILE.json, FILE.toml or FILE.yaml, or from the config.json of a run. "
        "Options override them.",
    ),
)


def chosen_runs(
    preset: str | None, compat: str | None, config: Path | None, options: dict[str, Any]
) -> tuple[Sweep, Preset | None]:
    """Combine preset, file and options; each overrides what is before it.

    Raises:
        InputError: If a name is unknown, the file is damaged, or `compat` is given without a preset.
    """
    values = {} if config is None else read_settings(config)
    given = {name: value for name, value in options.items() if value not in {None, ()}}
    if isinstance(given.get("class_order"), str):
        given["class_order"] = _order(given["class_order"])
    values |= given
    lists = {name: _listed(name, values.pop(name)) for name in ("width", "seeds", "seed") if name in values}
    widths, seeds = lists.get("width"), lists.get("seeds") or lists.get("seed") or (RunSettings.seed,)
    if widths:
        values["width"] = widths[0]
    if compat is not None and preset is None:
        raise InputError(
            "`compat` reproduces the published code of a preset: expected a `preset`, found none. Was it "
            "forgotten? Give one, or leave `compat` out."
        )
    found = None if preset is None else preset_of(preset)
    settings = RunSettings.from_json(values if found is None else found.values(values, compatible=compat is not None))
    return Sweep(settings, widths or (settings.width,), seeds), found


def _listed(name: str, value: Any) -> tuple[int, ...] | None:
    """Read one whole number or a list of them.

    Raises:
        InputError: If it is something else.
    """
    if value is None and name == "width":
        return None
    values = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in values):
        raise InputError(
            f"`{name}` has a value of the wrong kind: expected whole numbers that are not negative, found "
            f"{json.dumps(value, default=str)}. Was a number written in quotes? Correct it."
        )
    return tuple(values)


def _order(text: str) -> str | tuple[int, ...]:
    """Read the name of an order, or labels that are separated by commas.

    Raises:
        InputError: If a label is no number.
    """
    if "," not in text:
        return text
    try:
        return tuple(int(label) for label in text.split(","))
    except ValueError as error:
        raise InputError(
            f"{text!r} is no class order: expected labels, which are whole numbers, separated by commas, found "
            f"something else ({error}). Is it a name? Give natural, random or icarl, or all labels."
        ) from error


def settings_page(sweep: Sweep, preset: Preset | None) -> str:
    """List the settings that differ from the defaults, and describe the preset and which of its quirks are on."""
    lines = [f"Settings: {'; '.join(sweep.changed())}. The others have their defaults."]
    if preset is None:
        return lines[0]
    lines.append(f"Preset {preset.name}: {preset.source}. {preset.note}")
    for quirk in preset.quirks_of(sweep.settings.method):
        is_on = getattr(sweep.settings, quirk.setting) == quirk.value
        name = f"{quirk.setting.replace('_', ' ')} {in_words(quirk.value)}"
        lines.append(f"  {name} ({'as published' if is_on else 'published, not used'}): {quirk.source}")
    return "\n".join(lines)


def compared(preset: Preset | None, run: "RunReader") -> tuple[dict[str, Any], str]:
    """Compare a finished run with the published numbers, as JSON and as lines; both are empty without a preset."""
    if preset is None:
        return {}, ""
    from ntkgen.continual.comparison import compare

    found = compare(preset, run)
    if found is not None:
        return {"published": found.to_json()}, "".join(f"\n  {line}" for line in found.lines())
    known = sorted({f"{each.model} {each.width or ''} {each.method}".replace("  ", " ") for each in preset.runs})
    line = f"published by {preset.source}: no numbers of this network and method, but of {', '.join(known) or 'none'}"
    return {"published": None}, f"\n  {line}"
