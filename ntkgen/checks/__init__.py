"""Checks of a stored kernel: its files, its tiles, and its certificate (its measured error bound)."""
