"""From sections to one self-contained page in HTML, by the template `page.html.jinja`.

The template escapes every value that it is given. Style and script are files of this package that it includes.
"""

import re
from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from ntkgen.analysis.report.content import Part, Section

TEMPLATE = "page.html.jinja"
_INDEX = re.compile(r"(?<=[‖K²λ])_(\w+)")


def write_page(title: str, lead: Sequence[Part], sections: Sequence[Section]) -> bytes:
    """Put a page together: head, lead, links to the sections, the sections."""
    text = _environment().get_template(TEMPLATE).render(title=title, lead=lead, sections=sections)
    return text.encode(errors="backslashreplace")  # a path may have bytes that are no text


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("ntkgen.analysis.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["split_indices"] = split_indices
    return made


def split_indices(text: str) -> list[str]:
    """Split a text into what is on the line and, each second, an index of mathematics that goes below it.

    >>> split_indices("‖E‖_F ÷ K_rr of ntk_float32")
    ['‖E‖', 'F', ' ÷ K', 'rr', ' of ntk_float32']
    """
    return _INDEX.split(text)
