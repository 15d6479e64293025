"""Many networks with one hidden layer as one: their parameters, and the gradients of their squared errors.

The last axis of every array runs over the networks, the rows of a stack. All sums are over the first axis, and add its
entries in their order. A network therefore has the same bits in every stack, up to the exponential functions of NumPy
and, with more than six units, the sums of a stack of one row.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ntkgen.continual.chance import generator_of
from ntkgen.continual.slow_regression.activations import ACTIVATIONS

FloatArray = npt.NDArray[np.float32]


class Network:
    """The networks f(x) = v · (φ(W x), 1), whose inputs x end with a constant 1, so that W and v have the biases.

    Args:
        num_inputs: Number of inputs, the constant one included.
        units: Number of hidden units.
        activation: Name of the activation φ.
        rows: Number of networks.

    Attributes:
        parameters: All parameters, (parameters, rows).
        gradient: The gradient of the squared error, (parameters, rows).
        incoming: The weights W, a part of the parameters, (inputs, units, rows).
        outgoing: The weights v, a part of the parameters, (units + 1, rows).
        hidden: Activations of the hidden units at the last sample, and a constant 1, (units + 1, rows).
    """

    def __init__(self, num_inputs: int, units: int, activation: str, rows: int) -> None:
        self.num_inputs = num_inputs
        self.units = units
        self.bound = ACTIVATIONS[activation].gain * math.sqrt(3 / (num_inputs - 1))
        self.parameters = np.zeros((num_inputs * units + units + 1, rows), np.float32)
        self.gradient = np.zeros_like(self.parameters)
        self.incoming, self.outgoing = self.parts(self.parameters)
        self._of_incoming, self._of_outgoing = self.parts(self.gradient)
        self.hidden = np.ones((units + 1, rows), np.float32)
        self._evaluate = ACTIVATIONS[activation].evaluate
        self._active = self.hidden[:-1]
        self._unit_weights = self.outgoing[:-1]
        self._z = np.empty((units, rows), np.float32)
        self._double = np.empty(rows, np.float32)

    def parts(self, flat: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Divide what belongs to all parameters into that of W and that of v; both share its memory."""
        num_incoming = self.num_inputs * self.units
        return flat[:num_incoming].reshape(self.num_inputs, self.units, -1), flat[num_incoming:]

    def initialise(self, seeds: Sequence[int]) -> None:
        """Draw the first parameters of each row from its seed: uniform (He et al. 2015, LeCun for v), biases 0."""
        for row, seed in enumerate(seeds):
            rng = generator_of(seed, "init")
            self.incoming[:-1, :, row] = rng.uniform(-self.bound, self.bound, self.incoming[:-1, :, row].shape)
            bound = math.sqrt(3 / self.units)
            self.outgoing[:-1, row] = rng.uniform(-bound, bound, self.units)

    def draw_incoming(self, rng: np.random.Generator) -> FloatArray:  # (inputs,)
        """Draw incoming weights of a new unit as at the beginning, with a bias of 0."""
        return np.append(rng.uniform(-self.bound, self.bound, self.num_inputs - 1), 0).astype(np.float32)

    def differentiate(
        self,
        x: FloatArray,  # (inputs, 1, rows)
        y: FloatArray,  # (rows,)
        error: FloatArray,  # (rows,)
        slope: FloatArray,  # (units, rows)
    ) -> None:
        """Compute the gradient of (f(x) − y)². Write the error f(x) − y, and the derivatives of the activations.

        With e = f(x) − y it is 2 e (φ(W x), 1) for v, and 2 e v φ'(W x) xᵀ for W. Costs about 5 multiply-adds for each
        parameter.
        """
        np.multiply(self.incoming, x, out=self._of_incoming)
        np.add.reduce(self._of_incoming, axis=0, out=self._z)
        self._evaluate(self._z, self._active, slope)
        np.multiply(self.outgoing, self.hidden, out=self._of_outgoing)
        np.add.reduce(self._of_outgoing, axis=0, out=error)
        np.subtract(error, y, out=error)
        np.add(error, error, out=self._double)
        np.multiply(self.hidden, self._double, out=self._of_outgoing)
        np.multiply(self._unit_weights, self._double, out=self._z)
        np.multiply(self._z, slope, out=self._z)
        np.multiply(self._z, x, out=self._of_incoming)
