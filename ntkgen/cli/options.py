"""Options that several commands share, each defined once, and options that take several values after one flag."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ntkgen.cli.messages import CommandError
from ntkgen.errors import NtkgenError
from ntkgen.units import parse_bytes

Function = TypeVar("Function", bound=Callable[..., Any])


class ManyOption(click.Option):
    """An option whose flag is followed by one or more values: ``--models a b c``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "multiple": True})


class Command(click.Command):
    """A command that understands `ManyOption`, anywhere on its line, and whose errors name its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before each of its values, which is how click takes several."""
        flags = {flag for param in self.params if isinstance(param, ManyOption) for flag in param.opts}
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


def repeat_flags(args: Sequence[str], flags: set[str]) -> list[str]:
    """Write ``--flag a b`` as ``--flag a --flag b``.

    >>> repeat_flags(["-v", "--models", "a", "b", "--seed", "1"], {"--models"})
    ['-v', '--models', 'a', '--models', 'b', '--seed', '1']
    >>> repeat_flags(["--models=a", "b"], {"--models"})
    ['--models', 'a', '--models', 'b']

    Raises:
        UsageError: If no value follows a flag.
    """
    result: list[str] = []
    flag, found = "", True
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in flags:
            _require_value(flag, found=found)
            flag, found = name, bool(equals)
            result += [flag, value] if equals else []
        elif arg.startswith("-"):
            _require_value(flag, found=found)
            flag, found = "", True
            result.append(arg)
        else:
            result += [flag, arg] if flag else [arg]
            found = True
    _require_value(flag, found=found)
    return result


def _require_value(flag: str, *, found: bool) -> None:
    if not found:
        raise click.UsageError(f"Option {flag!r} needs at least one value behind it, and there is none.")


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of bytes, as ``8GB``, ``500MB`` or ``2GiB``."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the number and its unit."""
        count = value if isinstance(value, int) else parse_bytes(value)
        if not count:
            self.fail(f"{value!r} is not a number of bytes; write for example 8GB, 500MB or 2GiB.", param, ctx)
        return count


class FiniteRange(click.FloatRange):
    """A range of numbers, without infinity and NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


SEED = click.IntRange(0, 2**62)


def aligned(lines: dict[str, Any]) -> list[str]:
    """Write names and values in two columns."""
    return [f"  {name:<12}{value}" for name, value in lines.items()]


def training_options(command: Function) -> Function:
    """Add what determines a network: its name, its data, how it is trained, where it is kept."""
    options = [
        click.option(
            "--models",
            cls=ManyOption,
            required=True,
            metavar="NAME...",
            help="Names of the zoo, or package.module:factory.",
        ),
        click.option(
            "--dataset", default="digits", show_default=True, help="A name of `ntkgen datasets`, or FILE.npz."
        ),
        click.option(
            "--data-dir", type=click.Path(path_type=Path), help="Folder of the data sets [NTKGEN_DATA_DIR or data]."
        ),
        click.option("--raw-images", is_flag=True, help="Feed images in their own size and channels, not as 3×32×32."),
        click.option(
            "--epochs",
            "--num-epochs",
            "--num_epochs",
            "num_epochs",
            type=click.IntRange(min=0),
            help="At most [200]; 0 takes the network as it is built.",
        ),
        click.option(
            "--lr",
            "learning_rate",
            type=FiniteRange(min=0, min_open=True),
            help="Learning rate [0.1 with batch norm, else 0.02].",
        ),
        click.option(
            "--bs", "--batch-size", "batch_size", type=click.IntRange(min=1), help="Batch size of training [64]."
        ),
        click.option("--width", type=int, help="Channels of the first stage of a ResNet [64]."),
        click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of the first network."),
        click.option(
            "--repeats",
            default=1,
            show_default=True,
            type=click.IntRange(min=1),
            help="Networks, with seeds SEED, SEED+1, …",
        ),
        click.option(
            "--target-accuracy",
            default=99.5,
            show_default=True,
            type=FiniteRange(0, 100),
            help="Training accuracy in % at which training ends.",
        ),
        click.option("--allow-unconverged", is_flag=True, help="Go on with a network that missed the target."),
        click.option(
            "--out",
            default="runs",
            show_default=True,
            metavar="FOLDER",
            help="Folder of checkpoints and kernels; or s3://, gs://, az:// with ntkgen[cloud].",
        ),
        click.option("--fsync/--no-fsync", default=True, show_default=True, help="Force every file to the disk."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, … or mps."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object per result on stdout."),
        click.option("-v", "--verbose", is_flag=True, help="Say how each layer is treated."),
        click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
