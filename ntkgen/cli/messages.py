"""Messages of a command on stdout and stderr.

A message of the library names a setting, such as `memory_bytes`. Here the setting is replaced by its option, --memory.
"""

import re

import click

from ntkgen.errors import NtkgenError

# One word in backticks. A command line in backticks, such as `ntkgen verify --repair`, has several words and stays.
_SETTING = re.compile(r"(?<!`)`(\w+)`(?!`)")


class CommandError(Exception):
    """An error of the library whose message names the options of the running command."""

    def __init__(self, error: NtkgenError, command: click.Command) -> None:
        super().__init__(in_options(str(error), command))
        self.exit_code = error.exit_code


def in_options(text: str, command: click.Command) -> str:
    """Replace each setting in backticks by the option of a command that sets it. Other words stay as they are.

    >>> command = click.Command("compute", params=[click.Option(["--memory", "memory_bytes"])])
    >>> in_options("Raise `memory_bytes`, or run `ntkgen info` and see `layout`.", command)
    'Raise --memory, or run `ntkgen info` and see `layout`.'
    """
    options = {param.name: _spelling(param) for param in command.params if isinstance(param, click.Option)}
    return _SETTING.sub(lambda found: options.get(found[1], found[0]), text)


def _spelling(option: click.Option) -> str:
    """Return the first long name of an option.

    >>> _spelling(click.Option(["-q", "--quiet"]))
    '--quiet'
    """
    return next((spelling for spelling in option.opts if spelling.startswith("--")), option.opts[0])


def show(text: str) -> None:
    """Print a result of the running command on stdout."""
    click.echo(_in_own_options(text))


def note(text: str) -> None:
    """Print a message on stderr, in one line."""
    click.echo(" ".join(_in_own_options(text).split()), err=True)


def warn(text: str) -> None:
    """Print a warning on stderr, in one line."""
    note(f"Warning: {text}")


def complain(text: str) -> None:
    """Print an error on stderr, in one line. The command continues."""
    note(f"Error: {text}")


def _in_own_options(text: str) -> str:
    return in_options(text, click.get_current_context().command)
