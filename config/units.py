"""Sizes, rates and times as people write them: "512M" ↔ bytes, "1M/s" ↔ bytes per second.

Every unit is a power of 1024, as in vm.conf(5): K, M, G, T, P, E, each also as KiB, MiB, …
in either case. A bare number counts bytes. KB, MB, … are refused, since half of the world
reads them as powers of 1000.
"""

from __future__ import annotations

from typing import Final

_PREFIXES: Final = "kmgtpe"
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MAX_DIGITS: Final = 20  # more than 2**63 needs; keeps int() from chewing on a megabyte of digits
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}
MAX_SIZE: Final = 2**63 - 1  # what off_t can say


def _shift(unit: str) -> int:
    """Return the power of two that a unit stands for. Raises ValueError."""
    word = unit.lower()
    if word in ("", "b"):
        return 0
    power = 10 * (_PREFIXES.find(word[0]) + 1)
    if not power or word[1:] not in ("", "b", "ib"):
        raise ValueError(f"unknown unit {unit[:12]!r} (use K, M, G or T)")
    if word[1:] == "b":
        letter = word[0].upper()
        raise ValueError(f"{unit!r} may mean 1000 or 1024: write {letter} or {letter}iB for 1024")
    return power


def parse_size(text: str) -> int:
    """Return the bytes that `text` stands for, 0 to 2**63 - 1; "1.5G" is fine, "0.3K" is not whole.

    Raises ValueError with a sentence that says what is wrong.
    """
    body = text.strip()
    number = body.rstrip(_LETTERS)
    unit = body[len(number) :]
    whole, dot, fraction = number.rstrip().partition(".")
    digits = whole + fraction
    good = digits.isascii() and digits.isdigit() and whole and (fraction or not dot)
    if not good or len(digits) > _MAX_DIGITS:
        raise ValueError("not a size such as 512M or 2G")
    scale: int = 10 ** len(fraction)
    size, rest = divmod(int(digits) << _shift(unit), scale)
    if rest:
        raise ValueError("not a whole number of bytes")
    if size > MAX_SIZE:
        raise ValueError("larger than any size this machine can address")
    return size


def format_size(size: int) -> str:
    """Return `size` bytes in the largest unit that says it exactly; parse_size() reads it back."""
    for power in range(len(_PREFIXES), 0, -1):
        if size and not size % (1 << 10 * power):
            return f"{size >> 10 * power}{_PREFIXES[power - 1].upper()}"
    return str(size)


def parse_rate(text: str) -> int:
    """Return the bytes per second that "1M/s" stands for. Raises ValueError."""
    body = text.strip()
    if not body.endswith("/s"):
        raise ValueError("not a rate such as 1M/s")
    return parse_size(body.removesuffix("/s"))


def format_rate(rate: int) -> str:
    """Return bytes per second as parse_rate() reads them."""
    return f"{format_size(rate)}/s"


def parse_time(text: str) -> float:
    """Return the seconds that "30", "1.5s", "5m" or "2h" stands for. Raises ValueError."""
    body = text.strip()
    number, scale = (body[:-1], _SECONDS[body[-1]]) if body[-1:] in _SECONDS else (body, 1)
    whole, dot, fraction = number.partition(".")
    digits = whole + fraction
    good = digits.isascii() and digits.isdigit() and whole and (fraction or not dot)
    if not good or len(digits) > _MAX_DIGITS:
        raise ValueError("not a time such as 30s or 5m")
    return float(number) * scale


def format_time(seconds: float) -> str:
    """Return seconds in the largest unit that says them exactly; parse_time() reads it back."""
    for unit, scale in (("h", 3600), ("m", 60)):
        if seconds and not seconds % scale:
            return f"{seconds // scale:g}{unit}"
    return f"{seconds:g}s"
