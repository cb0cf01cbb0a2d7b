"""The spawner: a process that imports what devices need once, and then only forks.

It is forked by the VM process before that opens KVM or has a second thread. Each device process
is a fork of it, 1 ms old and sharing its pages, where a new interpreter would cost 50 ms.

    VM process → LAUNCH {kind, name, settings, regions, fds}, then one FD per name in `fds`
    spawner    → LAUNCHED, peerid the child's pid, with its pidfd   (or LOG: why not)
               → EXITED, peerid the child's pid: its wait status, 4 bytes

All processes of a disk with cache: none have one io_uring, its descriptor `ring` (`uringmake`); the
setting of that name says what it is like, or why there is none.

Nobody outlives anybody: the kernel kills the children when the spawner dies, and the spawner ends
them and itself when the VM process hangs up.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from config.errors import HostError, PyvmError
from devices import jail, process, title, uringmake, words
from devices.device import ERROR
from devices.guestmem import Region
from devices.process import Order
from devices.spec import SPECS
from devices.viodev import Channel, ChannelError, ImsgType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from devices.device import Device

    # Is a device process: order, descriptors, create() of its kind, jail's level → exit status.
    Main = Callable[[Order, dict[str, int], Callable[..., Device], str], int]

FD_DEADLINE: Final = 5.0  # seconds between LAUNCH and the last of its descriptors
LEAVE_DEADLINE: Final = 2.0  # seconds children get after the VM process has hung up
MAX_FDS: Final = 128


def serve(
    sock: socket.socket,
    vm: str,
    level: str,
    uid: int | None = None,
    *,
    kinds: Iterable[str] = SPECS,
    further: Iterable[str] = (),
    main: Main = process.main,
) -> None:
    """Be the spawner of the VM `vm`, at the other end of `sock`, until that is closed.

    `level` is vm.yaml's word for the jail: required, best-effort, off. `uid` is the user that the
    VM process will be, if that changes. Devices are of `kinds`, some of which want `further`
    modules, and each process is `main`.
    """
    _settle(sock.fileno())
    title.set_title(f"{vm}/spawn")
    channel = Channel(sock, "VM process", FD_DEADLINE)
    spawner = Spawner(channel, vm, level, main)
    for kind in kinds:
        spawner.load(kind)
    for name in further:
        __import__(name)
    jail.prepare(level, uid)
    # All that was imported stays: collections must not walk it, and so unshare it, in any child.
    gc.freeze()
    try:
        spawner.run()
    finally:
        spawner.end()


def _settle(sock_fd: int) -> None:
    """Shed what the VM process had: terminal, signal handlers, descriptors."""
    os.setsid()  # a ^C on the VM's terminal is for the VM process to act on
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _close_all_but({sock_fd})
    # Also of standard error: whoever waits for pyvmctl's to be closed must not wait for us.
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


class Spawner:
    """Forks device processes and reaps them."""

    def __init__(self, channel: Channel, vm: str, level: str, main: Main = process.main) -> None:
        self._channel, self._vm, self._level, self._main = channel, vm, level, main
        self._kinds: dict[str, Callable[..., Device]] = {}
        self._broken: dict[str, str] = {}  # kind → why it could not be imported
        self._children: dict[int, int] = {}  # pidfd → pid
        self._rings: dict[str, tuple[dict[str, int], str]] = {}  # by the device's name
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)

    def load(self, kind: str) -> None:
        """Import the module of a kind of device; if that fails, no such device can be launched."""
        try:
            self._kinds[kind] = __import__(f"devices.{kind}", fromlist=["create"]).create
        except Exception as err:  # whatever is wrong with it, other kinds are not
            self._broken[kind] = words.explain(err)

    def run(self) -> None:
        """Serve until the VM process hangs up or talks nonsense."""
        while True:
            for fd, _ in self._poll.poll():
                try:
                    if fd != self._channel.fileno():
                        self._reap(fd)
                    else:
                        self._serve_one()
                except ChannelError:
                    return  # it is gone, or as good as

    def end(self) -> None:
        """End the children, who have lost their channels too and get a moment to notice.

        Their images are free for others afterwards, but one that hangs in the kernel is left.
        """
        self._channel.close()
        self._wait_for_children()
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        self._wait_for_children()

    def _wait_for_children(self) -> None:
        """Reap those that end in time."""
        deadline = time.monotonic() + LEAVE_DEADLINE
        for pidfd, pid in list(self._children.items()):
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(max(deadline - time.monotonic(), 0) * 1e3):
                os.waitpid(pid, 0)
                del self._children[pidfd]

    def _serve_one(self) -> None:
        imsg = self._channel.receive()
        if imsg.fd is not None:
            os.close(imsg.fd)
        if imsg.type != ImsgType.LAUNCH:
            raise ChannelError(f"VM process: sent message type {imsg.type}")
        fds: dict[str, int] = {}
        try:
            request = json.loads(imsg.data)
            for name in [name.encode() for name in request["fds"][:MAX_FDS]]:
                fds[name.decode()] = self._receive_fd(name)
            self._launch(request, fds)
        except (PyvmError, OSError, ValueError, LookupError, TypeError, AttributeError) as err:
            if isinstance(err, ChannelError):
                raise
            text = str(err) if isinstance(err, OSError | PyvmError) else repr(err)
            self._channel.send(ImsgType.LOG, bytes([ERROR]) + text.encode())
        finally:
            for fd in fds.values():
                os.close(fd)

    def _receive_fd(self, name: bytes) -> int:
        imsg = self._channel.receive()
        if imsg.type != ImsgType.FD or imsg.fd is None or imsg.data != name:
            if imsg.fd is not None:
                os.close(imsg.fd)
            raise ChannelError(f"VM process: sent message type {imsg.type}, not {name!r}")
        return imsg.fd

    def _launch(self, request: dict[str, Any], fds: dict[str, int]) -> None:
        create = self._kinds.get(request["kind"])
        if create is None:
            why = self._broken.get(request["kind"], "unknown")
            raise HostError(f"no device of kind {request['kind']!r}: {why}")
        regions = tuple(Region(*region) for region in request["regions"])
        settings, name = request["settings"], request["name"]
        given = dict(fds)
        if settings.get("cache") == "none":
            ring, settings["ring"] = self._ring(name)
            given |= ring
        order = Order(request["kind"], name, settings, regions)
        pid = jail.fork(self._level)
        if pid == 0:
            self._become(order, given, create)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._channel.send(ImsgType.LAUNCHED, peerid=pid, fd=pidfd)

    def _ring(self, name: str) -> tuple[dict[str, int], str]:
        """Return a device's ring and what it is like, or nothing and why.

        Its processes are all alike in that: it is made when it is first asked for, or never.
        """
        if name not in self._rings:
            try:
                fd, params = uringmake.make(uringmake.DEPTH)
                self._rings[name] = {"ring": fd}, params.hex()
            except OSError as err:
                self._rings[name] = {}, f"no io_uring ({err.strerror})"
        return self._rings[name]

    def _become(self, order: Order, fds: dict[str, int], create: Callable[..., Device]) -> None:
        """Be a device process; does not return."""
        status = 1
        try:
            title.die_with_parent()
            _close_all_but({0, *fds.values()})
            os.dup2(0, 1)  # /dev/null, since _settle()
            os.dup2(0, 2)
            title.set_title(f"{self._vm}/{order.name}")
            status = self._main(order, fds, create, self._level)
        finally:
            os._exit(status)

    def _reap(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        pid, status = os.waitpid(self._children.pop(pidfd), 0)
        self._channel.send(ImsgType.EXITED, status.to_bytes(4, "little"), peerid=pid)


def _close_all_but(kept: set[int]) -> None:
    """Close every descriptor of this process but `kept`."""
    start = 0
    for fd in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        # An empty range must not reach closerange: CPython makes "all" of 0 to 0.
        if start < fd:
            os.closerange(start, fd)
        start = fd + 1
