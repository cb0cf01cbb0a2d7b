"""The Unix sockets a VM process offers: naming them, letting clients in, talking without waiting.

A `Listener` knows who connects and who may; a `Stream` is one client, with a queue for what it
has not read yet. Both live on the loop's thread, never block it, and never raise for anything a
client does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from devices.loop import READ, WRITE
from vmm import log, safefile

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from devices.loop import Loop

BACKLOG: Final = 64  # connections that wait in the kernel
ACCEPTS: Final = 8  # connections let in per round of the loop
READ_SIZE: Final = 16384  # bytes taken from one client per round
ACCEPT_PAUSE: Final = 1.0  # seconds without accept() when descriptors have run out
FLUSH_TIME: Final = 0.5  # seconds that all clients together get for the last words

_SO_PEERGROUPS: Final = 59  # socket(7); not in Python's socket module
_UCRED: Final = struct.Struct("iII")
_HANGUP: Final = select.EPOLLHUP | select.EPOLLERR
_Client = TypeVar("_Client")


class Peer(NamedTuple):
    """Who is at the other end, as the kernel noted at connect()."""

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...]  # supplementary groups; at most 256 are told


def peer_of(sock: socket.socket) -> Peer:
    """Return the peer's credentials (SO_PEERCRED, SO_PEERGROUPS in unix(7))."""
    pid, uid, gid = _UCRED.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:  # ERANGE: more groups than fit; the primary one still counts
        raw = b""
    return Peer(uid, gid, pid, struct.unpack(f"{len(raw) // 4}I", raw))


def owner_only(uid: int, gid: int | None = None) -> Callable[[Peer], bool]:
    """Return the usual rule: root, this process's user, user `uid`, and members of group `gid`."""

    def permitted(peer: Peer) -> bool:
        if peer.uid in (0, os.geteuid(), uid):
            return True
        return gid is not None and (peer.gid == gid or gid in peer.groups)

    return permitted


def leaver(clients: Mapping[_Client, Peer], newcomer: Peer) -> _Client | None:
    """Return who leaves a full house for a newcomer: the oldest of the user who has most places.

    If that is the newcomer's own user, the oldest of the process that has most. None if that is
    the newcomer, too, or if nobody has more than one. So one that takes all there is keeps out
    no other user, and no other process.
    """
    kinds: tuple[Callable[[Peer], Hashable], ...] = (lambda peer: peer.uid, lambda peer: peer.pid)
    for kind in kinds:
        counts = Counter(kind(peer) for peer in clients.values())
        # Not most_common(), which imports heapq: a VM process in its jail can import nothing.
        most, places = max(counts.items(), key=lambda row: row[1])
        if places > 1 and kind(newcomer) != most:
            return next(client for client, peer in clients.items() if kind(peer) == most)
    return None


def listen(name: str, dir_fd: int, mode: int = 0o600) -> socket.socket:
    """Return a listening socket `name` in a directory of any path length. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # bind() takes the mode from the unbound socket's inode: no moment with a wider one.
        os.fchmod(sock.fileno(), mode)
        sock.bind(f"/proc/self/fd/{dir_fd}/{name}")
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def connect(path: str, seconds: float) -> socket.socket:
    """Return a socket connected to `path`, whatever its length. Raises OSError.

    `seconds` bounds the connect and stays the socket's timeout.
    """
    directory, name = os.path.split(path)
    dir_fd = safefile.open_dir(directory or ".")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(seconds)
    try:
        sock.connect(f"/proc/self/fd/{dir_fd}/{name}")
    except OSError:
        sock.close()
        raise
    finally:
        os.close(dir_fd)
    return sock


class Stream:
    """One client. Subclasses say what its bytes mean: received(), ended(), drained()."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._loop, self._sock, self._fd = loop, sock, sock.fileno()
        self._queue = bytearray()
        self._mask, self._reading, self._deaf = READ, True, False
        self.closed = False
        self.eof = False  # the client will send no more; it may still read
        loop.add(self._fd, READ, self._event)

    def received(self, data: bytes) -> None:
        """Take input, at most READ_SIZE bytes."""

    def ended(self) -> None:
        """The client has closed, or at least its sending half. Closes unless told otherwise."""
        self.close()

    def hung_up(self) -> None:
        """The client has gone for good while nobody was reading. Closes unless told otherwise."""
        self.close()

    def drained(self) -> None:
        """Output has left; `queued` is smaller than before."""

    @property
    def queued(self) -> int:
        """Bytes of output that the client has not taken yet. The caller bounds it."""
        return len(self._queue)

    def send(self, data: bytes) -> None:
        """Send now what the client takes now, queue the rest."""
        if self.closed or self._deaf:
            return
        self._queue += data
        if len(self._queue) == len(data):  # else WRITE is being waited for
            self._flush()

    def read(self, on: bool) -> None:
        """Take input or leave it with the client, which then has to wait."""
        if on != self._reading and not self.closed:
            self._reading = on
            self._watch()

    def rest(self, limit: int) -> bytes:
        """Take what a client that has gone left unread, at most `limit` bytes."""
        data = b""
        with contextlib.suppress(OSError):
            while len(data) < limit and (piece := self._sock.recv(limit - len(data))):
                data += piece
        return data

    def close(self) -> None:
        """Drop the client and what it has not read."""
        if not self.closed:
            self.closed = True
            self._loop.remove(self._fd)
            self._sock.close()
            self._queue.clear()

    def _event(self, events: int) -> None:
        if events & WRITE:
            before = len(self._queue)
            self._flush()
            if len(self._queue) < before and not self.closed:
                self.drained()
        if self.closed:
            return
        if self._reading and not self.eof:
            if events & (READ | _HANGUP):
                self._receive()
        elif events & _HANGUP:
            self.hung_up()

    def _receive(self) -> None:
        try:
            data = self._take()
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.received(data)
            return
        self.eof = True
        self._watch()
        self.ended()

    def _take(self) -> bytes:
        """Read once. Descriptors that come along are closed by the kernel. Raises OSError."""
        return self._sock.recv(READ_SIZE)

    def _flush(self) -> None:
        try:
            del self._queue[: self._sock.send(self._queue)]
        except BlockingIOError:
            pass
        except OSError:
            # It does not listen any more, but what it said before it left still counts.
            self._deaf = True
            self._queue.clear()
        self._watch()

    def _watch(self) -> None:
        mask = READ if self._reading and not self.eof else 0
        mask |= WRITE if self._queue else 0
        if mask != self._mask and not self.closed:
            self._mask = mask
            self._loop.modify(self._fd, mask)


def flush_and_close(streams: Iterable[Stream], seconds: float = FLUSH_TIME) -> None:
    """Give clients a last chance to take what is queued, at most `seconds` in all; close them."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    waiting = {stream._fd: stream for stream in streams if not stream.closed}
    everyone = list(waiting.values())
    for fd in waiting:
        poll.register(fd, select.POLLOUT)
    while waiting:
        for fd, stream in list(waiting.items()):
            stream._flush()
            if stream.closed or not stream.queued:
                poll.unregister(fd)
                del waiting[fd]
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            break
        poll.poll(left * 1000)
    for stream in everyone:
        stream.close()


class Listener:
    """Lets permitted clients in. `welcome` takes the socket over and closes it sooner or later."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        *,
        permitted: Callable[[Peer], bool],
        welcome: Callable[[socket.socket, Peer], None],
        refusal: Callable[[str], bytes],
        who: str,
    ) -> None:
        sock.setblocking(False)
        self._loop, self._sock = loop, sock
        self._permitted, self._welcome, self._refusal = permitted, welcome, refusal
        self._who = who
        self._retry = loop.timer(self._resume)
        loop.add(sock.fileno(), READ, self._ready)

    def refuse(self, sock: socket.socket, why: str) -> None:
        """Tell a client why not, if it can take one line now, and close."""
        with contextlib.suppress(OSError), sock:
            sock.setblocking(False)
            sock.send(self._refusal(why))

    def close(self) -> None:
        """Let nobody in any more. The socket's name is the runtime directory's business."""
        self._retry.close()
        self._loop.remove(self._sock.fileno())
        self._sock.close()

    def _ready(self, _events: int) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as err:
                self._pause(err)
                return
            peer = peer_of(sock)
            if self._permitted(peer):
                self._welcome(sock, peer)
            else:
                what = f"uid {peer.uid} (process {peer.pid}) was refused"
                log.limited(f"{self._who} peer", what, self._who)
                self.refuse(sock, "permission denied")

    def _pause(self, err: OSError) -> None:
        """Out of descriptors or memory: accept() would fail again at once, so wait a little."""
        name = errno.errorcode.get(err.errno or 0, str(err))
        log.limited(f"{self._who} accept", f"cannot accept clients for now: {name}", self._who)
        self._loop.remove(self._sock.fileno())
        self._retry.arm(ACCEPT_PAUSE)

    def _resume(self) -> None:
        self._loop.add(self._sock.fileno(), READ, self._ready)
