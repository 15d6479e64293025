"""What each metric is: its title, its definition and its source, for tables that people read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """A metric in words.

    Attributes:
        title: Name in tables.
        formula: What it is.
        source: Who defined it; empty for common quantities.
    """

    title: str
    formula: str
    source: str = ""


# R[i, j] is the accuracy on task j after task i, tasks are counted from 1, and T is the number of finished tasks.
OF_ACCURACY = {
    "average_accuracy": Definition("average accuracy", "1/T Σ_j R[T, j]", "Lopez-Paz, Ranzato 2017, arXiv:1706.08840"),
    "average_incremental_accuracy": Definition(
        "average incremental accuracy",
        "mean over i of the mean of R[i, j] over j ≤ i",
        "Rebuffi et al. 2017, arXiv:1611.07725",
    ),
    "backward_transfer": Definition(
        "backward transfer", "1/(T−1) Σ_j<T (R[T, j] − R[j, j])", "Lopez-Paz, Ranzato 2017, arXiv:1706.08840"
    ),
    "forward_transfer": Definition(
        "forward transfer",
        "1/(T−1) Σ_j>1 (R[j−1, j] − b[j]), where b[j] is the accuracy on task j before any training",
        "Lopez-Paz, Ranzato 2017, arXiv:1706.08840",
    ),
    "forgetting": Definition(
        "forgetting", "1/(T−1) Σ_j<T (max over l<T of R[l, j] − R[T, j])", "Chaudhry et al. 2018, arXiv:1801.10112"
    ),
    "minimum_accuracy": Definition(
        "min-ACC",
        "mean over the tasks before the last one of the lowest accuracy at any evaluation after the end of the task",
        "De Lange et al. 2023, arXiv:2205.13452",
    ),
    "worst_case_accuracy": Definition(
        "WC-ACC", "1/T R[T, T] + (1 − 1/T) min-ACC", "De Lange et al. 2023, arXiv:2205.13452"
    ),
}

# Accuracies after each task.
OF_COURSES = {
    "seen_accuracy": Definition(
        "seen accuracy", "accuracy on the held-out samples of all tasks so far, class-incremental, after each task"
    ),
    "new_task_accuracy": Definition("new-task accuracy", "R[i, i] after each task i"),
    "class_accuracy": Definition(
        "accuracy of a class", "part of its held-out samples that are predicted as this class"
    ),
}

# f are the outputs on the probe samples of the tasks before a new task, and Δf is their change while it is trained.
OF_PREDICTIONS = {
    "predicted_change": Definition(
        "predicted change",
        "Δf̂, the integral of −K_ab g_b over the recorded times of the new task b, where g_b is the gradient of the "
        "mean loss on the probe samples of b with respect to their outputs",
        "Jacot, Gabriel, Hongler 2018, arXiv:1806.07572",
    ),
    "cosine": Definition("cosine", "⟨Δf̂, Δf⟩ / (‖Δf̂‖ ‖Δf‖) of the predicted and the true change"),
    "norm_ratio": Definition("ratio of norms", "‖Δf̂‖ / ‖Δf‖"),
    "scale": Definition("scale", "⟨Δf̂, Δf⟩ / ‖Δf̂‖², the factor with which the predicted change fits best"),
    "num_modes": Definition(
        "number of modes",
        "leading eigenvectors of K_bb that give the predicted change up to a tenth of its squared norm",
    ),
    "loss_increase": Definition(
        "increase of the loss", "that of the mean loss on the probe samples of a task, in nats"
    ),
    "predicted_loss_increase": Definition(
        "predicted increase of the loss", "the same if the outputs change by scale × predicted change"
    ),
}

# K is the kernel of the training samples of the probe, with N rows and the eigenvalues λ₁ ≥ … ≥ λ_N.
OF_KERNELS = {
    "frobenius_norm": Definition("norm", "‖K‖_F"),
    "trace": Definition("trace", "tr K"),
    "largest": Definition("λ₁", "largest eigenvalue"),
    "smallest": Definition("λ_N", "smallest eigenvalue"),
    "condition": Definition("condition", "λ₁ / λ_N; empty if λ_N ≤ N ε λ₁, where ε is the rounding of the kernel"),
    "condition_bound": Definition("condition at least", "λ₁ / (λ_N + N ε λ₁)"),
    "effective_rank": Definition("effective rank", "exp(−Σ p log p) with p = λ / Σ λ", "Roy, Vetterli 2007"),
    "rank_99": Definition(
        "rank of 99 %", "smallest k with Σ_{j≤k} λ_j ≥ 0.99 Σ λ", "Kumar et al. 2021, arXiv:2010.14498"
    ),
    "centred_distance": Definition(
        "centred distance",
        "1 − CKA(K₀, K), the distance of the kernels centred over the samples",
        "Kornblith et al. 2019",
    ),
    "participation_ratio": Definition("participation ratio", "(tr K)² / ‖K‖_F²"),
    "numerical_rank": Definition(
        "numerical rank", "number of eigenvalues above τ λ₁, where τ is N ε, or the given tolerance"
    ),
    "num_negative": Definition("negative eigenvalues", "number of eigenvalues below zero"),
    "distance": Definition(
        "distance", "1 − ⟨K₀, K⟩ / (‖K₀‖ ‖K‖) from the first kernel K₀", "Fort et al. 2020, arXiv:2010.15110"
    ),
    "previous_distance": Definition(
        "distance from the previous kernel", "1 − ⟨K', K⟩ / (‖K'‖ ‖K‖)", "Fort et al. 2020"
    ),
    "previous_centred_distance": Definition(
        "centred distance from the previous kernel", "1 − CKA(K', K)", "Kornblith et al. 2019"
    ),
    "mean_velocity": Definition(
        "mean velocity", "distance from the previous kernel / the number of iterations in between"
    ),
    "alignment": Definition("alignment", "⟨K, Y Yᵀ⟩ / (‖K‖ ‖Y Yᵀ‖) with one-hot labels Y", "Cristianini et al. 2001"),
    "centred_alignment": Definition(
        "centred alignment", "alignment of H K H with H Y Yᵀ H, H = I − 1 1ᵀ/n", "Cortes et al. 2012, arXiv:1203.0550"
    ),
    "leave_one_out_accuracy": Definition(
        "regression, left out",
        "accuracy on each training sample of kernel regression on the others, of the tasks so far",
        "Rasmussen, Williams 2006, eq. 5.12",
    ),
    "held_out_accuracy": Definition(
        "regression, held out", "accuracy on validation samples of kernel regression on the training samples"
    ),
    "velocity": Definition(
        "velocity", "distance S of two kernels that are dt iterations apart, / dt", "Fort et al. 2020, arXiv:2010.15110"
    ),
    "angular_velocity": Definition("angular velocity", "arccos(1 − S) / dt, in radians"),
    "interference": Definition(
        "interference of tasks a and b", "‖K_ab‖ / √(‖K_aa‖ ‖K_bb‖) of the blocks of the kernel"
    ),
    "lazy_error": Definition(
        "lazy error",
        "‖Δf − J Δθ‖ / ‖Δf‖ of the outputs on the probe since the last kernel, at fixed buffers",
        "Chizat, Oyallon, Bach 2019, arXiv:1812.07956",
    ),
    "lazy_error_from_start": Definition("lazy error from start", "the same since the first kernel"),
    "buffer_drift": Definition(
        "drift of buffers", "‖f(θ', b') − f(θ', b)‖ / ‖f(θ', b') − f(θ, b)‖ with the buffers b since the last kernel"
    ),
}

# F has the activations of the last hidden layer on n samples as rows, averaged over positions, with the singular values
# σ₁ ≥ σ₂ ≥ …
OF_PLASTICITY = {
    "dormant_units": Definition(
        "dormant units",
        "fraction of the hidden units that are not zero on less than 1 % of samples and positions",
        "Dohare et al. 2024, Nature 632",
    ),
    "effective_rank": Definition("effective rank", "exp(−Σ p log p) with p = σ / Σ σ", "Roy, Vetterli 2007"),
    "rank_99": Definition(
        "rank of 99 %", "smallest k with Σ_{j≤k} σ_j ≥ 0.99 Σ σ", "Kumar et al. 2021, arXiv:2010.14498"
    ),
    "rank_99_squared": Definition(
        "rank of 99 % of squares", "smallest k with Σ_{j≤k} σ_j² ≥ 0.99 Σ σ²", "Yang et al. 2020, arXiv:1909.12255"
    ),
    "stable_rank": Definition("stable rank", "‖F‖_F² / σ₁²", "Rudelson, Vershynin 2007"),
    "numerical_rank": Definition(
        "numerical rank",
        "number of singular values above τ σ₁, where τ is what the type resolves, or the given tolerance",
    ),
    "weight_magnitude": Definition("weight magnitude", "mean of |p| over all parameters", "Dohare et al. 2024"),
    "class_accuracy": Definition("accuracy by class", "accuracy at the end on each class, in the order of arrival"),
    "relative_accuracy": Definition(
        "relative accuracy",
        "accuracy minus that of a network of the same seed that is retrained for each task",
        "Dohare et al. 2024",
    ),
}
