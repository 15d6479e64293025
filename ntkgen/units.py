"""Conversion of bytes, seconds and counts to readable text, and of text to bytes."""

import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def human_bytes(count: float) -> str:
    """Format a number of bytes in decimal units.

    >>> human_bytes(465), human_bytes(5_000_000_000)
    ('465 B', '5.0 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, thing: str) -> str:
    """Write a number of things.

    >>> counted(1, "task"), counted(2000, "task")
    ('1 task', '2,000 tasks')
    """
    return f"{count:,} {thing}{'s' * (count != 1)}"


def parse_bytes(text: str) -> int | None:
    """Parse a number of bytes. Return None if the text is not a number of bytes.

    >>> parse_bytes("1.5GB"), parse_bytes("2GiB"), parse_bytes("much")
    (1500000000, 2147483648, None)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    return None if match is None or match[2] not in _UNITS else int(float(match[1]) * _UNITS[match[2]])


def human_seconds(seconds: float) -> str:
    """Format a duration in a suitable unit.

    >>> human_seconds(0.4), human_seconds(75), human_seconds(5400), human_seconds(200_000)
    ('0.4 s', '75 s', '1.5 h', '2.3 days')
    """
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
