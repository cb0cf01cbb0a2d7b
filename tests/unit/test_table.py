"""Column output of pyvmctl: vmctl's layout, sizes, colour, hostile text."""

from __future__ import annotations

import io

import pytest

from vmm.table import STATUS_COLUMNS, Paint, scaled, table, wants_colour

PLAIN = Paint(False)


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_status_has_the_columns_and_widths_of_vmctl() -> None:
    """Scripts written for `vmctl status` can read `pyvmctl status`: same columns, same widths."""
    rows = [
        ("1", "72118", "1", "1.0G", "88.1M", "ttyp8", "root", "running", "example"),
        ("2", "-", "1", "512M", "-", "-", "joe:ops", "stopped", "web"),
    ]

    assert table(STATUS_COLUMNS, rows, PLAIN, {}).split("\n") == [
        "   ID   PID VCPUS  MAXMEM  CURMEM     TTY        OWNER    STATE NAME",
        "    1 72118     1    1.0G   88.1M   ttyp8         root  running example",
        "    2     -     1    512M       -       -      joe:ops  stopped web",
    ]


def test_colour_does_not_move_columns() -> None:
    """Escape codes are outside the padding: what is seen is the same with and without colour."""
    row = ("1", "9", "1", "1.0G", "1.0M", "console", "root", "running", "running")
    painted = table(STATUS_COLUMNS, [row], Paint(True), {"STATE": {"running": "green"}})

    assert "\x1b[32mrunning\x1b[0m running" in painted  # the state, not the VM of that name
    for code in ("\x1b[32m", "\x1b[1m", "\x1b[0m"):
        painted = painted.replace(code, "")
    assert painted == table(STATUS_COLUMNS, [row], PLAIN, {})


def test_a_wide_cell_is_shown_whole() -> None:
    """A long owner pushes the row to the right; it is never cut to another, wrong name."""
    owner = "a-very-long-user:and-group"
    row = ("1", "9", "1", "1.0G", "1.0M", "console", owner, "running", "web")

    assert f" {owner}  running web" in table(STATUS_COLUMNS, [row], PLAIN, {})


def test_control_characters_do_not_reach_the_terminal() -> None:
    """A name from another user's file cannot move the cursor or start an escape sequence."""
    row = ("1", "9", "1", "1.0G", "1.0M", "console", "root", "running", "a\x1b[2Jb\nc\u202ed")

    assert (
        table(STATUS_COLUMNS, [row], PLAIN, {})
        .split("\n")[1]
        .endswith(" running a\\x1b[2Jb\\nc\\u202ed")
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (88 * 2**20 + 2**20 // 10, "88.1M"),
        (512 * 2**20, "512M"),
        (2**30, "1.0G"),
        (5 * 2**30, "5.0G"),
        (2**20 - 1, "1.0M"),  # 1023.999K rounds into the next unit
        (99 * 2**20 + 999 * 2**10, "100M"),  # 99.98M: no "100.0M"
        (2**40, "1.0T"),
        (2**70, "1024E"),
    ],
)
def test_sizes_are_scaled(size: int, text: str) -> None:
    """Sizes are in vmctl's form: one decimal below 100 units, none from there on."""
    assert scaled(size) == text


@pytest.mark.parametrize(
    ("choice", "environment", "stream", "expected"),
    [
        ("auto", {}, Terminal(), True),
        ("auto", {}, io.StringIO(), False),
        ("auto", {}, None, False),
        ("auto", {"NO_COLOR": "1"}, Terminal(), False),
        ("auto", {"NO_COLOR": ""}, Terminal(), True),
        ("auto", {"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, Terminal(), False),
        ("auto", {"CLICOLOR_FORCE": "1"}, io.StringIO(), True),
        ("auto", {"CLICOLOR_FORCE": "0"}, io.StringIO(), False),
        ("auto", {"TERM": "dumb"}, Terminal(), False),
        ("always", {"NO_COLOR": "1"}, io.StringIO(), True),
        ("never", {"CLICOLOR_FORCE": "1"}, Terminal(), False),
    ],
)
def test_colour_follows_flag_then_environment_then_terminal(
    choice: str,
    environment: dict[str, str],
    stream: io.StringIO | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--color wins over NO_COLOR, NO_COLOR over CLICOLOR_FORCE, and then the terminal decides."""
    for name in ("NO_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert wants_colour(choice, stream) is expected
