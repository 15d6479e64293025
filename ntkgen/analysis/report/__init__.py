"""The HTML report about stored kernels."""
