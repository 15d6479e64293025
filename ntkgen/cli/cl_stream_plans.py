"""`--dry-run` of `ntkgen cl-run` and `ntkgen cl-grid` for streams: what runs would do, and how long it would take."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ntkgen.cli.cl_streaming import load_stream_data
from ntkgen.cli.messages import show
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.units import counted, human_seconds


def show_streaming_plan(settings: StreamingSettings, data_dir: Path | None, device: str, *, as_json: bool) -> int:
    """Print what a run would do, with all its settings, and how long it would take."""
    (seconds,) = _times({"": settings}, data_dir, device).values()
    deviations = deviations_of(settings)
    plan = {
        "settings": settings.to_json(),
        "networks": settings.num_members,
        "tasks": settings.num_tasks,
        "combinations": settings.combinations,
        "as_published": deviations,
        "projected_seconds": seconds,
    }
    if as_json:
        show(json.dumps(plan))
        return 0
    networks, combinations = counted(settings.num_members, "network"), len(settings.combinations)
    show(
        f"{networks} ({settings.method}; {counted(combinations, 'combination')} of options, "
        f"{counted(len(settings.seeds), 'seed')}), "
        f"{settings.num_samples:,} samples each, in {counted(settings.num_tasks, 'task')}; about "
        f"{human_seconds(seconds)} without kernels"
    )
    show(f"settings: {in_words(settings.to_json())}")
    if settings.compat:
        show(f"as published: {'; '.join(deviations) or f'no difference is known for {settings.method}'}")
    return 0


def show_grid_plan(runs: Mapping[str, StreamingSettings], data_dir: Path | None, device: str, *, as_json: bool) -> None:
    """Print the runs of a grid, their settings, and how long they would take."""
    times = _times(runs, data_dir, device)
    counts = {name: settings.num_members for name, settings in runs.items()}
    values = {name: settings.to_json() for name, settings in runs.items()}
    if as_json:
        show(json.dumps({"runs": values, "networks": counts, "projected_seconds": times}))
        return
    first = next(iter(values.values()))
    shared = {name for name, value in first.items() if all(each[name] == value for each in values.values())}
    lines = [
        f"  {name}: {counted(counts[name], 'network')}, about {human_seconds(times[name])}; "
        f"{in_words(each, without=shared)}"
        for name, each in values.items()
    ]
    total = human_seconds(sum(times.values()))
    head = f"{counted(len(runs), 'run')}, {counted(sum(counts.values()), 'network')}; about {total} one after the other"
    show("\n".join([f"{head}, without kernels", *lines]))
    show(f"settings of all runs: {in_words({name: value for name, value in first.items() if name in shared})}")


def deviations_of(settings: StreamingSettings) -> list[str]:
    """List what the learner does as its published code, if that is asked for."""
    if not settings.compat:
        return []
    found = [settings.learner.quirks_in_words(options) for options in settings.combinations]
    return list(dict.fromkeys(quirk for quirks in found for quirk in quirks))


def in_words(values: Mapping[str, Any], without: set[str] | frozenset[str] = frozenset()) -> str:
    """Write settings in one line. Those that the learner does not have are left out.

    >>> in_words({"method": "sgd", "sigma": None, "learning_rate": [0.1, 0.2], "seeds": [0]}, {"seeds"})
    'method sgd, learning_rate 0.1 0.2'
    """
    found = {name: value for name, value in values.items() if value is not None and name not in without}
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in found.items()
    )


def _times(runs: Mapping[str, StreamingSettings], data_dir: Path | None, device: str) -> dict[str, float]:
    from ntkgen.continual.streaming.forecast import projected_times
    from ntkgen.engine.machine import choose_device

    return projected_times(runs, lambda settings: load_stream_data(settings, data_dir), choose_device(device))
