"""The processes that do a VM's networking, and what the VM process holds of it.

    with the rights of the starter:      keeper ── worker (links.set_up)
                                           │ SEQPACKET: one message with facts and descriptors
    later its owner's, confined:         VM process: Network

The socket's end tells the keeper that the VM process has gone, however that came about. It holds
the VM's lock meanwhile, so nobody takes the VM's place while its network is being cleared away.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
from typing import TYPE_CHECKING, Any, Final, NoReturn

from config.errors import ConfigError, HostError, PyvmError
from devices import passing
from devices.title import set_title
from vmm import log, runroot, safefile
from vmm.rundir import NETWORK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm.net.plan import Nic

SET_UP_SECONDS: Final = 30.0  # a worker that needs longer hangs
END_SECONDS: Final = 10.0
_LOCK: Final = ".net.lock"
_MESSAGE: Final = 60_000  # bytes
_FDS: Final = 250  # of one message; the kernel's limit is 253


class Work:
    """Taps, bridges and rules being made in other processes."""

    def __init__(self, nics: Sequence[Nic], lock_fd: int, dir_fd: int) -> None:
        """Begin, for the VM of that lock and runtime directory. Raises HostError."""
        self._lasting = any(nic.lasting for nic in nics)
        try:
            if self._lasting:
                safefile.write_file(NETWORK, b"", dir_fd)
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._pid = os.fork()
        except OSError as err:
            raise HostError(f"cannot start a process for networks: {err.strerror}") from err
        if not self._pid:
            self._channel.close()
            _keep(nics, theirs, lock_fd, dir_fd)
        theirs.close()
        self._pidfd = os.pidfd_open(self._pid)

    def result(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Wait for facts of each interface and all queues in order. Raises ConfigError, HostError.

        The descriptors are the caller's.
        """
        if not select.select([self._channel], [], [], SET_UP_SECONDS)[0]:
            raise HostError(f"interfaces were not set up within {SET_UP_SECONDS:g} s")
        data, fds, more = passing.receive(self._channel, _MESSAGE, _FDS)
        if not data or more:
            passing.close(fds)
            if more:
                raise HostError("no descriptors are left for all queues", hint="ulimit -n")
            raise HostError("the process that sets up interfaces has died")
        said = json.loads(data)
        if "error" in said:
            kind = ConfigError if said["config"] else HostError
            raise kind(said["error"], device=said["device"], hint=said["hint"])
        return said["facts"], fds

    def close(self) -> None:
        """Have everything cleared away, and wait for it."""
        self._channel.close()
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if poll.poll(END_SECONDS * 1000):
            os.waitpid(self._pid, 0)
        else:
            log.error("the network is not cleared away yet: see 'pyvmctl net'")
        os.close(self._pidfd)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function` returns in a process of its own, as JSON carries it; raises its error.

    For what imports pyroute2.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            said = _answer(lambda: {"value": function(*arguments)})
            with open(writer, "w") as file:
                json.dump(said, file)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    said = json.loads(text or "{}")
    if "value" not in said:
        what = said.get("error", "a process that looks at networks has died")
        raise HostError(what, hint=said.get("hint", ""))
    return said["value"]


def sweep() -> None:
    """Remove what VMs that were killed have left, as far as we may. Raises HostError."""
    apart(_sweep)


def _sweep() -> None:
    from vmm.net import links

    with _Lock():
        links.sweep()


def listing() -> dict[str, Any]:
    """Return what of ours there is on the host. Raises HostError."""
    found: dict[str, Any] = apart(_listing)
    return found


def _listing() -> dict[str, Any]:
    from vmm.net import links

    return links.listing()


class _Lock:
    """The lock of all networks: who makes or removes a bridge holds it."""

    def __enter__(self) -> None:
        root_fd = runroot.open_root(create=True)
        try:
            self._fd = safefile.open_file(_LOCK, os.O_RDWR | os.O_CREAT, root_fd)
        finally:
            os.close(root_fd)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _keep(nics: Sequence[Nic], channel: socket.socket, lock_fd: int, dir_fd: int) -> NoReturn:
    """Be the keeper."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # ^C is the VM process's, whose end we await
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):  # whoever waits for the end of pyvmctl's output waits for us, too
            os.dup2(null, standard)
        passed = [int(nic.tap[3:]) for nic in nics if nic.tap.startswith("fd:")]
        _close_others([channel.fileno(), lock_fd, dir_fd, *passed])
        worker = os.fork()
        if not worker:
            _work(nics, channel)
        passing.close(passed)
        os.waitpid(worker, 0)
        if any(nic.lasting for nic in nics):
            set_title(f"{nics[0].vm}/net")
            while channel.recv(1):  # nothing is ever sent: only its end comes
                pass
            _clear(nics[0].vm)
            safefile.remove(NETWORK, dir_fd)
    finally:
        os._exit(0)


def _work(nics: Sequence[Nic], channel: socket.socket) -> NoReturn:
    """Be the worker."""
    fds: list[int] = []

    def work() -> dict[str, Any]:
        from vmm.net import links

        with _Lock():
            facts, queues = links.set_up(nics)
        fds.extend(queues)
        return {"facts": facts}

    try:
        said = json.dumps(_answer(work)).encode()
        socket.send_fds(channel, [said], fds)
    finally:
        os._exit(0)


def _clear(vm: str) -> None:
    from vmm.net import links

    with _Lock():
        links.tear_down(vm)


def _answer(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns, or its error as something to send."""
    try:
        return work()
    except PyvmError as err:
        device, config = err.device, isinstance(err, ConfigError)
        return {"error": err.what, "hint": err.hint, "device": device, "config": config}
    except Exception as err:  # of pyroute2, which has many
        what = f"{type(err).__name__}: {err}"
        return {"error": what, "hint": "", "device": "", "config": False}


def _close_others(kept: Sequence[int]) -> None:
    """Close every descriptor but 0 to 2 and those."""
    start = 3
    for fd in sorted(kept):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))
