"""Sections → one self-contained HTML page, by the template `page.html.jinja`.

The template escapes every value, and includes the style and the script from files of this package.
"""

import re
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from ntkgen.analysis.report.content import Part, Section

TEMPLATE = "page.html.jinja"
_INDEX = re.compile(r"(?<=[‖K²λ])_(\w+)")


def write_page(title: str, lead: Sequence[Part], sections: Sequence[Section]) -> bytes:
    """Write a page: title, lead, links to the sections, and the sections."""
    text = _environment().get_template(TEMPLATE).render(title=title, lead=lead, sections=sections)
    return text.encode(errors="backslashreplace")  # a path may contain bytes that are not UTF-8


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ntkgen.analysis.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["split_indices"] = split_indices
    return environment


def split_indices(text: str) -> list[str]:
    """Split a text at the subscripts of formulas. Every second part of the result is a subscript.

    >>> split_indices("‖E‖_F ÷ K_rr of ntk_float32")
    ['‖E‖', 'F', ' ÷ K', 'rr', ' of ntk_float32']
    """
    return _INDEX.split(text)
