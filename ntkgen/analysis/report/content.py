"""What a page is made of: sections of paragraphs, tables, figures and code, as values without HTML.

The template `page.html.jinja` has a macro for each of them, of the name that its ``macro`` says.
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ntkgen.analysis.plots.style import Picture, render

# Tables with more rows scroll inside their frame.
TALL = 14
# Words with more letters than this get a wider column.
NAME = 12

Item = TypeVar("Item")


@dataclass(frozen=True)
class Paragraph:
    """Some sentences, perhaps ``soft`` or a ``warning``."""

    text: str
    kind: str = ""

    macro: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Code:
    """Lines that are shown as they are."""

    lines: Sequence[str]

    macro: ClassVar[str] = "code"


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    picture: Picture

    macro: ClassVar[str] = "figure"

    @property
    def source(self) -> str:
        """The picture as the address of an image. SVG inside an image shares no names with other pictures."""
        return f"data:image/svg+xml;base64,{base64.b64encode(render(self.picture, 'svg')).decode()}"


@dataclass(frozen=True)
class Cell:
    """A value of a table.

    ``kind`` is its class, and ``exact`` is what it is sorted by: all digits of a number, nothing for what is not known,
    and None where the text itself is.
    """

    text: str
    kind: str = ""
    exact: str | None = None


@dataclass(frozen=True)
class Facts:
    """Names and values, in their order: a table of two columns."""

    values: Mapping[str, Any]
    name: str

    macro: ClassVar[str] = "facts"

    @property
    def cells(self) -> dict[str, Cell]:
        """The values by name."""
        return {
            title: Cell(shown(value, digits=8), "fact" if is_number(value) else "")
            for title, value in self.values.items()
        }


@dataclass(frozen=True)
class Table:
    """A table that a click on a column's title sorts."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    name: str

    macro: ClassVar[str] = "table"

    @classmethod
    def of(cls, items: Iterable[Item], columns: Mapping[str, Callable[[Item], Any]], name: str) -> "Table":
        """List items, one a row: each column has a title, and what it says of an item."""
        return cls(tuple(columns), [[say(item) for say in columns.values()] for item in items], name)

    @property
    def is_tall(self) -> bool:
        """Whether it scrolls inside its frame."""
        return len(self.rows) > TALL

    @property
    def heads(self) -> list[Cell]:
        """The titles of its columns; numbers have a column of their own look."""
        return [
            Cell(column, "number" if all(is_number(row[at]) or row[at] is None for row in self.rows) else "")
            for at, column in enumerate(self.columns)
        ]

    @property
    def cells(self) -> list[list[Cell]]:
        """Its values, row by row."""
        heads = self.heads
        return [[_cell(value, head.kind) for value, head in zip(row, heads, strict=True)] for row in self.rows]


Part = Paragraph | Code | Figure | Facts | Table


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading, with sections of its own."""

    title: str
    body: Sequence[Part]
    parts: Sequence["Section"] = ()


def _cell(value: Any, kind: str) -> Cell:
    exact = repr(value) if is_number(value) else "" if value is None else None
    return Cell(shown(value), kind or ("name" if len(str(value)) > NAME else ""), exact)


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any, *, digits: int = 4) -> str:
    """Write a value for people.

    >>> shown(1234567), shown(-0.000123456), shown(None), shown(["a", "b"]), shown(True)
    ('1,234,567', '−0.0001235', '–', 'a, b', 'yes')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}g}".replace("-", "−")
    if isinstance(value, list | tuple):
        return ", ".join(shown(part, digits=digits) for part in value) or "–"
    return str(value)
