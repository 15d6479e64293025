"""Block conjugate gradients for (K + λI) X = B with a Nyström preconditioner; K is only used in products."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ntkgen.analysis.linalg.krylov import EPSILON, Multiply
from ntkgen.analysis.matrix import FloatArray
from ntkgen.errors import NotPositiveError

# Maximum number of passes for each λ.
MAX_STEPS = 1000


@dataclass(frozen=True)
class Nystrom:
    """A Nyström approximation U Λ Uᵀ of K, which gives the preconditioner of K + λI.

    The preconditioner is P = U (Λ + λI) Uᵀ / (λ_r + λ) + (I − U Uᵀ), where λ_r is the smallest entry of Λ.

    References:
        Frangella, Tropp, Udell (2023), Randomized Nyström preconditioning, arXiv:2110.02820.
    """

    values: FloatArray  # (rank,), Λ
    vectors: FloatArray  # (rows, rank), U

    @classmethod
    def of(cls, multiply: Multiply, rows: int, rank: int) -> "Nystrom":
        """Approximate K by (K Ω) (Ωᵀ K Ω)⁻¹ (K Ω)ᵀ with orthonormalised Gaussian vectors Ω, in one pass."""
        if not rank:
            return cls(np.zeros(0), np.zeros((rows, 0)))
        gaussian = np.linalg.qr(np.random.default_rng(1).normal(size=(rows, rank)))[0]
        product = multiply(gaussian)
        values, rotation = np.linalg.eigh(gaussian.T @ product)
        is_kept = values > rows * EPSILON * abs(values).max()
        root = product @ (rotation[:, is_kept] / np.sqrt(values[is_kept]))
        vectors, sizes, _ = np.linalg.svd(root, full_matrices=False)
        return cls(sizes**2, vectors)

    def power(self, V: FloatArray, shift: float, exponent: float) -> FloatArray:
        """Multiply V with a power of P."""
        if not len(self.values):
            return V
        factors = ((self.values + shift) / (self.values[-1] + shift)) ** exponent - 1
        product: FloatArray = V + self.vectors @ (factors[:, None] * (self.vectors.T @ V))
        return product


@dataclass(frozen=True)
class System:
    """The linear system (K + λI) X = B, solved by products with K only."""

    kernel: Multiply  # multiplies vectors with K
    shift: float  # λ
    preconditioner: Nystrom
    step: Callable[[], None]  # called after each pass

    def multiply(self, V: FloatArray) -> FloatArray:
        """Compute (K + λI) V in one pass."""
        product: FloatArray = self.kernel(V) + self.shift * V
        self.step()
        return product

    def solve(
        self, B: FloatArray, X: FloatArray, R: FloatArray, limits: FloatArray
    ) -> tuple[FloatArray, FloatArray]:  # X, and the recomputed residual R = B − (K + λI) X
        """Improve X until the norm of each column of the residual R is below its limit.

        The iteration also ends after `MAX_STEPS` passes, or when rounding errors prevent any progress.

        Raises:
            NotPositiveError: If K + λI is found not to be positive definite.
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
    ) -> tuple[FloatArray, int]:  # (K + λI)⁻¹ R, and the number of steps
        """Solve (K + λI) Z = R by block conjugate gradients, which store the residual as P^½ Q C with orthonormal Q.

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
        return self.preconditioner.power(V, self.shift, exponent)

    def _inverted(self, small: FloatArray) -> FloatArray:
        """Compute the pseudoinverse of Dᵀ (K + λI) D, which is singular if the columns of D are linearly dependent.

        Raises:
            NotPositiveError: If the matrix has a negative eigenvalue beyond rounding.
        """
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        if values[0] < -len(values) * EPSILON * values[-1]:
            raise NotPositiveError(f"vᵀ(K + λI)v = {values[0]:.3g} for a unit vector v")
        is_kept = values > len(values) * EPSILON * values[-1]
        inverse: FloatArray = (vectors[:, is_kept] / values[is_kept]) @ vectors[:, is_kept].T
        return inverse
