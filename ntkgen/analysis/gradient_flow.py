"""Gradient flow of the linearised network: its loss over time, and the learning time of each mode of the kernel."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.special

from ntkgen.analysis import defaults
from ntkgen.analysis.answer import Answer, Settings
from ntkgen.analysis.flow_courses import COURSES, Clock, Course
from ntkgen.analysis.linalg.krylov import EPSILON
from ntkgen.analysis.matrix import FloatArray, Matrix, memory_left
from ntkgen.analysis.regression import bytes_of, named
from ntkgen.analysis.results import recall_or_compute
from ntkgen.analysis.targets import Problem, TestSamples
from ntkgen.errors import InputError, UnknownNameError
from ntkgen.progress import Report, ignore_report
from ntkgen.store.store import KernelStore

LOSSES = ("squared", "cross-entropy")

LOSSES = ("squared", "cross-entropy")


@dataclass(frozen=True)
class FlowSettings(Settings):
    """Settings of `flow`.

    Attributes:
        loss: Loss function, ``squared`` or ``cross-entropy``.
        rate: Learning rate η.
        normalisation: Number c by which the sum of the losses is divided. None means the number of samples.
        times: Times of the evaluation, in steps of gradient descent with the learning rate η. None means times that
            cover the learning times of the modes.
        offset: Outputs f₀ at the start: ``zero``, or the ``logits`` of the network.
        num_modes: Maximum number of modes of the kernel that the answer lists.
        test: Store of the kernel with the training samples as rows and the test samples as columns.
    """

    loss: str = defaults.LOSS
    rate: float = defaults.RATE
    normalisation: float | None = None
    times: tuple[float, ...] | None = None
    offset: str = defaults.OFFSET
    num_modes: int = defaults.NUM_MODES
    test: KernelStore | None = None


@dataclass(frozen=True, kw_only=True)
class FlowAnswer(Answer):
    """Loss and accuracy of gradient flow at given times, and the modes that it learns.

    Attributes:
        times: Times of the evaluation, in steps of gradient descent with the learning rate.
        train_loss: Loss on the training samples at each time.
        train_accuracy: Fraction of the training samples that are classified correctly at each time.
        error_bounds: Upper bound on the error of the outputs at each time, relative to ‖y − f₀‖; None if not known.
        eigenvalues: Eigenvalues of the first modes in descending order. For the cross-entropy, this field and
            ``learning_times``, ``energies`` and ``energy_of_others`` are None.
        learning_times: Time after which each mode is learned; None for a mode with the eigenvalue zero.
        energies: Fraction of ‖y − f₀‖² in each mode.
        energy_of_others: Fraction of ‖y − f₀‖² in all other modes.
        loss: Loss function.
        rate: Learning rate η.
        offset: Outputs f₀ at the start, ``zero`` or ``logits``.
        normalisation: Number c by which the sum of the losses is divided.
        output: Name of the output map that the kernel was computed with.
        samples: Number of training samples.
        passes: Number of passes over the stored tiles.
        test_store: Path of the store with the test samples; None without one.
        test_accuracy: Fraction of the test samples that are classified correctly at each time; None without test
            samples.
        test_error: Mean squared error on the test samples at each time; None without test samples and for the
            cross-entropy.
        method: Method that computed the flow: ``eigh`` (eigendecomposition), ``krylov`` (Krylov space) or ``ode``
            (numerical integration).
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
    """Compute gradient flow on the labels for the network linearised at its parameters.

    The loss is L = (1/c) Σᵢ ℓ(f(xᵢ), yᵢ) over the samples, with ℓ = ½ ‖f − y‖² or the cross-entropy of softmax f. By
    default c is the number of samples. The parameters follow −η ∇L, so that time t corresponds to t steps of gradient
    descent with the learning rate η. The outputs then follow f' = −(η/c) K ∂ℓ/∂f. For the squared loss the solution is

        f_t = y + exp(−η K t / c) (f₀ − y).

    Mode k of the kernel, with the eigenvalue λₖ and the eigenvector uₖ, is learned after the time τₖ = c / (η λₖ). Its
    energy is the fraction of ‖y − f₀‖² in this mode, (uₖᵀ (y − f₀))² / ‖y − f₀‖². Negative eigenvalues count as zero.

    For the squared loss the flow comes from an eigendecomposition if that fits in memory. Otherwise it is computed in a
    Krylov space of y − f₀, from products with the stored tiles, with an error bound at each time. For the cross-entropy
    the differential equation is integrated numerically (DOP853), which needs the matrix in memory. A trace kernel is
    divided by the number m of outputs and is then used for each output separately.

    References:
        Jacot, Gabriel, Hongler (2018), arXiv:1806.07572, §5.
        Lee et al. (2019), arXiv:1902.06720, §2.2.
        Saad (1992), Analysis of some Krylov subspace approximations to the matrix exponential operator.

    Raises:
        InputError: If the store has no labels, if a setting is out of range, or if the cross-entropy is requested for a
            kernel of a single logit.
        BudgetError: If the memory limit is too small.
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
    """Refuse settings for which the flow is not defined.

    Raises:
        InputError: If a number is out of range, or the kernel lacks logits that the cross-entropy needs.
        UnknownNameError: If the name of the loss is unknown.
    """
    if settings.loss not in LOSSES:
        raise UnknownNameError("loss", settings.loss, LOSSES)
    numbers = {
        "rate": settings.rate,
        "normalisation": 1.0 if settings.normalisation is None else settings.normalisation,
        "num_modes": settings.num_modes,
    }
    wrong = [f"`{name}` {value:g}" for name, value in numbers.items() if not 0 < value < np.inf]
    wrong += [f"`times` {time:g}" for time in settings.times or () if not 0 <= time < np.inf]
    if wrong:
        raise InputError(
            f"A flow goes forward: expected positive numbers, found {wrong[0]} for {problem.matrix.name}. Is it a "
            "logarithm? Give the number itself."
        )
    if settings.loss != "squared" and (problem.readout.one_class is not None or problem.readout.num_logits < 2):
        raise InputError(
            f"The kernel at {problem.matrix.name} has no cross-entropy: expected the rows of all logits, found those "
            f"of one (output {problem.readout.name}). Is its output an index or the diagonal? Use `loss` squared, or "
            "a kernel of the output full, centered or trace."
        )


def _method(matrix: Matrix, settings: FlowSettings) -> str:
    if settings.loss != "squared":
        return "ode"
    return "eigh" if bytes_of(matrix, "eigh") <= memory_left(settings.memory_bytes) else "krylov"


def clock_of(problem: Problem, settings: FlowSettings) -> Clock:
    """Collect the problem, the rate of learning and the times of a flow."""
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
    """Compute the loss of outputs on the training samples."""
    if loss == "squared":
        return float(np.sum((clock.problem.targets - values) ** 2)) / (2 * clock.normalisation)
    scores = scipy.special.log_softmax(clock.problem.readout.scores(values), axis=1)
    labels = clock.problem.matrix.labels
    return -float(scores[np.arange(len(labels)), labels].sum()) / clock.normalisation


def _with_modes(answer: FlowAnswer, clock: Clock, course: Course, num_modes: int) -> FlowAnswer:
    """Add the modes with the largest eigenvalues, their learning times and their energies."""
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
