"""Linear algebra of symmetric matrices that may exceed memory: eigenvalues, factors, linear systems, quadrature."""
