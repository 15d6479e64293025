"""Stochastic Lanczos quadrature: sums over all eigenvalues, Σ f(λ_i), from products with a few Gaussian vectors.

For a Gaussian vector ω the mean of ωᵀ f(K) ω is tr f(K). A block Krylov space that starts from b Gaussian vectors,
Ω = Q₁ R, gives a quadrature rule for each of them, ωᵀ f(K) ω ≈ Σ_l f(θ_l) w_l. Its nodes θ_l are the eigenvalues of T.
Its weights w_l are the squares of the components of ω along the Ritz vectors: the first blocks of the eigenvectors of
T times R. After q steps the rule is exact for polynomials of degree 2q − 1.

References:
    Golub, Meurant (2010), Matrices, Moments and Quadrature with Applications, chapters 6 and 7.
    Ubaru, Chen, Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
    Zimmerling, Druskin, Simoncini (2024), arXiv:2407.21505 (block Gauss and Gauss–Radau rules as bounds).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ntkgen.analysis.linalg.krylov import EPSILON, Krylov, largest_eigenpairs
from ntkgen.analysis.matrix import FloatArray

# Maximum residual, relative to the Ritz value, at which a Ritz value counts as an eigenvalue, with the weight 1.
KNOWN = 1e-3
# Minimum sum over the unknown eigenvalues, relative to the sum over all, at which their difference is significant.
SIGNIFICANT = 1e-9
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Moments:
    """Exact moments of the eigenvalues: their number, tr K = Σ λ_i, and ‖K‖_F² = Σ λ_i²."""

    count: int
    trace: float
    squares: float


@dataclass(frozen=True)
class Quadrature:
    """A quadrature rule: nodes in descending order, and their weights for each probe vector.

    The weights of a probe add up to about the number of eigenvalues. The first ``num_known`` nodes are eigenvalues
    themselves, each with the weight 1.
    """

    nodes: FloatArray  # (nodes,)
    weights: FloatArray  # (nodes, probes)
    num_known: int

    @classmethod
    def of(cls, nodes: FloatArray, weights: FloatArray, num_known: int) -> "Quadrature":
        """Build a rule, and set the weights of the nodes that are eigenvalues to 1."""
        weights[:num_known] = 1.0
        return cls(nodes, weights, num_known)

    def total(self, f: Callable[[FloatArray], FloatArray], moments: Moments) -> tuple[float, float]:
        """Estimate Σ f(λ_i) and its standard error.

        A quadratic polynomial p close to f serves as control variate: Σ p(λ_i) follows from the moments, and only
        f − p is sampled. The known eigenvalues contribute exactly.
        """
        known, rest = np.split(self.nodes, [self.num_known])
        value = float(f(known).sum())
        if not len(rest):
            return value, 0.0
        weights = self.weights[self.num_known :]
        powers, sums = _powers(known, rest, moments)
        root = np.sqrt(weights.mean(axis=1))
        fitted = np.linalg.lstsq(powers * root[:, None], f(rest) * root, rcond=None)[0]
        samples = (f(rest) - powers @ fitted) @ weights
        return value + float(fitted @ sums) + float(samples.mean()), float(standard_error(samples))


def _powers(
    known: FloatArray,  # (known,)
    rest: FloatArray,  # (rest,)
    moments: Moments,
) -> tuple[FloatArray, FloatArray]:  # (rest, powers), (powers,)
    """Return the scaled powers 0 to 2 of the other nodes, and the sums of these powers over the unknown eigenvalues.

    A sum over the unknown eigenvalues is a difference. If cancellation has left only rounding errors of it, its power
    is omitted.
    """
    unit = max(float(np.abs(rest).max()), TINY)
    wholes = [moments.count, moments.trace, moments.squares]
    left = [whole - float((known**power).sum()) for power, whole in enumerate(wholes)]
    kept = [power for power in range(3) if power == 0 or left[power] > SIGNIFICANT * wholes[power]]
    powers = np.stack([(rest / unit) ** power for power in kept], axis=1)
    return powers, np.array([left[power] / unit**power for power in kept])


def standard_error(
    samples: FloatArray,  # (…, probes)
) -> FloatArray:  # (…)
    """Estimate the standard deviation of the mean of samples along the last axis."""
    count = samples.shape[-1]
    return np.asarray(samples.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.abs(samples).mean(axis=-1))


def gauss(krylov: Krylov) -> Quadrature:
    """Build the Gauss rule of a Krylov space without restarts. Costs about 9 · width³ FLOPs."""
    return _rules(krylov, with_radau=False)[0]


def gauss_and_radau(krylov: Krylov) -> tuple[Quadrature, Quadrature]:
    """Build the Gauss rule and the Gauss–Radau rule, which has as many additional nodes at zero as there are probes.

    Let K be positive semidefinite, and let all derivatives of a function from the second on be negative for even and
    positive for odd order on the positive axis, as for −x log x. Then, for each probe, the Gauss rule gives a sum that
    is too large, and the Gauss–Radau rule one that is too small. The rules agree if the Krylov space is invariant.
    """
    first, second = _rules(krylov, with_radau=True)
    return first, second


def _rules(krylov: Krylov, *, with_radau: bool) -> list[Quadrature]:
    assert krylov.is_lanczos
    nodes, S = krylov.ritz(krylov.width)
    weights = _weights(krylov, S)
    num_known = _count_known(nodes, krylov.residuals(S), len(krylov.start))
    rules, ends = [Quadrature.of(nodes, weights, num_known)], S[krylov.coupled].copy()
    del S  # frees its memory before another matrix of that size is built
    if with_radau:
        rules.append(_radau(krylov, (nodes, ends), num_known) if krylov.added else rules[0])
    return rules


def _count_known(
    nodes: FloatArray,  # (nodes,), descending
    residuals: FloatArray,  # (nodes,)
    num_probes: int,
) -> int:
    """Count the leading nodes that are eigenvalues with their full multiplicity.

    Block Krylov finds an eigenvalue at most as often as there are probes. If as many nodes as there are probes lie
    within the tolerance of each other, the multiplicity of the eigenvalue is therefore not known.
    """
    is_known = residuals <= KNOWN * np.abs(nodes)
    ends = nodes[min(num_probes, len(nodes)) - 1 :]
    is_cluster = nodes[: len(ends)] - ends <= 2 * KNOWN * np.abs(nodes[: len(ends)])
    is_known[: len(ends)] &= ~is_cluster
    return int(np.argmin(np.append(is_known, False)))


def _weights(krylov: Krylov, S: FloatArray) -> FloatArray:
    """Compute the squares of the components of the probes along the Ritz vectors."""
    weights: FloatArray = S[: len(krylov.start)].T @ krylov.start
    return np.square(weights, out=weights)


def _radau(krylov: Krylov, ritz: tuple[FloatArray, FloatArray], num_known: int) -> Quadrature:
    """Extend T by the border B and the corner B Eᵀ T⁻¹ E Bᵀ, with which zero is an eigenvalue once per added column."""
    nodes, ends = ritz
    turned = krylov.coupling @ ends
    M = krylov.bordered(0.0)
    M[krylov.width :, krylov.width :] = (turned / np.maximum(nodes, EPSILON * nodes[0])) @ turned.T
    values, S = largest_eigenpairs(M, len(M))
    return Quadrature.of(values, _weights(krylov, S), num_known)


def effective_rank(values: FloatArray) -> float:
    """Compute exp(−Σ p log p) with p = max(λ, 0) / Σ max(λ, 0); return 0 if no eigenvalue is positive.

    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 0.0, -1e-9])), 6)
    3.0
    """
    positive = values[values > 0]
    p = positive / positive.sum()
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def estimate_effective_rank(krylov: Krylov, moments: Moments) -> tuple[float, float]:
    """Estimate exp(−Σ p log p), p = λ / Σ λ, and its error: two standard errors plus half the gap between the rules.

    Eigenvalues that are not positive count as zero.
    """

    def entropy(x: FloatArray) -> FloatArray:
        p = np.maximum(x, 0.0) / moments.trace
        return -p * np.log(np.where(p > 0, p, 1.0))

    (above, error), (below, _) = (rule.total(entropy, moments) for rule in gauss_and_radau(krylov))
    rank = float(np.exp((above + below) / 2))
    return rank, rank * float(np.expm1(2 * error + abs(above - below) / 2))
