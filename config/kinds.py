"""Kinds of scalar values in vm.yaml: how each is read, described and put in the JSON Schema.

A kind sees the text of a YAML scalar and never its YAML type, so a bare 52:54:00:12:34:56 is no
base-60 number, `no` is a word where a word is due, and 0755 keeps its zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from config.units import (
    MAX_SIZE,
    format_rate,
    format_size,
    format_time,
    parse_rate,
    parse_size,
    parse_time,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_SHOWN: Final = 40  # characters of the user's text that a message repeats
_SIZE_TEXT: Final = r"[0-9]+(\.[0-9]+)? *([kmgtpeKMGTPE]([iI][bB])?|[bB])?"
_WORDS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def quoted(text: str) -> str:
    """Return the user's text as a message may repeat it: one line, short, no control characters."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def closest(word: str, known: Iterable[str]) -> str:
    """Return the member of `known` that `word` was probably meant to be, or ""."""
    import difflib  # saves 3 ms on every file without mistakes

    found = difflib.get_close_matches(word[:_SHOWN].lower(), list(known), n=1)
    return found[0] if found else ""


class Kind:
    """Base of all: what a scalar key accepts."""

    def expects(self) -> str:
        """Return what is allowed, to be read after "expected"."""
        raise NotImplementedError

    def read(self, text: str) -> object:
        """Return the value of `text`. Raises ValueError with the whole complaint."""
        raise NotImplementedError

    def remark(self, text: str) -> str:
        """Return a warning about a `text` that was read well, or ""."""
        del text
        return ""

    def show(self, value: Any) -> str:
        """Return `value` as vm.yaml would write it, or "none"."""
        return str(value) or "none"

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the value as an editor's YAML 1.2 parser sees it."""
        raise NotImplementedError

    def refuse(self, text: str, why: str = "") -> ValueError:
        """Return the error that says what was expected and what came."""
        tail = f"; {why}" if why else ""
        return ValueError(f"expected {self.expects()} (got {quoted(text)}{tail})")


class Bool(Kind):
    """true or false; yes, no, on and off mean the same, in any case."""

    def expects(self) -> str:
        """Name the two."""
        return "true or false"

    def read(self, text: str) -> bool:
        """Return the truth value. Raises ValueError."""
        value = _WORDS.get(text.lower())
        if value is None:
            raise self.refuse(text)
        return value

    def show(self, value: Any) -> str:
        """Return YAML's spelling."""
        return "true" if value else "false"

    def json_schema(self) -> dict[str, Any]:
        """Allow the words that YAML 1.2 reads as strings, too."""
        return {"enum": [True, False, "yes", "no", "on", "off"]}


class Int(Kind):
    """A decimal integer from `low` to `high`; leading zeros mean nothing."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def expects(self) -> str:
        """Name the range."""
        return f"an integer from {self.low} to {self.high}"

    def read(self, text: str) -> int:
        """Return the number. Raises ValueError."""
        if not (text.isascii() and text.isdigit() and len(text) <= 20):
            raise self.refuse(text)
        value = int(text)
        if not self.low <= value <= self.high:
            raise self.refuse(text)
        return value

    def json_schema(self) -> dict[str, Any]:
        """Give the range."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


class Size(Kind):
    """Bytes from `low` to `high`, a multiple of `step`."""

    def __init__(
        self, low: int, high: int = MAX_SIZE, step: int = 1, *, remark_bare: bool = False
    ) -> None:
        self.low, self.high, self.step, self.remark_bare = low, high, step, remark_bare

    def expects(self) -> str:
        """Name the range and the step."""
        span = f"a size from {format_size(self.low)} to {format_size(self.high)}"
        return span if self.step == 1 else f"{span} in steps of {format_size(self.step)}"

    def read(self, text: str) -> int:
        """Return the bytes. Raises ValueError that names the nearest good size, if one is near."""
        try:
            value = parse_size(text)
        except ValueError as err:
            raise self.refuse(text, str(err)) from err
        if not self.low <= value <= self.high:
            bare = self._bare(text) and self.low <= value << 20 <= self.high
            raise self.refuse(text, f"that is bytes: did you mean {value}M?" if bare else "")
        if value % self.step:
            nearest = (value + self.step // 2) // self.step * self.step
            raise self.refuse(text, f"the nearest is {format_size(min(nearest, self.high))}")
        return value

    def remark(self, text: str) -> str:
        """Point out a number without a unit: other programs take it for MiB."""
        if not (self.remark_bare and self._bare(text)):
            return ""
        return f"a number without unit is bytes: write {format_size(parse_size(text))}"

    @staticmethod
    def _bare(text: str) -> bool:
        return text.strip()[-1:].isdigit()

    def show(self, value: Any) -> str:
        """Return the shortest exact spelling."""
        return format_size(value)

    def json_schema(self) -> dict[str, Any]:
        """Check numbers fully and strings by their form."""
        number = {"type": "integer", "minimum": self.low, "maximum": self.high}
        if self.step > 1:
            number["multipleOf"] = self.step
        return {"anyOf": [number, {"type": "string", "pattern": f"^{_SIZE_TEXT}$"}]}


class BlockSize(Size):
    """A power of two in bytes."""

    def expects(self) -> str:
        """Name the range."""
        return f"a power of two from {format_size(self.low)} to {format_size(self.high)}"

    def read(self, text: str) -> int:
        """Return the bytes. Raises ValueError."""
        value = super().read(text)
        if value & (value - 1):
            raise self.refuse(text)
        return value


class Rate(Kind):
    """Bytes per second, "1M/s"."""

    def expects(self) -> str:
        """Show one."""
        return "a rate such as 1M/s"

    def read(self, text: str) -> int:
        """Return bytes per second, at least 1. Raises ValueError."""
        try:
            value = parse_rate(text)
        except ValueError as err:
            raise self.refuse(text) from err
        if not value:
            raise self.refuse(text, "leave the key out for no limit")
        return value

    def show(self, value: Any) -> str:
        """Return the shortest exact spelling."""
        return format_rate(value)

    def json_schema(self) -> dict[str, Any]:
        """Check the form."""
        return {"type": "string", "pattern": f"^{_SIZE_TEXT}/s$"}


class Time(Kind):
    """Seconds from `low` to `high`, "30s" or "5m"; a bare number counts seconds."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def expects(self) -> str:
        """Name the range."""
        return f"a time from {format_time(self.low)} to {format_time(self.high)}"

    def read(self, text: str) -> float:
        """Return seconds. Raises ValueError."""
        try:
            value = parse_time(text)
        except ValueError as err:
            raise self.refuse(text) from err
        if not self.low <= value <= self.high:
            raise self.refuse(text)
        return value

    def show(self, value: Any) -> str:
        """Return the shortest exact spelling."""
        return format_time(value)

    def json_schema(self) -> dict[str, Any]:
        """Check the form."""
        text = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?[smh]?$"}
        return {"anyOf": [text, {"type": "number", "minimum": self.low, "maximum": self.high}]}


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def expects(self) -> str:
        """List the words."""
        return f"one of {', '.join(self.words)}"

    def read(self, text: str) -> str:
        """Return the word. Raises ValueError with the likely one."""
        if text not in self.words:
            likely = closest(text, self.words)
            raise self.refuse(text, f"did you mean {likely!r}?" if likely else "")
        return text

    def json_schema(self) -> dict[str, Any]:
        """List the words."""
        return {"enum": list(self.words)}


class Text(Kind):
    """One line of at most `limit` bytes of UTF-8, of the form `pattern` where there is one."""

    def __init__(self, what: str, limit: int, pattern: str = "", *, empty: bool = False) -> None:
        self.what, self.limit, self.pattern, self.empty = what, limit, pattern, empty

    def expects(self) -> str:
        """Say what the text stands for."""
        return self.what

    def read(self, text: str) -> str:
        """Return the text itself. Raises ValueError."""
        try:
            length = len(text.encode())
        except UnicodeEncodeError as err:
            raise self.refuse(text, "not valid Unicode") from err
        if length > self.limit:
            raise self.refuse(text, f"{length} bytes, the limit is {self.limit}")
        if any(char < " " or "\x7f" <= char < "\xa0" for char in text):
            raise self.refuse(text, "control characters are not allowed")
        if not text and not self.empty:
            raise self.refuse(text)
        if self.pattern:
            import re  # free here: yaml has loaded it; config.kinds alone stays cheap

            if not re.fullmatch(self.pattern, text):
                raise self.refuse(text)
        return text

    def json_schema(self) -> dict[str, Any]:
        """Check the form; an unquoted number is text here, too."""
        form: dict[str, Any] = {"type": ["string", "number"], "maxLength": self.limit}
        if self.pattern:
            form["pattern"] = f"^({self.pattern})$"
        elif not self.empty:
            form["minLength"] = 1
        return form


class Words(Text):
    """Text that may be written over several lines of YAML; each line break becomes a blank."""

    def read(self, text: str) -> str:
        """Return the text on one line. Raises ValueError."""
        return super().read(" ".join(text.strip().split("\n")))


class Path(Text):
    """A file name; relative ones start at the directory of vm.yaml. `words` are not file names."""

    def __init__(self, *words: str) -> None:
        super().__init__(" or ".join((*words, "a file name")), 4095)
        self.words = words

    def read(self, text: str) -> str:
        """Return the name as written; the decoder knows the directory. Raises ValueError."""
        name = super().read(text)
        if name.startswith("~"):
            raise self.refuse(text, "'~' is not expanded here: write the directory, or ./~")
        return name
