"""Large empirical neural tangent kernels: exact, fast, resumable."""
