"""The event loop: descriptors, timers and calls from other threads."""

from __future__ import annotations

import os
import threading

from devices.loop import READ, Loop


def test_calls_from_other_threads() -> None:
    """What other threads ask for runs on the loop's thread, in order, each once."""
    loop, seen = Loop(), []
    here = threading.get_ident()

    def ask() -> None:
        for number in range(1000):
            loop.call(lambda number=number: seen.append((number, threading.get_ident())))  # type: ignore[misc]
        loop.call(loop.stop)

    thread = threading.Thread(target=ask)
    thread.start()
    loop.run()
    thread.join()
    loop.close()
    assert seen == [(number, here) for number in range(1000)]


def test_descriptors() -> None:
    """A readable descriptor calls back until it is removed."""
    loop, seen = Loop(), []
    reader, writer = os.pipe()

    def readable(_events: int) -> None:
        seen.append(os.read(reader, 1))
        if seen[-1] == b"2":
            loop.remove(reader)
            loop.stop()

    loop.add(reader, READ, readable)
    os.write(writer, b"123")
    loop.run()
    loop.close()
    assert seen == [b"1", b"2"]
    assert os.read(reader, 1) == b"3"
    os.close(reader)
    os.close(writer)


def test_removed_in_the_same_round() -> None:
    """A callback may remove another descriptor that is ready as well: that one stays silent."""
    loop, seen = Loop(), []
    fds = [os.eventfd(1), os.eventfd(1)]

    def ready(mine: int) -> None:
        seen.append(mine)
        loop.remove(fds[1 - mine])
        loop.stop()

    for index, fd in enumerate(fds):
        loop.add(fd, READ, lambda _events, index=index: ready(index))  # type: ignore[misc]
    loop.run()
    loop.close()
    assert len(seen) == 1
    for fd in fds:
        os.close(fd)


def test_timers() -> None:
    """A timer fires once when armed once, can be armed by any thread, and can be taken back."""
    loop, seen = Loop(), []
    never = loop.timer(lambda: seen.append("never"))
    never.arm(0.0001)
    never.disarm()
    timer = loop.timer(lambda: (seen.append("timer"), loop.stop()))  # type: ignore[func-returns-value, arg-type]
    threading.Thread(target=timer.arm, args=(0.001,)).start()
    loop.run()
    timer.close()
    never.close()
    loop.close()
    assert seen == ["timer"]


def test_periodic_timer() -> None:
    """A timer armed with a period goes on until it is disarmed."""
    loop, seen = Loop(), []

    def tick() -> None:
        seen.append(1)
        if len(seen) == 3:
            timer.disarm()
            loop.stop()

    timer = loop.timer(tick)
    timer.arm(0.0001, every=0.0001)
    loop.run()
    timer.close()
    loop.close()
    assert len(seen) == 3


def test_call_from_a_call_waits_a_round() -> None:
    """A call that calls again cannot starve descriptors."""
    loop, seen = Loop(), []
    fd = os.eventfd(1)

    def again() -> None:
        seen.append("call")
        loop.call(again)

    def ready(_events: int) -> None:
        seen.append("fd")
        loop.stop()

    loop.call(again)
    loop.add(fd, READ, ready)
    loop.run()
    loop.close()
    os.close(fd)
    assert "fd" in seen
