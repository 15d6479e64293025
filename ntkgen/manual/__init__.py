"""The pages of the manual, which are package data. `ntkgen manual PAGE` shows them."""

import re
from dataclasses import dataclass
from importlib.resources import files

from ntkgen.errors import UnknownNameError

# Names of the pages, in the order in which a newcomer should read them.
NAMES = (
    "computing",
    "python",
    "functions",
    "resuming",
    "workers",
    "object-stores",
    "reading",
    "questions",
    "continual",
    "plasticity",
    "streams",
    "accuracy",
    "speed",
    "extending",
    "contributing",
)

# Comments in the pages. They tell the tests which blocks must not run.
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One page: its name and its text in Markdown. The text begins with a title and a summary."""

    name: str
    text: str

    @property
    def title(self) -> str:
        """The first line without the ``#`` of the heading."""
        return self.text.splitlines()[0].removeprefix("# ")

    @property
    def summary(self) -> str:
        """The first paragraph, as one line."""
        return " ".join(self.text.split("\n\n")[1].split())


def page(name: str) -> Page:
    """Read a page.

    >>> page("accuracy").title
    'Accuracy'

    Raises:
        UnknownNameError: If there is no page of that name.
    """
    if name not in NAMES:
        raise UnknownNameError("page of the manual", name, NAMES)
    text = (files(__name__) / f"{name}.md").read_text(encoding="utf-8")
    return Page(name, _COMMENT.sub("", text))


def pages() -> list[Page]:
    """Read all pages."""
    return [page(name) for name in NAMES]
