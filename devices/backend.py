"""A vhost-user back end as a program: serves one front end after another.

    supervisor          opens what the device needs, listens, accepts; holds no guest memory
      └─ spawner        devices/spawner.py: forks, and jails what it forks
           └─ device    devices/vhostdoor.py: one connection, then it ends

Whatever a front end brings along, it brings to a process that is gone when the connection is: no
descriptor, mapping or queue can outlive it. One that crashes, or that a hostile front end has
taken over, is one connection's. The images stay open, and locked, in the supervisor.

One front end at a time: a disk with two writers would be no disk. Others wait to be accepted.

    SIGTERM, SIGINT   leave, exit 0: the device finishes what is in flight
    SIGHUP            see how large the image is now, and tell the driver (vioblk)
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import HostError
from devices import viodev
from devices.bucket import TokenBucket
from devices.device import DEBUG, ERROR, INFO, WARNING
from devices.imageuser import BACK_END
from devices.lines import printable, stamp
from devices.viodev import Channel, ChannelError, ImsgType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.viodev import Imsg

LAUNCH_DEADLINE: Final = 10.0  # seconds
TALK_DEADLINE: Final = 2.0  # seconds for the rest of a message of the device's
LEAVE_DEADLINE: Final = 5.0  # seconds a device has to end after its front end has
BACKLOG: Final = 16  # connections that wait
RATE: Final = 1.0  # warnings per second, for a front end can cause as many as it likes
BURST: Final = 20
#: Those that mean something; they wait, blocked, until there is somebody to take them.
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LEVELS: Final = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}


class Plan(NamedTuple):
    """What is to be served."""

    kind: str  # a row of spec.SPECS
    settings: Mapping[str, Any]
    fds: Mapping[str, int]  # by the names the device knows; they stay open here
    jail: str
    verbose: bool = False


class Served:
    """One connection, and the process that serves it."""

    def __init__(self, pid: int, pidfd: int, channel: Channel, connection: socket.socket) -> None:
        self.pid, self.pidfd = pid, pidfd
        self.channel: Channel | None = channel
        self.connection = connection  # a copy: it tells when the front end has gone
        self.deadline = 0.0  # when it has to have ended; 0.0: not yet


class Supervisor:
    """Serves a socket. For one thread."""

    def __init__(self, plan: Plan, sock: socket.socket) -> None:
        """Take over `sock`, which listens or is connected, and fork the spawner.

        Call it single-threaded. Raises HostError.
        """
        self._plan = plan
        self._listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self._socket = sock
        self._limiter, self._unsaid = TokenBucket(RATE, BURST), 0
        self._served: Served | None = None
        self._running = True
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        self._signals: list[int] = []
        self._spawner, theirs = viodev.pair("spawner", LAUNCH_DEADLINE)
        self._spawner_pid = os.fork()
        if not self._spawner_pid:
            _become_spawner(theirs, plan)
        theirs.close()

    # The loop.

    def run(self) -> int:
        """Serve until told to leave; return the exit status."""
        for number in SIGNALS:
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            self._say(INFO, "ready")
            if not self._listens:
                self._serve(self._socket)
            while self._running:
                self._wait()
        except ChannelError as err:
            self._say(ERROR, f"the spawner has died: {err.what}")
            return 1
        finally:
            self._end()
        return 0

    def _wait(self) -> None:
        """Wait for whatever comes next, and deal with it."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self._spawner.fileno(), select.POLLIN)
        served, timeout = self._served, None
        if served is None:
            poll.register(self._socket, select.POLLIN)
        else:
            if served.channel is not None:
                poll.register(served.channel.fileno(), select.POLLIN)
            if served.deadline:
                timeout = max(served.deadline - time.monotonic(), 0) * 1e3
            else:
                poll.register(served.connection, select.POLLRDHUP)
        ready = {fd for fd, _ in poll.poll(timeout)}
        if self._woken.fileno() in ready:
            self._take_signals()
        if served is None:
            if self._socket.fileno() in ready:
                self._accept()
        else:
            if served.channel is not None and served.channel.fileno() in ready:
                self._hear(served)
            if served.deadline and time.monotonic() >= served.deadline:
                self._say(WARNING, "the device did not end with its connection: killed")
                self._kill(served)
                served.deadline = time.monotonic() + LEAVE_DEADLINE
            elif served.connection.fileno() in ready:
                served.deadline = time.monotonic() + LEAVE_DEADLINE
        if self._spawner.fileno() in ready:
            self._reap(self._spawner.receive())

    def _take_signals(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(64)
        while self._signals:
            if self._signals.pop(0) != signal.SIGHUP:
                self._running = False
            elif self._served is not None and self._plan.kind == "vioblk":
                self._set("resize", 0)

    # One connection.

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as err:  # it has gone again, or there are no descriptors left
            self._say(WARNING, f"cannot accept a connection: {err.strerror}")
            return
        try:
            self._serve(connection)
        except HostError as err:
            self._say(ERROR, str(err))
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """Have a new process serve a connection. Raises HostError."""
        plan = self._plan
        channel, theirs = viodev.pair(plan.kind, TALK_DEADLINE)
        fds = {"channel": theirs.fileno(), "socket": connection.fileno(), **plan.fds}
        request = {
            "kind": plan.kind,
            "name": plan.kind,
            "settings": plan.settings,
            "regions": [],
            "fds": list(fds),
        }
        try:
            self._spawner.send(ImsgType.LAUNCH, json.dumps(request).encode())
            for name, fd in fds.items():
                self._spawner.send(ImsgType.FD, name.encode(), fd=fd)
            reply = self._spawner.receive()
        finally:
            theirs.close()
        if reply.type != ImsgType.LAUNCHED or reply.fd is None:
            channel.close()
            why = reply.data[1:].decode("utf-8", "replace") or "no reason given"
            raise HostError(f"cannot start a device process: {why}")
        self._served = Served(reply.peerid, reply.fd, channel, connection)
        self._say(INFO, f"a front end has connected, served by process {reply.peerid}")

    def _hear(self, served: Served) -> None:
        """Take a message of the device, which a front end may have taken over."""
        if served.channel is None:
            return
        try:
            imsg = served.channel.receive()
            if imsg.fd is not None:
                os.close(imsg.fd)
        except ChannelError as err:
            if not isinstance(err.__cause__, EOFError | ConnectionError):
                self._say(ERROR, str(err))
                self._kill(served)
            served.channel.close()
            served.channel = None
            return
        if imsg.type == ImsgType.LOG and imsg.data[:1] and imsg.data[0] in _LEVELS:
            self._say(imsg.data[0], imsg.data[1:].decode("utf-8", "replace"))
        elif imsg.type == ImsgType.SETTING:
            self._say(INFO, f"answers {imsg.data.decode('utf-8', 'replace')}")

    def _set(self, name: str, value: Any) -> None:
        """Change a setting of the device; its answer goes to the log."""
        if self._served is not None and self._served.channel is not None:
            request = json.dumps({"name": name, "value": value}).encode()
            with suppress(ChannelError):  # _hear() will see
                self._served.channel.send(ImsgType.SETTING, request)

    def _kill(self, served: Served) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(served.pidfd, signal.SIGKILL)

    def _reap(self, imsg: Imsg) -> None:
        """A device process has ended."""
        served = self._served
        if imsg.fd is not None:
            os.close(imsg.fd)
        if imsg.type != ImsgType.EXITED or served is None or imsg.peerid != served.pid:
            return
        while served.channel is not None:  # its last words
            self._hear(served)
        status = int.from_bytes(imsg.data, "little")
        if os.WIFSIGNALED(status):
            self._say(ERROR, f"the device process was killed by signal {os.WTERMSIG(status)}")
        self._forget(served)
        if not self._listens:
            self._running = False

    def _forget(self, served: Served) -> None:
        if served.channel is not None:
            served.channel.close()
        served.connection.close()
        os.close(served.pidfd)
        self._served = None

    def _end(self) -> None:
        """End the device, which finishes what it has begun, and the spawner."""
        served = self._served
        if served is not None:
            if served.channel is not None:
                served.channel.close()
                served.channel = None
            poll = select.poll()
            poll.register(served.pidfd, select.POLLIN)
            if not poll.poll(LEAVE_DEADLINE * 1e3):
                self._say(WARNING, "the device did not end: killed")
                self._kill(served)
            self._forget(served)
        self._spawner.close()
        os.waitpid(self._spawner_pid, 0)
        self._socket.close()

    # Words.

    def _say(self, level: int, text: str) -> None:
        """Log a line; what a front end can cause, so many and no more."""
        if level == DEBUG and not self._plan.verbose:
            return
        if self._limiter.wait() > 0:
            self._unsaid += 1
            return
        self._limiter.take(1)
        if self._unsaid:
            text += f" (and {self._unsaid} lines that were not written)"
            self._unsaid = 0
        line = f"{stamp()} {_LEVELS[level]} {self._plan.kind}: {printable(text)}\n"
        with suppress(OSError):
            os.write(2, line.encode())


def _become_spawner(sock: socket.socket, plan: Plan) -> None:
    """Be the spawner; does not return."""
    status = 1
    try:
        from devices import spawner, vhostdoor

        spawner.serve(sock, BACK_END, plan.jail, kinds=(plan.kind,), main=vhostdoor.main)
        status = 0
    finally:
        os._exit(status)
