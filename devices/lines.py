"""Lines of a log: when, and text that steers no terminal."""

from __future__ import annotations

import time


def printable(text: str) -> str:
    """Return `text` with whatever could steer a terminal written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def stamp() -> str:
    """Return the time as RFC 3339 has it: UTC, to the millisecond."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 10**6:03}Z"
