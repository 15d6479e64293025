"""The forgetting that kernels predict to first order, from the kernels and outputs of the probe over time.

The loss on the n_b probe samples of a task b has the gradient g_b with respect to their outputs, where f are the
outputs, Y the one-hot labels, and the loss is the mean cross-entropy (or the sum of binary cross-entropies):

    g_b = (softmax(f_b) − Y_b) / n_b        or        g_b = (σ(f_b) − Y_b) / n_b

Gradient flow on this loss changes the outputs on the probe samples of every task a by df_a/dτ = −K_ab g_b, where K_ab
is the block of the kernel with the rows of a and the columns of b (Jacot, Gabriel, Hongler 2018, arXiv:1806.07572).
While task b is in training, between the recorded times t_0 < … < t_S, the change is predicted by the trapezoidal rule,

    Δf̂_a = −Σ_s h_s ½ (K_ab(t_s) g_b(t_s) + K_ab(t_{s+1}) g_b(t_{s+1})),    h_s = step size · iterations in between,

and compared with the true change Δf_a = f_a(t_S) − f_a(t_0). The step size of an interval is that of its end. A time at
which outputs of the new classes do not exist, or are not in the kernel, is left out, and the other end of its interval
counts alone. Momentum and Adam take other steps than h_s, so the scale of the prediction is fitted and reported.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ntkgen.continual.metrics.kernels import FloatArray, IntArray
from ntkgen.errors import InputError, StoreError

if TYPE_CHECKING:
    import xarray

# The part of a predicted change, by its squared norm, that `num_modes` eigenmodes carry.
CARRIED = 0.9
# How the kernel of each output map gives K_ab. Other outputs do not determine it.
KERNELS = {
    "full": "exact",
    "seen": "exact for the outputs of the classes seen so far",
    "centered": "exact for outputs minus their mean over the outputs of a sample",
    "trace": "approximation K ≈ (trace / outputs) ⊗ I",
    "diagonal": "approximation by the diagonal of each block of outputs",
}
CROSS_ENTROPY, BINARY = "cross-entropy", "binary"


@dataclass(frozen=True)
class Agreement:
    """How a predicted change Δf̂ and the true change Δf agree; NaN where one of them is zero or missing.

    Attributes:
        cosine: ⟨Δf̂, Δf⟩ / (‖Δf̂‖ ‖Δf‖).
        norm_ratio: ‖Δf̂‖ / ‖Δf‖.
        scale: ⟨Δf̂, Δf⟩ / ‖Δf̂‖², the factor with which the prediction fits best.
        num_modes: Smallest k with ‖Δf̂ − Δf̂_k‖² ≤ 0.1 ‖Δf̂‖², where Δf̂_k is the prediction from the k leading
            eigenmodes of K_bb, that is with g_b projected on its first k eigenvectors at every time.
    """

    cosine: float
    norm_ratio: float
    scale: float
    num_modes: float

    @classmethod
    def of(
        cls,
        by_mode: FloatArray,  # (…, modes)
        true: FloatArray,  # (…)
    ) -> "Agreement":
        """Compare the entries that both have."""
        both = ~np.isnan(by_mode).any(-1) & ~np.isnan(true)
        parts, change = by_mode[both], true[both]
        predicted = parts.sum(-1)
        product, norm, size = float(predicted @ change), float(predicted @ predicted) ** 0.5, np.linalg.norm(change)
        if not norm or not size:
            return cls(*[float("nan")] * 4)
        rest = np.square(np.cumsum(parts, -1) - predicted[:, None]).sum(0)
        modes = int(np.flatnonzero(rest <= (1 - CARRIED) * norm**2)[0]) + 1
        return cls(product / norm / float(size), norm / float(size), product / norm**2, modes)


def predicted_forgetting(kernels: "xarray.Dataset", loss: str = CROSS_ENTROPY) -> "xarray.Dataset":
    """Predict from the recorded kernels how training on each task changes the outputs on the probe of every task.

    Args:
        kernels: The recorded kernels, as `RunReader.kernels` gives them.
        loss: ``cross-entropy`` over all outputs, or ``binary`` for the sum of one binary cross-entropy per output.

    Returns:
        For each ``new_task`` and each ``task`` the numbers of `Agreement`, and with the prefix ``old_`` for the samples
        of all tasks before the new one. ``predicted_change`` and ``true_change`` (new_task, sample, output).
        ``loss_increase`` (new_task, task): increase of the mean loss on the probe of a task, over the outputs that
        exist before the new task, in nats; ``predicted_loss_increase``: the same with the predicted change times
        ``old_scale``. ``interval_cosine`` (time): the cosine on old samples for the interval that ends at this time.
        The attribute ``kernel`` says whether the kernel is exact.

    Raises:
        InputError: If the kernels are sums over outputs, or labels are missing.
        StoreError: If outputs are not recorded.
    """
    import xarray

    history = _History.of(kernels, loss)
    numbers = np.unique(history.tasks)
    trained = [int(task) for task in np.unique(history.trained) if task in numbers]
    found = [_learned(history, task) for task in trained]
    data: dict[str, Any] = {}
    for name in vars(found[0].old) if found else ():
        data[name] = ("new_task", "task"), [[getattr(each.by_task[task], name) for task in numbers] for each in found]
        data[f"old_{name}"] = "new_task", [getattr(each.old, name) for each in found]
    for name in ("loss_increase", "predicted_loss_increase"):
        data[name] = ("new_task", "task"), [[getattr(each, name)[task] for task in numbers] for each in found]
    for name in ("predicted_change", "true_change"):
        data[name] = ("new_task", "sample", "output"), [getattr(each, name) for each in found]
    cosines = np.full(len(history.trained), np.nan)
    for each in found:
        cosines[list(each.interval_cosine)] = list(each.interval_cosine.values())
    data["interval_cosine"] = "time", cosines
    coordinates = {
        "new_task": trained,
        "task": numbers,
        "iteration": ("time", history.iterations),
        "trained_task": ("time", history.trained),
        "sample_task": ("sample", history.tasks),
        "sample_label": ("sample", history.labels),
    }
    return xarray.Dataset(data, coordinates, {"kernel": KERNELS[history.output], "loss": loss})


@dataclass(frozen=True, eq=False)
class _History:
    """The recorded kernels and outputs of n probe samples over time, with M outputs in the end."""

    kernels: Any  # (times, …), read time by time
    logits: FloatArray  # (times, n, M)
    output: str
    loss: str
    iterations: IntArray  # (times,)
    step_sizes: FloatArray  # (times,)
    trained: IntArray  # (times,): the task in training
    tasks: IntArray  # (n,): the task of each sample
    labels: IntArray  # (n,)

    @classmethod
    def of(cls, data: "xarray.Dataset", loss: str) -> "_History":
        output = str(data.attrs.get("ntkgen_snapshots", {}).get("output"))
        if output not in KERNELS:
            raise InputError(
                f"Kernels of the output {output!r} do not predict changes of outputs: expected one of "
                f"{', '.join(KERNELS)}. A sum over outputs loses which output changes. Record the run with "
                "`ntkgen cl-run --output full`, centered or trace."
            )
        if "logits" not in data:
            raise StoreError(
                "The outputs on the probe are not recorded: expected the array logits beside the kernels, found none. "
                "Was the run made by an earlier version? Run it again."
            )
        first = np.unique(data.row_sample.values, return_index=True)[1]
        labels = data.row_label.values[first]
        if (labels < 0).any():
            raise InputError(
                "The probe has no labels: expected the output of each sample's class, found none. Were they left out "
                "when the snapshots were begun? Give `labels` to Snapshots."
            )
        steps = data.step_size.values
        return cls(
            data.kernel,
            np.asarray(data.logits.values, np.float64),
            output,
            loss,
            data.iteration.values,
            np.where(np.isnan(steps), 1.0, steps),  # an unknown step size goes into the fitted scale
            data.task.values,
            data.row_task.values[first],
            labels,
        )


@dataclass(frozen=True, eq=False)
class _Learned:
    """What training on one task changes."""

    by_task: dict[int, Agreement]
    old: Agreement
    loss_increase: dict[int, float]
    predicted_loss_increase: dict[int, float]
    predicted_change: FloatArray  # (n, M)
    true_change: FloatArray  # (n, M)
    interval_cosine: dict[int, float]  # by time


def _learned(history: _History, task: int) -> _Learned:
    """Integrate the prediction over the training on one task."""
    times = np.flatnonzero(history.trained == task)
    start, is_old = max(0, int(times[0]) - 1), history.tasks < task
    by_mode, cosines, before = np.zeros((*history.logits.shape[1:], 0)), dict[int, float](), rates(history, start, task)
    for time in (int(each) for each in times if each > start):
        after = rates(history, time, task)
        step = history.step_sizes[time] * (history.iterations[time] - history.iterations[time - 1])
        part = step * _mean([end for end in (before, after) if end is not None], by_mode)
        found = _compared(part, history.logits[time] - history.logits[time - 1], history.output)
        cosines[time] = Agreement.of(*(each[is_old] for each in found)).cosine
        by_mode, before = _sum(by_mode, part), after
    first, last = history.logits[start], history.logits[times[-1]]
    by_mode, true = _compared(by_mode, last - first, history.output)
    old, predicted = Agreement.of(by_mode[is_old], true[is_old]), by_mode.sum(-1)
    members = {int(each): history.tasks == each for each in np.unique(history.tasks)}

    def increase(change: FloatArray) -> dict[int, float]:
        return {each: _loss_increase(history, first, change, rows) for each, rows in members.items()}

    return _Learned(
        {each: Agreement.of(by_mode[rows], true[rows]) for each, rows in members.items()},
        old,
        increase(true),
        increase(old.scale * predicted),
        predicted,
        true,
        cosines,
    )


def _sum(one: FloatArray, other: FloatArray) -> FloatArray:
    """Add contributions of modes; the one with fewer modes has zeros for the others."""
    modes = max(one.shape[-1], other.shape[-1])
    padded = [np.pad(each, [(0, 0), (0, 0), (0, modes - each.shape[-1])]) for each in (one, other)]
    return np.asarray(padded[0] + padded[1])


def _mean(ends: list[FloatArray], like: FloatArray) -> FloatArray:
    """Average the ends of an interval; without any, the change is not known."""
    if not ends:
        return np.full((*like.shape[:2], 1), np.nan)
    return ends[0] if len(ends) == 1 else _sum(*ends) / 2


def _compared(by_mode: FloatArray, true: FloatArray, output: str) -> tuple[FloatArray, FloatArray]:
    """Restrict both to the outputs that both have, and for ``centered`` subtract the mean over them."""
    missing = np.isnan(by_mode).any(-1) | np.isnan(true)
    pair = np.where(missing[..., None], np.nan, by_mode), np.where(missing, np.nan, true)
    if output != "centered" or missing.all():
        return pair
    kept = ~missing.all(0)  # outputs are missing for all samples, or for none
    return pair[0] - pair[0][:, kept].mean(1, keepdims=True), pair[1] - pair[1][:, kept].mean(1, keepdims=True)


def rates(history: _History, time: int, task: int) -> FloatArray | None:  # (n, M, modes)
    """Compute −K_·b g_b at one time, by eigenmode of K_bb in the order of falling eigenvalues.

    Returns:
        The contribution of each mode; NaN for outputs that do not exist. None if the output of a class of the task does
        not exist, or is not in the kernel.
    """
    new, logits = history.tasks == task, history.logits[time]
    m = int((~np.isnan(logits).any(0)).sum())  # the outputs that exist are the first ones
    matrix, outputs = _matrix(history, time, m)
    if not np.isin(history.labels[new], outputs).all():
        return None
    g = _residual(logits[new, :m], history.labels[new], history.loss)[:, outputs] / new.sum()
    contrasts = _contrasts(m) if history.output == "centered" else None
    mapped = g if contrasts is None else g @ contrasts.T
    if history.output != "trace":
        mapped = mapped.reshape(-1, 1)
    rows = np.repeat(new, len(matrix) // len(logits))
    eigenvectors = np.linalg.eigh(matrix[np.ix_(rows, rows)])[1][:, ::-1]
    left, right = matrix[:, rows] @ eigenvectors, eigenvectors.T @ mapped
    parts = (left[:, None, :] * right.T[None]).reshape(len(logits), -1, left.shape[1])  # (n, rows per sample, modes)
    placed = np.full((*logits.shape, left.shape[1]), np.nan)
    placed[:, outputs] = -(parts if contrasts is None else np.einsum("irk,ro->iok", parts, contrasts))
    return placed


def _matrix(history: _History, time: int, m: int) -> tuple[FloatArray, IntArray]:
    """Read a kernel as a matrix, (n r, n r), or (n, n) for ``trace``, and say which outputs it covers."""
    K, n = np.asarray(history.kernels[time].values, np.float64), len(history.tasks)
    outputs = np.arange(m)
    if history.output == "trace":
        return K / m, outputs
    if history.output == "diagonal":
        full = np.zeros((n, m, n, m))
        full[:, outputs, :, outputs] = K[:m]
        return full.reshape(n * m, n * m), outputs
    has_values = ~np.isnan(np.diagonal(K).reshape(n, -1)).any(0)
    rows = np.tile(has_values, n)
    return K[np.ix_(rows, rows)], outputs if history.output == "centered" else np.flatnonzero(has_values)


def _contrasts(m: int) -> FloatArray:  # (m − 1, m)
    from scipy.linalg import helmert

    found: FloatArray = helmert(m)
    return found


def _residual(logits: FloatArray, labels: IntArray, loss: str) -> FloatArray:
    """Compute softmax(f) − Y or σ(f) − Y."""
    targets = labels[:, None] == np.arange(logits.shape[1])
    if loss == BINARY:
        return np.asarray(np.exp(-np.logaddexp(0, -logits)) - targets)
    return np.asarray(np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True)) - targets)


def _loss_increase(history: _History, before: FloatArray, change: FloatArray, rows: npt.NDArray[np.bool_]) -> float:
    """Compute the increase of the mean loss of some samples, over the outputs with values."""
    kept = np.asarray(~np.isnan((before + change)[rows]).any(0))
    labels = history.labels[rows]
    if not kept[labels].all():
        return float("nan")
    positions = np.searchsorted(np.flatnonzero(kept), labels)
    first = before[rows][:, kept]
    losses = [_loss(values, positions, history.loss) for values in (first, first + change[rows][:, kept])]
    return losses[1] - losses[0]


def _loss(logits: FloatArray, labels: IntArray, loss: str) -> float:
    own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    if loss == BINARY:
        return float((np.logaddexp(0, logits).sum(1) - own).mean())
    return float((np.logaddexp.reduce(logits, 1) - own).mean())
