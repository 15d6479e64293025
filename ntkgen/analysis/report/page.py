"""One self-contained page in HTML: what it is made of, without a word of what it says.

Text is escaped here and nowhere else; what functions return is HTML.
"""

import base64
import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ntkgen.analysis.plots.style import Picture, render

# Tables with more rows scroll inside their frame.
TALL = 14
# Words with more letters than this get a wider column.
NAME = 12
# Nothing may be fetched from anywhere, which the browser then holds the page to.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading, with parts of its own."""

    title: str
    body: str
    parts: tuple["Section", ...] = ()


def write_page(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """Put a page together: head, lead, links to the sections, the sections."""
    anchors = [f"part-{index + 1}" for index in range(len(sections))]
    links = "".join(
        f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    bodies = "\n".join(_section(section, anchor) for anchor, section in zip(anchors, sections, strict=True))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_file("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{lead}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{bodies}
</main>
<script>
{_file("page.js")}</script>
</body>
</html>
""".encode(errors="backslashreplace")  # a path may have bytes that are no text


def _file(name: str) -> str:
    return resources.files("ntkgen.analysis.report").joinpath(name).read_text(encoding="utf-8")


def _section(section: Section, anchor: str, level: int = 2) -> str:
    parts = "\n".join(_section(part, f"{anchor}-{index + 1}", level + 1) for index, part in enumerate(section.parts))
    heading = f'<h{level} id="{anchor}-title">{escape(section.title)}</h{level}>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n{heading}\n{section.body}\n{parts}\n</section>'


def escape(text: Any) -> str:
    """Write text as HTML.

    >>> escape("‖E‖ < λ & so on")
    '‖E‖ &lt; λ &amp; so on'
    """
    return html.escape(str(text))


def marked_up(text: Any) -> str:
    """Write text as HTML, with the indices of mathematics below the line.

    >>> marked_up("‖E‖_F ÷ √(K_rr K_cc) of ntk_float32")
    '‖E‖<sub>F</sub> ÷ √(K<sub>rr</sub> K<sub>cc</sub>) of ntk_float32'
    """
    return re.sub(r"(?<=[‖K²λ])_(\w+)", r"<sub>\1</sub>", escape(text))


def paragraph(text: str, *, kind: str = "") -> str:
    """Write a paragraph, perhaps of a class."""
    chosen = f' class="{kind}"' if kind else ""
    return f"<p{chosen}>{marked_up(text)}</p>"


def code(lines: Sequence[str]) -> str:
    """Write lines as they are."""
    return f'<pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre>'


def facts(values: Mapping[str, Any], name: str) -> str:
    """Write names and values as a table of two columns, in their order."""
    rows = "".join(f'<tr><th scope="row">{marked_up(key)}</th>{_fact(value)}</tr>\n' for key, value in values.items())
    return _frame(f"<table><tbody>{rows}</tbody></table>", name)


def _fact(value: Any) -> str:
    kind = ' class="fact"' if is_number(value) else ""
    return f"<td{kind}>{marked_up(shown(value, digits=8))}</td>"


def _frame(content: str, name: str, *, is_tall: bool = False) -> str:
    """Let what is wider than the screen scroll by itself; the keyboard can do it too."""
    kind = "scroll tall" if is_tall else "scroll"
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(name)}">{content}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> str:
    """Write a table that a click on a column's title sorts; numbers keep all their digits for that."""
    numeric = [all(is_number(row[at]) or row[at] is None for row in rows) for at in range(len(columns))]
    kinds = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{marked_up(column)}</button></th>'
        for column, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(value, kind) for value, kind in zip(row, kinds, strict=True))}</tr>\n" for row in rows
    )
    content = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return _frame(content, name, is_tall=len(rows) > TALL)


def _cell(value: Any, kind: str) -> str:
    exact = f' data-value="{value!r}"' if is_number(value) else ' data-value=""' if value is None else ""
    kind = kind or (' class="name"' if len(str(value)) > NAME else "")
    return f"<td{kind}{exact}>{marked_up(shown(value))}</td>"


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


def figure(picture: Picture) -> str:
    """Put a picture into the page, as SVG inside an image: its names cannot meet those of another."""
    data, words = base64.b64encode(render(picture, "svg")).decode(), f"{picture.title}. {picture.caption}"
    return (
        '<figure><div class="picture" tabindex="0" role="region" '
        f'aria-label="{escape(picture.title)}"><img src="data:image/svg+xml;base64,{data}" alt="{escape(words)}"></div>'
        f"<figcaption>{marked_up(picture.caption)}</figcaption></figure>"
    )
