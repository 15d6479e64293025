"""Tiles, plans, stores: the kernel as a matrix on disk."""
