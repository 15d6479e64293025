"""Our copy of a user's module, in evaluation mode and another dtype, and how a network is called."""

import contextlib
import copy
import functools
import types
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ntkgen.errors import ModelError

# Maximum number of parts that cannot be copied and are shared. A network with more of them is refused.
MAX_SHARED_PARTS = 1000

Memo = dict[int, Any]


def outputs_of(module: nn.Module, batch: Tensor) -> Tensor:
    """Call a network on a clone of a batch. Every call of a network is made here, or clones as this does.

    A network may work in place on what it is given: neither the caller's tensor nor one that is used again is given.
    """
    outputs: Tensor = module(batch.clone())
    return outputs


@contextlib.contextmanager
def without_kept_graphs() -> Iterator[None]:
    """Explain the error of a network that keeps what it computed, with its graph, for its next call.

    Raises:
        ModelError: If a graph that was used up already is differentiated again.
        RuntimeError: If it is another one, as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ModelError(
            "The network returns what an earlier call computed: expected each call to compute its outputs anew, found "
            "a graph that was differentiated already. Does it keep results in a dictionary or a cache? Remove that, "
            "or keep them detached and out of the outputs."
        ) from error


def as_input(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Move a batch to where and how the network computes; token ids keep their integer dtype."""
    with torch.inference_mode(mode=False):
        moved = x.detach().to(device, dtype if x.is_floating_point() else None)
        return moved.clone() if moved.is_inference() else moved  # autograd cannot save what inference mode made


def evaluation_copy(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """Copy a module into evaluation mode, another dtype and plain strides; the user's own is left as it is.

    Real parameters and buffers get the dtype, complex ones the complex dtype of that precision; integers keep theirs.
    What `copy.deepcopy` refuses (a lock, a file, a process group) is shared, and what was computed is kept detached.

    Raises:
        ModelError: If it cannot be copied, or holds no numbers that could be.
    """
    require_plain_module(model)
    with torch.inference_mode(mode=False):
        module = _not_compiled(_copied(model))
        _into_evaluation_mode(module)
        _cast(module, dtype, device)
        for child in module.modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag):
                child.sparse = False  # the same function; sparse gradients cannot be differentiated on
        for param in module.parameters():  # bits must not depend on whether it was trained channels-last
            param.data = param.data.resolve_conj().contiguous()
    return module


def _not_compiled(module: nn.Module) -> nn.Module:
    """Take the modules that torch.compile has wrapped: the same function, whose layers can be followed."""
    for child in list(module.modules()):
        for name, part in child._modules.items():
            child._modules[name] = None if part is None else _wrapped_by_compile(part)
    return _wrapped_by_compile(module)


def _wrapped_by_compile(module: nn.Module) -> nn.Module:
    # by name, since to import what compiles takes seconds
    is_compiled = type(module).__module__ == "torch._dynamo.eval_frame" and isinstance(module._orig_mod, nn.Module)
    return module._orig_mod if is_compiled else module  # type: ignore[return-value]


def _into_evaluation_mode(module: nn.Module) -> None:
    """Call ``eval``, which may return nothing where ``train`` is the user's own.

    Raises:
        ModelError: If it raises.
    """
    try:
        module.eval()
    except Exception as error:  # it may be somebody else's code
        raise ModelError(
            f"{type(module).__name__} cannot be put into evaluation mode (eval() raised {_described(error)}): expected "
            "a module whose eval() and train(mode) work. Does it, or a part of it, define a train method of its own "
            "that takes other arguments? Rename that method."
        ) from error


def _cast(module: nn.Module, dtype: torch.dtype, device: torch.device | None) -> None:
    """Change the dtype of real and of complex numbers. `nn.Module.to` would drop imaginary parts."""

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, dtype.to_complex())
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    module._apply(cast)


def require_real_outputs(outputs: object) -> None:
    """Refuse a network whose outputs are complex.

    Raises:
        ModelError: If they are.
    """
    if isinstance(outputs, Tensor) and outputs.is_complex():
        raise ModelError(
            f"The network returns complex numbers, {outputs.dtype}: expected real ones, because kernels of "
            "complex outputs are not supported. Is a real part or an absolute value missing at the end? Wrap it in a "
            "module that returns torch.view_as_real(outputs).flatten(1), for two outputs in place of each."
        )


def require_own_parameters(outputs: Tensor, model: nn.Module) -> None:
    """Refuse outputs of our copy that depend on parameters of the user's own module, of which it is a copy.

    Raises:
        ModelError: If they do: the kernel would lack the rows of these.
    """
    theirs = {id(param): name for name, param in model.named_parameters()}
    seen, open_nodes = set(), [outputs.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        open_nodes += [before for before, _ in node.next_functions]
        leaf = getattr(node, "variable", None)  # of the nodes that accumulate the gradient of a leaf
        if id(leaf) in theirs:
            raise ModelError(
                f"{type(model).__name__} cannot be copied: its copy was expected to use its own parameters, and uses "
                f"{theirs[id(leaf)]} of the original. Does a function or an object that it holds refer to the network "
                "by a global name? Let it refer to the module that it is called on, through self or an argument."
            )


# refusals -------------------------------------------------------------------------------------------------------------


def require_plain_module(model: nn.Module) -> None:
    """Refuse modules whose parameters have no values yet, or that are not made of torch's differentiable operations.

    Raises:
        ModelError: If there is one, or it is no module at all.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"A kernel is that of a network: expected a torch.nn.Module, found {type(model).__name__}. Is it a "
            "function, a class that was not called, or a state_dict? Pass the module that has the parameters."
        )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{name} of {type(model).__name__} is not initialised: expected numbers, found a lazy parameter whose "
                "shape is not known before the first call. Call the network once on a batch, and then train or load it."
            )
        if tensor.is_meta:
            raise ModelError(
                f"{name} of {type(model).__name__} lies on the device meta: expected numbers, found a shape alone. Was "
                "the network built without its weights? Load them, as with load_state_dict(…, assign=True)."
            )
        if tensor.is_quantized:
            raise ModelError(_not_differentiable(model, name, "is quantised"))
    for name, child in model.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise ModelError(_not_differentiable(model, name, "is a TorchScript module"))
        if type(child).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise ModelError(_not_differentiable(model, name, "is a quantised module"))


def _not_differentiable(model: nn.Module, name: str, what: str) -> str:
    return (
        f"{name or 'The network'} of {type(model).__name__} {what}: expected a plain torch.nn.Module, whose passes can "
        "be followed and differentiated in any dtype. Was it prepared for serving? Pass the module that it was made of."
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# copying --------------------------------------------------------------------------------------------------------------


class _DetachedCopies(TorchFunctionMode):
    """Within it, `copy.deepcopy` takes tensors that were computed, such as kept activations, and detaches the copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _copied(model: nn.Module) -> nn.Module:
    """Copy a module, sharing what cannot be copied.

    Raises:
        ModelError: If the module itself, or a tensor of it, is what cannot be copied.
    """
    try:
        with _DetachedCopies():
            module, memo = _deepcopied(model)
            binding = _Binding(memo)
            for child in module.modules():
                binding.bind_items(vars(child))
    except Exception as error:  # whatever its parts raise
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({_described(error)}): expected a module that copy.deepcopy "
            "takes, apart from locks, files and their like. Does it define __deepcopy__ or __getstate__? Pass a newly "
            "built module that has loaded the same state."
        ) from error
    return module


def _deepcopied(model: nn.Module) -> tuple[nn.Module, Memo]:
    memo: Memo = {}
    with contextlib.suppress(Exception):  # as above
        return copy.deepcopy(model, memo), memo
    memo = _shared_parts(model)
    return copy.deepcopy(model, memo), memo


def _shared_parts(model: nn.Module) -> Memo:
    """Find, in copies without their numbers, the parts that cannot be copied: a memo that shares them."""
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
    """Find what `copy.deepcopy` was copying when it failed: it calls itself, and the innermost call knows."""
    part, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is copy.deepcopy.__code__:
            part = trace.tb_frame.f_locals["x"]
        trace = trace.tb_next
    return part


class _Binding:
    """Lets what `copy.deepcopy` keeps as it is, functions and weak references, refer to the copy.

    A function that was made within a method of a module, as ``self.act = lambda x: x * self.slope``, holds the module:
    in the copy it would go on to use, and be differentiated for, the parameters of the user's own.
    """

    def __init__(self, memo: Memo) -> None:
        self._memo = memo
        self._seen: set[int] = set()

    def bind_items(self, items: dict[Any, Any] | list[Any]) -> None:
        """Bind the values of a container that is ours."""
        if id(items) in self._seen:
            return
        self._seen.add(id(items))
        for key, value in list(items.items() if isinstance(items, dict) else enumerate(items)):
            if (bound := self._bound(value)) is not value:
                items[key] = bound
            elif isinstance(value, dict | list) and id(value) not in self._memo:  # what is shared is not ours
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
        """Make a function again, with what it holds replaced by the copies of it."""
        if id(function) in self._memo:
            found: types.FunctionType = self._memo[id(function)]
            return found
        held = function.__closure__ or ()
        new = [cell for cell in held if id(cell) not in self._memo]  # a variable that two functions share has one cell
        self._memo.update((id(cell), types.CellType()) for cell in new)
        cells = tuple(self._memo[id(cell)] for cell in held)
        defaults = None if function.__defaults__ is None else tuple(map(self._copied, function.__defaults__))
        ours = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
        ours.__module__, ours.__qualname__, ours.__doc__ = function.__module__, function.__qualname__, function.__doc__
        ours.__dict__.update(function.__dict__)
        self._memo[id(function)] = ours  # before its cells are filled: it may hold itself
        for cell in new:
            with contextlib.suppress(ValueError):  # it has no value yet
                self._memo[id(cell)].cell_contents = self._copied(cell.cell_contents)
        if function.__kwdefaults__ is not None:
            ours.__kwdefaults__ = {name: self._copied(value) for name, value in function.__kwdefaults__.items()}
        return ours

    def _copied(self, value: Any) -> Any:
        """Find the copy of what a function holds. Containers are copied with it: it may write into them."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if type(value) in {list, dict, set, tuple}:
            memo = dict(self._memo)
            with contextlib.suppress(Exception):  # it stays the user's, as what is shared does
                copied = copy.deepcopy(value, memo)
                self._memo.update(memo)
                return copied
        return self._bound(value)
