"""The parameters without a layer rule, followed through a forward pass to their junctions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.jacobian.calls import Call, CallMode, Path, mark_samples
from ntkgen.jacobian.junction_rows import Entries, Meeting, pulled
from ntkgen.jacobian.junctions import Junction
from ntkgen.jacobian.layers import Layer, sum_over_uses
from ntkgen.jacobian.recording import Recording, Use


@dataclass(frozen=True)
class Mark:
    """What one weight expression of a junction does for one parameter.

    Attributes:
        path: The path of the weight expression.
        layer: Name of the layer that it belongs to.
        param: Name of the parameter.
        entries: Which entries of the parameter it has; None if it is computed in another way.
        is_matrix: Whether inputs and cotangents are recorded, or else rows are computed.
    """

    path: Path
    layer: str
    param: str
    entries: Entries | None
    is_matrix: bool


@dataclass(frozen=True)
class Part:
    """The part of one parameter in one junction of a batch, as the input of a rule."""

    meeting: Meeting
    param: Tensor
    entries: Entries | None

    def is_complex(self) -> bool:
        """Say whether the weight is complex."""
        return self.meeting.weight.is_complex()

    def rows(self, grad: Tensor) -> Tensor:  # (samples, parameter), or (outputs, samples, parameter)
        """Compute the rows of the parameter from the gradient of one output, or from those of several."""
        return self.meeting.rows(self.param, self.entries, grad)


def pulled_rows(
    uses: Mapping[str, Sequence[Use]], grads: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor]:  # each (samples, parameter), or (outputs, samples, parameter)
    """Compute the rows of the parameters that a weight expression is computed from, in one pass through all of these.

    Args:
        uses: The uses of each layer in a batch.
        grads: The gradients of their results, for one output or for several.

    Returns:
        The rows, by layer. Other layers are left out.
    """
    parts = {
        layer: [(use.x, grad) for use, grad in zip(each, grads[layer], strict=True)]
        for layer, each in uses.items()
        if any(isinstance(use.x, Part) and use.x.entries is None for use in each)
    }
    if not parts:
        return {}
    met = {
        id(part.meeting): (part.meeting, grad) for each in parts.values() for part, grad in each if part.entries is None
    }
    params = {layer: each[0][0].param for layer, each in parts.items()}
    found = pulled(
        [meeting.weight for meeting, _ in met.values()],
        [meeting.weight_rows(grad) for meeting, grad in met.values()],
        list(params.values()),
    )
    simple = {
        layer: [part.rows(grad) for part, grad in each if part.entries is not None] for layer, each in parts.items()
    }
    count = next(iter(met.values()))[0].count
    return {
        layer: sum_over_uses([rows[..., :count, :], *simple[layer]]) for layer, rows in zip(params, found, strict=True)
    }


def rows_of_part(_module: nn.Module, part: Any, grad: Tensor) -> Tensor:
    """Compute rows as a rule does, from a `Part` in place of an input."""
    rows: Tensor = part.rows(grad)
    return rows


@dataclass(frozen=True)
class Following:
    """The junctions of some parameters, in the order of their calls.

    Attributes:
        junctions: The junctions. None stands for one that no treated parameter needs.
        marks: For each junction, what its weights do.
        layers: The parameters as layers.
        followed: All parameters whose calls count in the order, also those that are not treated.
    """

    junctions: tuple[Junction | None, ...] = ()
    marks: tuple[tuple[Mark, ...], ...] = ()
    layers: tuple[Layer, ...] = ()
    followed: frozenset[str] = frozenset()

    def without(self, params: frozenset[str]) -> "Following":
        """Leave some parameters out."""
        marks = tuple(tuple(mark for mark in each if mark.param not in params) for each in self.marks)
        junctions = tuple(junction if each else None for junction, each in zip(self.junctions, marks, strict=True))
        layers = tuple(
            layer for layer in self.layers if not params & {layer.full_name(param) for param in layer.params()}
        )
        return Following(junctions, marks, layers, self.followed)

    @property
    def treated(self) -> frozenset[str]:
        """The parameters whose junctions are recorded."""
        return frozenset(layer.full_name(param) for layer in self.layers for param in layer.params())

    def only(self, layers: Sequence[Layer]) -> "Following":
        """Leave out the parameters of layers that are not among these."""
        kept = {layer.name for layer in layers}
        return self.without(
            frozenset(
                layer.full_name(param) for layer in self.layers if layer.name not in kept for param in layer.params()
            )
        )

    @contextmanager
    def recording(self, module: nn.Module, batch: Tensor, recording: Recording) -> Iterator[None]:
        """Record the junctions of a forward pass. If they are not as planned, their layers are not recorded at all."""
        if not self.layers:
            yield
            return
        recorder = _Recorder(self, module, len(batch), recording)
        mark_samples(batch)
        with CallMode(identities(module, self.followed), recorder.join):
            yield
        recorder.finish()


NO_JUNCTIONS = Following()


@dataclass(frozen=True, eq=False)
class Joined:
    """A junction of a pass, its call, and its result as the node that gradients are taken at."""

    junction: Junction
    call: Call
    node: Tensor


class _AnotherWeightError(Exception):
    """A weight does not have the entries of its parameter that it had when the network was prepared."""


def uses_of(
    marks: Sequence[Mark], joined: Joined, num_samples: int, count: int, params: Mapping[str, Tensor]
) -> Iterator[tuple[Mark, Use]]:
    """Make what the rules of a junction's layers take.

    Args:
        marks: What the weights of the junction do.
        joined: The junction.
        num_samples: Number of samples of the batch, with its padding.
        count: Number of samples without the padding.
        params: The parameters by name.

    Raises:
        _AnotherWeightError: If a weight has other entries of its parameter than planned.
    """
    junction, call, node = joined.junction, joined.call, joined.node
    meetings: dict[Path, Meeting] = {}
    for mark in marks:
        entries = mark.entries
        if entries is not None:
            entries = entries.now(call.argument(mark.path), params[mark.param])
            if entries is None:
                raise _AnotherWeightError
        if mark.is_matrix:
            assert entries is not None
            x = junction.inputs(call, num_samples)
            kept = x[:count].detach()
            kept = kept if entries.scale == 1 else kept * entries.scale
            yield mark, Use(kept, node, x.requires_grad, (x.shape, node.shape))
        else:
            meeting = meetings.setdefault(mark.path, Meeting(junction, call, mark.path, node.ndim, num_samples, count))
            part = Part(meeting, params[mark.param], entries)
            has_samples = junction.axes[mark.path] is not None
            shape = node.shape if has_samples else torch.Size((num_samples, *meeting.weight.shape))
            yield mark, Use(part, node, passes_back=True, shapes=(shape, node.shape))


class _Recorder:
    def __init__(self, plan: Following, module: nn.Module, num_samples: int, recording: Recording) -> None:
        self._plan, self._num_samples, self._recording = plan, num_samples, recording
        self._params = dict(module.named_parameters())
        self._number, self._is_as_planned = 0, True
        self._uses: dict[str, list[Any]] = {layer.name: [] for layer in plan.layers}

    def join(self, call: Call) -> Any:
        number, self._number = self._number, self._number + 1
        result = call.function(*call.args, **call.kwargs)
        if number >= len(self._plan.junctions):
            self._is_as_planned = False
            return result
        junction = self._plan.junctions[number]
        if junction is None or not self._is_as_planned:
            return result
        if not (junction.accepts(call) and isinstance(result, Tensor) and result.requires_grad):
            self._is_as_planned = False
            return result
        n, count = self._num_samples, self._recording.count
        try:
            node = junction.node(result, n)
        except (RuntimeError, IndexError):
            self._is_as_planned = False
            return result
        try:
            for mark, use in uses_of(self._plan.marks[number], Joined(junction, call, node), n, count, self._params):
                self._uses[mark.layer].append(use)
        except _AnotherWeightError:
            self._is_as_planned = False
        return junction.unchanged(node).clone()

    def finish(self) -> None:
        """Add the uses to the recording, if every junction was as planned."""
        if self._is_as_planned and self._number == len(self._plan.junctions):
            self._recording.uses.update({name: uses for name, uses in self._uses.items() if uses})


def identities(module: nn.Module, names: frozenset[str]) -> dict[int, str]:
    """Map the identity of each named parameter to its name, for `CallMode`."""
    return {id(param): name for name, param in module.named_parameters() if name in names}
