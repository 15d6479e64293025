"""Computation of a stored kernel from a plan, a network and its samples, in this process or on a cluster."""
