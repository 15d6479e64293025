"""The network of a run: built from its settings, and tried on a few samples before anything is written."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ntkgen.continual.chance import seed_of
from ntkgen.continual.configuration import RunSettings
from ntkgen.continual.heads import growing_head, head_name
from ntkgen.continual.optimizer import make_optimizer
from ntkgen.continual.plan import Plan
from ntkgen.continual.snapshot_layout import SEEN
from ntkgen.continual.surgery import Subject, make_surgeries
from ntkgen.continual.surgery.registry import need_features
from ntkgen.continual.units import hidden_layers
from ntkgen.errors import ModelError, UnknownNameError
from ntkgen.jacobian.outputs import OUTPUTS, output_map, prepare_mapped
from ntkgen.jacobian.precision import check_device, policy
from ntkgen.jacobian.probe import in_turns
from ntkgen.training import zoo
from ntkgen.training.loop import evaluation_mode
from ntkgen.units import counted

# Number of samples on which a network is tried.
TRIED = 2


def build_network(settings: RunSettings, num_outputs: int, task: int = 0) -> nn.Module:
    """Build the network of a run, with parameters from the run's seed, or those whose last rows a later task adds."""
    return fresh_network(settings, num_outputs, seed_of(settings.seed, "init", *[task] * (task > 0)))


def fresh_network(settings: RunSettings, num_outputs: int, seed: int) -> nn.Module:
    """Build the network of a run with parameters from some seed."""
    options = {} if settings.parametrization == "standard" else {"parametrization": settings.parametrization}
    return zoo.build(settings.model, num_outputs, seed=seed, width=settings.width, **options)


def fitting_network(plan: Plan, device: torch.device) -> nn.Module:
    """Build the network of a run, and require that it fits the tasks and the output map of the kernels.

    Raises:
        ModelError: If the network fails, does not have an output for each class, or has a head that cannot grow.
        UnknownNameError: If there is no such network, output map or precision.
        InputError: If the network lacks the output of the kernels or a width, or the device lacks the precision.
    """
    settings, num_outputs = plan.settings, plan.num_outputs(0)
    _require_output(settings.output, num_outputs)
    check_device(policy(settings.precision), device)
    model = build_network(settings, num_outputs).to(device)
    _require_num_outputs(plan, _outputs(plan, model, device))
    if num_outputs < plan.stream.num_targets:
        growing_head(model, num_outputs, build_network(settings, plan.stream.num_targets))
    return model


def require_fitting(plan: Plan, device: torch.device) -> None:
    """Require that a run can begin: its network fits, its method and surgeries can use it, and its kernel is defined.

    Raises:
        ModelError: If the network does not fit the tasks, the method or a surgery, or its kernel is not defined.
        UnknownNameError: If there is no such network, method, output map or precision.
        InputError: If a setting does not fit the network or the device.
    """
    settings, model = plan.settings, fitting_network(plan, device)
    plan.method(model, plan.data.train.inputs)
    num_outputs = plan.num_outputs(0)
    subject = subject_of(settings, model, make_optimizer(settings, model), lambda: num_outputs)
    make_surgeries(settings.surgery, subject)
    output = "full" if settings.output == SEEN else settings.output
    x = plan.data.train.inputs(torch.from_numpy(plan.probe.ids))
    with _kept_random_state(device):
        prepare_mapped(model, in_turns(x, None).to(device), settings.precision, output)


def subject_of(
    settings: RunSettings, model: nn.Module, optimizer: torch.optim.Optimizer, num_outputs: Callable[[], int]
) -> Subject:
    """Say what the surgeries of a run act on.

    Args:
        settings: The settings of the run.
        model: Its network.
        optimizer: Its optimizer.
        num_outputs: Gives the present number of outputs, which may grow.

    Raises:
        ModelError: If a surgery needs hidden layers that are not known, or a last linear layer that is missing.
    """
    return Subject(
        model,
        optimizer,
        hidden_layers(model) if need_features(settings.surgery) else (),
        head_name(model, num_outputs()) if "reset-head" in settings.surgery else "",
        settings.seed,
        settings.surgery_options,
        lambda seed: fresh_network(settings, num_outputs(), seed),
    )


def _kept_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Keep the random states while a network is tried, which may draw."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _require_output(output: str, num_outputs: int) -> None:
    """Refuse an output map that does not exist.

    Raises:
        UnknownNameError: If its name is unknown.
        InputError: If the network has no such output.
    """
    if output == SEEN:
        return
    try:
        output_map(output, num_outputs)
    except UnknownNameError:
        raise UnknownNameError("output", output, [*OUTPUTS, SEEN]) from None


def _outputs(plan: Plan, model: nn.Module, device: torch.device) -> Tensor:  # (samples, …)
    """Run a network on a few samples in evaluation mode, without any change of random states.

    Raises:
        ModelError: If it fails, or does not return one tensor.
    """
    x = plan.data.train.inputs(torch.from_numpy(plan.probe.ids[:TRIED])).to(device)
    where = (
        f"The network {plan.settings.model} was tried on {counted(len(x), 'sample')} of the shape {tuple(x.shape[1:])}"
    )
    try:
        with evaluation_mode(model), torch.no_grad(), _kept_random_state(device):
            outputs = model(x)
    except Exception as error:  # user code may raise any error
        raise ModelError(
            f"{where}: expected their outputs, found an error ({type(error).__name__}: {error}). Is the network made "
            "for inputs of another shape? Call it in Python on such samples to find the cause."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(x):
        found = f"a tensor of the shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
        raise ModelError(
            f"{where}: expected a tensor with one row of outputs for each sample, found {found}. Does the network "
            "return something else beside its outputs? Let it return the outputs alone."
        )
    return outputs


def _require_num_outputs(plan: Plan, outputs: Tensor) -> None:
    """Require an output for each class.

    Raises:
        ModelError: If there are more or fewer.
    """
    expected, found = plan.num_outputs(0), outputs.shape[1]
    if found == expected:
        return
    grows = expected < plan.stream.num_targets
    classes = "the first task, since the head grows" if grows else "the tasks"
    remedy = ", or use the fixed `head`" if found == plan.stream.num_targets else ""
    raise ModelError(
        f"The network {plan.settings.model} has {found} outputs: expected {expected}, one for each class of {classes}. "
        f"Does its factory ignore the argument num_classes? Let the last layer have num_classes outputs{remedy}."
    )
