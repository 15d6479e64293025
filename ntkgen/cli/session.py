"""What every command that makes something does with its options: the data, the device, the networks."""

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkgen.errors import Terminated

TERMINATED = 143  # what a shell reports of a process that SIGTERM has ended

if TYPE_CHECKING:
    from ntkgen.data.dataset import Dataset
    from ntkgen.engine.computation import Execution
    from ntkgen.pipeline import RunSetup
    from ntkgen.training.recipe import TrainingRequest


def start_process() -> None:
    """Set what must be set before torch is loaded, or before its first parallel work.

    Threads that wait spin for some 30 µs, then give their core away. Spinning on, as is usual, made training 15 times
    slower with another program beside this one; sleeping at once makes the many short products of a kernel 1.5 times
    slower without one. Denormals are flushed, which threads inherit when they are made.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    signal.signal(signal.SIGTERM, _terminate)

    import torch

    torch.set_flush_denormal(True)


def _terminate(*_: object) -> None:
    """End as after Ctrl-C: the tile in flight is lost, what is finished is kept.

    Raises:
        Terminated: Always.
    """
    raise Terminated(TERMINATED)


@dataclass(frozen=True)
class Settings:
    """The options of `training_options`, as parsed."""

    models: tuple[str, ...]
    dataset: str
    data_dir: Path | None
    raw_images: bool
    num_epochs: int | None
    learning_rate: float | None
    batch_size: int | None
    width: int | None
    seed: int
    repeats: int
    target_accuracy: float
    allow_unconverged: bool
    out: str
    fsync: bool
    device: str
    as_json: bool
    verbose: bool
    quiet: bool

    @classmethod
    def pop_from(cls, options: dict[str, Any]) -> "Settings":
        """Take these options out of a command's, and leave it its own."""
        return cls(**{field.name: options.pop(field.name) for field in dataclasses.fields(cls)})

    def load_data(self, split: str = "train") -> "Dataset":
        """Load the samples of a split."""
        from ntkgen.data import dataset as data

        loaded = data.load(self.dataset, data_dir=self.data_dir, split=split)
        return dataclasses.replace(loaded, zoo_sized=False) if self.raw_images else loaded

    def setup(self, execution: "Execution | None" = None) -> "RunSetup":
        """Say where results lie, and what computes them."""
        from ntkgen.engine.computation import LOCAL
        from ntkgen.engine.machine import choose_device
        from ntkgen.files.place import folder_of
        from ntkgen.pipeline import RunSetup

        out = folder_of(self.out, fsync=self.fsync)
        return RunSetup(out, choose_device(self.device), execution or LOCAL, self.data_dir)

    def requests(self) -> "list[TrainingRequest]":
        """List the networks: every model with every seed."""
        from ntkgen.training.recipe import TrainingRequest

        return [
            TrainingRequest(
                model=model,
                seed=seed,
                width=self.width,
                num_epochs=self.num_epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                target_accuracy=self.target_accuracy,
                allow_unconverged=self.allow_unconverged,
            )
            for model in dict.fromkeys(self.models)
            for seed in range(self.seed, self.seed + self.repeats)
        ]
