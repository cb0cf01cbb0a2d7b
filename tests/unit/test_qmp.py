"""QMP's wire format: cutting the stream, reading requests, writing answers."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest

from config.errors import HostError
from vmm import qmp


def texts(data: bytes, step: int = 0) -> list[bytes | str]:
    """Feed `data`, `step` bytes at a time; return texts and error words in order."""
    framer, found = qmp.Framer(), list[bytes | str]()
    for at in range(0, len(data), step or len(data)):
        framer.feed(data[at : at + (step or len(data))])
        while True:
            try:
                text = framer.next()
            except qmp.QmpFatalError as err:
                return [*found, f"fatal: {err}"]
            except qmp.QmpError as err:
                found.append(str(err))
                continue
            if text is None:
                break
            found.append(text)
    return found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"execute":"stop"}', [b'{"execute":"stop"}']),
        (b'{"a":1}{"b":2}\r\n [3] ', [b'{"a":1}', b'{"b":2}', b"[3]"]),
        (b'{\n  "a": "}{\\"]\\\\"\n}', [b'{\n  "a": "}{\\"]\\\\"\n}']),
        (b"hello\n{}", [b"hello", b"{}"]),
        (b"}}\n{}", [b"}}", b"{}"]),
        (b"junk{}", [b"junk", b"{}"]),
        (b'{"half": "of it', []),
        (b" \r\n\t\n", []),
        (b"123", []),  # more digits may come
        (b"123\n", [b"123"]),
    ],
)
def test_the_stream_is_cut_by_brackets(data: bytes, expected: list[bytes]) -> None:
    """Requests need no line ends, may span lines, and hold brackets in strings."""
    assert texts(data) == expected
    assert texts(data, 1) == expected


@pytest.mark.parametrize("stray", [b"\x01", b"\xff", b"\x00", b"\x1b"])
@pytest.mark.parametrize("before", [b"", b'{"a": [', b'{"a": "str', b"junk", b'{"a": "\\"'])
def test_a_control_character_brings_a_clean_start(stray: bytes, before: bytes) -> None:
    """A client that sends one byte no JSON has gets an error, and its next request is heard."""
    expected = [f"JSON parse error: stray byte 0x{stray[0]:02x}", b'{"b":1}']
    assert texts(before + stray + b'{"b":1}') == expected
    assert texts(before + stray + b'{"b":1}', 1) == expected


def test_a_string_ends_with_its_line() -> None:
    """A string cut short does not swallow the requests after it."""
    assert texts(b'{"execute": "sto\n{"b":1}') == ["JSON parse error: stray byte 0x0a", b'{"b":1}']


@pytest.mark.parametrize("start", [b'{"a": "', b"x", b"[" + b"1," * 100, b'{"execute":'])
def test_an_endless_request_is_given_up(start: bytes) -> None:
    """What does not end within the limit ends the connection, kept memory stays bounded."""
    found = texts(start + b"x" * 10 * qmp.LIMIT, 4096)
    assert found == [f"fatal: request longer than {qmp.LIMIT} bytes"]


def test_a_long_request_that_ends_is_refused_too() -> None:
    """The limit does not depend on how the bytes arrive."""
    data = b'{"a": "' + b"x" * qmp.LIMIT + b'"}'
    assert texts(data) == [f"fatal: request longer than {qmp.LIMIT} bytes"]


@pytest.mark.parametrize("brackets", [b"[" * 100_000, b'{"a":' * 100_000])
def test_deep_nesting_never_reaches_the_decoder(brackets: bytes) -> None:
    """A hundred thousand brackets end the connection, not the process."""
    assert texts(brackets) == [f"fatal: JSON text nested deeper than {qmp.DEPTH}"]


def test_the_deepest_allowed_nesting_can_be_read() -> None:
    """Nesting up to the limit is no error."""
    nested = b"[" * (qmp.DEPTH - 1) + b"]" * (qmp.DEPTH - 1)
    (text,) = texts(b'{"execute":"x","id":' + nested + b"}")
    assert isinstance(text, bytes)
    assert qmp.parse(text).name == "x"


def test_any_cut_of_the_stream_gives_the_same_requests() -> None:
    """How the kernel cuts a stream into reads changes nothing."""
    rng = random.Random(7)  # noqa: S311  any sequence will do, but the same one each time
    awkward = ['"', "\\", "{", "]", "\n", "é", "\u2028", "x" * 300]
    values = [
        {"execute": "x", "id": "".join(rng.choices(awkward, k=rng.randrange(12))), "n": [n, {}]}
        for n in range(200)
    ]
    stream = b"".join(json.dumps(v, ensure_ascii=rng.random() < 0.5).encode() for v in values)
    for step in (1, 2, 7, 64, 1000, len(stream)):
        assert [json.loads(text) for text in texts(stream, step)] == values


def test_random_bytes_never_break_the_framer() -> None:
    """Whatever comes in, next() gives a text, nothing, or one of its two errors."""
    rng = random.Random(11)  # noqa: S311
    alphabet = b'{}[]",:\\ \n\x00\xff1aeu'
    for _ in range(300):
        data = bytes(rng.choices(alphabet, k=400))
        for text in texts(data, rng.randrange(1, 50)):
            if isinstance(text, bytes):
                with contextlib.suppress(qmp.QmpError):
                    qmp.parse(text)


def test_a_request_is_read() -> None:
    """Command, arguments and id come through; arguments and id may be missing."""
    full = qmp.parse(b'{"execute": "stop", "arguments": {"a": 1}, "id": ["x", null]}')
    assert full == qmp.Request("stop", {"a": 1}, {"id": ["x", None]})
    assert qmp.parse(b'{"execute": "stop"}') == qmp.Request("stop", {}, {})
    assert qmp.parse(b'{"execute": "stop", "id": null}').tag == {"id": None}


@pytest.mark.parametrize(
    ("text", "message", "tag"),
    [
        (b'{"execute": }', "JSON parse error", {}),
        (b"{'execute': 'stop'}", "JSON parse error", {}),
        (b'{"execute": "\xc3("}', "JSON parse error", {}),
        (b'{"execute": "x", "id": NaN}', "NaN is not JSON", {}),
        (b'{"execute": "x", "id": -Infinity}', "-Infinity is not JSON", {}),
        (b'{"execute": "x", "id": 1e999}', "number too large", {}),
        (b'{"id": ' + b"9" * 5000 + b"}", "JSON parse error", {}),
        (b"[1, 2]", "must be a JSON object", {}),
        (b"42", "must be a JSON object", {}),
        (b'{"id": 1}', "lacks member 'execute'", {"id": 1}),
        (b'{"execute": 5, "id": 1}', "lacks member 'execute'", {"id": 1}),
        (b'{"execute": "x", "arguments": [], "id": 1}', "must be an object", {"id": 1}),
        (b'{"execute": "x", "arguments": null}', "must be an object", {}),
        (b'{"execute": "x", "extra": 1, "id": 2}', "'extra' is unexpected", {"id": 2}),
        (b'{"exec-oob": "x", "id": 3}', "out-of-band", {"id": 3}),
    ],
)
def test_a_bad_request_is_refused_with_its_id(
    text: bytes, message: str, tag: dict[str, Any]
) -> None:
    """Each mistake has its words, and the id is repeated wherever it could be read."""
    with pytest.raises(qmp.QmpError, match=message) as caught:
        qmp.parse(text)
    assert caught.value.tag == tag
    assert not isinstance(caught.value, qmp.QmpFatalError)
    assert len(str(caught.value)) < 300


def test_answers_are_ascii_objects_on_lines() -> None:
    """The server speaks ASCII, one object per CRLF-ended line (qmp-spec, General Definitions)."""
    err = HostError("geht nicht: ü\n", vm="web")
    for message, expected in (
        (qmp.reply(None, {}), {"return": {}}),
        (qmp.reply([1, "é"], {"id": None}), {"return": [1, "é"], "id": None}),
        (
            qmp.error(err, {"id": 7}),
            {"error": {"class": "GenericError", "desc": "web: geht nicht: ü\n"}, "id": 7},
        ),
        (
            qmp.error(qmp.QmpError("no", error_class="CommandNotFound"), {}),
            {"error": {"class": "CommandNotFound", "desc": "no"}},
        ),
    ):
        assert message.isascii()
        assert message.endswith(b"\r\n")
        assert message.count(b"\n") == 1
        assert json.loads(message) == expected


def test_a_reply_json_cannot_hold_is_an_error() -> None:
    """NaN and bytes never reach the wire."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        qmp.reply(float("nan"), {})
    with pytest.raises(TypeError):
        qmp.reply(b"", {})


def test_an_event_has_a_timestamp_and_perhaps_data() -> None:
    """Events carry seconds and microseconds since 1970 (qmp-spec, Asynchronous events)."""
    event = json.loads(qmp.event("RESET", {"guest": True}))
    assert event["event"] == "RESET"
    assert event["data"] == {"guest": True}
    assert event["timestamp"].keys() == {"seconds", "microseconds"}
    assert event["timestamp"]["seconds"] > 1_700_000_000
    assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
    assert "data" not in json.loads(qmp.event("STOP", {}))


def test_the_greeting_offers_nothing_that_does_not_work() -> None:
    """The greeting has QMP's form: a version triple and a list of capabilities, empty here."""
    greeting = json.loads(qmp.greeting())["QMP"]
    assert greeting["capabilities"] == []
    assert greeting["version"]["qemu"].keys() == {"major", "minor", "micro"}
    assert all(type(part) is int for part in greeting["version"]["qemu"].values())
    assert greeting["version"]["package"].startswith("pyvmd ")
