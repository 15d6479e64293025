"""Options that several commands share, and options that take several values after one flag."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ntkgen.analysis import defaults
from ntkgen.cli.messages import CommandError
from ntkgen.errors import NtkgenError
from ntkgen.training.recipe import LEARNING_RATE, Recipe, TrainingRequest
from ntkgen.units import parse_bytes

Function = TypeVar("Function", bound=Callable[..., Any])


class ManyOption(click.Option):
    """An option whose flag is followed by one or more values: ``--models a b c``.

    If it has a value for ``alone``, the flag may also have no value after it, and then it has this one.
    """

    def __init__(self, *args: Any, alone: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True})
        self.alone = alone


class Command(click.Command):
    """A command that accepts `ManyOption` anywhere on its line, and whose errors name its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each of its values, as click expects it."""
        flags = {flag: param.alone for param in self.params if isinstance(param, ManyOption) for flag in param.opts}
        return super().parse_args(ctx, repeat_flags(args, flags))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            CommandError: If the library raises an error.
        """
        try:
            return super().invoke(ctx)
        except NtkgenError as error:
            raise CommandError(error, self) from error


def given_options() -> list[str]:
    """List the parameters of the running command that its line gives. The others have their defaults."""
    ctx = click.get_current_context()
    return [name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]


# The beginning of a negative number, which is a value and not an option.
_NEGATIVE = re.compile(r"-\.?\d")


def repeat_flags(args: Sequence[str], flags: Mapping[str, str | None]) -> list[str]:
    """Write ``--flag a b`` as ``--flag a --flag b``. A flag may have a value that it gets if none follows.

    >>> repeat_flags(["-v", "--models", "a", "b", "--seed", "1"], {"--models": None})
    ['-v', '--models', 'a', '--models', 'b', '--seed', '1']
    >>> repeat_flags(["--models=a", "b"], {"--models": None})
    ['--models', 'a', '--models', 'b']
    >>> repeat_flags(["--shifts", "-1", "2", "-q"], {"--shifts": None})
    ['--shifts', '-1', '--shifts', '2', '-q']
    >>> repeat_flags(["--per-layer", "-q"], {"--per-layer": "each"})
    ['--per-layer', 'each', '-q']

    Raises:
        UsageError: If no value follows a flag.
    """
    result: list[str] = []
    flag, found = "", True

    def end() -> None:
        if not found:
            result.extend((flag, _value_alone(flag, flags[flag])))

    for arg in args:
        name, equals, value = arg.partition("=")
        if name in flags:
            end()
            flag, found = name, bool(equals)
            result += [flag, value] if equals else []
        elif arg.startswith("-") and not (flag and _NEGATIVE.match(arg)):
            end()
            flag, found = "", True
            result.append(arg)
        else:
            result += [flag, arg] if flag else [arg]
            found = True
    end()
    return result


def _value_alone(flag: str, value: str | None) -> str:
    if value is None:
        raise click.UsageError(f"Option {flag!r} has no value: expected at least one value after it, found none.")
    return value


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of bytes, such as ``8GB``, ``500MB`` or ``2GiB``."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the number and its unit."""
        count = value if isinstance(value, int) else parse_bytes(value)
        if not count:
            self.fail(f"{value!r} is not a number of bytes. Write for example 8GB, 500MB or 2GiB.", param, ctx)
        return count


class FiniteRange(click.FloatRange):
    """A range of finite numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class WholeNumber(click.IntRange):
    """A range of whole numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the number."""
        try:
            return int(super().convert(int(value), param, ctx))
        except ValueError:
            self.fail(f"{value!r} is not a whole number. Is it a name or a fraction? Write digits alone.", param, ctx)


SEED = WholeNumber(0, 2**62)


def aligned(lines: dict[str, Any]) -> list[str]:
    """Write names and values in two columns."""
    return [f"  {name:<12}{value}" for name, value in lines.items()]


# options of several commands ------------------------------------------------------------------------------------------

POSITIVE = FiniteRange(min=0, min_open=True)


def stacked(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Combine options into one decorator, in the order of the help."""

    def add(command: Function) -> Function:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def json_option(each: str = "") -> Callable[[Function], Function]:
    """Define --json. ``each`` names what gets an object of its own, such as a store; empty means one object in all."""
    printed = f"one JSON object per {each}" if each else "one JSON object"
    return click.option("--json", "as_json", is_flag=True, help=f"Print {printed} on stdout.")


def memory_option(meaning: str) -> Callable[[Function], Function]:
    """Define --memory. The help ``meaning`` says whether it limits the process or only what the command adds."""
    return click.option("--memory", "memory_bytes", type=Bytes(), help=meaning)


def dtype_option(*name: str, **attributes: Any) -> Callable[[Function], Function]:
    """Define --dtype, for dtypes of stored numbers. ``name`` is the parameter if it is not ``dtype``."""
    return click.option("--dtype", *name, **attributes)


def out_option(*names: str, **attributes: Any) -> Callable[[Function], Function]:
    """Define --out, for the path of the results. ``names`` are a short option and a parameter other than ``out``."""
    return click.option("--out", *names, callback=_require_path, **attributes)


def _require_path(_: click.Context, __: click.Parameter, path: str | None) -> str | None:
    """Require that a path is not empty. An empty one would mean the current directory.

    Raises:
        UsageError: If the path is empty.
    """
    if path is not None and not path.strip():
        raise click.UsageError(
            "--out has an empty path: expected the path of a folder or file, found no characters. Is a variable of the "
            "shell not set? Give a path. The current directory is a dot."
        )
    return path


def device_option(meaning: str) -> Callable[[Function], Function]:
    """Define --device, for the device of the computation."""
    return click.option("--device", default="auto", show_default=True, help=meaning)


def seed_option(meaning: str) -> Callable[[Function], Function]:
    """Define --seed, for the random numbers of the command."""
    return click.option("--seed", default=TrainingRequest.seed, show_default=True, type=SEED, help=meaning)


def scheduler_option(meaning: str) -> Callable[[Function], Function]:
    """Define --scheduler, for a running dask cluster."""
    return click.option("--scheduler", "client", metavar="ADDRESS|FILE", help=meaning)


def top_option(meaning: str, **attributes: Any) -> Callable[[Function], Function]:
    """Define --top, for the number of largest eigenvalues."""
    return click.option("--top", type=int, help=meaning, **attributes)


def offset_option(meaning: str) -> Callable[[Function], Function]:
    """Define --offset, for the outputs at the start of a fit."""
    choice = click.Choice(["zero", "logits"])
    return click.option("--offset", type=choice, default=defaults.OFFSET, show_default=True, help=meaning)


FORMATS = ("png", "svg")  # of pictures
format_option = click.option(
    "--format",
    "formats",
    cls=ManyOption,
    type=click.Choice(FORMATS),
    default=("png",),
    metavar="FORMAT...",
    help="File formats: png, svg or both [png].",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Print the projected cost and time, and leave nothing behind."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress bars.")
data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder of the data sets [NTKGEN_DATA_DIR, or data]."
)
tile_option = click.option(
    "--tile", "tile_side", type=int, help="Rows per tile, a multiple of the number of outputs [chosen from the size]."
)
shift_option = click.option(
    "--shift", type=float, default=defaults.SHIFT, show_default=True, help="Number λ that is added to the diagonal."
)
test_option = click.option("--test", help="Store of the kernel with test samples (`compute --against test`).")

# Networks and their data.
network_options = stacked(
    click.option(
        "--models",
        cls=ManyOption,
        required=True,
        metavar="NAME...",
        help="Networks: names from `ntkgen models`, or package.module:factory.",
    ),
    click.option("--dataset", default="digits", show_default=True, help="A name from `ntkgen datasets`, or FILE.npz."),
    data_dir_option,
    click.option("--raw-images", is_flag=True, help="Do not resize the images to 3×32×32."),
)

# Training of the networks.
recipe_options = stacked(
    click.option(
        "--epochs",
        "--num-epochs",
        "--num_epochs",
        "num_epochs",
        type=click.IntRange(min=0),
        help=f"Maximum number of epochs [{Recipe.num_epochs}]. 0 leaves the network untrained.",
    ),
    click.option(
        "--lr",
        "learning_rate",
        type=POSITIVE,
        help=f"Learning rate [{LEARNING_RATE[True]:g} with batch norm, else {LEARNING_RATE[False]:g}].",
    ),
    click.option(
        "--bs",
        "--batch-size",
        "batch_size",
        type=click.IntRange(min=1),
        help=f"Number of samples per training step [{Recipe.batch_size}].",
    ),
    click.option("--width", type=int, help="Number of channels of the first stage of a ResNet [64]."),
    seed_option("Seed of the first network."),
    click.option(
        "--repeats",
        default=1,
        show_default=True,
        type=click.IntRange(min=1),
        help="Number of networks per name, with the seeds SEED, SEED+1, …",
    ),
    click.option(
        "--target-accuracy",
        default=TrainingRequest.target_accuracy,
        show_default=True,
        type=FiniteRange(0, 100),
        help="Training accuracy in % at which training ends.",
    ),
    click.option("--allow-unconverged", is_flag=True, help="Accept a network that missed the target."),
)

# Paths of the results, the device, and the output of the command.
run_options = stacked(
    out_option(
        default="runs",
        show_default=True,
        metavar="FOLDER",
        help="Folder of the checkpoints and kernels. s3://, gs:// and az:// need ntkgen[cloud].",
    ),
    click.option(
        "--fsync/--no-fsync",
        default=True,
        show_default=True,
        help="Force every file to the disk, so that a loss of power damages none.",
    ),
    device_option("Device of the computation: auto, cpu, cuda, cuda:1, … or mps."),
    json_option("result"),
    click.option("-v", "--verbose", is_flag=True, help="Print how each layer is computed."),
    quiet_option,
)

# All options of a network, from its name to the path of its checkpoint.
training_options = stacked(network_options, recipe_options, run_options)
