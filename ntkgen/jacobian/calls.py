"""The calls of torch functions in a forward pass, and which of them join parameters with samples.

Tensors of a forward pass are of three kinds. A *weight expression* W = φ(θ) depends on parameters alone, such as a
scaled, masked, sliced or normalised weight. An *activation* depends on the samples. Everything else is a constant. A
call with a weight expression and an activation among its arguments is a *junction*. Parameters reach the outputs
through junctions only.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ntkgen.jacobian.decompositions import decomposition

# Where an argument is: its position or its name, then its position in a list or tuple.
Path = tuple[int | str, ...]
Names = frozenset[str]

_CHANGING = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul"))}
_WEIGHT_OF, _DEPENDS = "_ntkgen_weight_of", "_ntkgen_depends_on_samples"


@dataclass(frozen=True, eq=False)
class Call:
    """A junction, as it was called.

    Attributes:
        function: The torch function.
        args: Its positional arguments.
        kwargs: Its named arguments.
        weights: The parameters that each weight expression depends on, by its path.
        activations: The paths of the other tensors.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    weights: Mapping[Path, Names]
    activations: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Name of the function."""
        return str(getattr(self.function, "__name__", self.function))

    def argument(self, path: Path) -> Any:
        """Return an argument."""
        found: Any = self.kwargs[path[0]] if isinstance(path[0], str) else self.args[path[0]]
        for part in path[1:]:
            found = found[part]
        return found

    def given(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def called_with(self, values: Mapping[Path, Tensor]) -> Any:
        """Call the function with other tensors."""
        args = [_replaced(value, (index,), values) for index, value in enumerate(self.args)]
        return self.function(*args, **{key: _replaced(value, (key,), values) for key, value in self.kwargs.items()})


def _replaced(value: Any, path: Path, values: Mapping[Path, Tensor]) -> Any:
    if path in values:
        return values[path]
    if isinstance(value, list | tuple):
        parts = [_replaced(part, (*path, index), values) for index, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _tensors(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(part, (*path, index))


class CallMode(TorchFunctionMode):
    """Follows some parameters through a forward pass, and passes every junction to a function.

    Composite functions of torch, such as `lstm`, are replaced by simple ones, whose calls are junctions.

    Args:
        params: The names of the parameters that are followed, by their identity.
        join: Makes the junction's call, and returns its result.

    Attributes:
        lost: Parameters whose way could not be followed.
    """

    def __init__(self, params: Mapping[int, str], join: Callable[[Call], Any]) -> None:
        super().__init__()
        self._params = params
        self._join = join
        self.lost: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args, ())]
        for key, value in kwargs.items():
            tensors += _tensors(value, (key,))
        weights = {path: names for path, tensor in tensors if (names := self._weight_of(tensor))}
        depends = any(getattr(tensor, _DEPENDS, False) for _, tensor in tensors)
        if not weights or not depends:
            result = func(*args, **kwargs)
            return self._marked(func, args, result, frozenset().union(*weights.values()), depends=depends)
        simple = decomposition(func, args)
        if simple is not None:
            for path, tensor in tensors:
                if path not in weights:  # a first state may be constant; it meets the weights as later ones do
                    mark_samples(tensor)
            with self:
                return simple(*args, **kwargs)
        call = Call(func, args, kwargs, weights, tuple(path for path, _ in tensors if path not in weights))
        return self._marked(func, args, self._join(call), frozenset(), depends=True)

    def _weight_of(self, tensor: Tensor) -> Names:
        name = self._params.get(id(tensor))
        return frozenset([name]) if name is not None else getattr(tensor, _WEIGHT_OF, frozenset())

    def _marked(self, func: Any, args: Any, result: Any, names: Names, *, depends: bool) -> Any:
        """Mark what a call has computed."""
        found = [tensor for _, tensor in _tensors(result, ())]
        if _changes(func) and args and isinstance(args[0], Tensor):
            found.append(args[0])
            if names and args[0] is not result:  # such as a part of a constant that becomes a weight
                self.lost.update(names)
        for tensor in found:
            if depends:
                mark_samples(tensor)
            elif names and tensor.requires_grad:
                setattr(tensor, _WEIGHT_OF, names)
        return result


def mark_samples(tensor: Tensor) -> None:
    """Mark a tensor as an activation."""
    setattr(tensor, _DEPENDS, True)


def _changes(func: Any) -> bool:
    """Say whether a function changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in _CHANGING or (name.endswith("_") and not name.endswith("__"))
