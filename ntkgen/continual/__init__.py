"""Continual learning: a stream of tasks, a network, a method and a schedule, with the kernel as a time series."""
