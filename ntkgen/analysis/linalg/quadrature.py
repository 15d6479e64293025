"""Stochastic Lanczos quadrature: sums over all eigenvalues, Σ f(λ_i), from products with a few Gaussian vectors.

For a Gaussian vector ω the mean of ωᵀ f(K) ω is tr f(K). A block Krylov space that starts from b of them, Ω = Q₁ R,
gives all b of these at once, ωᵀ f(K) ω ≈ Σ_l f(θ_l) w_l, with the eigenvalues θ_l of T as nodes and, as weights, the
squares of the first block of their eigenvectors times R. After q steps that is exact for polynomials of degree 2q − 1.

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

# A Ritz value whose residual is this fraction of it is taken as the eigenvalue itself, with the weight 1.
KNOWN = 1e-3
# A sum over the other eigenvalues that is a smaller fraction of that over all is not taken from their difference.
SIGNIFICANT = 1e-9
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Moments:
    """What is known exactly of the eigenvalues: how many, tr K = Σ λ_i, and ‖K‖_F² = Σ λ_i²."""

    count: int
    trace: float
    squares: float


@dataclass(frozen=True)
class Quadrature:
    """Nodes, descending, and for each probe their weights, which add up to about the number of eigenvalues.

    The first ``num_known`` nodes are eigenvalues themselves, each of the weight 1.
    """

    nodes: FloatArray  # (nodes,)
    weights: FloatArray  # (nodes, probes)
    num_known: int

    @classmethod
    def of(cls, nodes: FloatArray, weights: FloatArray, num_known: int) -> "Quadrature":
        """Give the nodes that are eigenvalues their weight."""
        weights[:num_known] = 1.0
        return cls(nodes, weights, num_known)

    def total(self, f: Callable[[FloatArray], FloatArray], moments: Moments) -> tuple[float, float]:
        """Estimate Σ f(λ_i), and the standard error of that.

        A quadratic polynomial p that is close to f is subtracted first: Σ p(λ_i) is known from the moments, and only
        what is left of f is sampled. What is known of single eigenvalues is not sampled either.
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
    """List the powers 0 to 2 of the other nodes, scaled, and their sums over the eigenvalues that are not known.

    Of a sum that is but what rounding left of a difference the power is left out.
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
    """Estimate the standard deviation of the mean of some samples."""
    count = samples.shape[-1]
    return np.asarray(samples.std(axis=-1, ddof=1) / np.sqrt(count) if count > 1 else np.abs(samples).mean(axis=-1))


def gauss(krylov: Krylov) -> Quadrature:
    """Build the rule of Gauss of a Krylov space that was not restarted. Costs about 9 · width³ FLOPs."""
    return _rules(krylov, with_radau=False)[0]


def gauss_and_radau(krylov: Krylov) -> tuple[Quadrature, Quadrature]:
    """Build the rules of Gauss and of Gauss and Radau, the latter with as many nodes at zero as there are probes.

    For a positive semidefinite K and a function whose derivatives of even order are negative, and of odd order
    positive, on the positive axis (as −x log x has from the second one on) the first is too large and the second too
    small, for each probe; they agree where Q is invariant.
    """
    first, second = _rules(krylov, with_radau=True)
    return first, second


def _rules(krylov: Krylov, *, with_radau: bool) -> list[Quadrature]:
    assert krylov.is_lanczos
    nodes, S = krylov.ritz(krylov.width)
    weights = _weights(krylov, S)
    num_known = _count_known(nodes, krylov.residuals(S), len(krylov.start))
    rules, ends = [Quadrature.of(nodes, weights, num_known)], S[krylov.coupled].copy()
    del S  # before another matrix of its size is made
    if with_radau:
        rules.append(_radau(krylov, (nodes, ends), num_known) if krylov.added else rules[0])
    return rules


def _count_known(
    nodes: FloatArray,  # (nodes,), descending
    residuals: FloatArray,  # (nodes,)
    num_probes: int,
) -> int:
    """Count the first nodes that are eigenvalues, each as often as it is there.

    An eigenvalue, or a cluster of them as narrow as the residuals may be, that more vectors share than there are probes
    is found as often as there are probes: where so many nodes lie so close, nobody knows.
    """
    is_known = residuals <= KNOWN * np.abs(nodes)
    ends = nodes[min(num_probes, len(nodes)) - 1 :]
    is_cluster = nodes[: len(ends)] - ends <= 2 * KNOWN * np.abs(nodes[: len(ends)])
    is_known[: len(ends)] &= ~is_cluster
    return int(np.argmin(np.append(is_known, False)))


def _weights(krylov: Krylov, S: FloatArray) -> FloatArray:
    """Square the components of the probes along Ritz vectors."""
    weights: FloatArray = S[: len(krylov.start)].T @ krylov.start
    return np.square(weights, out=weights)


def _radau(krylov: Krylov, ritz: tuple[FloatArray, FloatArray], num_known: int) -> Quadrature:
    """Border T such that it becomes singular, as often as there are columns in the border: B Eᵀ T⁻¹ E Bᵀ."""
    nodes, ends = ritz
    turned = krylov.coupling @ ends
    M = krylov.bordered(0.0)
    M[krylov.width :, krylov.width :] = (turned / np.maximum(nodes, EPSILON * nodes[0])) @ turned.T
    values, S = largest_eigenpairs(M, len(M))
    return Quadrature.of(values, _weights(krylov, S), num_known)


def estimate_effective_rank(krylov: Krylov, moments: Moments) -> tuple[float, float]:
    """Estimate exp(−Σ p log p), p = λ / Σ λ, and how far that may be off: twice its standard error, and the rules' gap.

    Eigenvalues that are not positive count as zero.
    """

    def entropy(x: FloatArray) -> FloatArray:
        p = np.maximum(x, 0.0) / moments.trace
        return -p * np.log(np.where(p > 0, p, 1.0))

    (above, error), (below, _) = (rule.total(entropy, moments) for rule in gauss_and_radau(krylov))
    rank = float(np.exp((above + below) / 2))
    return rank, rank * float(np.expm1(2 * error + abs(above - below) / 2))
