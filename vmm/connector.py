"""The process that connects to sockets of other programs, for a VM process that no longer can.

A program that serves one of the guest's devices may be started anew, and then somebody has to
connect to its socket again. The VM process cannot: it has become its owner's, and no path is open
to it. So it forks this process before, which keeps the starter's rights for one purpose. It knows
a list of paths, is asked for one by its number, and hands out a connected socket or an error.

    VM process → u32 number
               ← u32 number, u32 errno; with 0, the socket
"""

from __future__ import annotations

import errno
import os
import select
import socket
from struct import Struct
from typing import TYPE_CHECKING, Final, NoReturn

from config.errors import HostError
from devices import jail, passing, title
from devices.loop import READ
from vmm import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.loop import Loop

FIRST_SECONDS: Final = 5.0  # for a connection while the VM is started
_ASK: Final = Struct("<I")
_ANSWER: Final = Struct("<II")


class Connector:
    """The VM process's end. For the loop's thread."""

    def __init__(self, vm: str, paths: Sequence[str], level: str) -> None:
        """Fork the process; call this single-threaded, before anything is opened.

        `level` is vm.yaml's word for the jail. Raises HostError.
        """
        self._paths = paths
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._pid = os.fork()
        except OSError as err:
            raise HostError(f"cannot fork the connector: {err.strerror}", vm=vm) from err
        if not self._pid:
            _be_connector(theirs, vm, paths, level)
        theirs.close()
        #: Called with a number and a socket that is the callee's now, or -1 and why there is none.
        self.on_answer: Callable[[int, int, str], None] = lambda number, fd, why: os.close(fd)

    def connect(self, number: int) -> int:
        """Return a socket connected to path `number`; before watch(). Raises HostError."""
        path = self._paths[number]
        self.ask(number)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        answer = self._receive() if poll.poll(FIRST_SECONDS * 1e3) else None
        if answer is None:
            raise HostError(f"{path}: cannot connect: no answer")
        _, fd, why = answer
        if fd < 0:
            hint = "is the program that serves it running?"
            raise HostError(f"{path}: cannot connect: {why}", hint=hint)
        return fd

    def ask(self, number: int) -> None:
        """Ask for a connection, which on_answer will have."""
        try:
            self._sock.send(_ASK.pack(number), socket.MSG_DONTWAIT)
        except OSError as err:
            log.error(f"the connector does not listen: {err.strerror}")

    def watch(self, loop: Loop) -> None:
        """Hear answers from now on."""
        loop.add(self._sock.fileno(), READ, lambda _: self._incoming(loop))

    def close(self, loop: Loop) -> None:
        """Have the process end, and wait for it."""
        loop.remove(self._sock.fileno())
        self._sock.close()
        os.waitpid(self._pid, 0)

    def _incoming(self, loop: Loop) -> None:
        answer = self._receive()
        if answer is None:
            log.error("the connector has ended: what others serve cannot be reached again")
            loop.remove(self._sock.fileno())
        else:
            self.on_answer(*answer)

    def _receive(self) -> tuple[int, int, str] | None:
        """Return number, descriptor or -1, and what went wrong; None at the connector's end."""
        try:
            data, fds, more = passing.receive(self._sock, _ANSWER.size, 1)
        except OSError:
            return None
        if len(data) != _ANSWER.size:
            passing.close(fds)
            return None
        number, error = _ANSWER.unpack(data)
        if not error and len(fds) == 1:
            return number, fds[0], ""
        passing.close(fds)
        return number, -1, os.strerror(errno.EMFILE if more or not error else error)


def _be_connector(sock: socket.socket, vm: str, paths: Sequence[str], level: str) -> NoReturn:
    """Be the connector, until the VM process hangs up."""
    status = 1
    try:
        title.die_with_parent()
        os.setsid()  # a ^C on the VM's terminal is for the VM process to act on
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.closerange(3, sock.fileno())
        os.closerange(sock.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        title.set_title(f"{vm}/connect")
        jail.confine_connector(level)
        while data := sock.recv(_ASK.size):
            (number,) = _ASK.unpack(data)
            _answer(sock, number, paths[number])
        status = 0
    finally:
        os._exit(status)


def _answer(sock: socket.socket, number: int, path: str) -> None:
    # Non-blocking: a program that has a queue of connections waiting does not stop us.
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        peer.connect(path)
    except OSError as err:
        sock.send(_ANSWER.pack(number, err.errno or errno.ENAMETOOLONG))
    else:
        socket.send_fds(sock, [_ANSWER.pack(number, 0)], [peer.fileno()])
    finally:
        peer.close()
