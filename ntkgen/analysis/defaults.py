"""Defaults of the questions: for their settings, and for the options of the commands.

It loads nothing, so that the help of a command is quick.
"""

# Spectrum: relative error of an eigenvalue, passes over the tiles, eigenvalues where all of them do not fit in memory.
TOLERANCE, MAX_PASSES, SPECTRUM_TOP = 1e-6, 100, 50
# Density: passes over the tiles, and the standard deviation of the smoothing in decades.
DENSITY_PASSES, BANDWIDTH = 20, 0.1
# Everything that is factored: λ of K + λI.
SHIFT = 0.0
# The law of extrapolation: numbers of terms, exponent of the weights, fraction held out.
Q, POWERS, ALPHA, HOLDOUT = 2, 0, 0.0, 0.25
# Regression and flow: where they start from.
OFFSET = "zero"
METHOD = "auto"
# Flow: learning rate and modes of the kernel that are listed.
LOSS, RATE, NUM_MODES = "squared", 1.0, 100
# Comparison: eigenvectors and eigenvalues.
COMPARED_TOP = 10
