"""A back end of ours as a program, and a front end with a driver that uses it.

    with Program("viornd", "--rate", "1M") as program, Session(program.connect()) as session:
        session.begin(F_VERSION_1)
        [queue] = session.queues
        queue.add([], [64])
        session.kick(0)
        assert session.wait_call(0, DEADLINE)

Every step of `Session.begin` can be taken alone, through `session.front`.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

from devices import vhostdoor, viodev
from devices.features import F_RING_PACKED, F_VERSION_1
from devices.guestmem import GuestMemory, Region
from devices.process import Order
from devices.vhostask import connect
from devices.vhostfront import FrontEnd, MemoryRegion, Ring
from devices.vhostwire import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    NEED_REPLY,
    P_REPLY_ACK,
    U64,
    Front,
    Message,
    PeerError,
    Wire,
)
from devices.viodev import ChannelError, ImsgType
from tools.viodriver import make_memfd, open_driver

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from devices.vhostfront import InflightArea
    from tools.viodriver import PackedDriver, SplitDriver, Used

DEADLINE: Final = 20.0  # seconds; what does not come by then never will
HVA: Final = 0x7F00_0000_0000  # where the front end says guest address 0 is
TOP: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIRST_BASE: Final = {0: 0, F_RING_PACKED: 0x8000_8000}
ROOM: Final = 0x60000  # bytes of guest memory for a ring and its buffers


class Program:
    """`python -m devices KIND …`, until the end of the `with`."""

    def __init__(
        self,
        kind: str,
        *arguments: str,
        sock: socket.socket | None = None,
        path: str = "",
        fds: Sequence[int] = (),
    ) -> None:
        """Start it, with `sock` as its --fd or listening at `path`, and wait until it listens.

        It inherits `fds`.
        """
        self.path = path or f"/tmp/vhostlab-{os.getpid()}-{id(self):x}.sock"
        where = ["--fd", str(sock.fileno())] if sock else ["--socket-path", self.path]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "devices", kind, *where, *arguments],
            cwd=TOP,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[*fds, *([sock.fileno()] if sock else [])],
        )
        self._said = b""
        self._killed: set[int] = set()
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        if not sock:
            self.wait_for(lambda: "ready\n" in self.said() or self.process.poll() is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE)
        self.said()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def connect(self) -> Wire:
        """Return a new connection to it; its socket may be there before it listens."""
        found: list[Wire] = []

        def listens() -> bool:
            try:
                found.append(connect(self.path))
            except PeerError as err:
                if not isinstance(err.__cause__, ConnectionRefusedError):
                    raise
            return bool(found)

        self.wait_for(listens)
        return found[0]

    def said(self) -> str:
        """Return what it has written so far."""
        assert self.process.stderr is not None
        self._said += self.process.stderr.read() or b""
        return self._said.decode()

    def wait_said(self, words: str, count: int = 1) -> str:
        """Wait until it has written `words` that often; return all that it has written."""
        self.wait_for(lambda: self.said().count(words) >= count)
        return self.said()

    def wait_for(self, condition: Any) -> None:
        """Wait until something is so."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, self.said()
            assert self.process.stderr is not None
            select.select([self.process.stderr], [], [], 0.02)

    def device_pid(self) -> int:
        """Return the process that serves the latest connection.

        It may serve before the program has said so; one that was killed is not it.
        """
        self.wait_for(lambda: not self._killed.issuperset(self._served()[-1:]))
        return self._served()[-1]

    def kill_device(self) -> None:
        """SIGKILL for the process that serves the latest connection."""
        pid = self.device_pid()
        self._killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def _served(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"served by process (\d+)\n", self.said())]


class Session:
    """One connection, guest memory, and a driver. `transport.Transport` of its queues."""

    def __init__(self, wire: Wire, size: int = 8 << 20) -> None:
        self.front = FrontEnd(wire, DEADLINE)
        self.size = size
        self.fd = make_memfd(size)
        self.memory = GuestMemory(self.fd, [Region(0, size, 0)])
        self.region = MemoryRegion(0, size, HVA, 0, self.fd)
        self.queues: list[SplitDriver | PackedDriver] = []
        self.kicks: list[int] = []
        self.calls: list[int] = []
        self.errs: list[int] = []
        self.features = 0
        self.inflight: InflightArea | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up, and drop all."""
        self.front.close()
        for fd in (*self.kicks, *self.calls, *self.errs, self.fd):
            os.close(fd)
        if self.inflight is not None:
            os.close(self.inflight.fd)
        self.kicks, self.calls, self.errs = [], [], []

    def begin(
        self, features: int = 0, count: int = 1, *, size: int = 128, inflight: bool = False
    ) -> list[SplitDriver | PackedDriver]:
        """Negotiate, share memory, and start `count` queues of `size` entries."""
        self.front.negotiate()
        self.make_queues(features | F_VERSION_1, count, size)
        if inflight:
            self.inflight = self.front.get_inflight(count, size)
        self.resume()
        return self.queues

    def make_queues(self, features: int, count: int, size: int) -> None:
        """Make the driver's side of queues, which have never been started."""
        self.features = features
        for index in range(count):
            base_gpa = 0x10000 + index * ROOM
            queue = open_driver(self.memory, size, base_gpa, features, arena_bytes=ROOM - 0x20000)
            self.queues.append(queue)
            self.kicks.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self.calls.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            self.errs.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def resume(self, bases: list[int] | None = None) -> None:
        """Set everything up once more, and start all queues."""
        self.front.accept(self.features)
        if self.inflight is not None:
            self.front.set_inflight(self.inflight)
        self.front.share([self.region])
        for index in range(len(self.queues)):
            base = bases[index] if bases else FIRST_BASE[self.features & F_RING_PACKED]
            self.start(index, base)
            self.front.enable_queue(index)

    def start(self, index: int, base: int) -> None:
        """Start one queue, disabled."""
        self.front.start_queue(
            index,
            self.ring(index, base),
            kick=self.kicks[index],
            call=self.calls[index],
            err=self.errs[index],
        )

    def ring(self, index: int, base: int) -> Ring:
        """Describe one queue."""
        queue = self.queues[index]
        log = queue.used_gpa if self.features & F_LOG_ALL else None
        desc, avail, used = HVA + queue.desc_gpa, HVA + queue.avail_gpa, HVA + queue.used_gpa
        return Ring(queue.size, base, desc, avail, used, log)

    def reconnect(self, wire: Wire) -> None:
        """Go on with another back end, as a monitor does after the first one has died."""
        self.front.close()
        self.front = FrontEnd(wire, DEADLINE)
        self.front.negotiate()
        self.resume([self.used_base(queue) for queue in self.queues])

    def used_base(self, queue: SplitDriver | PackedDriver) -> int:
        """Where a monitor believes a queue to be whose back end has died."""
        if self.features & F_RING_PACKED:
            return FIRST_BASE[F_RING_PACKED]  # it cannot know
        return int.from_bytes(self.memory.read(queue.used_gpa + 2, 2), "little")

    # transport.Transport.

    def kick(self, queue: int) -> None:
        """Signal the queue's eventfd."""
        os.eventfd_write(self.kicks[queue], 1)

    def wait_call(self, queue: int, timeout: float) -> bool:
        """Wait for a call of that queue, and take it."""
        return self.wait(self.calls[queue], timeout)

    def wait_readable(self, fd: int) -> bool:
        """Wait until there is something to read."""
        return bool(select.select([fd], [], [], DEADLINE)[0])

    def wait(self, fd: int, timeout: float) -> bool:
        """Wait for an eventfd, and take what is there."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(timeout * 1e3):
            return False
        os.eventfd_read(fd)
        return True

    def ask(self, index: int, *parts: bytes, room: tuple[int, ...] = ()) -> tuple[int, bytes]:
        """Make one request and wait for it: used length, and all that could be written."""
        queue = self.queues[index]
        queue.enable_calls()
        queue.add(parts, room)
        self.kick(index)
        [used] = self.wait_used(index)
        return used.written, queue.data(used.request)

    def wait_used(self, index: int) -> list[Used]:
        """Wait until something comes back, by calls alone; a call may come for nothing."""
        deadline = time.monotonic() + DEADLINE
        while not (found := self.queues[index].collect()):
            assert self.wait_call(index, max(deadline - time.monotonic(), 0))
        return found


class Child:
    """The device process alone, forked from the test, without supervisor or jail.

    `wire` is a connection to it; `ask` sends one message and says what came of it.
    """

    def __init__(self, kind: str, settings: dict[str, Any] | None = None, **fds: int) -> None:
        """Fork it; copies of `fds` are the device's own."""
        ours, theirs = socket.socketpair()
        self.channel, channel = viodev.pair("device", DEADLINE)
        create = __import__(f"devices.{kind}", fromlist=["create"]).create
        self.pid = os.fork()
        if not self.pid:
            status = 9
            try:
                ours.close()
                self.channel.close()
                given = {"channel": channel.detach(), "socket": theirs.detach()}
                given |= {name: os.dup(fd) for name, fd in fds.items()}
                order = Order(kind, kind, {"packed": True, **(settings or {})}, ())
                status = vhostdoor.main(order, given, create, "off")
            finally:
                os._exit(status)
        theirs.close()
        channel.close()
        self.said: list[str] = []
        while (imsg := self.channel.receive()).type == ImsgType.LOG:
            self.said.append(imsg.data[1:].decode())
        self._inherited = self._count_maps()
        self.wire = Wire(ours, "back end")
        self.status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wire.close()
        self.wait_end()
        self.channel.close()

    def wait_end(self) -> int:
        """Wait for its end; return its exit status, as os.waitpid() does."""
        if self.status is None:
            while True:
                try:
                    imsg = self.channel.receive()
                except ChannelError:
                    break
                if imsg.type == ImsgType.LOG:
                    self.said.append(imsg.data[1:].decode())
            self.status = os.waitpid(self.pid, 0)[1]
        return self.status

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        """Send a message, whatever it looks like."""
        self.wire.send(Message(request, flags, payload, tuple(fds)))

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a message that wants a reply, and return that."""
        self.send(request, payload, fds, NEED_REPLY)
        return self.wire.wait(DEADLINE)

    def accepts(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        """Send a message that is only acknowledged; return whether it was done."""
        reply = self.ask(request, payload, fds)
        assert (reply.request, reply.fds) == (request, ())
        return not U64.unpack(reply.payload)[0]

    def negotiate(self, protocol: int, features: int = F_VERSION_1 | F_PROTOCOL_FEATURES) -> None:
        """Settle those of `protocol` that are offered, with REPLY_ACK, and features."""
        self.send(Front.GET_PROTOCOL_FEATURES)
        protocol &= U64.unpack(self.wire.wait(DEADLINE).payload)[0]
        self.send(Front.SET_PROTOCOL_FEATURES, U64.pack(protocol | P_REPLY_ACK))
        assert self.accepts(Front.SET_OWNER)
        assert self.accepts(Front.SET_FEATURES, U64.pack(features))

    def hangs_up(self) -> bool:
        """Tell whether it has ended, or does so now; else it has answered that it is there."""
        try:
            self.send(Front.GET_FEATURES)
            self.wire.wait(DEADLINE)
        except PeerError:
            return True
        return False

    def nr_fds(self) -> int:
        """Count its descriptors, once it has seen to all that was sent."""
        self.send(Front.GET_FEATURES)
        self.wire.wait(DEADLINE)
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def nr_maps(self) -> int:
        """Count its mappings of shared memory, but for those that it has from the test."""
        return self._count_maps() - self._inherited

    def _count_maps(self) -> int:
        with open(f"/proc/{self.pid}/maps") as maps:
            return sum("memfd:" in line for line in maps)
