"""The choice of the comparison for a certificate, by counted passes: the whole kernel, or a random sample of it.

The unit is a backward pass of one sample. The factors were measured on a CPU with perceptrons, convolutional networks
and transformers, in float64. Equal plans give equal choices, because no time is measured.
"""

import math
from dataclasses import dataclass

from ntkgen.checks.pairs import MAX_KEPT_BYTES, affordable_outputs
from ntkgen.checks.sampling import Sampling
from ntkgen.jacobian.reference import MAX_JACOBIAN_BYTES
from ntkgen.plan.plan import Plan

# Number of inner products of two rows that take as long as one pass. Measured: 23 to 300.
PRODUCTS_PER_PASS = 100
# Cost of a row in g passes, each through one of g groups of parameters: a + b g. Measured: 1.6 for 5 groups of a
# ResNet-18, and 2.7 for 13.
GROUP_COST = (0.75, 0.25)
# Cost of one product with a random vector for each sample: a backward pass, and one in forward mode, both in a batch.
# Measured: 0.5 to 2.
PROBE_PASSES = 1
# Cost of the check of each sample's batch, and of the preparation of the operator.
CHECK_PASSES, PREPARATION_PASSES = 3, 15


@dataclass(frozen=True)
class KernelSize:
    """The numbers that determine the cost of a comparison."""

    num_rows: int  # samples of the rows
    num_cols: int | None  # samples of the columns, if these are others
    num_outputs: int  # rows of the Jacobian of a sample
    num_params: int
    is_reduced: bool  # whether only the trace or the diagonal of the block of a pair of samples is stored

    @classmethod
    def of(cls, plan: Plan) -> "KernelSize":
        """Take the numbers from a plan."""
        profile, grid = plan.profile, plan.grid
        is_reduced = plan.jacobian.reduction != "none"
        return cls(grid.num_samples, grid.num_col_samples, profile.num_outputs, profile.num_params, is_reduced)

    @property
    def num_samples(self) -> int:
        """Samples of rows and columns."""
        return self.num_rows + (self.num_cols or 0)


def compares_whole(sampling: Sampling, size: KernelSize) -> bool:
    """Decide whether the whole kernel is compared: if the sampling allows it, and if it does not cost more.

    >>> lenet = KernelSize(8, None, 10, 61_706, False)
    >>> compares_whole(Sampling(or_whole=True), lenet), compares_whole(Sampling(), lenet)
    (True, False)
    """
    return sampling.or_whole and whole_passes(size) <= sampled_passes(sampling, size)


def whole_passes(size: KernelSize) -> float:
    """Count the cost of the whole kernel, in passes: the rows of all samples, and their products.

    >>> whole_passes(KernelSize(8, None, 10, 61_706, False))
    144.0
    """
    rows = size.num_samples * size.num_outputs
    groups = math.ceil(8 * rows * size.num_params / MAX_JACOBIAN_BYTES)
    once, each = GROUP_COST
    entries = size.num_rows * (size.num_cols or size.num_rows) * size.num_outputs
    products = entries if size.is_reduced else entries * size.num_outputs
    return rows * (once + each * groups) + products / PRODUCTS_PER_PASS


def sampled_passes(sampling: Sampling, size: KernelSize) -> float:
    """Count the cost of random vectors and pairs of samples, in passes.

    >>> sampled_passes(Sampling(), KernelSize(8, None, 10, 61_706, False))
    199
    """
    vectors = sampling.num_probes * (size.num_outputs if size.is_reduced else 1)
    probes = size.num_samples * (vectors * PROBE_PASSES + CHECK_PASSES)
    return probes + _pair_passes(sampling, size) + PREPARATION_PASSES


def _pair_passes(sampling: Sampling, size: KernelSize) -> int:
    """Count the rows of the pairs. A sample's rows are computed again for each of its pairs if not all can be kept."""
    pairs = min(sampling.num_pairs, size.num_rows * (size.num_cols or size.num_rows))
    outputs = min(size.num_outputs, affordable_outputs(size.num_params))
    distinct = min(2 * pairs, size.num_samples)
    is_kept = 8 * distinct * outputs * size.num_params <= MAX_KEPT_BYTES
    return outputs * (distinct if is_kept else 2 * pairs)
