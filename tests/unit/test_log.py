"""The log: its line, its limits, and that it never gets in the way."""

from __future__ import annotations

import os
import re
import resource
import threading
from typing import TYPE_CHECKING, Final

import pytest

from config.errors import HostError
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINE: Final = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warning|error) [^ ]+: .*"
)


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """The log of a VM called web."""
    path = tmp_path / "log"
    log.setup(str(path), vm="web")
    yield path
    log.setup(stderr=True)


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """No file grows past 100 bytes, as on a full disk: short writes first, then errors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def note(lost: int, why: str) -> bytes:
    """A gap's note that a test can read."""
    return f"<{lost} {why}>".encode()


def test_a_line_has_time_level_place_and_sentence(log_file: Path) -> None:
    """Every line reads `time level vm/device: sentence`, the time in RFC 3339."""
    log.info("started")
    log.warning("odd access", "vioblk0")
    log.error("gave up", "console")

    lines = log_file.read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert [line.partition(" ")[2] for line in lines] == [
        "info web: started",
        "warning web/vioblk0: odd access",
        "error web/console: gave up",
    ]


def test_debug_lines_appear_only_when_asked_for(log_file: Path) -> None:
    """Without -v there are no debug lines."""
    log.debug("quiet")
    log.setup(str(log_file), vm="web", verbose=True)
    log.debug("loud")

    assert [line.rpartition(" ")[2] for line in log_file.read_text().splitlines()] == ["loud"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("two\nlines\r", r"two\nlines\r"),
        ("C1 \x9b31m", r"C1 \x9b31m"),
        ("bidi \u202e", r"bidi \u202e"),
        ("lone \ud800", r"lone \ud800"),
        ("Grüße, 世界", "Grüße, 世界"),
    ],
)
def test_nothing_in_a_message_can_steer_a_terminal(log_file: Path, text: str, shown: str) -> None:
    """Control characters of a guest's making are written as escapes; other text stays."""
    log.info(text, "dev\x1bice")

    line = log_file.read_text()
    assert line.endswith(rf"info web/dev\x1bice: {shown}" + "\n")
    assert line[:-1].isprintable()


def test_a_message_is_cut_at_its_limit(log_file: Path) -> None:
    """A message of a megabyte becomes one short line that tells its length."""
    log.info("x" * 1_000_000)

    line = log_file.read_text()
    assert len(line) < log.TEXT_LIMIT + 100
    assert line.endswith("x... (1000000 characters)\n")


def test_lines_of_many_threads_stay_whole(log_file: Path) -> None:
    """Lines are written in one piece, whoever else writes."""

    def chatter(number: int) -> None:
        for _ in range(200):
            log.info(f"thread {number} " + "z" * 100)

    threads = [threading.Thread(target=chatter, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    lines = log_file.read_text().splitlines()
    assert len(lines) == 800
    assert all(LINE.fullmatch(line) and line.endswith("z" * 100) for line in lines)


def test_standard_error_gets_lines_in_the_foreground(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In foreground mode file and standard error get the same line."""
    log.setup(str(tmp_path / "log"), vm="web", stderr=True)
    log.info("hello")
    log.setup(stderr=True)

    assert capfd.readouterr().err == (tmp_path / "log").read_text() != ""


def test_a_full_disk_is_survived_and_told_once(tmp_path: Path, file_size_limit: None) -> None:
    """Writes that fail raise nothing; once there is room, one note tells how much is missing."""
    path = tmp_path / "log"
    out = log.Appender(str(path), 10_000, note)
    out.write(b"a" * 80 + b"\n")
    out.write(b"b" * 40 + b"\n")  # 19 bytes fit
    out.write(b"c" * 40 + b"\n")  # none fits
    assert out.lost == 41 + 41 - 19
    assert path.stat().st_size == 100

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    out.write(b"d\n")
    out.write(b"e\n")

    assert out.lost == 0
    told = path.read_bytes().split(b"\n", 1)[1]
    assert told == b"b" * 19 + b"\n<63 File too large>d\ne\n"


def test_a_full_log_becomes_the_old_one(tmp_path: Path) -> None:
    """At its limit the file moves to .1 and a new one starts: two files at most, both bounded."""
    path = tmp_path / "log"
    out = log.Appender(str(path), 1000, note)
    for n in range(100):
        out.write(b"%099d\n" % n)

    assert path.read_bytes() == b"".join(b"%099d\n" % n for n in range(90, 100))
    assert (tmp_path / "log.1").read_bytes() == b"".join(b"%099d\n" % n for n in range(80, 90))
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


def test_a_log_that_cannot_be_rotated_is_cut_instead(tmp_path: Path) -> None:
    """The bound holds even where the old log cannot be moved out of the way."""
    (tmp_path / "log.1" / "in the way").mkdir(parents=True)
    path = tmp_path / "log"
    out = log.Appender(str(path), 1000, note)
    for n in range(100):
        out.write(b"%099d\n" % n)

    assert path.stat().st_size <= 1000
    assert path.read_bytes().endswith(b"%099d\n" % 99)


def test_an_existing_log_is_continued(tmp_path: Path) -> None:
    """A new run adds to the log of the last one, and its size counts."""
    (tmp_path / "log").write_bytes(b"o" * 990 + b"\n")
    out = log.Appender(str(tmp_path / "log"), 1000, note)
    out.write(b"new\n")
    out.write(b"more than fits\n")

    assert (tmp_path / "log.1").read_bytes() == b"o" * 990 + b"\nnew\n"
    assert (tmp_path / "log").read_bytes() == b"more than fits\n"


def test_a_log_that_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    """A symbolic link, a second name, a FIFO in the log's place: a clear error, no write."""
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "hard").hardlink_to(target)
    os.mkfifo(tmp_path / "fifo")

    for name in ("link", "hard", "fifo", "no/such/dir"):
        with pytest.raises(HostError, match=f"cannot open .*{name}"):
            log.Appender(str(tmp_path / name), 1000, note)
    assert target.read_text() == "precious"


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def sentences(path: Path) -> list[str]:
    """What the log says, without times and places."""
    return [line.split(": ", 1)[1] for line in path.read_text().splitlines()]


def test_a_flood_of_one_kind_is_thinned_and_counted(log_file: Path) -> None:
    """Per key `burst` lines pass, then one per `seconds`, which tells how many were left out."""
    clock = Clock()
    limited = log.Limited(burst=3, seconds=10.0, clock=clock)

    assert [limited.warning("port 0x10", f"write {n}") for n in range(100)] == [True] * 3 + [
        False
    ] * 97
    clock.now = 10.0
    assert limited.warning("port 0x10", "write again")
    assert not limited.warning("port 0x10", "and again")

    assert sentences(log_file) == [
        "write 0", "write 1", "write 2", "97 similar suppressed", "write again",
    ]  # fmt: skip


def test_keys_do_not_disturb_each_other(log_file: Path) -> None:
    """A flood from one device leaves another's warnings alone."""
    limited = log.Limited(burst=2, clock=Clock())
    for n in range(50):
        limited.warning("noisy", f"noise {n}")

    assert limited.warning("calm", "once")
    assert sentences(log_file) == ["noise 0", "noise 1", "once"]


def test_walking_through_keys_does_not_get_round_the_limit(log_file: Path) -> None:
    """Memory and lines stay bounded even if the guest chooses a new key every time."""
    clock = Clock()
    limited = log.Limited(burst=2, seconds=10.0, keys=4, clock=clock)
    logged = sum(limited.warning(f"port {n}", "x") for n in range(20_000))

    assert logged == 8
    assert len(limited._buckets) == 4
    clock.now = 100.0
    limited.warning("port 1", "later")
    assert sentences(log_file)[-2:] == [f"{20_000 - 8 - 4} other warnings suppressed", "later"]
