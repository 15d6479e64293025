"""The projected time of a run that learns a stream, from its first samples."""

import dataclasses
import time
from tempfile import TemporaryDirectory

import torch

from ntkgen.continual.chance import seed_of
from ntkgen.continual.streaming.run import StreamData, StreamingRun
from ntkgen.continual.streaming.settings import StreamingSettings
from ntkgen.files.place import folder_of
from ntkgen.training.loop import training_mode

# Samples that are learnt before the clock starts, and while it runs. The first sample is one with norms and ranks.
UNCOUNTED, COUNTED = 5, 20


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
