"""Content of a report as values without HTML: sections of paragraphs, tables, figures and code.

The attribute ``macro`` of each class names the macro of the template `page.html.jinja` that writes it.
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ntkgen.analysis.plots.style import Picture, render

# Maximum number of rows of a table that does not scroll.
TALL = 14
# Maximum length of a text in a column of normal width. Longer texts get a wider column.
NAME = 12

Item = TypeVar("Item")


@dataclass(frozen=True)
class Paragraph:
    """Sentences. ``kind`` is their style: empty, ``soft`` or ``warning``."""

    text: str
    kind: str = ""

    macro: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Code:
    """Lines of code or commands."""

    lines: Sequence[str]

    macro: ClassVar[str] = "code"


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    picture: Picture

    macro: ClassVar[str] = "figure"

    @property
    def source(self) -> str:
        """The picture as a data URL of an image. Inside an image, the names of an SVG cannot clash with others."""
        return f"data:image/svg+xml;base64,{base64.b64encode(render(self.picture, 'svg')).decode()}"


@dataclass(frozen=True)
class Cell:
    """A value of a table.

    Attributes:
        text: The printed text.
        kind: The CSS class.
        exact: The sort key: all digits of a number, empty for an unknown value, None to sort by the text.
    """

    text: str
    kind: str = ""
    exact: str | None = None


@dataclass(frozen=True)
class Facts:
    """A table of two columns: names and values."""

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
    """A table that can be sorted by a click on the title of a column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    name: str

    macro: ClassVar[str] = "table"

    @classmethod
    def of(cls, items: Iterable[Item], columns: Mapping[str, Callable[[Item], Any]], name: str) -> "Table":
        """Make a table with one row per item. ``columns`` maps the title of a column to the function of its value."""
        return cls(tuple(columns), [[value_of(item) for value_of in columns.values()] for item in items], name)

    @property
    def is_tall(self) -> bool:
        """Whether the table scrolls inside its frame."""
        return len(self.rows) > TALL

    @property
    def heads(self) -> list[Cell]:
        """The titles of the columns, marked as ``number`` for a column of numbers."""
        return [
            Cell(column, "number" if all(is_number(row[at]) or row[at] is None for row in self.rows) else "")
            for at, column in enumerate(self.columns)
        ]

    @property
    def cells(self) -> list[list[Cell]]:
        """The values, row by row."""
        heads = self.heads
        return [[_cell(value, head.kind) for value, head in zip(row, heads, strict=True)] for row in self.rows]


Part = Paragraph | Code | Figure | Facts | Table


@dataclass(frozen=True)
class Section:
    """A heading with its content and its subsections."""

    title: str
    body: Sequence[Part]
    parts: Sequence["Section"] = ()


def _cell(value: Any, kind: str) -> Cell:
    exact = repr(value) if is_number(value) else "" if value is None else None
    return Cell(shown(value), kind or ("name" if len(str(value)) > NAME else ""), exact)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any, *, digits: int = 4) -> str:
    """Format a value as readable text.

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
