"""Data sets: samples in one fixed order, loaded by name."""
