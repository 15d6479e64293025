"""Printed output of a benchmark: progress, a table of results, and errors in one line."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ntkgen.cli.messages import complain
from ntkgen.errors import NtkgenError

# Number of characters per line of a table that is not printed in a terminal.
FILE_WIDTH = 160

Line = tuple[str, Callable[[Mapping[str, Any]], str]]


def print_table(results: Sequence[Mapping[str, Any]], lines: Sequence[Line], title: str) -> None:
    """Print a table with one column per result and one line per number."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column(no_wrap=True), *(result["model"] for result in results), title=title, title_justify="left")
    for label, write in lines:
        table.add_row(label, *(write(result) for result in results))
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)


def say(line: str) -> None:
    """Print a line about the progress on stderr."""
    click.echo(line, err=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error of ntkgen as one line on stderr, and end the process with its exit code."""
    try:
        yield
    except NtkgenError as error:
        complain(str(error))
        sys.exit(error.exit_code)
