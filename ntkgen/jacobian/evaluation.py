"""The copy of a user's module, in evaluation mode and in the compute dtype, and the calls of a network."""

import contextlib
import copy
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ntkgen.errors import ModelError
from ntkgen.jacobian.precision import default_dtype_of

# Maximum number of parts that are shared because they cannot be copied. A network with more such parts is refused.
MAX_SHARED_PARTS = 1000

Memo = dict[int, Any]


class OutputFormError(ModelError):
    """The outputs of a network are no matrix of real numbers. An adapter may make one from them."""


class PreparedCopy(nn.Module):
    """A module that changes its own evaluation copies."""

    def prepare_copy(self) -> None:
        """Change a copy, which is in evaluation mode and has its dtype."""


def outputs_of(module: nn.Module, batch: Tensor) -> Tensor:
    """Call a network on a clone of a batch. Every call of a network uses this function, or clones the batch too.

    A network may change its input in place. The clone protects the caller's tensor and batches that are used again.
    """
    with default_dtype_of(module):
        outputs: Tensor = module(batch.clone())
    return outputs


@contextlib.contextmanager
def without_kept_graphs() -> Iterator[None]:
    """Explain the error of a network that keeps computed tensors, with their graph, for its next call.

    Raises:
        ModelError: If a graph is differentiated again after it was freed.
        RuntimeError: If another error occurs. It is raised unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ModelError(
            "The network returns a result of an earlier call: expected each call to compute its outputs again, found "
            "a graph that was differentiated before. Does the network keep results in a dictionary or a cache? Remove "
            "this cache, or detach the results and do not use them in the outputs."
        ) from error


def as_input(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Move a batch to a device, and convert it to a dtype. Token ids keep their integer dtype."""
    with torch.inference_mode(mode=False):
        moved = x.detach().to(device, dtype if x.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved  # autograd cannot save tensors of inference mode


def evaluation_copy(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Copy a module, and put the copy into evaluation mode, another dtype and contiguous strides.

    The user's module is not changed. Real parameters and buffers get the dtype. Complex ones get the complex dtype of
    the same precision. Integers keep their dtype. Objects that `copy.deepcopy` refuses (a lock, a file, a process
    group) are shared with the original. Computed tensors are detached.

    Raises:
        ModelError: If the module cannot be copied, or its parameters have no values.
    """
    require_plain_module(model)
    with torch.inference_mode(mode=False):
        module = _not_compiled(_copied(model, _cast_tensors(model, dtype, device)))
        _into_evaluation_mode(module)
        _cast(module, dtype, device)
        for child in module.modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag):
                child.sparse = False  # the same function; sparse gradients have no second derivative
        for param in module.parameters():  # bits must not depend on a channels-last format
            param.data = param.data.resolve_conj().contiguous()
        if isinstance(module, PreparedCopy):
            module.prepare_copy()
    return module


def _not_compiled(module: nn.Module) -> nn.Module:
    """Replace wrappers of torch.compile by their modules, which compute the same and whose layers have hooks."""
    for child in list(module.modules()):
        for name, part in child._modules.items():
            child._modules[name] = None if part is None else unwrapped(part)
    return unwrapped(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside a wrapper of torch.compile, or the module itself."""
    # compared by name, because the import of torch._dynamo takes seconds
    is_compiled = type(module).__module__ == "torch._dynamo.eval_frame" and isinstance(module._orig_mod, nn.Module)
    return module._orig_mod if is_compiled else module  # type: ignore[return-value]


def _into_evaluation_mode(module: nn.Module) -> None:
    """Call ``eval``. Its result is not used, because it may be None if the user has overridden ``train``.

    Raises:
        ModelError: If the call raises an error.
    """
    try:
        module.eval()
    except Exception as error:  # eval may be the user's code
        raise ModelError(
            f"{class_name(module)} cannot be put into evaluation mode (eval() raised {_described(error)}): expected "
            "a module whose eval() and train(mode) work. Does the module, or a part of it, define its own train "
            "method with other arguments? Rename that method."
        ) from error


def _cast(module: nn.Module, dtype: torch.dtype, device: torch.device | None) -> None:
    """Convert real and complex tensors to a dtype. `nn.Module.to` would drop imaginary parts."""
    module._apply(lambda tensor: _as_dtype(tensor, dtype, device))


def _as_dtype(tensor: Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    if tensor.is_complex():
        return tensor.to(device, dtype.to_complex())
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _cast_tensors(model: nn.Module, dtype: torch.dtype, device: torch.device | None) -> Memo:
    """Convert parameters for `copy.deepcopy`, which would otherwise copy them before they are converted.

    The empty dictionaries of hooks are made here too.
    """
    memo: Memo = {}
    for child in model.modules():  # ten empty dictionaries each, whose general copies take most of the time
        memo.update(
            (id(value), OrderedDict()) for value in vars(child).values() if type(value) is OrderedDict and not value
        )
    for param in model.parameters():
        if type(param) is nn.Parameter and param.is_leaf:
            cast = _as_dtype(param.detach(), dtype, device)
            data = cast.clone() if cast.data_ptr() == param.data_ptr() else cast
            memo[id(param)] = nn.Parameter(data, requires_grad=param.requires_grad)
    return memo


def require_matrix(outputs: object, count: int) -> None:
    """Refuse outputs that are not (samples, outputs), or are complex.

    Raises:
        OutputFormError: If they are no matrix of real numbers.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != count:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise OutputFormError(
            f"The network must return one row per sample, ({count}, outputs), and returned {found}. Is a "
            "flatten missing, or does it return several values? Wrap it in a module that returns one such tensor."
        )
    if outputs.is_complex():
        raise OutputFormError(
            f"The network returns complex numbers, {outputs.dtype}: expected real ones, because kernels of "
            "complex outputs are not supported. Is a real part or an absolute value missing at the end? Wrap it in a "
            "module that returns torch.view_as_real(outputs).flatten(1), which has two real outputs for each."
        )


def require_own_parameters(outputs: Tensor, model: nn.Module) -> None:
    """Refuse outputs of the copy that depend on parameters of the user's module.

    Raises:
        ModelError: If they depend on such a parameter. The kernel would lack its part.
    """
    originals = {id(param): name for name, param in model.named_parameters()}
    seen, open_nodes = set(), [outputs.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        open_nodes += [before for before, _ in node.next_functions]
        leaf = getattr(node, "variable", None)  # only nodes that accumulate the gradient of a leaf have a variable
        if id(leaf) in originals:
            raise ModelError(
                f"{class_name(model)} cannot be copied: its copy was expected to use its own parameters, and uses "
                f"{originals[id(leaf)]} of the original. Does a function or an object in the network refer to the "
                "network by a global name? Pass the module as self or as an argument instead."
            )


# refusals -------------------------------------------------------------------------------------------------------------


def require_plain_module(model: nn.Module) -> None:
    """Refuse modules whose parameters have no values, or whose operations torch cannot differentiate.

    Raises:
        ModelError: If a part of the model is such a module, or the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"A kernel needs a network: expected a torch.nn.Module, found {type(model).__name__}. Is it a "
            "function, a class that was not called, or a state_dict? Pass the module that has the parameters."
        )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{name} of {class_name(model)} is not initialised: expected numbers, found a lazy parameter whose "
                "shape is not known before the first call. Call the network once on a batch. Then train or load it."
            )
        if tensor.is_meta:
            raise ModelError(
                f"{name} of {class_name(model)} is on the device meta: expected numbers, found only a shape. Was "
                "the network built without its weights? Load them with load_state_dict(…, assign=True)."
            )
        if tensor.is_quantized:
            raise ModelError(_not_differentiable(model, name, "is quantised"))
    for name, child in model.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise ModelError(_not_differentiable(model, name, "is a TorchScript module"))
        if type(child).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ModelError(_not_differentiable(model, name, "is a quantised module"))


def class_name(model: nn.Module) -> str:
    """Return the name of the class of the user's module, which is the first module of an adapter too."""
    return type(next(model.modules())).__name__


def _not_differentiable(model: nn.Module, name: str, what: str) -> str:
    return (
        f"{name or 'The network'} of {class_name(model)} {what}: expected a plain torch.nn.Module, which can be "
        "recorded and differentiated in any dtype. Was it converted for deployment? Pass the original module."
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# copying --------------------------------------------------------------------------------------------------------------


class _DetachedCopies(TorchFunctionMode):
    """Let `copy.deepcopy` copy computed tensors, such as kept activations, and detach their copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copied(model: nn.Module, tensors: Memo) -> nn.Module:
    """Copy a module. Parts that cannot be copied are shared with the original.

    Args:
        model: The module.
        tensors: Copies of some of its tensors, by the identity of the original.

    Raises:
        ModelError: If the module itself or one of its tensors cannot be copied.
    """
    try:
        with _DetachedCopies():
            module, memo = _deepcopied(model, tensors)
            binding = _Binding(memo)
            for child in (module, *module.modules()):
                binding.bind_items(vars(child))
    except Exception as error:  # parts of a network may raise any error
        raise ModelError(
            f"{class_name(model)} cannot be copied ({_described(error)}): expected a module that copy.deepcopy "
            "accepts, except for locks, files and similar objects. Does it define __deepcopy__ or __getstate__? Pass "
            "a newly built module that has loaded the same state."
        ) from error
    return module


def _deepcopied(model: nn.Module, tensors: Memo) -> tuple[nn.Module, Memo]:
    memo: Memo = dict(tensors)
    with contextlib.suppress(Exception):  # parts of a network may raise any error
        return copy.deepcopy(model, memo), memo
    memo = {**_shared_parts(model), **tensors}
    return copy.deepcopy(model, memo), memo


def _shared_parts(model: nn.Module) -> Memo:
    """Find the parts that cannot be copied, and return a memo that shares them. Tensors are not copied meanwhile."""
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    shared: Memo = {}
    for _ in range(MAX_SHARED_PARTS):
        try:
            copy.deepcopy(model, {**tensors, **shared})
        except Exception as error:
            part = _not_copied(error)
            if isinstance(part, Tensor | nn.Module):
                raise
            shared[id(part)] = part
        else:
            break
    return shared


def _not_copied(error: Exception) -> object:
    """Find the object that `copy.deepcopy` could not copy: the argument of its innermost recursive call."""
    part, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is copy.deepcopy.__code__:
            part = trace.tb_frame.f_locals["x"]
        trace = trace.tb_next
    return part


class _Binding:
    """Make functions and weak references in a copy refer to the copy. `copy.deepcopy` does not copy them.

    A function that is defined in a method, such as ``self.act = lambda x: x * self.slope``, refers to its module. In
    the copy it would still use the parameters of the user's module.
    """

    def __init__(self, memo: Memo) -> None:
        self._memo = memo
        self._seen: set[int] = set()

    def bind_items(self, items: dict[Any, Any] | list[Any]) -> None:
        """Bind the values of a container that belongs to the copy."""
        if id(items) in self._seen:
            return
        self._seen.add(id(items))
        for key, value in list(items.items() if isinstance(items, dict) else enumerate(items)):
            if (bound := self._bound(value)) is not value:
                items[key] = bound
            elif (
                isinstance(value, dict | list) and value and id(value) not in self._memo
            ):  # shared containers are not changed
                self.bind_items(value)

    def _bound(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType) and (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return self._function(value)
        if type(value) is functools.partial:
            return functools.partial(self._bound(value.func), *value.args, **value.keywords)
        if type(value) is weakref.ref and id(target := value()) in self._memo:
            return weakref.ref(self._memo[id(target)])
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Create a copy of a function whose closure and defaults refer to copies."""
        if id(function) in self._memo:
            known: types.FunctionType = self._memo[id(function)]
            return known
        held = function.__closure__ or ()
        new = [cell for cell in held if id(cell) not in self._memo]  # functions with a common variable share its cell
        self._memo.update((id(cell), types.CellType()) for cell in new)
        cells = tuple(self._memo[id(cell)] for cell in held)
        defaults = None if function.__defaults__ is None else tuple(map(self._copied, function.__defaults__))
        bound = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
        bound.__module__, bound.__qualname__, bound.__doc__ = (
            function.__module__,
            function.__qualname__,
            function.__doc__,
        )
        bound.__dict__.update(function.__dict__)
        self._memo[id(function)] = bound  # before its cells are filled, because it may refer to itself
        for cell in new:
            with contextlib.suppress(ValueError):  # the cell may be empty
                self._memo[id(cell)].cell_contents = self._copied(cell.cell_contents)
        if function.__kwdefaults__ is not None:
            bound.__kwdefaults__ = {name: self._copied(value) for name, value in function.__kwdefaults__.items()}
        return bound

    def _copied(self, value: Any) -> Any:
        """Find the copy of a value in a closure. A container is copied too, because the function may write into it."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if type(value) in {list, dict, set, tuple}:
            memo = dict(self._memo)
            with contextlib.suppress(Exception):  # a container that cannot be copied is shared
                copied = copy.deepcopy(value, memo)
                self._memo.update(memo)
                return copied
        return self._bound(value)
