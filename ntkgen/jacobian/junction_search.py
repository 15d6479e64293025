"""The search for the junctions of some parameters, in two passes that also serve the trial of a network."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ntkgen.jacobian.calls import Call, CallMode, Path, mark_samples
from ntkgen.jacobian.following import NO_JUNCTIONS, Following, Joined, Mark, identities, rows_of_part, uses_of
from ntkgen.jacobian.junction_rows import Entries, entries_of
from ntkgen.jacobian.junctions import Junction, convolution_like, junction_of
from ntkgen.jacobian.layers import CONVOLUTION, DENSE, Layer, LayerRule
from ntkgen.jacobian.recording import Recording


@dataclass
class _Seen:
    """The junctions of one pass. There is no junction for a call whose result is of no use."""

    calls: list[Call] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    joined: list[Joined | None] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)

    def key(self, number: int) -> Any:
        """Return what both passes must have in common."""
        call = self.calls[number]
        return call.name, tuple(call.weights.items()), call.activations

    def shapes(self, number: int) -> list[torch.Size]:
        """List the shapes of the tensors of a call."""
        call = self.calls[number]
        return [call.argument(path).shape for path in (*call.weights, *call.activations)]


class JunctionSearch:
    """Follows some parameters through a pass of one sample and a pass of three samples.

    The shapes of both passes tell the axis of the samples in every tensor.

    Args:
        module: The network.
        names: The parameters. Complex ones are not followed.

    Attributes:
        following: What was found, after the second pass.
    """

    def __init__(self, module: nn.Module, names: frozenset[str]) -> None:
        self._params = {
            name: param for name, param in module.named_parameters() if name in names and not param.is_complex()
        }
        self._first, self._second = _Seen(), _Seen()
        self.following = NO_JUNCTIONS

    @property
    def is_needed(self) -> bool:
        """Whether there are parameters to follow."""
        return bool(self._params)

    @contextmanager
    def alone(self, module: nn.Module, batch: Tensor, _recording: Recording) -> Iterator[None]:
        """Watch the pass of one sample."""

        def join(call: Call) -> Any:
            self._first.calls.append(call)
            self._first.results.append(call.function(*call.args, **call.kwargs))
            return self._first.results[-1]

        mark_samples(batch)
        mode = CallMode(identities(module, frozenset(self._params)), join)
        with mode:
            yield
        self._first.failed = mode.lost

    @contextmanager
    def together(self, module: nn.Module, batch: Tensor, recording: Recording) -> Iterator[None]:
        """Watch the pass of three samples, and record the junctions in it."""
        mark_samples(batch)
        mode = CallMode(identities(module, frozenset(self._params)), lambda call: self._join(call, len(batch)))
        with mode:
            yield
        if len(self._first.calls) != len(self._second.calls):
            return
        self._second.failed |= mode.lost | self._first.failed
        self.following = self._found()
        for marks, joined in zip(self.following.marks, self._second.joined, strict=True):
            if marks and joined is not None:
                for mark, use in uses_of(marks, joined, len(batch), recording.count, self._params):
                    recording.uses.setdefault(mark.layer, []).append(use)

    def _join(self, call: Call, num_samples: int) -> Any:
        seen, number = self._second, len(self._second.calls)
        result = call.function(*call.args, **call.kwargs)
        seen.calls.append(call)
        try:
            junction = self._junction(number, result)
            joined = None if junction is None else Joined(junction, call, junction.node(result, num_samples))
        except (ValueError, AttributeError, IndexError, RuntimeError):
            seen.failed.update(*call.weights.values())
            joined = None
        seen.joined.append(joined)
        return result if joined is None else joined.junction.unchanged(joined.node).clone()

    def _junction(self, number: int, result: Any) -> Junction | None:
        """Describe a junction; None if its result has no gradient.

        Raises:
            ValueError: If the passes differ, or the result is not one real tensor.
        """
        first, second = self._first, self._second
        if number >= len(first.calls) or first.key(number) != second.key(number):
            raise ValueError("the passes differ")
        if not isinstance(result, Tensor):
            parts = result if isinstance(result, list | tuple) else [result]
            if result is None or any(isinstance(part, Tensor) and part.requires_grad for part in parts):
                raise ValueError("no single result")
            return None
        if not result.requires_grad:
            return None
        call = second.calls[number]
        if call.name == "embedding" and call.given(5, "scale_grad_by_freq"):
            raise ValueError("a gradient that depends on the other samples")
        if result.is_complex():
            raise ValueError("a complex result")
        shapes = [first.results[number].shape, result.shape]
        return junction_of(call, first.shapes(number), second.shapes(number), shapes)

    def _found(self) -> Following:
        seen = self._second
        junctions = [None if joined is None else joined.junction for joined in seen.joined]
        marks: list[list[Mark]] = [[] for _ in junctions]
        layers: list[Layer] = []
        for name, param in self._params.items():
            if name not in seen.failed:
                _add_marks(name, param, seen.calls, junctions, marks, layers)
        names = frozenset(self._params)
        treated = frozenset(mark.param for each in marks for mark in each)
        found = Following(tuple(junctions), tuple(tuple(each) for each in marks), tuple(layers), names)
        return found.without(names - treated)


@dataclass(frozen=True)
class _Matrix:
    """Some entries of a parameter as a matrix, and the junctions that multiply with it.

    Attributes:
        positions: The entries of the flattened parameter, (channels, inputs).
        kind: The settings of a convolution.
        members: Numbers of the junctions.
    """

    positions: Tensor
    kind: str
    members: list[int]


def _add_marks(
    name: str,
    param: Tensor,
    calls: Sequence[Call],
    junctions: Sequence[Junction | None],
    marks: list[list[Mark]],
    layers: list[Layer],
) -> None:
    """Decide whether a parameter is treated as matrices or by rows, and mark its junctions."""
    owner, _, short = name.rpartition(".")
    own = [
        (number, path, names)
        for number, junction in enumerate(junctions)
        if junction is not None
        for path, names in junction.weights
        if name in names
    ]
    if not own:
        return
    entries = [
        entries_of(calls[number].argument(path), param) if names == {name} else None for number, path, names in own
    ]
    matrices = _matrices(own, entries, calls, junctions, param)
    if matrices is None:
        rule = LayerRule(vectors={short: rows_of_part})
        layers.append(Layer(name, nn.Identity(), rule, has_matrix=False, vectors=(short,), owner=owner))
        for (number, path, _), each in zip(own, entries, strict=True):
            marks[number].append(Mark(path, name, name, each, is_matrix=False))
        return
    for number, matrix in enumerate(matrices):
        title = name if len(matrices) == 1 else f"{name}[{number}]"
        module: nn.Module = nn.Identity()
        rule = dataclasses.replace(DENSE, matrix=short, vectors={})
        if matrix.kind:
            module = convolution_like(calls[own[matrix.members[0]][0]])
            rule = dataclasses.replace(CONVOLUTION, matrix=short, vectors={})
        positions = matrix.positions.flatten()
        layers.append(Layer(title, module, rule, has_matrix=True, vectors=(), owner=owner, positions=positions))
        for member in matrix.members:
            call, path, _ = own[member]
            marks[call].append(Mark(path, title, name, entries[member], is_matrix=True))


def _matrices(
    own: Sequence[tuple[int, Path, frozenset[str]]],
    entries: Sequence[Entries | None],
    calls: Sequence[Call],
    junctions: Sequence[Junction | None],
    param: Tensor,
) -> list[_Matrix] | None:
    """Find the matrices (channels, inputs) of entries of a parameter that its junctions multiply with.

    Returns:
        The matrices, or None if a junction is no matrix product, or if two matrices share some entries.
    """
    found: list[_Matrix] = []
    for member, ((number, path, _), each) in enumerate(zip(own, entries, strict=True)):
        junction, call = junctions[number], calls[number]
        if each is None or junction is None or junction.matrix != path:
            return None
        shaped = each.positions.view(call.argument(path).shape)
        shaped = shaped.mT if junction.form == "right" else shaped
        kind = str(convolution_like(call)) if junction.form == "convolution" else ""
        same = [matrix for matrix in found if torch.equal(matrix.positions, shaped) and matrix.kind == kind]
        if same:
            same[0].members.append(member)
        else:
            found.append(_Matrix(shaped, kind, [member]))
    counts = torch.cat([matrix.positions.flatten() for matrix in found]).bincount(minlength=param.numel())
    return found if bool((counts == 1).all()) else None
