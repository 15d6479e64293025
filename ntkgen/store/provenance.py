"""The provenance of a kernel: the network, the data and the training that it was computed from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """The entries of a store's provenance that this program reads. An entry that the store lacks is None.

    A provenance that was read is written with the same values, because users may have added keys, and other versions of
    this program have more or fewer keys.

    Attributes:
        model: Name of the network.
        dataset: Name of the data set. For a file, its name without the folder.
        seed: Seed of the network's initialisation.
        width: Width of the network, if one was chosen.
        subsample: Number of samples in the rows, if the kernel uses only the first samples of the order.
        shuffle_seed: Seed of the order of the samples, if the order is random.
        against: Split that the columns are taken from, if they are other samples.
        against_subsample: Number of samples in the columns, if the kernel uses only the first of them.
        select: Selection of the network's outputs, if not all are taken.
        params: Patterns of the names of parameters, if not all are taken.
        has_labels: False if the samples of the data set have no labels.
        raw_images: Whether images keep their size in the data set.
        num_epochs: Maximum number of training epochs.
        target_accuracy: Accuracy at which training ends, in per cent.
        epochs: Number of training epochs that were run.
        train_accuracy: Accuracy that training reached, in per cent.
        learning_rate: Learning rate of the training.
        batch_size: Number of samples in a training step.
        checkpoint: Name of the file with the trained network, beside the store.
        imported_from: Name of the file that the kernel was imported from, if it was not computed.
        quantity: Meaning of the kernel's values, if they are not J Jᵀ.
    """

    model: str | None = None
    dataset: str | None = None
    seed: int | None = None
    width: int | None = None
    subsample: int | None = None
    shuffle_seed: int | None = None
    against: str | None = None
    against_subsample: int | None = None
    select: str | None = None
    params: Sequence[str] | None = None
    has_labels: bool | None = None
    raw_images: bool | None = None
    num_epochs: int | None = None
    target_accuracy: float | None = None
    epochs: int | None = None
    train_accuracy: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    checkpoint: str | None = None
    imported_from: str | None = None
    quantity: str | None = None
    # The values that it was read from. `dataclasses.replace` does not copy them, because it makes another provenance.
    _read_from: Mapping[str, Any] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Provenance":
        """Read plain values. Unknown keys are kept.

        >>> provenance = Provenance.of({"model": "lenet", "my_key": 1})
        >>> provenance.model, provenance.to_json()
        ('lenet', {'model': 'lenet', 'my_key': 1})

        Raises:
            TypeError: If the values are not a mapping.
        """
        if not isinstance(values, Mapping):
            raise TypeError("a provenance is a mapping from names to plain values")
        names = {entry.name for entry in dataclasses.fields(cls) if entry.init}
        provenance = cls(**{name: value for name, value in values.items() if name in names})
        object.__setattr__(provenance, "_read_from", dict(values))
        return provenance

    @property
    def is_empty(self) -> bool:
        """Whether no entry is known, for example for a store that was written from Python."""
        return not self.to_json()

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values: the values that were read, or otherwise all entries that are not None."""
        if self._read_from is not None:
            return dict(self._read_from)
        entries = ((entry.name, getattr(self, entry.name)) for entry in dataclasses.fields(self) if entry.init)
        return {name: value for name, value in entries if value is not None}
