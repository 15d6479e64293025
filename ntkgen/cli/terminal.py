"""ASCII spellings of characters that a terminal cannot show.

Help, results and errors contain characters such as ‖, λ and ≤. The encodings latin-1, cp1252 and ASCII lack some of
them. Without this module, printing them there would end with a traceback.
"""

import codecs
import contextlib
import io
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Name of the codec error handler that replaces characters which the encoding of a stream lacks.
HANDLER = "ntkgen.spelled"
# Python's default error handlers of stdout and stderr. A handler that the user has chosen is not replaced.
_DEFAULTS = {"strict", "surrogateescape", "backslashreplace"}

_SPELLED = {
    "‖": "||",
    "→": "->",
    "←": "<-",
    "×": "x",
    "·": "*",
    "−": "-",
    "–": "-",
    "÷": "/",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "…": "...",
    "√": "sqrt ",
    "½": "1/2",
    "∘": "*",
    "⊗": "(x)",
    "⟨": "<",
    "⟩": ">",
    "⌈": "ceil(",
    "⌉": ")",
    "⌊": "floor(",
    "⌋": ")",
    "°": " degrees",
    "∈": "in",
    "∂": "d",
    "∇": "grad ",
    "∫": "integral ",
    "§": "section ",
    "ᵀ": "^T",
    "⁻": "^-",
    "⁺": "^+",
    "’": "'",
    "“": '"',
    "”": '"',
    "━": "-",  # of progress bars
    "╸": "-",
    "╺": "-",
    "µ": "u",
    "ß": "ss",
}


def spell(text: str) -> str:
    """Spell text in ASCII: symbols by their meaning, Greek letters by name, unknown characters as ``?``.

    >>> spell("K = J Jᵀ, ‖E‖ ≤ √(λ₁ × 10⁻²) … Größe 数")
    'K = J J^T, ||E|| <= sqrt (lambda1 x 10^-2) ... Grosse ?'
    """
    return "".join(sign if sign.isascii() else _spell_sign(sign) for sign in text)


def _spell_sign(sign: str) -> str:
    if sign in _SPELLED:
        return _SPELLED[sign]
    if unicodedata.combining(sign):
        return ""
    name = unicodedata.name(sign, "")
    if name.startswith("GREEK"):
        letter = name.split()[-1].replace("LAMDA", "LAMBDA")
        return letter.capitalize() if "CAPITAL" in name else letter.lower()
    return unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode("ascii") or "?"


def _spell_error(error: UnicodeError) -> tuple[str, int]:
    """Spell the characters that could not be encoded. Python's codecs call this function.

    Raises:
        UnicodeError: If decoding failed, not encoding.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return spell(error.object[error.start : error.end]), error.end


codecs.register_error(HANDLER, _spell_error)


@contextmanager
def spelled_streams() -> Iterator[None]:
    """Let stdout and stderr print any character in any encoding. An error handler that the user has set is kept."""
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in _DEFAULTS:
                stack.callback(_set_errors, stream, stream.errors)
                _set_errors(stream, HANDLER)
        yield


def _set_errors(stream: io.TextIOWrapper, errors: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # The stream is closed. The next write reports it.
        stream.reconfigure(errors=errors)
