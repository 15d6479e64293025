"""The command line: parse, call one function, print.

Large packages such as torch are imported only when a command runs, so that `ntkgen --help` is quick.
"""

import errno
import sys
from collections.abc import Sequence

import click

import ntkgen
from ntkgen.cli.analyze import analyze
from ntkgen.cli.cl_analyze import cl_analyze
from ntkgen.cli.cl_grid import cl_grid
from ntkgen.cli.cl_import import cl_import
from ntkgen.cli.cl_plot import cl_plot
from ntkgen.cli.cl_run import cl_run
from ntkgen.cli.compute import compute
from ntkgen.cli.importing import import_
from ntkgen.cli.info import info
from ntkgen.cli.listings import datasets, models
from ntkgen.cli.manual import manual
from ntkgen.cli.messages import CommandError
from ntkgen.cli.mirror import mirror
from ntkgen.cli.plot import plot
from ntkgen.cli.report import report
from ntkgen.cli.session import TERMINATED
from ntkgen.cli.terminal import spelled_streams
from ntkgen.cli.train import train
from ntkgen.cli.verify import verify
from ntkgen.errors import Terminated

# Errors of a full disk, and of a used-up disk quota.
FULL = {errno.ENOSPC, errno.EDQUOT}
# Exit code that a shell reports for a process that Ctrl-C has ended.
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(ntkgen.__version__, prog_name="ntkgen")
def cli() -> None:
    """Compute large empirical neural tangent kernels, K = J Jᵀ, exactly. A computation can be resumed.

    A first example: ntkgen compute --models lenet --dataset digits --subsample 500

    `ntkgen manual` lists the pages of the manual.
    """


for command in (
    compute,
    train,
    cl_run,
    cl_grid,
    cl_analyze,
    cl_plot,
    cl_import,
    info,
    verify,
    mirror,
    import_,
    models,
    datasets,
    analyze,
    plot,
    report,
    manual,
):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process.

    An error that a user can cause prints one line, and the exit code is not zero.
    """
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    with spelled_streams():
        return _run(args)


def _run(args: Sequence[str] | None) -> int:
    try:
        result = cli.main(args, prog_name="ntkgen", standalone_mode=False)
    except CommandError as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, Terminated) as error:
        word, exit_code = ("Terminated", TERMINATED) if isinstance(error, Terminated) else ("Interrupted", INTERRUPTED)
        click.echo(f"{word}. What was finished before is kept. The same command continues from there.", err=True)
        return exit_code
    except Exception as error:
        from ntkgen.files.bucket import first_lines, is_remote_error

        if not is_remote_error(error):
            raise
        is_full = isinstance(error, OSError) and error.errno in FULL
        question = "Is the path right, and do you have access to it?"
        advice = "Free some space, then run the same command again." if is_full else question
        what = "The disk is full" if is_full else first_lines(error)
        return _fail(f"{what}. Finished work is kept. {advice}", 1)
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return exit_code
