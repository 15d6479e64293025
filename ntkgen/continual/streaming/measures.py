"""The names, units and meanings of what is measured while a stream is learnt. This module does not import torch."""

# Loss below which the plasticity has this denominator.
SMALL_LOSS = 1e-8
# Measured in every step.
EACH_STEP = {
    "loss": ("nat", "cross-entropy of a sample before its step"),
    "accuracy": ("1", "part of the samples whose class was predicted before the step"),
    "plasticity": ("1", "part of the loss of a sample that its own step takes away, from 0 to 1"),
    "inactive_units": ("1", "part of the outputs of the ReLUs that are 0, for the sample after its step"),
}
# Measured every few steps, of the parameters whose name ends with `weight`: weights after a step, gradients before it.
THINNED = {
    "weight_rank": ("1", "sum of the ranks of the weights after a step, divided by that of the largest possible ranks"),
    "weight_l2": ("1", "l2 norm of the weights after a step"),
    "weight_l1": ("1", "l1 norm of the weights after a step"),
    "grad_l2": ("1", "l2 norm of the gradient of the weights before a step"),
    "grad_l1": ("1", "l1 norm of the gradient of the weights before a step"),
    "grad_l0": ("1", "part of the gradient of the weights before a step that is not 0"),
}
# Measured at the end of each task.
HELD_OUT = ("1", "part of held-out samples that is classified as the task wants, at its end")
