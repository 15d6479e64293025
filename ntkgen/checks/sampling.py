"""The number of random vectors and pairs of samples of a certificate, with the defaults."""

import dataclasses
from dataclasses import dataclass

from ntkgen.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """The random sample of a certificate.

    Attributes:
        num_probes: Number of Gaussian vectors.
        num_pairs: Number of pairs of samples.
        seed: Seed of both.
        or_whole: Whether the whole kernel is compared instead if that does not cost more.
    """

    num_probes: int = 10
    num_pairs: int = 16
    seed: int = 0
    or_whole: bool = False

    def __post_init__(self) -> None:
        """Refuse invalid numbers.

        Raises:
            InputError: If there is no probe, or a number is negative.
        """
        if self.num_probes < 1 or self.num_pairs < 0 or self.seed < 0:
            raise InputError(
                f"A certificate (the measured error bound of a kernel) cannot be computed from {self.num_probes} "
                f"probes and {self.num_pairs} pairs with the seed {self.seed}: expected at least one probe, and no "
                "negative number. Is one of them misspelt? The defaults are 10 probes and 16 pairs."
            )


# Sampling of a kernel with the output `full`.
USUAL_SAMPLING = Sampling(or_whole=True)
# Sampling of a kernel with the output `trace` or `diagonal`. A probe costs m times as much there. Fewer probes make
# the ratio of bound and estimate larger.
REDUCED_SAMPLING = Sampling(num_probes=3, or_whole=True)
# Maximum number of backward passes for the sampled pairs of a `trace` kernel. Each of its entries needs all m outputs
# of both samples.
TRACE_PASSES = 512


def usual_sampling(output: str, num_logits: int) -> Sampling:
    """Choose the default sampling of a certificate for the kernel of an output map.

    >>> usual_sampling("full", 1000).num_pairs, usual_sampling("trace", 10).num_pairs, usual_sampling("trace", 1000)
    (16, 16, Sampling(num_probes=3, num_pairs=1, seed=0, or_whole=True))
    """
    if output == "trace":
        num_pairs = max(1, min(REDUCED_SAMPLING.num_pairs, TRACE_PASSES // (2 * num_logits)))
        return dataclasses.replace(REDUCED_SAMPLING, num_pairs=num_pairs)
    return REDUCED_SAMPLING if output == "diagonal" else USUAL_SAMPLING
