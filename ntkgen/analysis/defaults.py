"""Defaults of the questions about a kernel, for their settings and for the options of the commands.

This module imports nothing, so that the help of a command is quick.
"""

# Spectrum: relative error of an eigenvalue, maximum number of passes over the tiles, and number of eigenvalues if the
# kernel does not fit in memory.
TOLERANCE, MAX_PASSES, SPECTRUM_TOP = 1e-6, 100, 50
# Density: number of passes over the tiles, and standard deviation of the smoothing in decades.
DENSITY_PASSES, BANDWIDTH = 20, 0.1
# Factorisations: λ of K + λI.
SHIFT = 0.0
# Extrapolation: numbers of terms of its law, exponent of the weights, fraction held out to measure the error.
Q, POWERS, ALPHA, HOLDOUT = 2, 0, 0.0, 0.25
# Regression and flow: outputs at the start.
OFFSET = "zero"
# Regression: solver.
METHOD = "auto"
# Flow: loss, learning rate, and maximum number of listed modes.
LOSS, RATE, NUM_MODES = "squared", 1.0, 100
# Comparison: number of largest eigenvalues and eigenvectors.
COMPARED_TOP = 10
