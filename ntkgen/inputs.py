"""The samples of a kernel: the inputs of the network, and the labels and positions that are stored."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntkgen.fingerprints import array_fingerprint
from ntkgen.jacobian.adapter import Given, Target
from ntkgen.jacobian.probe import in_turns
from ntkgen.jacobian.samples import Data, data_of
from ntkgen.store.schema import Samples


@dataclass(frozen=True)
class Inputs:
    """The samples of the rows and, for a rectangular kernel, the samples of the columns.

    Attributes:
        x: The samples of the rows, or their numbers in ``data``.
        samples: Labels and positions.
        against: The samples of the columns, or their numbers.
        data: What the numbers stand for, if the samples are not one tensor.
    """

    x: Tensor
    samples: Samples
    against: Tensor | None = None
    data: Data | None = None

    def aimed(self, model: nn.Module, target: Target) -> "tuple[nn.Module, Inputs]":
        """Return the network and the samples as the engine takes them for a kernel of a target."""
        if target.is_plain and self.data is None:
            return model, self
        given = Given.adapted(model, self.data or data_of(self.x, self.against), target)
        return given.model, dataclasses.replace(self, x=given.rows, against=given.columns, data=given.data)

    @property
    def all(self) -> Tensor:
        """All samples, each once: first those of the rows, then those of the columns."""
        return self.x if self.against is None else torch.cat([self.x, self.against])

    @property
    def probe(self) -> Tensor:
        """Samples of rows and columns on which the network is tried."""
        return in_turns(self.x, self.against)

    @property
    def counts(self) -> tuple[int, int | None]:
        """The number of samples of the rows, and of the columns if these have other samples."""
        return len(self.x), None if self.against is None else len(self.against)

    def fingerprint(self) -> str:
        """Hash the samples, their labels and their positions."""
        sides = [self.samples] if self.samples.against is None else [self.samples, self.samples.against]
        arrays = [torch.from_numpy(array) for side in sides for array in (side.labels, side.index)]
        if self.data is not None:
            return array_fingerprint(*self.data.sides(), *arrays)
        return array_fingerprint(*([self.x] if self.against is None else [self.x, self.against]), *arrays)
