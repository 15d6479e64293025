"""All pictures of one run."""

from typing import TYPE_CHECKING

from ntkgen.analysis.plots.style import Picture
from ntkgen.continual.plots import cells, curves
from ntkgen.continual.plots.forgetting import draw_forgetting
from ntkgen.continual.reading import RunReader
from ntkgen.errors import InputError, StoreError

if TYPE_CHECKING:
    import xarray

# Pictures of every run, in their order.
KINDS = (
    "accuracy",
    "loss",
    "progress",
    "matrix",
    "confusion",
    "norm",
    "eigenvalues",
    "validation-eigenvalues",
    "motion",
    "velocity",
    "lazy-error",
    "regression",
    "interference",
    "forgetting",
)


def draw_run(run: RunReader) -> tuple[list[Picture], dict[str, str]]:
    """Draw the pictures of a run. Return them in the order of `KINDS`, and the reason for each that is left out."""
    parts = {"train": run.kernel_metrics()}
    if run.has_validation_probe:
        parts["validation"] = run.kernel_metrics(part="validation")
    drawn = [
        curves.draw_accuracy(run),
        curves.draw_loss(run),
        curves.draw_progress(run),
        cells.draw_matrix(run),
        cells.draw_confusion(run),
        *_of_kernels(run, parts),
    ]
    reasons = dict(_REASONS)
    try:
        drawn.append(draw_forgetting(run))
    except (InputError, StoreError) as error:
        reasons["forgetting"] = str(error)
    pictures = {picture.kind: picture for picture in drawn if picture is not None}
    left_out = {kind: why for kind, why in reasons.items() if kind not in pictures}
    return [pictures[kind] for kind in KINDS if kind in pictures], left_out


def _of_kernels(run: RunReader, parts: "dict[str, xarray.Dataset]") -> list[Picture | None]:
    kernels = parts["train"]
    drawn: list[Picture | None] = [curves.draw_norm(run, parts)]
    drawn += [curves.draw_eigenvalues(run, found, part) for part, found in parts.items()]
    drawn += [curves.draw_motion(run, kernels), cells.draw_interference(kernels)]
    if (kernels.velocity > 0).any():
        drawn.append(curves.draw_velocity(run, kernels))
    if "lazy_error" in kernels and (kernels.lazy_error > 0).any():
        drawn.append(curves.draw_lazy_error(run, kernels))
    if not kernels.leave_one_out_accuracy.isnull().all():
        drawn.append(curves.draw_regression(run, kernels))
    return drawn


# Why a picture may be missing.
_REASONS = {
    "loss": "no losses were recorded",
    "confusion": "the run was recorded without confusion matrices",
    "validation-eigenvalues": "the probe has no validation samples; `ntkgen cl-run --probe-parts both` adds them",
    "interference": "no blocks of the kernel between two tasks were recorded",
    "velocity": "the kernel does not change, or no two are a fixed number of iterations apart",
    "lazy-error": "no lazy errors were recorded, or the network is linear in its parameters",
    "forgetting": "no task is learned after another one",
    "regression": "the rows of the kernels have no targets; those of `ntkgen cl-run --output trace`, full or centered "
    "have some",
}
