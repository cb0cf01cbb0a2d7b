"""The processes of a network device's further queue pairs: begun with it, and again when they die.

A pair's process has no state that is not elsewhere, too: what to do it hears from the device's
first process, where its queues are lies in an in-flight area. Both outlive it, so another takes
its place, and the guest sees nothing. `devices/vionet.py` says who does what; here it is who lives.

    pair dies ─► socketpair ─► new process with one end
                     └─► setting "pair" to the first process, with the other end
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import PyvmError
from devices.spec import INFLIGHT_STRIDE
from vmm import log
from vmm.channel import DeviceChannel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.loop import Loop, Timer
    from vmm.launch import DeviceProcess, Order, Spawner

WORD: Final = "pair-"  # what the first process says of one that does not follow: pair-N-LIFE

_QUEUES: Final = 2
_SETTLED: Final = 0.1  # seconds that a process has to live for the next to come at once
_WAIT: Final = (0.02, 1.0)  # seconds: first and longest wait where they die young
_ROOM: Final = 1 << 20  # bytes of messages that may wait in a connection, as far as the host allows


class Hand(NamedTuple):
    """What a device offers its pairs."""

    loop: Loop
    spawner: Spawner
    #: Makes the order of a process: name, settings, number of its first queue, queues, descriptors.
    order: Callable[[str, Mapping[str, Any], int, int, Mapping[str, int]], Order]
    #: Gives the first process a connection: value and descriptor of the setting "pair". PyvmError,
    #: also if that process has died; whoever takes its place has connections of its own.
    hand: Callable[[list[int], int], Any]


class Pair:
    """One pair's process, and what is there for each that has its place."""

    def __init__(self, device: str, number: int, tap: int, hand: Hand) -> None:
        """Make what outlives the process; `tap` is its queue of the tap. Raises OSError."""
        self.name, self.number = f"{device}.{number}", number
        self.process: DeviceProcess | None = None
        self.channel: DeviceChannel | None = None
        self.life = 0  # how many processes there have been
        self.cause = ""  # what went wrong with the channel of the one that is there
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inflight = os.memfd_create("pyvmd-inflight", os.MFD_CLOEXEC)
        os.ftruncate(self._inflight, _QUEUES * INFLIGHT_STRIDE)
        self._tap, self._hand = tap, hand
        self._timer: Timer | None = None
        self._since, self._wait = 0.0, 0.0

    def launch(self, link: int) -> Callable[[], None]:
        """Ask for a process with this end of a connection; call what is returned to wait for it.

        Raises HostError.
        """
        self.life += 1
        self.cause, self._since = "", time.monotonic()
        self.channel = DeviceChannel(self.name, self._hand.loop, self._failed)
        fds = {"tap0": self._tap, "link": link, "bell": self.bell, "inflight": self._inflight}
        order = self._hand.order(
            self.name, {"pair": self.number}, _QUEUES * self.number, _QUEUES, fds
        )
        ready = self._hand.spawner.launch(order, self.channel)

        def wait() -> None:
            self.process = ready()
            self._since = time.monotonic()

        return wait

    def again(self) -> None:
        """Have another process take the place of one that has died: now, or in a while."""
        if time.monotonic() - self._since > _SETTLED:
            self._wait = 0.0
            self._relaunch()
            return
        self._wait = min(max(2 * self._wait, _WAIT[0]), _WAIT[1])
        if self._timer is None:
            self._timer = self._hand.loop.timer(self._relaunch)
        self._timer.arm(self._wait)

    def _relaunch(self) -> None:
        if self.process is not None:
            return  # it came with the device's first process
        try:
            mine, theirs = connection()
        except OSError as err:
            log.limited(f"{self.name} fails", f"socketpair: {err}", self.name, log.error)
            self.again()
            return
        with mine, theirs:
            try:
                self.launch(theirs.fileno())()
                self._hand.hand([self.number, self.life], mine.fileno())
            except PyvmError as err:
                log.limited(f"{self.name} fails", f"has no process: {err}", self.name, log.error)
                self.end()
                self.again()

    def _failed(self, why: str) -> None:
        """Its channel is no good any more: end what may still run behind it."""
        self.cause = self.cause or why
        self.kill()

    def kill(self) -> None:
        """End its process, whatever it does; another will come."""
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        """Be without a process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close(self) -> None:
        """Ask its process to leave, and free what is here."""
        if self.channel is not None:
            self.channel.shut_down()
        self.stop()
        os.close(self.bell)
        os.close(self._inflight)

    def stop(self) -> None:
        """Have no process any more, and none later."""
        if self.channel is not None:
            self.channel.close()
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def facts(self) -> dict[str, Any]:
        """Return what `status --json` tells of it."""
        return {
            "name": self.name,
            "pid": self.process.pid if self.process else 0,
            "state": "running" if self.process else "starting",
            "lives": self.life,
        }


class Pairs:
    """All further pairs of one device."""

    def __init__(self, device: str, taps: Mapping[int, int], hand: Hand) -> None:
        """Prepare them; `taps` are the queues of the tap, by the number of the pair."""
        self._pairs = {n: Pair(device, n, tap, hand) for n, tap in taps.items()}
        self._links: list[socket.socket] = []

    def fds(self) -> dict[str, int]:
        """Return what the device's first process needs: connections and bells.

        The other ends are for `launch`, which comes next.
        """
        fds: dict[str, int] = {}
        for pair in self._pairs.values():
            self._links += (ends := connection())
            fds[f"pair{pair.number}"], fds[f"bell{pair.number}"] = ends[0].fileno(), pair.bell
        return fds

    def lives(self) -> list[int]:
        """Return which of their processes `launch` begins, pair by pair."""
        return [pair.life + 1 for pair in self._pairs.values()]

    def launch(self) -> Callable[[], None]:
        """Ask for all processes; call what is returned to wait for them. Raises HostError."""
        waits = [
            pair.launch(link.fileno())
            for pair, link in zip(self._pairs.values(), self._links[1::2], strict=True)
        ]

        def wait() -> None:
            with ExitStack() as every:  # also those behind one that fails
                every.callback(self._hang_up)
                for ready in waits:
                    every.callback(ready)

        return wait

    def _hang_up(self) -> None:
        """The processes have copies; these must not keep connections open."""
        for end in self._links:
            end.close()
        self._links.clear()

    def ended(self, process: DeviceProcess) -> bool:
        """Take note that a process has ended; False if it is none of these."""
        for pair in self._pairs.values():
            if process.name == pair.name:
                if process is pair.process:
                    cause = f" ({pair.cause})" if pair.cause else ""
                    how = f"process {process.pid} {process.ended}{cause}: another takes its place"
                    log.limited(f"{pair.name} ended", how, pair.name)
                    pair.end()
                    pair.again()
                return True
        return False

    def end(self, deadline: float) -> bool:
        """End all processes; False if one has not by `deadline` on the monotonic clock.

        They can be launched again.
        """
        self._hang_up()
        processes = [pair.process for pair in self._pairs.values() if pair.process is not None]
        for pair in self._pairs.values():
            pair.end()
        return all(process.wait(deadline) for process in processes)

    def said(self, word: str) -> None:
        """Act on a word of the first process, which may say anything."""
        number, _, life = word.removeprefix(WORD).partition("-")
        for pair in self._pairs.values():
            if (number, life) == (str(pair.number), str(pair.life)):
                pair.kill()  # its end comes back as ended()

    def stop(self) -> None:
        """The first process has died: there is nothing for the others to do."""
        for pair in self._pairs.values():
            pair.end()
            pair.stop()

    def close(self) -> None:
        """End all, and free everything."""
        self._hang_up()
        for pair in self._pairs.values():
            pair.close()

    def facts(self) -> list[dict[str, Any]]:
        """Return what `status --json` tells of each process."""
        return [pair.facts() for pair in self._pairs.values()]


def connection() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection between two processes of a device. Raises OSError."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
    return ends
