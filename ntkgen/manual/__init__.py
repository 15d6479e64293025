"""The pages of the manual, as package data: what `ntkgen manual PAGE` shows."""

import re
from dataclasses import dataclass
from importlib.resources import files

from ntkgen.errors import UnknownNameError

# In the order in which a newcomer reads them.
NAMES = (
    "computing",
    "python",
    "resuming",
    "workers",
    "object-stores",
    "reading",
    "questions",
    "accuracy",
    "speed",
    "extending",
    "contributing",
)

# A comment says to the tests why a block is not run.
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One page: its name, and its text in Markdown, a title and a summary first."""

    name: str
    text: str

    @property
    def title(self) -> str:
        """The first line, without its sign."""
        return self.text.splitlines()[0].removeprefix("# ")

    @property
    def summary(self) -> str:
        """The first paragraph, in one line."""
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
