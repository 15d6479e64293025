"""The options of `ntkgen cl-run` for streams of single samples and for their learners."""

from collections.abc import Sequence
from typing import Any

import click

from ntkgen.cli.options import Command, Function, WholeNumber
from ntkgen.continual.optim.names import OPTIONS
from ntkgen.continual.streaming.bins import KINDS

# Options that other streams have too, under the same name.
_SHARED = {"lr", "weight_decay"}
# Options that only the library has.
_HIDDEN = {"published"}


def _learner_option(name: str) -> Any:
    """Make the option of a learner. Several numbers, separated by commas, are several combinations."""
    option, flag = OPTIONS[name], f"--{name.replace('_', '-')}"
    meaning = f"{option.meaning[0].upper()}{option.meaning[1:]}."
    if option.kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=meaning)
    kind = click.Choice(option.choices) if option.choices else click.FLOAT
    return click.option(flag, name, type=kind, help=meaning)


_OPTIONS = [
    *(_learner_option(name) for name in OPTIONS if name not in _SHARED | _HIDDEN),
    click.option(
        "--grid",
        multiple=True,
        metavar="NAME=VALUE,…",
        help="Values of an option of a learner, such as sigma=0.001,0.01. All combinations of several such options "
        "learn side by side. Give --grid once per option.",
    ),
    click.option(
        "--samples-per-task",
        type=WholeNumber(min=1),
        help="Samples between two changes of a permuted stream [2,500 with labels, 5,000 with pixels].",
    ),
    click.option(
        "--compounding/--no-compounding",
        default=None,
        help="Apply each permutation to what the last one has made, or to the original data [labels: compounding].",
    ),
    click.option("--restarts/--no-restarts", default=None, help="Begin every task of a stream with a new network."),
    click.option(
        "--held-out",
        type=WholeNumber(min=0),
        help="Test samples on which each task of a stream is evaluated at its end, under its own permutation [0].",
    ),
    click.option(
        "--bins",
        type=click.Choice(KINDS),
        help="Average over whole tasks of a stream, or over the bins of published code [tasks].",
    ),
    click.option(
        "--stats-every", type=WholeNumber(min=1), help="Samples between two measurements of norms and ranks [250]."
    ),
    click.option(
        "--kernels-every", type=WholeNumber(min=0), help="Tasks of a stream between two kernels; 0 for none [0]."
    ),
    click.option(
        "--save-every", type=WholeNumber(min=0), help="Samples between two files of parameters; 0 for none [0]."
    ),
]


class LearnerCommand(Command):
    """A command with options of learners, which explains how several options of a grid are given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse several options after one flag before click reads the line."""
        require_a_flag_per_option(args)
        return super().parse_args(ctx, args)


def require_a_flag_per_option(args: Sequence[str]) -> None:
    """Require that each option of a grid has a flag of its own.

    >>> require_a_flag_per_option(["--grid", "lr=0.1,0.01", "--grid=sigma=1,2", "--out", "a=b"])

    Raises:
        UsageError: If several follow one flag.
    """
    for index, arg in enumerate(args):
        first = index + 2 if arg == "--grid" else index + 1
        if (arg == "--grid" or arg.startswith("--grid=")) and first < len(args):
            more = args[first]
            if "=" in more and not more.startswith("-"):
                own = args[first - 1].removeprefix("--grid=")
                raise click.UsageError(
                    f"--grid has several options: expected one, NAME=VALUE,VALUE, found {more!r} after it. Was it "
                    f"written once for all? Give it once per option: --grid {own} --grid {more}."
                )


def with_learner_options(command: Function) -> Function:
    """Give a command the options of streams of single samples."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
