"""The QMP wire format: bytes → requests, and replies, errors and events → bytes.

QMP (QEMU's docs/interop/qmp-spec) is a stream of JSON objects. The server ends each of its own
with CRLF; a client need not, so where one ends is told by its brackets, not by lines. Knows no
socket and no command. Everything that comes in is hostile: length and nesting are bounded before
the JSON decoder sees a byte.
"""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any, Final, NamedTuple, NoReturn

from config.errors import PyvmError
from vmm.version import VERSION

LIMIT: Final = 64 * 1024  # bytes of one request
DEPTH: Final = 64  # brackets in brackets

# A control character or 0xFF is in no JSON text: clients send one to get a clean start (see
# "Forcing the JSON parser into known-good state" in the specification).
_OUTSIDE: Final = re.compile(rb'["{}\[\]\x00-\x08\x0b\x0c\x0e-\x1f\xff]')
_IN_STRING: Final = re.compile(rb'["\\\x00-\x1f\xff]')
_NOT_SPACE: Final = re.compile(rb"[^ \t\r\n]")
_JUNK_END: Final = re.compile(rb"[\n{\[\x00-\x08\x0b\x0c\x0e-\x1f\xff]")


class QmpError(PyvmError):
    """A request that gets an error reply.

    `error_class` is one of the classes QMP knows; `tag` is {"id": value}, or {} if none was read.
    """

    def __init__(
        self, what: str, tag: dict[str, Any] | None = None, *, error_class: str = "GenericError"
    ) -> None:
        super().__init__(what)
        self.error_class, self.tag = error_class, tag or {}


class QmpFatalError(QmpError):
    """A request that gets an error reply and ends the connection."""


class Request(NamedTuple):
    """One command of a client."""

    name: str
    arguments: dict[str, Any]
    tag: dict[str, Any]  # {"id": value} or {}: what the reply repeats


class Framer:
    """Cuts a byte stream into JSON texts; looks at each byte once."""

    def __init__(self) -> None:
        self._buffer = bytearray()  # begins with the text being cut
        self._at = 0  # looked at so far
        self._depth = 0  # brackets open there
        self._string = False  # inside a string there

    def feed(self, data: bytes) -> None:
        """Append input. Call next() until it gives None before feeding much more."""
        self._buffer += data

    @property
    def empty(self) -> bool:
        """Whether no text has begun."""
        return not self._buffer

    def next(self) -> bytes | None:
        """Return the next text, which need not be valid JSON, or None if it is not all there.

        Raises QmpError for a character that no JSON text holds; what came before it is dropped.
        Raises QmpFatalError for a text too long or too deep.
        """
        buffer = self._buffer
        if not self._at:
            first = _NOT_SPACE.search(buffer)
            del buffer[: first.start() if first else len(buffer)]
        if not buffer:
            return None
        return self._brackets() if buffer[0] in b"{[" else self._junk()

    def _brackets(self) -> bytes | None:
        """Look for the bracket that closes the first one."""
        buffer = self._buffer
        while found := (_IN_STRING if self._string else _OUTSIDE).search(buffer, self._at):
            char, self._at = found[0], found.end()
            if char == b"\\":
                if self._at == len(buffer):  # what it escapes has not come yet
                    self._at -= 1
                    return None
                self._at += 1
            elif char == b'"':
                self._string = not self._string
            elif char in b"{[":
                self._depth += 1
                if self._depth > DEPTH:
                    raise QmpFatalError(f"JSON text nested deeper than {DEPTH}")
            elif char in b"}]":
                self._depth -= 1
                if not self._depth:
                    return self._cut(self._at)
            else:
                self._stray(self._at)
        self._wait()
        return None

    def _junk(self) -> bytes | None:
        """Look for the end of what cannot be a request: a line, or up to the next bracket."""
        found = _JUNK_END.search(self._buffer, self._at)
        if found is None:
            self._wait()
            return None
        if found[0] in b"\n{[":
            return self._cut(found.start())
        return self._stray(found.end())

    def _wait(self) -> None:
        self._at = len(self._buffer)
        self._check(self._at)

    def _cut(self, end: int) -> bytes:
        self._check(end)
        text = bytes(self._buffer[:end])
        self._drop(end)
        return text

    def _stray(self, end: int) -> NoReturn:
        byte = self._buffer[end - 1]
        self._drop(end)
        raise QmpError(f"JSON parse error: stray byte 0x{byte:02x}")

    def _check(self, length: int) -> None:
        if length > LIMIT:
            raise QmpFatalError(f"request longer than {LIMIT} bytes")

    def _drop(self, end: int) -> None:
        del self._buffer[:end]
        self._at = self._depth = 0
        self._string = False


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number too large")
    return value


def parse(text: bytes) -> Request:
    """Read one request. Raises QmpError; with the id, if one could be read."""
    try:
        value = json.loads(text.decode(), parse_constant=_constant, parse_float=_number)
    except (ValueError, RecursionError) as err:
        raise QmpError(f"JSON parse error: {err}") from err
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    tag = {"id": value.pop("id")} if "id" in value else {}
    name, arguments = value.pop("execute", None), value.pop("arguments", {})
    if "exec-oob" in value:
        raise QmpError("out-of-band execution is not offered", tag)
    if not isinstance(name, str):
        raise QmpError("QMP input lacks member 'execute', a string", tag)
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object", tag)
    for key in value:
        raise QmpError(f"QMP input member '{clip(key)}' is unexpected", tag)
    return Request(name, arguments, tag)


def encode(message: dict[str, Any]) -> bytes:
    """Return the wire form: ASCII, CRLF at the end. Raises ValueError, TypeError."""
    return json.dumps(message, allow_nan=False).encode() + b"\r\n"


def reply(value: Any, tag: dict[str, Any]) -> bytes:
    """Return a success reply; a command without a result gives None, on the wire {}."""
    return encode({"return": {} if value is None else value, **tag})


def error(err: PyvmError, tag: dict[str, Any]) -> bytes:
    """Return an error reply; `tag` is for errors that know none themselves."""
    error_class = "GenericError"
    if isinstance(err, QmpError):
        error_class, tag = err.error_class, err.tag or tag
    return encode({"error": {"class": error_class, "desc": str(err)}, **tag})


def clip(text: str) -> str:
    """Return a client's word, short enough to be repeated to it."""
    return text if len(text) <= 64 else f"{text[:64]}..."


def event(name: str, data: dict[str, Any]) -> bytes:
    """Return an event that happened now."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    timestamp = {"seconds": seconds, "microseconds": rest // 1000}
    body = {"data": data} if data else {}
    return encode({"timestamp": timestamp, "event": name, **body})


def version() -> dict[str, Any]:
    """Return what query-version tells. Clients read the "qemu" triple as the server's own."""
    triple = zip(("major", "minor", "micro"), map(int, VERSION.split(".")), strict=True)
    return {"qemu": dict(triple), "package": f"pyvmd {VERSION}"}


def greeting() -> bytes:
    """Return the server's first words. No capability is offered."""
    return encode({"QMP": {"version": version(), "capabilities": []}})
