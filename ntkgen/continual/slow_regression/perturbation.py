"""The noise of shrink and perturb, added to all parameters after each step (Ash, Adams 2020, arXiv:1910.08475)."""

import numpy as np
import torch

from ntkgen.continual.chance import seed_of
from ntkgen.continual.slow_regression.network import FloatArray, Network
from ntkgen.continual.slow_regression.settings import RegressionSettings
from ntkgen.continual.streams.regression import BLOCK


class Perturbation:
    """Adds normal noise to the parameters of some rows. The noise of a sample is a function of seed and position.

    Args:
        network: The network.
        rows: The rows with noise.
        settings: The settings, with the seed of each of these rows.
    """

    def __init__(self, network: Network, rows: slice, settings: RegressionSettings) -> None:
        self.settings = settings
        self._parameters = network.parameters[:, rows]
        self._noise: FloatArray = np.empty((0, *self._parameters.shape), np.float32)

    def prepare(self, start: int, stop: int) -> None:
        """Draw the noise of the samples from ``start`` to before ``stop``, all of one block of the stream."""
        block, count = start // BLOCK, len(self._parameters)
        first = block * BLOCK
        drawn = np.empty((len(self.settings.seeds), stop - start, count), np.float32)
        for values, seed in zip(drawn, self.settings.seeds, strict=True):
            # of torch, whose normal numbers take a quarter of the time of NumPy's
            generator = torch.Generator("cpu").manual_seed(seed_of(seed, "noise", block))
            of_block = torch.randn(BLOCK, count, generator=generator).numpy()
            np.multiply(of_block[start - first : stop - first], self.settings.noise_std, out=values)
        self._noise = drawn.transpose(1, 2, 0)

    def after_step(self, step: int) -> None:
        """Add the noise of a sample, counted from the first that is prepared."""
        np.add(self._parameters, self._noise[step], out=self._parameters)
