"""The choice of outputs from the result of a network: `select`, a short expression or a function."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ntkgen.errors import InputError, ModelError

# What a user gives: text such as ``logits[:, -1, [5, 7]]``, or a function of the network's result.
Select = str | Callable[[Any], Any]
# Number of names of a result that an error lists.
MANY = 12


@dataclass(frozen=True)
class Selection:
    """The parsed text: a name or a number first, then names and indices, which are applied from left to right."""

    text: str
    steps: tuple[Any, ...]

    def __call__(self, result: Any) -> Any:
        """Take the selected outputs.

        Raises:
            ModelError: If the result has no such part.
        """
        value = result
        for step in self.steps:
            value = _part(value, step, self.text)
        return value


def parse(select: Select) -> Callable[[Any], Any]:
    """Read a selection. The text is parsed and never executed.

    >>> parse("logits[:, -1, [5, 7]]").steps
    ('logits', (slice(None, None, None), -1, [5, 7]))
    >>> parse("0[:, :3]").steps
    (0, (slice(None, None, None), slice(None, 3, None)))

    Raises:
        InputError: If the text is none of the allowed expressions, or the selection is neither text nor a function.
    """
    if not isinstance(select, str):
        if callable(select):
            return select
        raise InputError(
            f"A selection of outputs is text or a function, and is a {type(select).__name__}. Is it an index without "
            "the name of an output? Write it as text, such as 'logits[:, -1]'."
        )
    text = select.strip()
    is_index = text.startswith("[")  # of the only tensor that a network returns
    try:
        steps = _steps(ast.parse(f"_{text}" if is_index else text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"The selection {select!r} cannot be read: expected the name or the number of an output, and indices in "
            "brackets made of numbers, slices, lists of numbers and '...', such as logits, 'logits[:, -1, [5, 7]]' or "
            "'0[:, :3]'. Is it an expression of Python that computes something? Write a function of the network's "
            "result instead."
        ) from error
    return Selection(text, steps[1:] if is_index else steps)


def _steps(node: ast.expr) -> tuple[Any, ...]:
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Constant(value=int() | str() as name) if not isinstance(name, bool):
            return (name,)
        case ast.Attribute(value=inner, attr=name):
            return (*_steps(inner), name)
        case ast.Subscript(value=inner, slice=index):
            return (*_steps(inner), _index(index))
    raise ValueError(type(node).__name__)


def _index(node: ast.expr) -> Any:
    match node:
        case ast.Tuple(elts=parts):
            return tuple(_index(part) for part in parts)
        case ast.List(elts=parts):
            return [_number(part) for part in parts]
        case ast.Slice(lower=lower, upper=upper, step=step):
            return slice(*(None if part is None else _number(part) for part in (lower, upper, step)))
        case ast.Constant(value=value) if value is None or value is Ellipsis or isinstance(value, str):
            return value
    return _number(node)


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as number)) if not isinstance(number, bool):
            return -number
    raise ValueError(type(node).__name__)


def _part(value: Any, step: Any, text: str) -> Any:
    """Take one part of a result: by name, by number, or by an index of a tensor.

    Raises:
        ModelError: If there is no such part.
    """
    is_name = isinstance(step, str)
    if isinstance(value, Tensor):
        if not is_name:
            try:
                return value[step]
            except (IndexError, RuntimeError, TypeError) as error:
                raise ModelError(
                    f"The selection {text!r} does not fit the network's result: expected an index into a tensor of "
                    f"shape {tuple(value.shape[1:])} for each sample, found none "
                    f"({' '.join(str(error).split())[:120]}). Is an axis missing, or a number too large? The first "
                    "axis is that of the samples."
                ) from error
    elif isinstance(value, Mapping):
        if step in value if is_name else isinstance(step, int) and -len(value) <= step < len(value):
            return value[step] if is_name else list(value.values())[step]
    elif is_name and hasattr(value, step):
        return getattr(value, step)
    elif isinstance(value, list | tuple) and isinstance(step, int) and -len(value) <= step < len(value):
        return value[step]
    raise ModelError(
        f"The selection {text!r} takes no output of the network: expected that its result has {step!r}, found "
        f"{described(value)}. Is the name misspelt, or does the network return it only with another setting? Select "
        "one of the outputs that are there."
    )


def described(result: Any) -> str:
    """Describe the result of a network, with the names that can be selected."""
    if isinstance(result, Tensor):
        if result.ndim == 0:
            return "one number"
        return f"one tensor of shape {tuple(result.shape[1:])} for each sample, which an index selects from"
    if isinstance(result, Mapping):
        return f"a {type(result).__name__} with {_few(map(str, result))}"
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return f"a {type(result).__name__} with {_few(result._fields)}"
    if isinstance(result, list | tuple):
        return f"a {type(result).__name__} of {len(result)}, with the numbers {_few(map(str, range(len(result))))}"
    return f"a {type(result).__name__}"


def _few(names: Any) -> str:
    listed = list(names)
    return (", ".join(listed[:MANY]) + (", …" if len(listed) > MANY else "")) or "nothing"


def only_output(result: Any) -> Any:
    """Take the output of a network without a selection: its tensor, the only one of several parts, or ``logits``.

    Raises:
        ModelError: If it is not clear which part is meant.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        if "logits" in result or len(result) == 1:
            return result["logits"] if "logits" in result else next(iter(result.values()))
    elif isinstance(result, list | tuple) and len(result) == 1:
        return result[0]
    raise ModelError(
        f"The network returns several values, {described(result)}: expected one tensor, or to be told which. Does it "
        "return its states or its loss too? Choose with `select`, by a name or a number, such as select='logits' or "
        "select='0[:, -1]'."
    )
