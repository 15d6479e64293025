"""Accuracy of kernel regression with a recorded kernel: how well the tangent features at this moment classify."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.regression import left_out
from ntkgen.analysis.targets import Readout

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# λ relative to the mean eigenvalue of the kernel.
RIDGE = 1e-3
# Output maps whose rows have a target for each label.
MAPS = ("trace", "full", "centered")


@dataclass(frozen=True, eq=False)
class Regression:
    """Which of the probe samples kernel regression classifies correctly.

    Attributes:
        left_out: For each training sample, whether the fit to the others does, (training samples,).
        held_out: For each held-out sample, whether the fit to all training samples does, (held-out samples,).
    """

    left_out: BoolArray
    held_out: BoolArray


def classify(
    K: FloatArray,  # (rows, rows), rows in sample-major order
    labels: IntArray,  # (samples,), positions of the outputs
    is_training: BoolArray,  # (samples,)
    readout: Readout,
) -> Regression:
    """Fit the labels by kernel regression, f(x) = K(x, X) (K(X, X) + λI)⁻¹ Y, and classify by the largest output.

    Y has the one-hot labels of the training samples X. λ is `RIDGE` times the mean eigenvalue of K(X, X). The fit
    without sample i misses its labels by (G_ii)⁻¹ (G Y)_i, where G = (K(X, X) + λI)⁻¹, and G_ii is the block of the
    rows of sample i (Rasmussen, Williams 2006, eq. 5.12, for blocks). Costs 2 rows³ multiply-adds.

    Long (2021), arXiv:2105.10585, calls regression with the kernel of a trained network the after kernel.

    Args:
        K: The kernel of all samples.
        labels: The label of each sample.
        is_training: Which of the samples are fitted. All others are held out.
        readout: How labels and outputs belong to the rows of the kernel.
    """
    per_sample = len(K) // len(labels)
    trained = np.repeat(is_training, per_sample)
    Y: FloatArray = readout.targets(labels[is_training])
    inner = K[np.ix_(trained, trained)]
    shift = RIDGE * float(np.trace(inner)) / len(inner)
    G = np.asarray(np.linalg.inv(inner + shift * np.eye(len(inner))), np.float64)
    alpha = np.asarray(G @ Y, np.float64)
    count = int(is_training.sum())
    blocks: FloatArray = G.reshape(count, per_sample, count, per_sample)[np.arange(count), :, np.arange(count)]
    predicted = np.subtract(Y, left_out(blocks, alpha), dtype=np.float64)
    return Regression(
        readout.scores(predicted).argmax(1) == labels[is_training],
        readout.scores(K[np.ix_(~trained, trained)] @ alpha).argmax(1) == labels[~is_training],
    )
