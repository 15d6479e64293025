"""Any function of a network and any samples, as a module that maps the numbers of samples to (samples, outputs).

The engine computes the kernel of a module that maps one tensor to one matrix of outputs. An `Adapter` makes such a
module from a user's module, samples of any form, functions of both, and a selection of outputs and parameters.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ntkgen.errors import InputError, ModelError
from ntkgen.jacobian.batches import checked_batches
from ntkgen.jacobian.evaluation import OutputFormError, PreparedCopy, require_plain_module, unwrapped
from ntkgen.jacobian.failures import NotInThisDtypeError, explained_by
from ntkgen.jacobian.patterns import as_patterns, chosen_names, plain
from ntkgen.jacobian.samples import Arguments, Batch, Data, data_of, is_one_tensor
from ntkgen.jacobian.selection import Select, described, only_output, parse

# A function of a module and a batch. Its outputs have the samples as first axis.
Function = Callable[[nn.Module, Any], Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What a kernel is of: functions of a network, some of their outputs, and some of the parameters.

    Attributes:
        functions: The functions. Their outputs are joined. None means the network itself.
        select: The selection of outputs.
        params: Patterns of the names of parameters. None means all trainable ones.
        columns: The functions of the columns, if they are others than those of the rows.
    """

    functions: tuple[Function, ...] = ()
    select: Select | None = None
    params: tuple[str, ...] = ()
    columns: tuple[Function, ...] = ()

    @classmethod
    def of(
        cls,
        function: Function | Sequence[Function] | None = None,
        select: Select | None = None,
        params: str | Sequence[str] | None = None,
        columns_function: Function | Sequence[Function] | None = None,
    ) -> "Target":
        """Check what a user gives.

        Raises:
            InputError: If a function cannot be called, a selection cannot be read, or patterns are not texts.
        """
        if select is not None:
            parse(select)
        return cls(
            _functions(function, "function"),
            select,
            as_patterns(params),
            _functions(columns_function, "columns_function"),
        )

    @property
    def is_plain(self) -> bool:
        """Whether the kernel is that of all outputs and all trainable parameters of the network."""
        return self == Target()

    def described(self) -> dict[str, Any]:
        """Describe what is not the default, with plain values. A function is described by its name."""
        values = {
            "function": [qualified_name(function) for function in self.functions],
            "select": self.select
            if self.select is None or isinstance(self.select, str)
            else qualified_name(self.select),
            "params": list(self.params),
            "columns_function": [qualified_name(function) for function in self.columns],
        }
        return {name: value for name, value in values.items() if value}


def _functions(given: Function | Sequence[Function] | None, setting: str) -> tuple[Function, ...]:
    """Check one function or several.

    Raises:
        InputError: If something else was given.
    """
    if given is None:
        return ()
    functions = (given,) if callable(given) else tuple(given if isinstance(given, Sequence) else ())
    if not functions or not all(map(callable, functions)):
        raise InputError(
            f"`{setting}` must be a function of a module and a batch, or a list of several, and is a "
            f"{type(given).__name__}. Was its result passed? Pass the function itself, such as {setting}=residual."
        )
    return functions


def qualified_name(function: Callable[..., Any]) -> str:
    """Return the name of a function with its module, or that of the class of another callable object.

    >>> qualified_name(qualified_name), qualified_name(functools.partial(parse, "logits"))
    ('ntkgen.jacobian.adapter.qualified_name', 'ntkgen.jacobian.selection.parse')
    """
    if isinstance(function, functools.partial):
        return qualified_name(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


class Adapter(PreparedCopy):
    """A module that maps the numbers of samples, (n,), to a matrix of real outputs, (n, outputs).

    Its parameters and modules have the names of the user's module. The samples are shared by all copies.
    """

    def __init__(self, network: nn.Module, data: Data, target: Target) -> None:
        super().__init__()
        self._ntkgen_network = unwrapped(network)
        self._ntkgen_data = data
        self._ntkgen_target = target
        # A copy of the module binds the functions in these lists.
        self._ntkgen_functions, self._ntkgen_columns = list(target.functions), list(target.columns)
        self._ntkgen_select = only_output if target.select is None else parse(target.select)
        self._ntkgen_chosen = chosen_names(network, target.params) if target.params else None
        self._share_tensors()

    # the names of the user's module -----------------------------------------------------------------------------------

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,  # noqa: FBT001, FBT002 - the signature of torch
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the modules of the user's module, which is the first."""
        yield from self._ntkgen_network.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of the user's module."""
        return self._ntkgen_network.state_dict(*args, **kwargs)

    def eval(self) -> "Adapter":
        """Put the user's module into evaluation mode, by its own method."""
        self._ntkgen_network.eval()
        self.training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":  # noqa: FBT001, FBT002
        self._ntkgen_network._apply(fn, recurse)
        self._share_tensors()
        return self

    def __getattr__(self, name: str) -> Any:
        """Find a module by its name in the user's module, as `torch.func.functional_call` does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_ntkgen_network"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        other: Adapter = object.__new__(type(self))
        memo[id(self)] = other
        shared = ("_parameters", "_buffers")
        other.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in shared}
        )
        other._share_tensors()
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._share_tensors()

    def _share_tensors(self) -> None:
        network = self.__dict__["_modules"]["_ntkgen_network"]
        self.__dict__["_parameters"], self.__dict__["_buffers"] = network._parameters, network._buffers

    def described(self) -> dict[str, Any]:
        """Describe what the kernel is of, with plain values: functions, selection, patterns, names of the inputs."""
        names = self._ntkgen_data.names
        return self._ntkgen_target.described() | ({} if names is None else {"inputs": sorted(names)})

    def prepare_copy(self) -> None:
        """Freeze the parameters that were not chosen. Only copies are changed."""
        if self._ntkgen_chosen is not None:
            for name, param in self.named_parameters(remove_duplicate=False):
                if plain(name) not in self._ntkgen_chosen:
                    param.requires_grad = False

    # the outputs ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        numbers: Tensor,  # (samples,), int64
    ) -> Tensor:  # (samples, outputs)
        """Call the functions, or the network itself, on some samples."""
        if not self._ntkgen_columns:
            return self._outputs(self._ntkgen_functions, numbers)
        is_column = numbers >= self._ntkgen_data.num_rows
        places = [(~is_column).nonzero().flatten(), is_column.nonzero().flatten()]
        parts = [
            self._outputs(functions, numbers[place])
            for functions, place in zip((self._ntkgen_functions, self._ntkgen_columns), places, strict=True)
            if len(place)
        ]
        if len(parts) == 1:
            return parts[0]
        _require_same_width(*parts)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _outputs(self, functions: Sequence[Function], numbers: Tensor) -> Tensor:
        if not functions:
            return self._matrix(self._called(call, numbers), len(numbers))
        with torch.enable_grad():  # a function may differentiate
            results = [self._called(function, numbers) for function in functions]
        matrices = [self._matrix(result, len(numbers)) for result in results]  # outside, without a graph where none is
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)

    def _called(self, function: Function, numbers: Tensor) -> Any:
        """Call a function of the user.

        Raises:
            NotInThisDtypeError: If it raises an error.
            Exception: If memory is exhausted, or the error is one that others explain.
        """
        like = _first_number(self._ntkgen_network)
        batch = self._ntkgen_data.take(numbers, _real(like.dtype), like.device)
        with explained_by(lambda error: _failed(error, function, self._ntkgen_data)):
            result = function(self._ntkgen_network, batch)
        with explained_by(lambda error: _not_selected(error, self._ntkgen_select, result)):
            return self._ntkgen_select(result)

    def _matrix(self, result: Any, count: int) -> Tensor:
        """Convert outputs to a matrix of real numbers. A complex output becomes two real ones.

        Raises:
            ModelError: If the result is no tensor with the samples as first axis, or has no outputs.
            NotInThisDtypeError: If the outputs have another dtype than the parameters.
        """
        if not isinstance(result, Tensor) or result.ndim == 0 or len(result) != count:
            found = tuple(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise ModelError(
                f"The outputs must be a tensor whose first axis is that of the {count} samples, and are {found}. Does "
                "the function or the selection sum over the samples, or take one of them? Keep the first axis, for "
                "example with ':' as the first index."
            )
        outputs = result.reshape(count, -1)
        if outputs.shape[1] == 0:
            raise ModelError(
                f"No output is selected: expected at least one for each sample, found the shape "
                f"{tuple(result.shape[1:])}. "
                "Is the slice of the selection empty? Select at least one output."
            )
        expected = _real(_first_number(self._ntkgen_network).dtype)
        if _real(outputs.dtype) != expected:
            raise NotInThisDtypeError(
                f"The outputs are {outputs.dtype} where parameters and samples are {expected}: the forward pass rounds "
                "on its own, or selects numbers that have no gradient. Remove the cast, so that `precision` says how "
                "the kernel is computed."
            )
        return torch.view_as_real(outputs.resolve_conj()).reshape(count, -1) if outputs.is_complex() else outputs


def _require_same_width(rows: Tensor, columns: Tensor) -> None:
    if rows.shape[1] != columns.shape[1]:
        raise ModelError(
            f"The functions of rows and columns have different numbers of outputs: expected equal ones, found "
            f"{rows.shape[1]} and {columns.shape[1]}. Is one of them a vector? Pass both as `function`, which joins "
            "their outputs, and take the block that is wanted."
        )


def call(network: nn.Module, batch: Arguments) -> Any:
    """Call a network with a batch: a dictionary as keyword arguments, and a tuple as positional ones."""
    if isinstance(batch, dict):
        return network(**batch)
    return network(*batch) if isinstance(batch, tuple) else network(batch)


def _first_number(network: nn.Module) -> Tensor:
    """Return the first parameter of real or complex numbers, whose dtype and device are those of the copy."""
    return next(param for param in network.parameters() if param.is_floating_point() or param.is_complex())


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _not_selected(error: Exception, select: Callable[..., Any], result: Any) -> str:
    return (
        f"The selection {qualified_name(select)} raises an error ({_told(error)}): expected outputs of the network's "
        f"result, found {described(result)}. Does it name an output that is not there? Select one that is there."
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _failed(error: Exception, function: Function, data: Data) -> str:
    text = _told(error)
    who = "The network" if function is call else f"The function {qualified_name(function)}"
    is_of_integers = not any(leaf.is_floating_point() for leaf in data.leaves)
    if any(word in text for word in ("dtype", "same type", "Float", "Double", "Long")):
        cause = "Does a forward pass cast, or hold a tensor that is no buffer? Remove the cast, or use register_buffer."
        if is_of_integers:
            cause = (
                "Does the network need floating-point numbers instead of integers? Convert the samples, as x.float()."
            )
    else:
        cause = "Does it expect other inputs, another shape or another size? Pass samples that it accepts."
    return f"{who} does not accept these samples ({data}): expected outputs, found an error ({text}). {cause}"


# the networks and samples that the engine gets ------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A network and the samples of rows and columns, as the engine takes them.

    Attributes:
        model: The user's module, or an `Adapter` of it.
        rows: The samples of the rows, or their numbers.
        columns: The samples of the columns, or their numbers; None if they are those of the rows.
        data: The samples behind the numbers.
    """

    model: nn.Module
    rows: Tensor
    columns: Tensor | None = None
    data: Data | None = None

    @classmethod
    def of(cls, model: nn.Module, x1: Batch, x2: Batch | None = None, target: Target = Target()) -> "Given":
        """Check a network and samples. One tensor and a plain target need no adapter.

        Raises:
            InputError: If samples are missing or no numbers, or if the target does not fit the network.
            ShapeError: If samples have different shapes, or inputs different numbers of samples.
            ModelError: If the model is not a module that can be differentiated.
        """
        if target.is_plain and is_one_tensor(x1) and (x2 is None or is_one_tensor(x2)):
            return cls(model, *checked_batches(x1, x2))  # type: ignore[arg-type]
        require_plain_module(model)
        if target.columns and x2 is None:
            x2 = x1
        return cls.adapted(model, data_of(x1, x2), target)

    @property
    def network(self) -> nn.Module:
        """The user's module, without an adapter."""
        return self.model._ntkgen_network if isinstance(self.model, Adapter) else self.model

    @property
    def target(self) -> Target:
        """What the kernel is of."""
        return self.model._ntkgen_target if isinstance(self.model, Adapter) else Target()

    @classmethod
    def kept(cls, model: nn.Module, x1: Batch, x2: Batch | None = None, target: Target = Target()) -> "Given":
        """Check a network and samples as `of` does, and copy the samples. The caller may change its own later.

        Raises:
            InputError: If samples are missing or no numbers, or if the target does not fit the network.
            ShapeError: If samples have different shapes, or inputs different numbers of samples.
            ModelError: If the model is not a module that can be differentiated.
        """
        given = cls.of(model, x1, x2, target)
        if given.data is not None:
            return cls.adapted(model, given.data.copied(), target)
        columns = None if given.columns is None else given.columns.clone()
        return cls(model, given.rows.clone(), columns)

    @classmethod
    def adapted(cls, model: nn.Module, data: Data, target: Target) -> "Given":
        """Put an adapter around a network."""
        return cls(Adapter(model, data, target), *data.numbers(are_alike=not target.columns), data)

    def attempt(self, work: Callable[["Given"], T]) -> T:
        """Do some work. If the outputs of the network are no matrix, do it again with an adapter."""
        if self.data is not None:
            return work(self)
        try:
            return work(self)
        except OutputFormError:
            pass
        return work(self.adapted(self.model, data_of(self.rows, self.columns), Target()))
