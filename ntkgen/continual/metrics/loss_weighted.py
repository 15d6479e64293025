"""The loss-weighted kernel, whose spectrum is that of the Gauss-Newton matrix of the cross-entropy.

The cross-entropy of the outputs f of a sample has the Hessian diag(p) − p pᵀ with respect to f, where p = softmax f. It
does not depend on the label. H is block-diagonal with one such block per sample, and J has the derivatives of the
outputs of all samples. The Gauss-Newton matrix of the summed losses is Jᵀ H J, and that of their mean is Jᵀ H J / n.
The weighted kernel H^½ K H^½ with K = J Jᵀ has the same eigenvalues as Jᵀ H J, apart from zeros.

References:
    Martens (2014), arXiv:1412.1193. With the softmax it is also the Fisher matrix.
"""

import numpy as np
import numpy.typing as npt

from ntkgen.analysis.targets import contrasts
from ntkgen.continual.metrics.kernels import FloatArray
from ntkgen.errors import InputError, ShapeError

# Output maps whose kernels determine the Gauss-Newton matrix.
CENTERED = "centered"
OUTPUTS = ("full", "seen", CENTERED)


def softmax_hessians(
    logits: FloatArray,  # (samples, outputs)
) -> FloatArray:  # (samples, outputs, outputs)
    """Compute diag(p) − p pᵀ with p = softmax of the logits of each sample.

    The rows of each block sum to zero, which determines the diagonal without cancellation for p close to 1.

    >>> softmax_hessians(np.zeros((1, 2))).tolist()
    [[[0.25, -0.25], [-0.25, 0.25]]]
    """
    p = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))
    H = -p[:, :, None] * p[:, None, :]
    diagonal = np.arange(logits.shape[1])
    H[:, diagonal, diagonal] = 0
    H[:, diagonal, diagonal] = -H.sum(2)
    return np.asarray(H)


def weighted_kernel(
    K: FloatArray,  # (rows, rows), sample-major
    logits: FloatArray,  # (samples, outputs)
    output: str = "full",
) -> FloatArray:  # (kept rows, kept rows)
    """Compute H^½ K H^½ with the symmetric roots of the blocks of H.

    Outputs without values in the kernel or in the logits are left out, as those of classes that are not seen yet. They
    are the last ones. The softmax is then over the outputs that are left. For rows that are contrasts Q f (output
    ``centered``) the blocks are Q H Qᵀ: H has no component along a common shift of the outputs, so nothing is lost.
    Costs 2 rows² · rows per sample multiply-adds, and one eigendecomposition per sample.

    Args:
        K: The kernel.
        logits: The outputs of the network on its samples.
        output: The output map of the kernel.

    Raises:
        InputError: If the kernel is of another output map.
        ShapeError: If kernel and logits are not of the same samples and outputs.
    """
    block, kept = _with_values(K, logits, output)
    H = softmax_hessians(kept)
    if output == CENTERED:
        Q = contrasts(kept.shape[1])
        H = Q @ H @ Q.T
    values, vectors = np.linalg.eigh(H)
    roots = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :]) @ vectors.swapaxes(1, 2)
    weighted = _on_both_sides(roots, block)
    return np.asarray((weighted + weighted.T) / 2)


def weighted_contrasts(
    K: FloatArray,  # (rows, rows), sample-major
    logits: FloatArray,  # (samples, outputs)
    output: str = "full",
) -> FloatArray:  # (samples · (kept outputs − 1), samples · (kept outputs − 1))
    """Compute the weighted kernel of the contrasts of the outputs, whatever the output map of the kernel is.

    Its eigenvalues are those of `weighted_kernel` without one zero per sample, that of a common shift of the outputs.
    Only without these zeros the smallest eigenvalue and the condition number have a meaning.

    Raises:
        InputError: If the kernel is of another output map.
        ShapeError: If kernel and logits are not of the same samples and outputs.
    """
    if output != CENTERED:
        K, logits = _with_values(K, logits, output)
        Q = contrasts(logits.shape[1])
        K = _on_both_sides(np.broadcast_to(Q, (len(logits), *Q.shape)), K)
    return weighted_kernel(K, logits, CENTERED)


def _with_values(K: FloatArray, logits: FloatArray, output: str) -> tuple[FloatArray, FloatArray]:
    """Cut kernel and logits to the first outputs that have values for all samples in both.

    Raises:
        InputError: If the kernel is of another output map.
        ShapeError: If kernel and logits are not of the same samples and outputs.
    """
    if output not in OUTPUTS:
        raise InputError(
            f"Kernels of the output {output!r} have no loss-weighted form: expected one of {', '.join(OUTPUTS)}. The "
            "Hessian of the loss mixes the outputs of a sample, and a sum over outputs has lost them. Record the run "
            "with `output` full, seen or centered."
        )
    (n, m), lacking = logits.shape, int(output == CENTERED)  # there is one contrast fewer than outputs
    per_sample = m - lacking
    if K.shape != (n * per_sample, n * per_sample):
        raise ShapeError(
            f"Kernel and logits do not belong together: expected {n * per_sample} rows for {n} samples, {m} outputs "
            f"and the output map {output!r}, found a kernel of the shape {K.shape}. Are they of different probes? Pass "
            "those of one time."
        )
    in_kernel = _num_leading(~np.isnan(np.diagonal(K)).reshape(n, per_sample)) + lacking
    kept = min(in_kernel, _num_leading(~np.isnan(logits)))
    rows = np.flatnonzero(np.tile(np.arange(per_sample) < kept - lacking, n))
    return K[np.ix_(rows, rows)], logits[:, :kept]


def _num_leading(known: npt.NDArray[np.bool_]) -> int:  # (samples, outputs)
    """Count the first outputs that all samples have."""
    return int(np.logical_and.accumulate(known.all(0)).sum())


def _on_both_sides(
    blocks: FloatArray,  # (samples, new rows per sample, rows per sample)
    K: FloatArray,  # (rows, rows)
) -> FloatArray:  # (new rows, new rows)
    """Compute B K Bᵀ for a symmetric kernel and a block-diagonal matrix B."""
    return _times(blocks, _times(blocks, K).T)


def _times(
    blocks: FloatArray,  # (samples, new rows per sample, rows per sample)
    K: FloatArray,  # (rows, columns)
) -> FloatArray:  # (new rows, columns)
    n, new, old = blocks.shape
    return np.asarray((blocks @ K.reshape(n, old, K.shape[1])).reshape(n * new, K.shape[1]))
