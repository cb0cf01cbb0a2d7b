"""What a device process says: limited, never waiting, and to the point."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError, HostError
from devices import viodev, words
from devices.bucket import TokenBucket
from devices.device import DEBUG, ERROR, INFO, WARNING
from devices.viodev import Channel, ImsgType, MsgType
from devices.words import BURST, TEXT_MAX, Words

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a channel: ours, and the VM process's."""
    ours, theirs = viodev.pair("VM process", 1.0)
    vm = Channel(theirs, "device", 1.0)
    yield ours, vm
    ours.close()
    vm.close()


def heard(vm: Channel) -> tuple[int, str]:
    """Take one LOG message."""
    imsg = vm.receive()
    assert imsg.type == ImsgType.LOG
    return imsg.data[0], imsg.data[1:].decode()


def test_levels_travel(ends: tuple[Channel, Channel]) -> None:
    """A level byte, then text."""
    ours, vm = ends
    voice = Words(ours)
    for level in (DEBUG, INFO, WARNING, ERROR):
        voice.say(level, "naïve")
        assert heard(vm) == (level, "naïve")


def test_text_is_bounded_and_always_utf8(ends: tuple[Channel, Channel]) -> None:
    """A name out of a disk image could hold anything."""
    ours, vm = ends
    words.send(ours, INFO, "\udcff" + "x" * 9999)
    level, text = heard(vm)
    assert (level, text) == (INFO, "?" + "x" * (TEXT_MAX - 1))


def test_warnings_are_limited_and_counted(ends: tuple[Channel, Channel]) -> None:
    """A burst, then one per second; the next one tells how many were not said."""
    ours, vm = ends
    voice, clock = Words(ours), Clock()
    voice._bucket = TokenBucket(words.RATE, BURST, clock)
    for number in range(BURST + 7):
        voice.say(WARNING, f"register {number}")
    assert [heard(vm)[1] for _ in range(BURST)][-1] == f"register {BURST - 1}"
    clock.now += 1
    voice.say(WARNING, "again")
    assert heard(vm)[1] == "again (and 7 more since the last one)"
    clock.now += 1
    voice.say(WARNING, "once more")
    assert heard(vm)[1] == "once more"


def test_a_full_channel_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    """The VM process may be stopped; the device's work goes on, and the count is kept."""
    ours, vm = ends
    voice = Words(ours)
    for _ in range(5000):
        voice.say(INFO, "x" * 500)
    arrived = 0
    while voice._unsaid + arrived < 5000:
        heard(vm)
        arrived += 1
    assert 0 < arrived < 5000
    voice.say(WARNING, "room again")
    assert heard(vm)[1] == f"room again (and {5000 - arrived} more since the last one)"


def raise_deep() -> None:
    """Fail in a place that can be named."""
    _ = sys.argv[9999]


def test_last_words_name_the_place_of_a_bug(ends: tuple[Channel, Channel]) -> None:
    """One of ours speaks for itself; any other error needs its place in the code."""
    ours, vm = ends
    try:
        raise_deep()
    except IndexError as err:
        words.last_words(ours, err)
    level, text = heard(vm)
    assert level == ERROR
    assert text.startswith("IndexError: list index out of range in raise_deep (test_words.py:")
    assert vm.receive_msg().type == MsgType.ERROR
    assert words.explain(HostError("no image", hint="give one")) == "no image (give one)"
    assert words.explain(GuestError("ring")) == "ring"
    assert words.explain(ValueError("never raised")) == "ValueError: never raised"


def test_last_words_to_nobody(ends: tuple[Channel, Channel]) -> None:
    """Who is gone is not told."""
    ours, vm = ends
    vm.close()
    words.last_words(ours, HostError("alone"))


def test_a_bucket_allows_a_burst_and_then_the_rate() -> None:
    """Whoever takes more than there is makes the next one wait for it."""
    clock = Clock()
    bucket = TokenBucket(10.0, 100.0, clock)
    assert bucket.wait() == 0
    bucket.take(100)
    assert bucket.wait() == pytest.approx(0.1)  # until there is one
    clock.now += 5
    assert bucket.wait() == 0
    bucket.take(100)
    assert bucket.wait() == pytest.approx(5.1)
    clock.now += 1000
    assert bucket.wait() == 0
    bucket.take(101)
    assert bucket.wait() > 0  # a rest is worth a burst, no more
