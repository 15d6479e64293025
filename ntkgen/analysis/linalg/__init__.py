"""Eigenvalues, factors and quadrature of symmetric matrices larger than memory."""
