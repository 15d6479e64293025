"""`ntkgen manual`: the pages of the manual."""

import json
import sys

import click

from ntkgen.cli.options import Command, json_option
from ntkgen.manual import Page, page, pages

# Maximum number of characters per line. Longer lines are hard to read even in a wide terminal.
MAX_WIDTH = 110


@click.command(cls=Command)
@click.argument("name", metavar="[PAGE]", required=False)
@click.option("--list", "as_list", is_flag=True, help="Print only the names of the pages, one per line.")
@json_option("page")
def manual(name: str | None, *, as_list: bool, as_json: bool) -> None:
    """Show a page of the manual, or list the pages if none is given.

    A terminal shows headings and tables. A pipe or a file gets the page as Markdown.

    \b
    ntkgen manual accuracy
    ntkgen manual questions | less
    """  # noqa: D301 - \b tells click not to wrap the lines
    if name is None:
        _show_list(as_list=as_list, as_json=as_json)
    else:
        _require_page_alone(name, as_list=as_list)
        _show_page(page(name), as_json=as_json)


def _require_page_alone(name: str, *, as_list: bool) -> None:
    """Refuse the combination of a page with ``--list``.

    Raises:
        UsageError: If both are given.
    """
    if as_list:
        raise click.UsageError(
            f"--list cannot be combined with a page: expected one of the two, found both --list and the page {name!r}. "
            "--list prints the names of all pages. Leave out one of the two."
        )


def _show_list(*, as_list: bool, as_json: bool) -> None:
    if not as_list and not as_json:
        click.echo("Pages of the manual. `ntkgen manual PAGE` shows a page.\n")
    for each in pages():
        if as_json:
            click.echo(json.dumps({"page": each.name, "title": each.title, "summary": each.summary}))
        else:
            click.echo(each.name if as_list else f"  {each.name:<15}{each.summary}")


def _show_page(shown: Page, *, as_json: bool) -> None:
    if as_json:
        values = {"page": shown.name, "title": shown.title, "summary": shown.summary, "text": shown.text}
        click.echo(json.dumps(values))
    elif sys.stdout.isatty():
        _lay_out(shown.text)
    else:
        click.echo(shown.text, nl=False)


def _lay_out(text: str) -> None:
    """Print Markdown with its headings, tables and code formatted to the width of the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text), width=min(console.width, MAX_WIDTH))
