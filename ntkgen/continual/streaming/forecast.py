"""The projected time of a run that learns a stream, from its first samples."""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Mapping
from tempfile import TemporaryDirectory

import torch

from ntkgen.continual.chance import seed_of
from ntkgen.continual.streaming.run import StreamData, StreamingRun
from ntkgen.continual.streaming.settings import LEARNER_SETTINGS, StreamingSettings
from ntkgen.files.place import folder_of
from ntkgen.training.loop import training_mode

# Samples that are learnt before the clock starts, and while it runs. The first sample is one with norms and ranks.
UNCOUNTED, COUNTED = 5, 20


def projected_times(
    runs: Mapping[str, StreamingSettings], load: Callable[[StreamingSettings], StreamData], device: torch.device
) -> dict[str, float]:
    """Project the seconds of several runs. Those that differ in numbers of their learner alone are measured once.

    Args:
        runs: The settings of the runs by name.
        load: Loads the data of a run.
        device: The device.
    """
    # data depend on a few settings; runs that have these in common share them
    load_once = functools.lru_cache(1)(load)
    found: dict[Hashable, float] = {}
    for settings in runs.values():
        if _work(settings) not in found:
            names = ("dataset", "held_out", "model", "normalise")
            data = load_once(StreamingSettings(**{name: getattr(settings, name) for name in names}))
            found[_work(settings)] = projected_seconds(settings, data, device)
    return {name: found[_work(settings)] for name, settings in runs.items()}


def _work(settings: StreamingSettings) -> Hashable:
    """Describe what the time of a run depends on: all settings, but of numbers of learners only whether they are 0."""
    numbers = {name: value for name in LEARNER_SETTINGS if _is_number(value := getattr(settings, name))}
    are_zero = tuple(not any(value if isinstance(value, tuple) else (value,)) for value in numbers.values())
    others = tuple(pair for pair in vars(settings).items() if pair[0] not in {*numbers, "seeds"})
    return others, are_zero, settings.num_members


def _is_number(value: object) -> bool:
    return isinstance(value, float | int | tuple) and not isinstance(value, bool)


def projected_seconds(settings: StreamingSettings, data: StreamData, device: torch.device) -> float:
    """Measure the first steps of a run, and multiply by the number of samples. Kernels are not included."""
    count = UNCOUNTED + COUNTED
    length = max(count, settings.permuted.period)
    short = dataclasses.replace(settings, kernels_every=0, held_out=0, num_samples=count, samples_per_task=length)
    seed = seed_of(settings.seeds[0], "noise")
    with TemporaryDirectory() as folder, training_mode(device, seed, torch.get_num_threads()):
        run = StreamingRun(short, data, folder_of(folder, fsync=False), device)
        run.learn_up_to(1)
        run.learn_up_to(UNCOUNTED)
        began = time.perf_counter()
        run.learn_up_to(count)
        step = (time.perf_counter() - began) / COUNTED
        began = time.perf_counter()
        run.learner.measure_thinned()
        thinned = time.perf_counter() - began
    measurements = max(settings.num_samples / settings.stats_every, len(settings.ends))  # at least one per bin
    return step * settings.num_samples + thinned * measurements
