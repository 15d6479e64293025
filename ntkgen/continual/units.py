"""Hidden units of a network: the layers that they form, and their activations in a forward pass.

A unit is one output of an `nn.Linear`, or one output channel of an `nn.Conv2d`, that another such layer reads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from ntkgen.errors import ModelError

# Activation functions: each number of their outputs depends on one number of their inputs, and they have no parameters.
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink),
    *(nn.Softshrink, nn.Threshold),
)
POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Modules after which the units are as before: in the mean, in another shape, or exactly.
TRANSPARENT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Flatten, nn.Identity)
LAYERS = (nn.Linear, nn.Conv2d)


class HiddenLayer(NamedTuple):
    """The names of the modules of one hidden layer.

    It has the fields of the zoo's `models.hidden.HiddenLayer`. The zoo is not imported here, because another package
    may have its name.
    """

    activation: str
    """The module whose outputs are the activations of the units, as the next layer reads them."""
    incoming: str
    """The `nn.Linear` or `nn.Conv2d` that computes the units."""
    norm: str | None
    """The batch norm of the units; None if there is none."""
    outgoing: str
    """The `nn.Linear` or `nn.Conv2d` on the main path that reads the units."""


def hidden_layers(model: nn.Module) -> tuple[HiddenLayer, ...]:
    """List the hidden layers of a network, in the order of the computation.

    A network declares them in its attribute ``hidden_layers``: a tuple with the four names of each layer. Those of a
    chain, which is an `nn.Sequential` of modules or of chains, need no declaration. There the activations of a layer
    are the outputs of the last module before the next layer, without dropout and flattening: those of an activation
    function, or of the pooling after it.

    Raises:
        ModelError: If the network is no chain of modules that keep units apart and declares no layers, or if the names
            are not those of such modules.
    """
    declared: Any = getattr(model, "hidden_layers", None)
    is_declared = isinstance(declared, tuple) and all(isinstance(each, tuple) and len(each) == 4 for each in declared)
    layers = tuple(HiddenLayer(*each) for each in declared) if is_declared else tuple(_layers_of_chain(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in layers:
        _require_fitting(model, layer, modules)
    for field in ("activation", "incoming"):
        counts = Counter(modules[getattr(layer, field)] for layer in layers)
        repeated = [getattr(layer, field) for layer in layers if counts[modules[getattr(layer, field)]] > 1]
        if repeated:
            _refuse(
                model,
                f"one module for each layer, found that the modules {' and '.join(repeated)} are the same one",
                "Was a module created once and used several times? Create one for each layer.",
            )
    return layers


@contextmanager
def recorded(model: nn.Module, layers: Iterable[HiddenLayer]) -> Iterator[dict[str, Tensor]]:
    """Record the activations of hidden layers in the forward passes of a block of code.

    The network has hooks within the block alone. The dictionary has the activations of the last forward pass, without
    gradients, by the name of the activation module, and stays valid after the block.

    Args:
        model: The network.
        layers: The layers.
    """
    features: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(layer.activation).register_forward_hook(_keeper(features, layer.activation))
        for layer in layers
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _keeper(features: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        features[name] = output.detach()

    return keep


def _layers_of_chain(model: nn.Module) -> Iterator[HiddenLayer]:
    """Find the hidden layers of a chain: from each layer to the next one.

    Raises:
        ModelError: If units do not stay apart.
    """
    begun: HiddenLayer | None = None  # the last layer, whose reader is not known yet
    is_flat = False
    for name, module in _chain(model):
        if isinstance(module, LAYERS):
            if begun is not None:
                if isinstance(module, nn.Linear) and not is_flat:
                    _refuse(
                        model,
                        f"an nn.Flatten between {begun.incoming} and {name}, found none",
                        "Does the linear layer act on rows of pixels? Declare `hidden_layers`, or flatten.",
                    )
                yield begun._replace(outgoing=name)
            begun, is_flat = HiddenLayer(name, name, None, ""), isinstance(module, nn.Linear)
        elif begun is None:
            if next(module.parameters(), None) is not None and not isinstance(module, NORMS):
                _refuse_unknown(model, name, module)
        elif isinstance(module, NORMS) and begun.norm is None:
            begun = begun._replace(activation=name, norm=name)
        elif isinstance(module, (*ACTIVATIONS, *POOLINGS)):
            begun = begun._replace(activation=name)
        elif isinstance(module, TRANSPARENT):
            is_flat = is_flat or isinstance(module, nn.Flatten)
        else:
            _refuse_unknown(model, name, module)


def _chain(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """List the modules of nested chains, a module that is used twice twice."""
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for part, child in module._modules.items():
        assert child is not None
        yield from _chain(child, f"{name}.{part}".removeprefix("."))


def _require_fitting(model: nn.Module, layer: HiddenLayer, modules: dict[str, nn.Module]) -> None:
    """Check the modules of a layer.

    Raises:
        ModelError: If a module is missing, is of another kind, or has other units.
    """
    missing = [name for name in layer if name is not None and name not in modules]
    if missing:
        _refuse(model, f"names of its modules, found {missing[0]!r}", "Is a name misspelt? Correct `hidden_layers`.")
    incoming, outgoing = modules[layer.incoming], modules[layer.outgoing]
    for name in (layer.incoming, layer.outgoing):
        module = modules[name]
        if not isinstance(module, LAYERS) or not isinstance(module.weight, nn.Parameter):
            _refuse(
                model,
                f"an nn.Linear or an nn.Conv2d with plain weights as {name}, found a {type(module).__name__}",
                "Are its weights computed from others? Declare `hidden_layers` without this layer.",
            )
    assert isinstance(incoming, LAYERS)
    assert isinstance(outgoing, LAYERS)
    num_units, num_inputs = len(incoming.weight), outgoing.weight.shape[1]
    is_flattened = isinstance(incoming, nn.Conv2d) and isinstance(outgoing, nn.Linear)
    if num_inputs % num_units or (num_inputs != num_units and not is_flattened):
        _refuse(
            model,
            f"inputs of {layer.outgoing} for each of the {num_units} units of {layer.incoming}, found {num_inputs}",
            "Is it a grouped convolution, or does it read others too? Declare `hidden_layers` without this layer.",
        )
    norm = None if layer.norm is None else modules[layer.norm]
    if norm is not None and (not isinstance(norm, NORMS) or norm.num_features != num_units):
        _refuse(
            model,
            f"a batch norm of the {num_units} units of {layer.incoming} as {layer.norm}, found {norm}",
            "Does it normalise pixels, or are there others? Use a batch norm of the channels.",
        )


def _refuse_unknown(model: nn.Module, name: str, module: nn.Module) -> NoReturn:
    _refuse(
        model,
        "a chain of linear layers, convolutions, batch norms, activation functions, poolings, dropout and nn.Flatten, "
        f"found a {type(module).__name__}{f' as {name}' if name else ''}",
        "Does it compute units in another way? Declare them: `hidden_layers` is a tuple with the names of the "
        "activation, of the layer before it, of its batch norm or None, and of the layer after it, for each layer.",
    )


def _refuse(model: nn.Module, facts: str, advice: str) -> NoReturn:
    raise ModelError(f"The hidden units of {type(model).__name__} are not known: expected {facts}. {advice}")
