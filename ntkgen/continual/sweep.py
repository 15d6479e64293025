"""Runs that differ in seed and width: their settings and the names of their folders."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.settings import require_each_once


@dataclass(frozen=True)
class Sweep:
    """Runs of several seeds and widths.

    Attributes:
        settings: The settings that all runs share.
        widths: The widths of the networks; None is the default width.
        seeds: The seeds.
    """

    settings: RunSettings
    widths: tuple[int | None, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that each run occurs once.

        Raises:
            InputError: If a width or a seed occurs twice, or there is none.
        """
        for name in ("widths", "seeds"):
            option = "width" if name == "widths" else name
            require_each_once(option, getattr(self, name), "Each run has a folder of its own.")

    @property
    def runs(self) -> dict[str, RunSettings]:
        """The settings of each run, by the name of its folder.

        >>> list(Sweep(RunSettings(), (8, 16), (0,)).runs), list(Sweep(RunSettings(), (8,), (0, 3)).runs)
        (['width8/seed0', 'width16/seed0'], ['seed0', 'seed3'])
        """
        return {
            (f"width{width}/" if len(self.widths) > 1 else "") + f"seed{seed}": dataclasses.replace(
                self.settings, width=width, seed=seed
            )
            for width in self.widths
            for seed in self.seeds
        }

    def changed(self) -> list[str]:
        """List what differs from the defaults, as ``name value``."""
        defaults = RunSettings().to_json()
        listed = [
            f"{name.replace('_', ' ')} {in_words(value)}"
            for name, value in self.settings.to_json().items()
            if value != defaults[name] and name not in {"width", "seed"}
        ]
        named = {"width": [width for width in self.widths if width is not None], "seed": self.seeds}
        return listed + [f"{name} {', '.join(map(str, values))}" for name, values in named.items() if values]


def in_words(value: Any) -> str:
    """Write the value of a setting, as a person would.

    >>> [in_words(value) for value in ("5/5", True, None, [49, 63], 1e-5)]
    ['5/5', 'yes', 'none', '49,63', '1e-05']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
