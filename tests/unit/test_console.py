"""The console: every byte to everyone who keeps up, and the guest never waits."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from devices.loop import Loop
from tests.unit.turning import at_end, take, turn, until
from vmm import console, safefile, sockets
from vmm.console import Console

if TYPE_CHECKING:
    from pathlib import Path


class Uart:
    """A receiver with a FIFO of `size` bytes, and a guest that reads it when told."""

    def __init__(self, size: int) -> None:
        self.size, self.fifo, self.read = size, bytearray(), bytearray()

    def receive(self, data: bytes) -> int:
        """Take what there is room for."""
        taken = min(self.size - len(self.fifo), len(data))
        self.fifo += data[:taken]
        return taken

    def drain(self) -> None:
        """The guest reads everything."""
        self.read += self.fifo
        self.fifo.clear()


class Served:
    """A console in a directory of its own, and its loop."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, str(directory / "console.sock")
        self.loop, self.uart, self.allowed = Loop(), Uart(1 << 30), True
        dir_fd = safefile.open_dir(str(directory))
        listener = sockets.listen("console.sock", dir_fd)
        os.close(dir_fd)
        self.console = Console(
            self.loop,
            listener,
            str(directory / "console.log"),
            self.uart.receive,
            lambda peer: self.allowed,
        )
        self._viewers: list[socket.socket] = []
        self._closed = False

    def viewer(self) -> socket.socket:
        """Attach one more viewer."""
        sock = sockets.connect(self.path, 5.0)
        sock.setblocking(False)
        self._viewers.append(sock)
        before = self.console.viewers
        if self.allowed and before < console.VIEWERS:
            until(self.loop, lambda: self.console.viewers > before)
        return sock

    def print(self, data: bytes) -> None:
        """Let the guest print, and deliver it."""
        self.console.output(data)
        until(self.loop, lambda: not self.console._pending)

    def room(self) -> None:
        """The guest reads what was typed."""
        self.uart.drain()
        self.console.room()
        turn(self.loop, 2)

    def log(self) -> bytes:
        """Return console.log."""
        return (self.directory / "console.log").read_bytes()

    def close(self) -> None:
        """End the console; once is enough."""
        if not self._closed:
            self._closed = True
            self.console.close()

    def finish(self) -> None:
        """End everything."""
        self.close()
        for sock in self._viewers:
            sock.close()
        self.loop.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A console for a test to attach to; in less of a rush it would only test slower."""
    monkeypatch.setattr(console, "GATHER", 0.0001)
    served = Served(tmp_path)
    yield served
    served.finish()


def pour(served: Served, total: int, *readers: socket.socket) -> bytes:
    """Print `total` bytes in lines of 1000; `readers` read along. Returns what was printed."""
    printed = b""
    for n in range(total // 1000):
        line = b"%0999d\n" % n
        served.print(line)
        printed += line
        for sock in readers:
            take(sock)
    return printed


def test_output_reaches_all_viewers_and_the_log(served: Served) -> None:
    """Several viewers see the same bytes, unchanged; console.log has them too."""
    one, two = served.viewer(), served.viewer()
    data = bytes(range(256))
    served.print(data)
    served.print(b"more")
    assert take(one) == take(two) == served.log() == data + b"more"
    assert served.console.bytes_out == 260


def test_a_new_viewer_sees_what_was_printed_before(served: Served) -> None:
    """Attaching replays the recent output, whole while it is short, then goes on live."""
    served.print(b"booting\r\n")
    viewer = served.viewer()
    served.console.output(b"login: ")
    turn(served.loop, 2)
    until(served.loop, lambda: not served.console._pending)
    assert take(viewer) == b"booting\r\nlogin: "


def test_the_replay_is_bounded_and_starts_with_a_line(served: Served) -> None:
    """No more than the ring is replayed, and not from the middle of a line."""
    printed = pour(served, 3 * console.RING)
    replay = take(served.viewer())
    assert printed.endswith(replay)
    assert console.RING - 1000 <= len(replay) <= console.RING
    assert printed[-len(replay) - 1 : -len(replay)] == b"\n"


def test_output_wakes_the_loop_once_for_many_bytes(served: Served) -> None:
    """A guest that prints bytewise costs one wake-up per delivery, not one per byte."""
    for n in range(1000):
        served.console.output(b"%d" % (n % 10))
    assert len(served.loop._calls) == 1
    served.print(b"!")
    for _ in range(1000):
        served.console.output(b"x")
    assert len(served.loop._calls) == 0  # the timer of the last delivery brings them
    until(served.loop, lambda: len(served.log()) == 2001)


def test_an_idle_console_costs_nothing(served: Served) -> None:
    """After the last delivery the timer fires once more, and then there is silence."""
    served.viewer()
    served.print(b"x")
    until(served.loop, lambda: not served.console._awake)
    assert served.loop._epoll.poll(0.01) == []


def test_output_from_many_threads_is_complete(served: Served) -> None:
    """VCPU threads may print at once; nothing is lost or torn below the limit."""
    viewer = served.viewer()

    def vcpu(number: int) -> None:
        for _ in range(500):
            served.console.output(b"<%d>" % number)

    threads = [threading.Thread(target=vcpu, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    until(served.loop, lambda: len(served.log()) == 4 * 500 * 3)
    for thread in threads:
        thread.join()
    seen = take(viewer)
    assert [seen.count(b"<%d>" % n) for n in range(4)] == [500] * 4


def test_a_guest_faster_than_the_loop_loses_its_oldest_bytes(served: Served) -> None:
    """Output is bounded even if the loop does not run: the newest stay, the gap is told."""
    viewer = served.viewer()
    for _ in range(console.PENDING_LIMIT // 1000 + 10):
        served.console.output(b"o" * 1000)
    served.console.output(b"newest")
    lost = (console.PENDING_LIMIT // 1000 + 10) * 1000 + 6 - console.PENDING_LIMIT
    assert len(served.console._pending) == console.PENDING_LIMIT

    seen = b""
    while not seen.endswith(b"newest"):
        turn(served.loop)
        seen += take(viewer)
    assert seen.startswith(b"\r\n[pyvmd: %d bytes lost]\r\nooo" % lost)
    assert served.log() == seen


def test_a_slow_viewer_loses_bytes_alone_and_is_told(served: Served) -> None:
    """Who does not read misses output and sees how much; others and the guest see no difference."""
    slow, fast = served.viewer(), served.viewer()
    printed, seen = b"", b""
    for n in range(1000):
        line = b"%0999d\n" % n
        printed += line
        served.print(line)
        seen += take(fast)
    assert seen == printed
    viewers = list(served.console._viewers)
    assert max(viewer.queued for viewer in viewers) <= console.VIEWER_LIMIT

    late = b""
    while b"bytes lost]" not in late:
        turn(served.loop)
        late += take(slow)
    served.print(b"and on it goes\n")
    turn(served.loop, 2)
    late += take(slow)
    kept, _, rest = late.partition(b"\r\n[pyvmd: ")
    lost, _, rest = rest.partition(b" bytes lost]\r\n")
    assert printed.startswith(kept)
    assert len(kept) + int(lost) == len(printed)
    assert rest == b"and on it goes\n"


def test_typing_reaches_the_uart_in_order(served: Served) -> None:
    """What viewers type arrives, unchanged; several may type."""
    one, two = served.viewer(), served.viewer()
    one.send(b"ls\r")
    until(served.loop, lambda: served.console.bytes_in == 3)
    two.send(bytes(range(256)))
    until(served.loop, lambda: served.console.bytes_in == 259)
    assert served.uart.fifo == b"ls\r" + bytes(range(256))


def test_a_full_uart_holds_up_only_who_types(served: Served) -> None:
    """Back-pressure: nothing typed is lost, memory is bounded, others still watch."""
    served.uart.size = 16
    typist, watcher = served.viewer(), served.viewer()
    text = b"".join(b"%07d\n" % n for n in range(200))
    typist.send(text)
    turn(served.loop, 10)
    typist.send(b"x")
    turn(served.loop, 10)
    assert next(iter(served.console._viewers)).typed == text[16:]  # the x waits in the kernel
    assert len(served.uart.fifo) == 16
    assert served.loop._epoll.poll(0) == []  # no spinning meanwhile
    served.print(b"still alive")
    assert take(watcher) == b"still alive"
    while len(served.uart.read) < len(text):
        before = len(served.uart.read)
        served.room()
        assert len(served.uart.read) > before
    served.room()
    assert served.uart.read == text + b"x"


def test_two_who_type_into_a_full_uart_take_turns(served: Served) -> None:
    """Neither of two waiting viewers is starved by the other."""
    served.uart.size = 10
    one, two = served.viewer(), served.viewer()
    one.send(b"a" * 100)
    two.send(b"b" * 100)
    turn(served.loop, 3)
    for _ in range(8):
        served.room()
    served.uart.drain()
    assert served.uart.read.count(b"a") >= 30
    assert served.uart.read.count(b"b") >= 30


def test_room_made_while_feeding_is_not_missed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest may read between the UART's "full" and the console's note of it."""
    guest = Uart(4)

    def receive(data: bytes) -> int:
        taken = guest.receive(data)
        guest.drain()  # on a vCPU thread, right now
        served.console.room()
        return taken

    monkeypatch.setattr(served.console, "_feed", receive)
    served.viewer().send(b"0123456789")
    until(served.loop, lambda: len(guest.read) == 10)


def test_room_is_free_when_nobody_waits(served: Served) -> None:
    """A guest that reads its UART all day wakes nobody."""
    for _ in range(100):
        served.console.room()
    assert not served.loop._calls


def test_what_was_typed_before_leaving_is_still_fed(served: Served) -> None:
    """`echo ... | socat` works even if the guest is slow to read: nothing is dropped at hang-up."""
    served.uart.size = 16
    text = b"".join(b"%07d\n" % n for n in range(3000))
    viewer = served.viewer()
    viewer.send(text)
    viewer.close()
    until(served.loop, lambda: not served.console.viewers)
    for _ in range(len(text) // 16):
        served.room()
    assert served.uart.read == text


def test_typists_who_left_are_bounded(served: Served) -> None:
    """A guest that never reads does not make the host keep the words of hundreds of visitors."""
    served.uart.size = 0
    for n in range(3 * console.ORPHANS):
        viewer = served.viewer()
        viewer.send(b"%d" % n)
        viewer.close()
        until(served.loop, lambda: not served.console.viewers)
    assert len(served.console._starved) <= console.ORPHANS


def test_a_viewer_that_stops_typing_may_go_on_watching(served: Served) -> None:
    """Closing the sending half is no detach; closing both is."""
    viewer = served.viewer()
    viewer.shutdown(socket.SHUT_WR)
    turn(served.loop, 3)
    served.print(b"hello")
    assert take(viewer) == b"hello"
    until(served.loop, lambda: not served.loop._epoll.poll(0))  # but for a timer of the console's
    viewer.close()
    until(served.loop, lambda: not served.console.viewers)


def test_who_may_not_is_told_in_one_line(served: Served) -> None:
    """No permission: a line of text, nothing of the console, closed."""
    served.print(b"secret")
    served.allowed = False
    viewer = served.viewer()
    turn(served.loop, 3)
    assert take(viewer) == b"pyvmd: console: permission denied\r\n"
    assert at_end(viewer)


def test_the_number_of_viewers_is_limited(served: Served) -> None:
    """One too many is told so; a place that becomes free is given again."""
    viewers = [served.viewer() for _ in range(console.VIEWERS)]
    late = served.viewer()
    turn(served.loop, 3)
    assert take(late) == b"pyvmd: console: 16 viewers are attached already\r\n"
    assert at_end(late)
    viewers[0].close()
    until(served.loop, lambda: served.console.viewers == console.VIEWERS - 1)
    served.viewer()
    assert served.console.viewers == console.VIEWERS


def test_one_who_takes_every_place_keeps_nobody_else_out(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user gets the place of the oldest."""
    viewers = [served.viewer() for _ in range(console.VIEWERS)]
    monkeypatch.setattr(sockets, "peer_of", lambda _sock: sockets.Peer(1, 0, 1, ()))
    other = served.viewer()
    turn(served.loop, 3)
    served.print(b"hello")
    until(served.loop, lambda: take(other) == b"hello")
    assert at_end(viewers[0])
    assert take(viewers[1]) == b"hello"


def test_the_log_is_two_bounded_files(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """console.log turns over at its limit, so a guest cannot fill the disk."""
    monkeypatch.setattr(served.console._log, "_limit", 10_000)
    printed = pour(served, 50_000)
    old = (served.directory / "console.log.1").read_bytes()
    assert printed.endswith(old + served.log())
    assert len(old) <= 10_000 >= len(served.log()) > 0
    assert len(os.listdir(served.directory)) == 3


def test_the_last_words_are_delivered_at_the_end(served: Served) -> None:
    """Output just before the end reaches log and viewers, then the console closes."""
    viewer = served.viewer()
    served.print(b"x")
    served.console.output(b"reboot: Power down\r\n")
    served.close()
    assert take(viewer) == served.log() == b"xreboot: Power down\r\n"
    assert at_end(viewer)


def test_a_viewer_that_never_reads_does_not_hold_up_the_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end everyone gets a moment, all together, and no more."""
    monkeypatch.setattr(sockets.flush_and_close, "__defaults__", (0.02,))
    slow, fast = served.viewer(), served.viewer()
    pour(served, 1_000_000, fast)
    served.console.output(b"the end")
    served.close()
    assert take(fast).endswith(b"the end")
    assert at_end(slow)
