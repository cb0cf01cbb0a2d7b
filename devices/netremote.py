"""The further queue pairs of a network device, each served by a process of its own.

The first pair's process has all registers, the control queue, the filter, the link. Whatever
changes there is followed by the others: `follow` tells each what it has to do by now and returns
when they do it. So when the driver reads the ack of a command, or that a reset is over, no pair
works by older rules.

A process that has died follows by not being there: the kernel takes its memory away before its
end of the connection closes. Its successor comes with a new connection (`take`), and is told the
same. One that does not answer, or talks nonsense, is given up: the VM process hears `pair-N-L`,
where L counts the processes that pair N has had, ends it, and sends another.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from config.errors import ConfigError, GuestError
from devices import netlink
from devices.device import WARNING
from devices.netlink import DEADLINE, MESSAGE_MAX, Captured, GoneError, Link, LinkError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.device import Host

NUMBERS: Final = 1 << 32


class Leader(Protocol):
    """The device whose pairs these are."""

    def pair_state(self, number: int) -> dict[str, Any]:
        """Return what pair `number` has to follow now, as plain JSON; the same if it is the same.

        `devices.netpair` says what is in it.
        """

    def captured(self, frame: Captured) -> None:
        """Show a frame to the capture, if there still is one."""

    def kept(self, frame: bytes) -> None:
        """Answer a frame of the guest's, header first, that may be the local link's."""

    def port_lost(self, err: OSError) -> None:
        """Take note that a pair's port has failed."""


class _Remote:
    """One pair's process, or its absence."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.link: Link | None = None
        self.life = 0  # which of its processes that leads to
        self.state: dict[str, Any] = {}  # the latest that was sent
        self.sent = self.followed = 0  # numbers of states
        self.cursors: tuple[tuple[int, int] | None, ...] = (None, None)


class Remotes:
    """All of them; none for most devices, and then nothing here takes time."""

    def __init__(
        self,
        host: Host,
        leader: Leader,
        fds: Mapping[int, tuple[int, int]],
        lives: Sequence[int] = (),
    ) -> None:
        """Take over, by the number of each pair, a connection and the eventfd of its calls.

        `lives` says of pairs 1, 2, … which of their processes the connections lead to; else 1.
        """
        self._host, self._leader = host, leader
        self._number = 0
        self._broken = ""
        self._fail = host.timer(self._fail_now)
        self._remotes = {number: _Remote(number) for number in fds}
        for number, (fd, bell) in fds.items():
            self._open(self._remotes[number], fd, lives[number - 1] if lives else 1)
            host.watch(bell, partial(self._rung, number, bell))

    def __bool__(self) -> bool:
        return bool(self._remotes)

    def follow(self, *, wait: bool = True) -> None:
        """Have every process do what is to be done now, and wait until it does."""
        for remote in self._remotes.values():
            state = self._leader.pair_state(remote.number)
            if remote.link is not None and state != remote.state:
                self._send(remote, state)
        if wait:
            deadline = time.monotonic() + DEADLINE
            for remote in self._remotes.values():
                self._await(remote, deadline)

    def take(self, value: Any, fd: int) -> None:
        """Take over the connection to a new process; `value` is [number, life].

        Whoever sends it has seen the end of the process before it. Raises ConfigError, the
        descriptor not taken.
        """
        match value:
            case [int(number), int(life)] if number in self._remotes:
                remote = self._remotes[number]
            case _:
                raise ConfigError(f"there is no pair {value!r} that another process serves")
        if remote.link is not None:
            self._close(remote)
        self._open(remote, fd, life)
        self._send(remote, self._leader.pair_state(remote.number))

    def cursors(self, number: int) -> tuple[tuple[int, int] | None, ...]:
        """Return where the two queues of a pair were when it last followed; None: nobody knows."""
        return self._remotes[number].cursors

    def reset(self) -> None:
        """What a driver had done wrong is forgotten."""
        self._broken = ""
        self._fail.disarm()

    # Connections.

    def _open(self, remote: _Remote, fd: int, life: int) -> None:
        remote.link, remote.life = Link(fd), life
        remote.state, remote.followed = {}, remote.sent
        self._host.watch(fd, partial(self._readable, remote))

    def _close(self, remote: _Remote) -> None:
        if remote.link is not None:
            self._host.unwatch(remote.link.fd)
            remote.link.close()
        remote.link, remote.cursors = None, (None, None)

    def _send(self, remote: _Remote, state: dict[str, Any]) -> None:
        if remote.link is None:
            return
        self._number = (self._number + 1) % NUMBERS
        remote.state, remote.sent = state, self._number
        text = json.dumps({"number": self._number, **state}).encode()
        try:
            remote.link.send(bytes((netlink.STATE,)) + text, time.monotonic() + DEADLINE)
        except LinkError as err:
            self._give_up(remote, err)

    def _await(self, remote: _Remote, deadline: float) -> None:
        try:
            while remote.link is not None and remote.followed != remote.sent:
                remote.link.wait(deadline)
                self._take_one(remote)
        except LinkError as err:
            self._give_up(remote, err)

    def _readable(self, remote: _Remote, _events: int) -> None:
        try:
            self._take_one(remote)
        except LinkError as err:
            self._give_up(remote, err)

    def _give_up(self, remote: _Remote, err: LinkError) -> None:
        """Nobody follows at the other end: see to it that somebody does."""
        if remote.link is not None:
            if not isinstance(err, GoneError):  # which is told where it is seen to have died
                self._host.log(WARNING, f"the process of queue pair {remote.number} {err.what}")
            self._close(remote)
            self._host.tell(f"pair-{remote.number}-{remote.life}")

    def _rung(self, number: int, bell: int, _events: int) -> None:
        """A pair wants to call while the driver asks ISR, which is here."""
        os.eventfd_read(bell)
        self._host.call(2 * number)
        self._host.call(2 * number + 1)

    def _take_one(self, remote: _Remote) -> None:
        """Do what one message says. Raises LinkError."""
        message = remote.link.receive(MESSAGE_MAX) if remote.link is not None else None
        if message is None:
            return
        kind = message[0]
        if kind == netlink.FOLLOWED:
            answer = netlink.read_followed(message)
            if answer.number == remote.sent:
                remote.followed, remote.cursors = answer.number, answer.cursors
        elif kind == netlink.CAPTURED:
            self._leader.captured(netlink.read_captured(message))
        elif kind == netlink.KEPT:
            self._leader.kept(message[1:])
        elif kind == netlink.LOST:
            self._leader.port_lost(netlink.read_lost(message))
        elif kind == netlink.BROKEN:
            self._broken = netlink.text_of(message[1:])
            self._fail.arm(0)
        else:
            raise LinkError(f"sent a message of kind {kind}")

    def _fail_now(self) -> None:
        """Raise what a pair has found: in the loop, which knows what to do with it."""
        broken, self._broken = self._broken, ""
        if broken:
            raise GuestError(broken)
