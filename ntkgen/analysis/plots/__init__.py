"""Figures of a stored kernel."""
