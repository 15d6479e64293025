"""From a stored kernel to an answer, on kernels larger than memory and on machines without torch.

Each function takes an opened store (or what `open_matrix` makes of one) and returns plain values.
"""
