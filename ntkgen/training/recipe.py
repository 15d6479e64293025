"""Settings of a training, as given by a user and as recorded in a checkpoint, with the defaults.

The module imports no other module of the package, so that the help of a command appears quickly.
"""

import dataclasses
from dataclasses import dataclass

# Default learning rate with batch norm (True) and without (False). At a rate of 0.1, the training of networks without
# batch norm on the digits data set fails for half of the seeds.
LEARNING_RATE = {True: 0.1, False: 0.02}


@dataclass(frozen=True)
class TrainingRequest:
    """The network to train, and the settings of the training.

    None means the setting that the checkpoint has, or the default if there is no checkpoint.
    """

    model: str
    seed: int = 0
    width: int | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    target_accuracy: float = 99.5
    allow_unconverged: bool = False


@dataclass(frozen=True)
class Recipe:
    """All settings that determine a training run, except the device."""

    model: str
    dataset: str
    data_fingerprint: str
    seed: int = 0
    width: int | None = None
    num_epochs: int = 200
    batch_size: int = 64
    learning_rate: float = LEARNING_RATE[True]
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def differences(self, other: "Recipe") -> list[str]:
        """List the fields that differ, with the value of this recipe, which is stored, and that of the other.

        The data of two networks that are not trained may differ.
        """
        if self.num_epochs == other.num_epochs == 0:
            other = dataclasses.replace(other, data_fingerprint=self.data_fingerprint)
        pairs = zip(dataclasses.asdict(self).items(), dataclasses.asdict(other).values(), strict=True)
        return [
            f"{name} {str(stored)[:40]}, now {str(current)[:40]}"
            for (name, stored), current in pairs
            if stored != current
        ]
