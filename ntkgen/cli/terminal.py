"""Signs that a terminal cannot show, written in ASCII.

Help, results and errors hold signs such as ‖, λ and ≤. A terminal in latin-1, cp1252 or ASCII has not all of them, and
a program that prints them there ends with a traceback.
"""

import codecs
import contextlib
import io
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# How Python is told what to do with a sign that a stream's encoding lacks.
HANDLER = "ntkgen.spelled"
# What Python does otherwise, unless somebody has asked for more: fail, or show the number of the sign.
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
    """Write what is not ASCII in ASCII: signs by what they mean, Greek letters by name, others as ``?``.

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
    """Spell the part of a text that an encoding lacks: called by Python's codecs.

    Raises:
        UnicodeError: If it was not writing that failed.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return spell(error.object[error.start : error.end]), error.end


codecs.register_error(HANDLER, _spell_error)


@contextmanager
def spelled_streams() -> Iterator[None]:
    """Let stdout and stderr write any sign, whatever their encoding is; what the user has set stays."""
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in _DEFAULTS:
                stack.callback(_set_errors, stream, stream.errors)
                _set_errors(stream, HANDLER)
        yield


def _set_errors(stream: io.TextIOWrapper, errors: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # it was closed, or its reader has gone: which the writer will find
        stream.reconfigure(errors=errors)
