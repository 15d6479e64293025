"""What a store says that its kernel was made of, as a value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What this program reads of a store's provenance; None where the store does not say it.

    One that was read is written with the same values: users may have added keys of their own, and other versions of
    this program have more keys, or fewer.

    Attributes:
        model: The name of the network.
        dataset: The name of the data set, of a file without its folder.
        seed: The seed that the network is built from.
        width: Its width, where that was chosen.
        subsample: Samples of the rows, the first ones of their order, where not all are taken.
        shuffle_seed: The seed of their order, where it is random.
        against: The split that the columns are of, where they are other samples.
        against_subsample: Samples of the columns, where not all are taken.
        raw_images: Whether images have the size that they have in the data set.
        num_epochs: Maximum epochs of the training.
        target_accuracy: The accuracy at which the training ends, in per cent.
        epochs: Epochs of the training that were done.
        train_accuracy: The accuracy that was reached, in per cent.
        learning_rate: The learning rate of the training.
        batch_size: Samples of a step of the training.
        checkpoint: The file with the network, beside the store.
        imported_from: The file that the kernel was made of, where it was not computed.
        quantity: What the kernel's values are, where they are not J Jᵀ.
    """

    model: str | None = None
    dataset: str | None = None
    seed: int | None = None
    width: int | None = None
    subsample: int | None = None
    shuffle_seed: int | None = None
    against: str | None = None
    against_subsample: int | None = None
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
    # The values that it was read from; not copied by `dataclasses.replace`, which makes another provenance.
    _read_from: Mapping[str, Any] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Provenance":
        """Read plain values, with keys of any kind.

        >>> made = Provenance.of({"model": "lenet", "of_mine": 1})
        >>> made.model, made.to_json()
        ('lenet', {'model': 'lenet', 'of_mine': 1})

        Raises:
            TypeError: If they are no mapping.
        """
        if not isinstance(values, Mapping):
            raise TypeError("a provenance is a mapping from names to plain values")
        known = {each.name for each in dataclasses.fields(cls) if each.init}
        made = cls(**{name: value for name, value in values.items() if name in known})
        object.__setattr__(made, "_read_from", dict(values))
        return made

    @property
    def is_empty(self) -> bool:
        """Whether the store says nothing, as one that was made in Python."""
        return not self.to_json()

    def to_json(self) -> dict[str, Any]:
        """Turn into plain values: those that were read, or else what is known."""
        if self._read_from is not None:
            return dict(self._read_from)
        known = ((each.name, getattr(self, each.name)) for each in dataclasses.fields(self) if each.init)
        return {name: value for name, value in known if value is not None}
