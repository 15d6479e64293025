"""From a plan, a network and its samples to a stored kernel, here or on the workers of a cluster."""
