"""Gradient flow of the linearised network: what it has learned when, and which modes of the kernel it learns first."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.special

from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.flow_courses import COURSES, Clock, Course
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left
from ntkgen.analysis.regression import bytes_of, named
from ntkgen.analysis.results import recall_or_compute
from ntkgen.analysis.targets import Problem, TestSamples
from ntkgen.errors import InputError
from ntkgen.progress import Report, ignore_report
from ntkgen.store.store import KernelStore

LOSSES = ("squared", "cross-entropy")


@dataclass(frozen=True)
class FlowSettings(Settings):
    """What is asked of a gradient flow.

    Attributes:
        loss: One of `LOSSES`.
        rate: Learning rate η.
        normalisation: What the sum of losses is divided by, c; None: the number of samples.
        times: When to look; None: over all learning times.
        offset: f₀, `zero` or the network's `logits`.
        num_modes: Modes of the kernel that the answer lists.
        test: The kernel of the same samples with test samples.
    """

    loss: str = "squared"
    rate: float = 1.0
    normalisation: float | None = None
    times: tuple[float, ...] | None = None
    offset: str = "zero"
    num_modes: int = 100
    test: KernelStore | None = None


@dataclass(frozen=True, kw_only=True)
class FlowAnswer(Answer):
    """What gradient flow has learned at some times.

    Attributes:
        times: In steps of the learning rate.
        train_loss, train_accuracy: At each time.
        error_bounds: Of the outputs at each time, relative to y − f₀; None where none is known.
        eigenvalues: Of the first modes, descending; these and the next three are None of the cross-entropy.
        learning_times: When each mode is learned; None of a mode that never is.
        energies: Part of y − f₀ in each mode.
        energy_of_others: Part of it in all other modes.
        loss, rate, offset, normalisation: As they were used.
        output: The output map of the kernel.
        samples: Samples of the kernel.
        passes: Passes over the stored tiles.
        test_store, test_accuracy, test_error: Of the test samples, if there are any; the error for the squared loss.
        method: How the flow was followed, of `COURSES`.
    """

    times: Sequence[float]
    train_loss: Sequence[float]
    train_accuracy: Sequence[float]
    error_bounds: Sequence[float | None]
    eigenvalues: Sequence[float] | None = None
    learning_times: Sequence[float | None] | None = None
    energies: Sequence[float] | None = None
    energy_of_others: float | None = None
    loss: str
    rate: float
    offset: str
    normalisation: float
    output: str
    samples: int
    passes: float
    test_store: str | None = None
    test_accuracy: Sequence[float] | None = None
    test_error: Sequence[float] | None = None
    method: str

    QUESTION: ClassVar[str] = "flow"


def flow(matrix: Matrix, settings: FlowSettings | None = None, *, report: Report = ignore_report) -> FlowAnswer:
    """Follow gradient flow on the labels, as the network linearised at its parameters does it.

    The loss is L = (1/c) Σᵢ ℓ(f(xᵢ), yᵢ) over the samples, with ℓ = ½ ‖f − y‖² or the cross-entropy of softmax f; its
    normalisation c is the number of samples unless another is given. Parameters that follow −η ∇L, which is gradient
    descent with the learning rate η at t steps, move the outputs by f' = −(η/c) K ∂ℓ/∂f. For the squared loss

        f_t = y + exp(−η K t / c) (f₀ − y),

    so that the mode k of the kernel is learned after τₖ = c / (η λₖ), and counts by the energy of the labels in it,
    (uₖᵀ (y − f₀))² / ‖y − f₀‖². By an eigendecomposition where it fits in memory; otherwise in a Krylov space of y − f₀
    on products with the stored tiles, with a bound of the error at each time. Eigenvalues below zero count as zero. For
    the cross-entropy the equation is integrated (DOP853), where the matrix fits in memory. A kernel of the trace,
    divided by m, moves each output by itself.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §5.
        Lee et al. (2019), arXiv:1902.06720, §2.2.
        Saad (1992), Analysis of some Krylov subspace approximations to the matrix exponential operator.

    Raises:
        InputError: If there are no labels, a number is not positive that must be, or one logit alone has no
            cross-entropy.
        BudgetError: If the memory is too small.
    """
    settings = settings or FlowSettings()
    problem = Problem.of(matrix, settings.offset)
    test = None if settings.test is None else TestSamples.of(settings.test, problem, settings.offset)
    _check(problem, settings)
    method = _method(matrix, settings)
    asked = {
        "loss": settings.loss,
        "rate": settings.rate,
        "normalisation": settings.normalisation,
        "times": settings.times,
        "offset": settings.offset,
        "num_modes": settings.num_modes,
        "test": named(settings.test),
        "method": method,
    }

    def compute() -> FlowAnswer:
        clock = clock_of(problem, settings)
        course = COURSES[method](clock, report)
        answer = _with_modes(_described(clock, course, settings, method), clock, course, settings.num_modes)
        return answer if test is None else _with_test(answer, course, test, report)

    return recall_or_compute(matrix, FlowAnswer, asked, compute)


def _check(problem: Problem, settings: FlowSettings) -> None:
    """Refuse what has no flow.

    Raises:
        InputError: If a number is wrong, or the cross-entropy lacks logits.
    """
    numbers = {
        "--rate": settings.rate,
        "--normalisation": 1.0 if settings.normalisation is None else settings.normalisation,
        "--modes": settings.num_modes,
    }
    wrong = [f"{name} {value:g}" for name, value in numbers.items() if not 0 < value < np.inf]
    wrong += [f"--times {time:g}" for time in settings.times or () if not 0 <= time < np.inf]
    if wrong:
        raise InputError(
            f"A flow goes forward: expected positive numbers, found {wrong[0]} for {problem.matrix.name}. Is it a "
            "logarithm? Give the number itself."
        )
    if settings.loss != "squared" and (problem.readout.one_class is not None or problem.readout.num_logits < 2):
        raise InputError(
            f"The kernel at {problem.matrix.name} has no cross-entropy: expected the rows of all logits, found those "
            f"of one (output {problem.readout.name}). Is it of --output index or diagonal? Use --loss squared, or a "
            "kernel of --output full, centered or trace."
        )


def _method(matrix: Matrix, settings: FlowSettings) -> str:
    if settings.loss != "squared":
        return "ode"
    return "eigh" if bytes_of(matrix, "eigh") <= memory_left(settings.memory_bytes) else "krylov"


def clock_of(problem: Problem, settings: FlowSettings) -> Clock:
    """Say what is learned, how quickly, and when to look."""
    normalisation = settings.normalisation or float(problem.matrix.num_samples)
    return Clock(problem, settings.rate, normalisation, settings.times, settings.memory_bytes)


def _described(clock: Clock, course: Course, settings: FlowSettings, method: str) -> FlowAnswer:
    problem, labels = clock.problem, clock.problem.matrix.labels
    return FlowAnswer(
        times=course.times.tolist(),
        train_loss=[_loss(clock, settings.loss, values) for values in course.values],
        train_accuracy=[problem.readout.accuracy(values, labels) for values in course.values],
        error_bounds=course.bounds,
        loss=settings.loss,
        rate=settings.rate,
        offset=settings.offset,
        normalisation=clock.normalisation,
        output=problem.readout.name,
        samples=problem.matrix.num_samples,
        passes=round(problem.matrix.passes, 3),
        method=method,
    )


def _with_test(answer: FlowAnswer, course: Course, test: TestSamples, report: Report) -> FlowAnswer:
    """Add accuracies and errors on test samples."""
    measured = [test.measure(values) for values in test.predict(course.alphas, report)]
    return dataclasses.replace(
        answer,
        test_store=test.name,
        test_accuracy=[accuracy for accuracy, _ in measured],
        test_error=[error for _, error in measured] if answer.loss == "squared" else None,
    )


def _loss(clock: Clock, loss: str, values: FloatArray) -> float:
    """Measure the loss of outputs."""
    if loss == "squared":
        return float(np.sum((clock.problem.targets - values) ** 2)) / (2 * clock.normalisation)
    scores = scipy.special.log_softmax(clock.problem.readout.scores(values), axis=1)
    labels = clock.problem.matrix.labels
    return -float(scores[np.arange(len(labels)), labels].sum()) / clock.normalisation


def _with_modes(answer: FlowAnswer, clock: Clock, course: Course, num_modes: int) -> FlowAnswer:
    """List the modes with the largest eigenvalues: when they are learned, and what of the labels is in them."""
    if course.eigenvalues is None or course.energies is None:
        return answer
    tiny = clock.problem.matrix.num_rows * EPSILON * float(np.abs(course.eigenvalues).max(initial=0))
    top, energies = course.eigenvalues[:num_modes], course.energies[:num_modes]
    return dataclasses.replace(
        answer,
        eigenvalues=top.tolist(),
        learning_times=[float(1 / (clock.speed * value)) if value > tiny else None for value in top],
        energies=energies.tolist(),
        energy_of_others=max(0.0, 1 - float(energies.sum())) if course.energies.any() else 0.0,
    )
