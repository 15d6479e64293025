"""Setup that the commands share: the process, the data, the device and the networks."""

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkgen.errors import Terminated

# Exit code that a shell reports for a process that SIGTERM has ended.
TERMINATED = 143

if TYPE_CHECKING:
    from ntkgen.data.dataset import Dataset
    from ntkgen.engine.computation import Execution
    from ntkgen.pipeline import RunSetup
    from ntkgen.training.recipe import TrainingRequest


def start_process() -> None:
    """Set the thread and number settings that must precede the import of torch or its first parallel computation.

    A waiting OpenMP thread spins for about 30 µs and then sleeps. Unlimited spinning, the usual default, made training
    15 times slower while another program was running. Sleeping at once makes the many short products of a kernel 1.5
    times slower without another program. Denormal numbers are flushed to zero. Threads inherit this setting when they
    are created.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    signal.signal(signal.SIGTERM, _terminate)

    import torch

    torch.set_flush_denormal(True)


def _terminate(*_: object) -> None:
    """End the process as after Ctrl-C: the running tile is lost, and finished tiles are kept.

    Raises:
        Terminated: Always.
    """
    raise Terminated(TERMINATED)


@dataclass(frozen=True)
class Settings:
    """Parsed values of `training_options`."""

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
        """Remove the training options from the options of a command and return them."""
        return cls(**{field.name: options.pop(field.name) for field in dataclasses.fields(cls)})

    def load_data(self, split: str = "train", *, any_form: bool = False) -> "Dataset":
        """Load the samples of a split. A file of ``any_form`` may hold other samples than images."""
        from ntkgen.data import dataset as data

        loaded = data.load(self.dataset, data_dir=self.data_dir, split=split, any_form=any_form)
        return dataclasses.replace(loaded, zoo_sized=False) if self.raw_images else loaded

    def setup(self, execution: "Execution | None" = None) -> "RunSetup":
        """Return the folder of the results, the device and the execution."""
        from ntkgen.engine.computation import LOCAL
        from ntkgen.engine.machine import choose_device
        from ntkgen.files.place import folder_of
        from ntkgen.pipeline import RunSetup

        out = folder_of(self.out, fsync=self.fsync)
        return RunSetup(out, choose_device(self.device), execution or LOCAL, self.data_dir)

    def requests(self) -> "list[TrainingRequest]":
        """List one request for every network and every seed."""
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
