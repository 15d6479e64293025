"""The options of `ntkgen cl-run` that choose many settings at once, and what they print."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ntkgen.cli.options import Function, stacked
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.presets import PRESETS, Preset, expanded, preset_of
from ntkgen.continual.published_config import (
    NAMES,
    PRESET,
    PublishedConfig,
    is_published,
    seed_of_index,
    shipped,
    translated,
)
from ntkgen.continual.settings_file import read_settings
from ntkgen.continual.sweep import Sweep, in_words
from ntkgen.errors import InputError

if TYPE_CHECKING:
    from ntkgen.continual.reading import RunReader


class ConfigFile(click.Path):
    """A file of settings, or the name of a published one."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of the file. A file in the current folder precedes a published name."""
        found = None if Path(value).exists() else shipped(str(value))
        return super().convert(found or value, param, ctx)


preset_options: Callable[[Function], Function] = stacked(
    click.option(
        "--preset", help=f"Settings of a published experiment: {', '.join(PRESETS)}. Files and options override them."
    ),
    click.option(
        "--compat",
        type=click.Choice(["published"]),
        help="Also reproduce what the published code of the preset, or of the learner of a stream, does in another "
        "way. --dry-run lists it.",
    ),
    click.option(
        "--config",
        type=ConfigFile(),
        metavar="FILE",
        help="Read settings from FILE.json, FILE.toml or FILE.yaml, from the config.json of a run, or from a published "
        f"configuration of incremental CIFAR-100: {', '.join(NAMES)}. Options override them.",
    ),
    click.option(
        "--experiment-index",
        type=click.IntRange(min=0),
        metavar="N",
        help="Take the seed of the N-th run of incremental CIFAR-100, and also write its results as the published code "
        "does: one folder per metric with a file index-N.npy.",
    ),
)


@dataclass(frozen=True)
class Chosen:
    """The runs that were asked for.

    Attributes:
        sweep: Their settings.
        preset: Their preset, if they have one.
        published: The published configuration, if one was read.
        index: The experiment index, if one was given.
    """

    sweep: Sweep
    preset: Preset | None
    published: PublishedConfig | None = None
    index: int | None = None


def chosen_runs(
    preset: str | None, compat: str | None, config: Path | None, options: dict[str, Any], index: int | None = None
) -> Chosen:
    """Combine preset, file and options; each overrides what is before it.

    Raises:
        InputError: If a name is unknown, the file is damaged, `compat` is given without a preset, or a seed beside an
            experiment index.
    """
    values, published = ({}, None) if config is None else _read(config)
    if published is not None:
        preset = preset or PRESET
    given = {name: value for name, value in options.items() if value not in {None, ()}}
    if "method" in given:  # the algorithm of the options takes the place of that of the file
        given = expanded(given)
        values.pop("surgery", None)
    if isinstance(given.get("class_order"), str):
        given["class_order"] = _order(given["class_order"])
    values |= given
    lists = {name: _listed(name, values.pop(name)) for name in ("width", "seeds", "seed") if name in values}
    widths, seeds = lists.get("width"), lists.get("seeds") or lists.get("seed")
    if index is not None:
        if seeds:
            raise InputError(
                f"`experiment_index` chooses the seed: expected no other, found {', '.join(map(str, seeds))}. Was one "
                "of the two left over? Leave it out."
            )
        seeds = (seed_of_index(index),)
    if widths:
        values["width"] = widths[0]
    if compat is not None and preset is None:
        raise InputError(
            "`compat` reproduces the published code of a preset: expected a `preset`, found none. Was it "
            "forgotten? Give one, or leave `compat` out."
        )
    found = None if preset is None else preset_of(preset)
    whole = expanded(values) if found is None else found.values(values, compatible=compat is not None)
    settings = RunSettings.from_json(whole)
    sweep = Sweep(settings, widths or (settings.width,), seeds or (RunSettings.seed,))
    if index is not None and len(sweep.runs) > 1:
        raise InputError(
            f"`experiment_index` belongs to one run: expected one width, found {len(sweep.widths)}. Is it a sweep? "
            "Give `seeds` instead."
        )
    return Chosen(sweep, found, published, index)


def require_one_worker(workers: int) -> None:
    """Refuse to print the lines of several runs at once.

    Raises:
        InputError: If there are several workers.
    """
    if workers > 1:
        raise InputError(
            f"`verbose` prints what one run does: expected one worker, found {workers}. Were both copied from other "
            "commands? Leave one of the two out."
        )


def _read(file: Path) -> tuple[dict[str, Any], PublishedConfig | None]:
    """Read a file of settings, and translate it if it is a published one."""
    values = read_settings(file)
    if not is_published(values):
        return values, None
    published = translated(values, file.stem)
    return dict(published.settings), published


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
    if not preset.runs:  # its source has curves alone
        return {"published": None}, ""
    known = sorted({f"{each.model} {each.width or ''} {each.method}".replace("  ", " ") for each in preset.runs})
    line = f"published by {preset.source}: no numbers of this network and method, but of {', '.join(known)}"
    return {"published": None}, f"\n  {line}"
