"""Device processes: started by a spawner, watched, and reaped.

The spawner is forked before this process opens KVM or has a second thread. It imports what
devices need once and then only forks, so a device starts in milliseconds and shares its pages.
It is the parent of every device process; the VM process holds pidfds and two channels to each.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import HostError, PyvmError
from devices import viodev
from devices.loop import READ
from devices.spec import LASTING, QUEUE_PAIRS
from devices.viodev import Channel, ChannelError, ImsgType, MsgType
from vmm import log
from vmm.channel import ASYNC_DEADLINE, SYNC_DEADLINE, DeviceChannel, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.loop import Loop
    from devices.viodev import Imsg

LAUNCH_DEADLINE: Final = 10.0  # seconds from LAUNCH to READY
LEAVE_DEADLINE: Final = 2.0  # seconds between SHUTDOWN and SIGKILL


class Order(NamedTuple):
    """What one device process is to be."""

    kind: str  # a row of devices.spec.SPECS
    name: str  # "vioblk0"
    settings: Mapping[str, Any]  # plain values out of vm.yaml
    regions: tuple[tuple[int, int, int], ...]  # of guest memory: gpa, size, offset in the memfd
    fds: Mapping[str, int]  # by the names the device knows; copies are sent


class DeviceProcess:
    """One running device process, or what is left of it."""

    def __init__(self, name: str, pid: int, pidfd: int, channel: DeviceChannel) -> None:
        self.name, self.pid, self.channel = name, pid, channel
        self._pidfd = pidfd
        self.ended = ""  # how, in words; "" while it runs
        self.cause = ""  # what went wrong with its channel, if that came first

    @property
    def end(self) -> str:
        """How it ended, and why."""
        return (self.ended or "given up") + (f" ({self.cause})" if self.cause else "")

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):  # it has ended, and its parent knows by now
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, deadline: float) -> bool:
        """Wait until it has ended, at most to `deadline` on the monotonic clock."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(max(deadline - time.monotonic(), 0) * 1e3))

    def release(self) -> None:
        """Free the descriptor; the process is nobody's to signal any more."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1


class Spawner:
    """The VM process's end of its spawner."""

    def __init__(
        self, vm: str, jail: str, uid: int | None = None, *, queue_pairs: bool = False
    ) -> None:
        """Fork it. Call this single-threaded, with no descriptor open that a device must not see.

        `jail` is vm.yaml's word: required, best-effort, off; `uid` is the user that this process
        will be, if that changes; `queue_pairs`: a network device may have several processes.
        Raises HostError.
        """
        channel, theirs = viodev.pair("spawner", LAUNCH_DEADLINE)
        try:
            self.pid = os.fork()
        except OSError as err:
            raise HostError(f"cannot fork the spawner: {err.strerror}", vm=vm) from err
        if self.pid == 0:
            _become_spawner(theirs, vm, jail, uid, queue_pairs=queue_pairs)
        theirs.close()
        self._channel, self._vm = channel, vm
        self._processes: dict[int, DeviceProcess] = {}
        self._loop: Loop | None = None
        #: Called on the loop's thread when a device process has ended unasked.
        self.on_death: Callable[[DeviceProcess], None] = lambda process: None

    def launch(self, order: Order, channel: DeviceChannel) -> Callable[[], DeviceProcess]:
        """Ask for one device process; call what is returned to wait until it is ready.

        Several may be asked for before the first is waited for. Raises HostError.
        """
        sync, sync_theirs = viodev.pair(order.name, LAUNCH_DEADLINE)
        async_, async_theirs = viodev.pair(order.name, LAUNCH_DEADLINE)
        fds = {"sync": sync_theirs.fileno(), "async": async_theirs.fileno(), **order.fds}
        request = {**order._asdict(), "fds": list(fds)}
        try:
            self._channel.send(ImsgType.LAUNCH, json.dumps(request).encode())
            for name, fd in fds.items():
                self._channel.send(ImsgType.FD, name.encode(), fd=fd)
            while (reply := self._channel.receive()).type == ImsgType.EXITED:
                self._later(reply)  # another one, meanwhile; whoever hears of it may launch, too
        except ChannelError as err:
            raise HostError(f"cannot launch {order.name}: {err.what}", vm=self._vm) from err
        finally:
            sync_theirs.close()
            async_theirs.close()
        if reply.type != ImsgType.LAUNCHED or reply.fd is None:
            why = reply.data[1:].decode("utf-8", "replace") or "no reason given"
            raise HostError(f"the spawner could not launch {order.name}: {why}", vm=self._vm)
        process = DeviceProcess(order.name, reply.peerid, reply.fd, channel)
        self._processes[process.pid] = process
        return partial(self._await_ready, process, sync, async_)

    def _await_ready(self, process: DeviceProcess, sync: Channel, async_: Channel) -> DeviceProcess:
        """READY on both channels, or the device's own words for why not. Raises HostError."""
        try:
            for channel in (sync, async_):
                while (imsg := channel.receive()).type == ImsgType.LOG:
                    text = imsg.data[1:].decode("utf-8", "replace")
                    if imsg.data[:1] == b"\3":
                        raise HostError(text, vm=self._vm, device=process.name)
                    log.info(text, process.name)
                if channel.decode(imsg).type != MsgType.READY:
                    raise ChannelError(f"{process.name}: did not say READY")
        except PyvmError as err:
            process.kill()
            process.wait(time.monotonic() + LEAVE_DEADLINE)  # another shall not run beside it
            if isinstance(err, HostError):
                raise
            raise HostError(f"did not start: {err.what}", vm=self._vm, device=process.name) from err
        sync.set_deadline(SYNC_DEADLINE)
        async_.set_deadline(ASYNC_DEADLINE)
        process.channel.open(sync, async_)
        return process

    def watch(self, loop: Loop) -> None:
        """Hear of deaths from now on."""
        self._loop = loop
        loop.add(self._channel.fileno(), READ, partial(self._incoming, loop))

    def _incoming(self, loop: Loop, _events: int) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        if not poll.poll(0):
            return  # launch() has taken it, in an earlier callback of the same round
        try:
            imsg = self._channel.receive()
        except ChannelError as err:
            log.error(f"the spawner has died: {err.what}")
            loop.remove(self._channel.fileno())
            for process in list(self._processes.values()):
                self._over(process, "died with the spawner")
            return
        if imsg.fd is not None:
            os.close(imsg.fd)
        if imsg.type == ImsgType.EXITED:
            self._exited(imsg)

    def _later(self, imsg: Imsg) -> None:
        if self._loop is None:
            self._exited(imsg)
        else:
            self._loop.call(partial(self._exited, imsg))

    def _exited(self, imsg: Imsg) -> None:
        found = self._processes.get(imsg.peerid)
        if found is not None and len(imsg.data) == 4:
            self._over(found, describe(int.from_bytes(imsg.data, "little")))

    def _over(self, process: DeviceProcess, how: str) -> None:
        del self._processes[process.pid]
        process.ended = how
        self.on_death(process)
        process.release()

    def close(self, loop: Loop) -> None:
        """End what has not left since its channels were closed, and the spawner itself."""
        deadline = time.monotonic() + LEAVE_DEADLINE
        for process in self._processes.values():
            if not process.wait(deadline):
                log.warning(f"did not leave in {LEAVE_DEADLINE:g} s, killed", process.name)
                process.kill()
            process.release()
        self._processes.clear()
        loop.remove(self._channel.fileno())
        self._channel.close()
        os.waitpid(self.pid, 0)


def _become_spawner(
    sock: socket.socket, vm: str, jail: str, uid: int | None, *, queue_pairs: bool
) -> None:
    """Be the spawner; does not return. Only here does device code enter the VM side."""
    status = 1
    try:
        from devices import spawner  # not before the fork: the VM process never needs it

        further = LASTING + QUEUE_PAIRS * queue_pairs
        spawner.serve(sock, vm, jail, uid, further=further)
        status = 0
    finally:
        os._exit(status)
