"""Block conjugate gradients for (K + λI) X = B, on products with K alone, with a Nyström preconditioner."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ntkgen.analysis.linalg.krylov import EPSILON, Multiply
from ntkgen.analysis.matrix import FloatArray
from ntkgen.errors import NotPositiveError

# Passes for each λ, at most.
MAX_STEPS = 1000


@dataclass(frozen=True)
class Nystrom:
    """An approximation U Λ Uᵀ of K, by which (K + λI) is preconditioned: P = U (Λ + λ) Uᵀ / (λ_r + λ) + (I − U Uᵀ).

    References:
        Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning, arXiv:2110.02820.
    """

    values: FloatArray  # (rank,), Λ
    vectors: FloatArray  # (rows, rank), U

    @classmethod
    def of(cls, multiply: Multiply, rows: int, rank: int) -> "Nystrom":
        """Approximate by products with Gaussian vectors Ω, in one pass: (K Ω) (Ωᵀ K Ω)⁻¹ (K Ω)ᵀ."""
        if not rank:
            return cls(np.zeros(0), np.zeros((rows, 0)))
        gaussian = np.linalg.qr(np.random.default_rng(1).normal(size=(rows, rank)))[0]
        product = multiply(gaussian)
        values, rotation = np.linalg.eigh(gaussian.T @ product)
        is_there = values > rows * EPSILON * abs(values).max()
        root = product @ (rotation[:, is_there] / np.sqrt(values[is_there]))
        vectors, sizes, _ = np.linalg.svd(root, full_matrices=False)
        return cls(sizes**2, vectors)

    def power(self, V: FloatArray, shift: float, exponent: float) -> FloatArray:
        """Multiply with a power of P."""
        if not len(self.values):
            return V
        factors = ((self.values + shift) / (self.values[-1] + shift)) ** exponent - 1
        product: FloatArray = V + self.vectors @ (factors[:, None] * (self.vectors.T @ V))
        return product


@dataclass(frozen=True)
class System:
    """The equations (K + λI) X = B, solved by products alone."""

    kernel: Multiply  # with K
    shift: float
    near: Nystrom
    step: Callable[[], None]  # called after each pass

    def multiply(self, V: FloatArray) -> FloatArray:
        """Find (K + λI) V, in one pass."""
        product: FloatArray = self.kernel(V) + self.shift * V
        self.step()
        return product

    def solve(
        self, B: FloatArray, X: FloatArray, R: FloatArray, limits: FloatArray
    ) -> tuple[FloatArray, FloatArray]:  # X, and the true R = B − (K + λI) X
        """Go on from X until each column of the residual R is below its limit, or rounding allows no more.

        Raises:
            NotPositiveError: If K + λI turns out not to be positive definite.
        """
        steps = 0
        while (np.linalg.norm(R, axis=0) > limits).any() and steps < MAX_STEPS:
            before = float(np.linalg.norm(R))
            change, taken = self._descend(R, limits, MAX_STEPS - steps)
            X = X + change
            R = B - self.multiply(X)
            steps += taken + 1
            if float(np.linalg.norm(R)) > before / 2:
                break
        return X, R

    def _descend(
        self, R: FloatArray, limits: FloatArray, max_steps: int
    ) -> tuple[FloatArray, int]:  # (K + λI)⁻¹ R, and the steps that were taken
        """Take steps of conjugate gradients whose residual P^½ Q C is kept as an orthonormal basis and coefficients.

        References:
            Dubrulle (2001), Retooling the method of block conjugate gradients, ETNA 12, algorithm BCGrQ.
        """
        (Q, C), steps, Z = np.linalg.qr(self._scaled(R, -0.5)), 0, np.zeros_like(R)
        D = Q
        while (np.linalg.norm(self._scaled(Q, 0.5) @ C, axis=0) > limits / 2).any() and steps < max_steps:
            KD = self._scaled(self.multiply(self._scaled(D, -0.5)), -0.5)
            inverse = self._inverted(D.T @ KD)
            Z += D @ (inverse @ C)
            Q, S = np.linalg.qr(Q - KD @ inverse)
            C, D, steps = S @ C, Q + D @ S.T, steps + 1
        return self._scaled(Z, -0.5), steps

    def _scaled(self, V: FloatArray, exponent: float) -> FloatArray:
        return self.near.power(V, self.shift, exponent)

    def _inverted(self, small: FloatArray) -> FloatArray:
        """Invert Dᵀ (K + λI) D, but for directions that D has twice.

        Raises:
            NotPositiveError: If it is not positive definite.
        """
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        if values[0] < -len(values) * EPSILON * values[-1]:
            raise NotPositiveError(f"vᵀ(K + λI)v = {values[0]:.3g} for a unit vector v")
        is_there = values > len(values) * EPSILON * values[-1]
        inverse: FloatArray = (vectors[:, is_there] / values[is_there]) @ vectors[:, is_there].T
        return inverse
