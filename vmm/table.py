"""What pyvmctl prints: columns, sizes in scaled form, and colour where a terminal shows it."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import PyvmError
from devices.lines import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

_UNITS: Final = "BKMGTPE"
_STYLES: Final = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1"}


class Column(NamedTuple):
    """One column. Right aligned to `width`; width 0 takes what the text needs (last column)."""

    title: str
    width: int


# vmctl(8)'s status output, so that scripts written for it read ours.
STATUS_COLUMNS: Final = (
    Column("ID", 5),
    Column("PID", 5),
    Column("VCPUS", 5),
    Column("MAXMEM", 7),
    Column("CURMEM", 7),
    Column("TTY", 7),
    Column("OWNER", 12),
    Column("STATE", 8),
    Column("NAME", 0),
)


class Paint:
    """Wraps text in colour, or leaves it alone when the reader is not a terminal."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, text: str, style: str = "") -> str:
        """Return `text` in `style`, one of green, yellow, red, dim, bold, or plain for ""."""
        if not self.enabled or not style:
            return text
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def wants_colour(choice: str, stream: TextIO | None) -> bool:
    """Decide for `--color` auto, always or never.

    Auto means: a terminal that is not dumb, and no NO_COLOR in the environment;
    CLICOLOR_FORCE other than 0 colours a pipe as well.
    """
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") != "0":
        return True
    return bool(stream and stream.isatty() and os.environ.get("TERM") != "dumb")


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    paint: Paint,
    styles: dict[str, dict[str, str]],
) -> str:
    """Return heading and rows, one line each; `styles` maps column title → cell → style.

    Text wider than its column pushes the rest to the right rather than being cut: a
    shortened name or owner would be a wrong one.
    """
    titles = [column.title for column in columns]
    lines = [_row(columns, titles, [paint(title, "bold") for title in titles])]
    for row in rows:
        # Names may come from files of other users: none may move the reader's cursor.
        cells = [printable(cell) for cell in row]
        painted = [
            paint(cell, styles.get(title, {}).get(cell, ""))
            for title, cell in zip(titles, cells, strict=True)
        ]
        lines.append(_row(columns, cells, painted))
    return "\n".join(lines)


def _row(columns: Sequence[Column], cells: Sequence[str], painted: Sequence[str]) -> str:
    # Escape codes have a length but no width, so the padding is reckoned from the plain cell.
    return " ".join(
        " " * max(column.width - len(cell), 0) + text
        for column, cell, text in zip(columns, cells, painted, strict=True)
    )


def scaled(size: int) -> str:
    """Return bytes in vmctl's scaled form: 1.0G, 88.1M, 512M, 0B; at most five characters.

    Below 100 units one decimal is shown, from 100 on none; rounding is to nearest.
    """
    if size < 1024:
        return f"{size}B"
    shift = 0
    while size >> (shift + 10) and shift < 60:
        shift += 10
    # Rounding may reach the next unit: 1023.9K is 1.0M.
    if (size + (1 << shift >> 1)) >> shift >= 1024 and shift < 60:
        shift += 10
    tenths = ((size * 10) + (1 << shift >> 1)) >> shift
    unit = _UNITS[shift // 10]
    if tenths >= 1000:
        return f"{(size + (1 << shift >> 1)) >> shift}{unit}"
    return f"{tenths // 10}.{tenths % 10}{unit}"


def say(text: str) -> None:
    """Print data and flush it, so that a full disk is noticed.

    Raises PyvmError, but BrokenPipeError as it is: a reader that has enough is no failure.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as err:
        # What could not be flushed must not fail a second time when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        raise PyvmError(f"cannot write the output: {err.strerror}") from err


def say_json(value: Any) -> None:
    """Print one JSON document."""
    say(json.dumps(value, indent=2))


def tell(text: str) -> None:
    """Say something to the user, apart from the data."""
    print(printable(text), file=sys.stderr, flush=True)
