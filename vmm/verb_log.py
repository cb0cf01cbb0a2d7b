"""pyvmctl log."""

from __future__ import annotations

import argparse
import json
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError
from devices.lines import printable
from vmm import safefile, survey
from vmm.table import say
from vmm.usage import PROGRAM, Verb, name_argument, verbs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLLOW_SECONDS: Final = 0.2  # between looks at a log that is followed
LINE_LIMIT: Final = 16 * 1024  # bytes; our own lines are far shorter
HISTORY: Final = 100_000  # lines kept of a log and its older part, which are 2 MiB together

_CHUNK: Final = 64 * 1024


class LogReader:
    """Reads the log in a VM's directory, first its older part, then on and on over rotations."""

    def __init__(self, path: str) -> None:
        """Raises HostError if there is no log to read."""
        try:
            self._dir = safefile.open_dir(path)
            self._fd = safefile.open_file("log", os.O_RDONLY, self._dir)
        except OSError as err:
            raise HostError(f"cannot read {path}/log: {err.strerror}") from err
        self._rest = b""

    def history(self) -> Iterator[str]:
        """Yield the lines there are."""
        try:
            older = safefile.open_file("log.1", os.O_RDONLY, self._dir)
        except OSError:
            pass
        else:
            yield from self._read(older)
            os.close(older)
        yield from self._read(self._fd)

    def more(self) -> Iterator[str]:
        """Yield the lines that have come since."""
        yield from self._read(self._fd)
        try:
            new = safefile.open_file("log", os.O_RDONLY, self._dir)
        except OSError:
            return
        if os.path.samestat(os.fstat(new), os.fstat(self._fd)):
            os.close(new)
            return
        yield from self._read(self._fd)  # what came between the last read and the rotation
        os.close(self._fd)
        self._fd = new
        yield from self._read(new)

    def close(self) -> None:
        """Free the descriptors."""
        os.close(self._fd)
        os.close(self._dir)

    def _read(self, fd: int) -> Iterator[str]:
        """Yield whole lines; keep the beginning of one that is not all there yet."""
        while data := os.read(fd, _CHUNK):
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > LINE_LIMIT:
                lines.append(self._rest)
                self._rest = b""
            for line in lines:
                yield printable(line.decode(errors="replace"))


def _lines(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of lines, got {text!r}")
    return int(text[:9])


def _arguments(to: argparse.ArgumentParser) -> None:
    name_argument(to)
    to.add_argument("-f", dest="follow", action="store_true", help="go on until the VM has ended")
    to.add_argument("-n", dest="lines", metavar="N", type=_lines, help="only the last N lines")
    to.add_argument("--json", action="store_true", help="print each entry as a line of JSON")


def _log(options: Any) -> int:
    info = survey.lookup(options.name)
    reader = LogReader(info.path)
    keep = HISTORY if options.lines is None else min(options.lines, HISTORY)
    _show(deque(reader.history(), maxlen=keep), options.json)
    while options.follow:
        # Asked before reading, so that a VM's last words are read after its end.
        ended = survey.wait_end(info.name, FOLLOW_SECONDS, info.pid) is not None
        _show(reader.more(), options.json)
        if ended:
            break
    reader.close()
    return EXIT_DONE


def _show(lines: Iterable[str], as_json: bool) -> None:
    text = "\n".join(json.dumps(entry(line)) for line in lines) if as_json else "\n".join(lines)
    if text:
        say(text)


def entry(line: str) -> dict[str, str]:
    """Return the parts of a line; all of it is text if it is none that pyvmd has written."""
    words = line.split(" ", 2)
    who, colon, text = words[-1].partition(": ")
    if len(words) < 3 or not colon:
        return {"time": "", "level": "", "who": "", "text": line}
    return {"time": words[0], "level": words[1], "who": who, "text": text}


VERBS = verbs(
    Verb(
        name="log",
        summary="show a VM's log",
        arguments=_arguments,
        run=_log,
        example=f"{PROGRAM} log -f web\n{PROGRAM} log -n 20 web",
        details="""\
A line is the time, a level (info, warning for what the guest does wrong, error
for what goes wrong here), the VM or its device, and a sentence. With --json
these are "time", "level", "who" and "text".""",
    )
)
