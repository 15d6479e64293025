"""Activations and their derivatives, written into arrays that exist."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
# Writes the activation and its derivative at some points: points, activation, derivative.
Evaluate = Callable[[FloatArray, FloatArray, FloatArray], None]

# Slope of leaky ReLU below zero, and the two constants of SELU (Klambauer et al. 2017, arXiv:1706.02515).
LEAK = 0.01
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


@dataclass(frozen=True)
class Activation:
    """An activation.

    Attributes:
        evaluate: Writes the activation and its derivative at some points.
        gain: Factor of the standard deviation of first weights, by which the activations keep their scale.
    """

    evaluate: Evaluate
    gain: float


def relu(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate max(z, 0). Its derivative at 0 is 0, as in torch."""
    np.maximum(z, 0, out=value)
    np.sign(value, out=slope)


def leaky_relu(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate max(z, z / 100)."""
    np.multiply(z, LEAK, out=value)
    np.maximum(z, value, out=value)
    slope[...] = np.where(z > 0, 1, LEAK)


def tanh(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate tanh."""
    np.tanh(z, out=value)
    np.multiply(value, value, out=slope)
    np.subtract(1, slope, out=slope)


def sigmoid(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate σ(z) = (1 + tanh(z / 2)) / 2, which does not overflow."""
    np.multiply(z, 0.5, out=value)
    np.tanh(value, out=value)
    np.multiply(value, 0.5, out=value)
    np.add(value, 0.5, out=value)
    np.subtract(1, value, out=slope)
    np.multiply(slope, value, out=slope)


def swish(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate z σ(z), whose derivative is σ(z) + z σ'(z)."""
    sigmoid(z, value, slope)
    np.multiply(slope, z, out=slope)
    np.add(slope, value, out=slope)
    np.multiply(value, z, out=value)


def elu(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate z above zero, and exp(z) − 1 below."""
    np.minimum(z, 0, out=value)
    np.expm1(value, out=value)
    np.add(value, 1, out=slope)
    np.maximum(z, value, out=value)  # exp(z) − 1 ≥ z


def selu(z: FloatArray, value: FloatArray, slope: FloatArray) -> None:
    """Evaluate s z above zero, and s α (exp(z) − 1) below."""
    np.minimum(z, 0, out=value)
    np.expm1(value, out=value)
    np.multiply(value, SELU_SCALE * SELU_ALPHA, out=value)
    np.add(value, SELU_SCALE * SELU_ALPHA, out=slope)
    slope[z > 0] = SELU_SCALE
    np.add(value, SELU_SCALE * np.maximum(z, 0), out=value)


# Gains as in the published code: those of He et al. (2015), arXiv:1502.01852, and that of ReLU for ELU and swish. SELU
# has none, which is LeCun's initialisation.
ACTIVATIONS = {
    "relu": Activation(relu, math.sqrt(2)),
    "tanh": Activation(tanh, 5 / 3),
    "sigmoid": Activation(sigmoid, 1.0),
    "leaky-relu": Activation(leaky_relu, math.sqrt(2 / (1 + LEAK**2))),
    "elu": Activation(elu, math.sqrt(2)),
    "selu": Activation(selu, 1.0),
    "swish": Activation(swish, math.sqrt(2)),
}
