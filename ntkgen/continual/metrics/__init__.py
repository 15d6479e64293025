"""Metrics of a finished or unfinished run, from what is stored: NumPy in, NumPy out, no torch."""
