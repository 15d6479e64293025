"""A run beside the published numbers of its preset."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.metrics.switches import switches_of
from ntkgen.continual.presets import Preset
from ntkgen.continual.published import KERNEL_QUANTITIES, QUANTITIES, PublishedRun
from ntkgen.continual.reading import RunReader

# Settings that change no published number.
IRRELEVANT = {"seed", "kernels", "evaluations", "dense", "precision", "per_layer"}
# Settings that change numbers of kernels alone.
OF_KERNELS = {"probe_per_class", "probe_rule", "probe_parts", "output"}


@dataclass(frozen=True)
class Comparison:
    """Numbers of a run, and the published ones.

    Attributes:
        published: The published run.
        numbers: Numbers of this run by the names of `QUANTITIES`; those of kernels are missing if no kernels were
            recorded after each epoch.
        seen: Accuracy of this run on all classes seen so far, after each task.
        differences: Settings that differ and matter, with both values. The numbers are comparable if there are none.
    """

    published: PublishedRun
    numbers: dict[str, float]
    seen: tuple[float, ...]
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as plain values."""
        return {
            "source": self.published.source,
            "numbers": dict(self.published.numbers),
            "seen_accuracy": list(self.published.seen),
            "run": {**self.numbers, "seen_accuracy": list(self.seen)},
            "differences": list(self.differences),
        }

    def lines(self) -> list[str]:
        """Write a table, and what makes the numbers incomparable."""
        lines = [f"published by {self.published.source}", f"  {'':<32}{'this run':>12}{'published':>12}"]
        for name, title in QUANTITIES.items():
            if name in self.published.numbers:
                found = f"{self.numbers[name]:.4g}" if name in self.numbers else "not recorded"
                lines.append(f"  {title:<32}{found:>12}{self.published.numbers[name]:>12.4g}")
        for title, values in (("this run", self.seen), ("published", self.published.seen)):
            if self.published.seen:
                found = " ".join(f"{value:.3f}" for value in values)
                lines.append(f"  seen accuracy after each task, {title}: {found}")
        if self.differences:
            lines.append(f"  not comparable: {'; '.join(self.differences)}")
        return lines


def compare(preset: Preset, run: RunReader) -> Comparison | None:
    """Compare a finished run with the published run of its network and method; None if there is none."""
    settings = run.settings
    published = published_run(preset, settings)
    if published is None:
        return None
    matrix = run.matrix()
    numbers = {name: value for name in QUANTITIES if (value := getattr(matrix, name, None)) is not None}
    has_kernels = any(name in published.numbers for name in KERNEL_QUANTITIES)
    if has_kernels:
        is_validation = run.evaluations.get("probe_is_validation")
        training = None if is_validation is None else ~np.asarray(is_validation.values, bool)
        found = switches_of(run.kernels, 0, training)
        numbers |= {} if found is None else vars(found)
    seen = tuple(matrix.seen_accuracy.tolist())
    differences = _differences(preset, settings, IRRELEVANT if has_kernels else IRRELEVANT | OF_KERNELS)
    return Comparison(published, numbers, seen, differences)


def published_run(preset: Preset, settings: RunSettings) -> PublishedRun | None:
    """Find the published run of the same network and method."""
    for run in preset.runs:
        is_same = (run.model, run.width, run.method) == (settings.model, settings.width, settings.method)
        if is_same and run.exemplars in {"", settings.exemplars}:
            return run
    return None


def _differences(preset: Preset, settings: RunSettings, ignored: set[str]) -> tuple[str, ...]:
    chosen = {name: getattr(settings, name) for name in ("model", "width", "method")}
    published = RunSettings.from_json(preset.values(chosen, compatible=True)).to_json()
    return tuple(
        f"{name} {_shown(value)}, published {_shown(published[name])}"
        for name, value in settings.to_json().items()
        if name not in ignored and value != published[name]
    )


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
