"""Requests made piece by piece on one queue, and what became of them.

    queue = device.acquire(0)
    queue.start("mine", 3)                                    # any object; up to 3 pieces
    queue.add([(header, 16)]); queue.add([(data, 4096), (status, 1)], writable=True)
    queue.flush()                                             # all that was started, one kick
    for done in queue.wait(1, timeout=1.0): …                 # done.cookie, done.written

The device owns what was flushed until `poll` or `wait` returns it. Buffers are guest addresses:
`take` and `give` hand out the queue's own, and others may be named as well.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import PyvmError
from tools.viodriver.errors import DeviceGoneError, DriverError, NoAnswerError, NoRoomError
from tools.viodriver.queue import Segment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tools.viodriver.packed import PackedDriver
    from tools.viodriver.queue import Request
    from tools.viodriver.split import SplitDriver
    from tools.viodriver.transport import Transport


CHECK_EVERY: Final = 0.2  # seconds between looks at whether a silent device is alive


class Completion(NamedTuple):
    """A request that the device gave back."""

    cookie: Any
    written: int  # bytes the device says it wrote


class _Draft:
    """A request that is being made."""

    def __init__(self, cookie: Any, pieces: int) -> None:
        self.cookie, self.pieces = cookie, pieces
        self.segments: list[Segment] = []


class RequestQueue:
    """One queue, for whoever has acquired it. Not for several threads."""

    def __init__(self, transport: Transport, index: int, ring: SplitDriver | PackedDriver) -> None:
        self.index, self.ring = index, ring
        self._transport = transport
        self._draft: _Draft | None = None
        self._ready: list[Request] = []  # made, not flushed
        self._cookies: dict[int, Any] = {}  # token → cookie
        self._done: list[Completion] = []  # collected, not polled

    # Buffers.

    def take(self, content: bytes | int) -> int:
        """Return the guest address of a new buffer: of these bytes, or of so many zeroes."""
        data = bytes(content) if isinstance(content, int) else content
        gpa = self.ring.arena.take(len(data))
        self.ring.memory.write(gpa, data)
        return gpa

    def give(self, gpa: int, length: int) -> None:
        """Take a buffer back."""
        self.ring.arena.give(gpa, length)

    # Making requests.

    def start(self, cookie: Any, pieces: int) -> None:
        """Begin a request of up to `pieces` pieces; the one begun before is complete.

        Raises NoRoomError if there are not so many descriptors now, DriverError if the queue
        never has them, or if the request before has no piece.
        """
        self._complete()
        if not 0 < pieces <= self.ring.size:
            raise DriverError(f"a request of {pieces} pieces on a queue of {self.ring.size}")
        if self.ring.places(pieces) > self.ring.free_places - sum(
            self.ring.places(len(request.segments)) for request in self._ready
        ):
            raise NoRoomError(f"queue {self.index} has no room for {pieces} pieces")
        self._draft = _Draft(cookie, pieces)

    def add(self, pieces: Iterable[tuple[int, int]], *, writable: bool = False) -> None:
        """Add pieces, address and length, to the request begun last. Raises DriverError.

        What the device may write comes after all that it may only read.
        """
        draft = self._draft
        if draft is None:
            raise DriverError("no request was started")
        new = [Segment(gpa, length, writable) for gpa, length in pieces]
        if len(draft.segments) + len(new) > draft.pieces:
            raise DriverError(f"more than the {draft.pieces} pieces that were asked for")
        if not writable and draft.segments and draft.segments[-1].writable:
            raise DriverError("a readable piece after a writable one")
        draft.segments += new

    def abort(self) -> Any:
        """Forget the request begun last, which must not be complete; return its cookie."""
        if self._draft is None:
            raise DriverError("no request was started")
        draft, self._draft = self._draft, None
        return draft.cookie

    def flush(self) -> int:
        """Give the device all requests made so far, and kick it if it wants; return how many."""
        self._complete()
        ready, self._ready = self._ready, []
        if ready:
            self.ring.submit(*ready)
            if self.ring.kick_needed():
                self._transport.kick(self.index)
        return len(ready)

    def _complete(self) -> None:
        draft = self._draft
        if draft is None:
            return
        if not draft.segments:
            raise DriverError("a request without pieces: add some, or abort it")
        request = self.ring.place_at(draft.segments)
        request.owned = True
        self._cookies[request.token] = draft.cookie
        self._ready.append(request)
        self._draft = None

    # What came of them.

    @property
    def outstanding(self) -> int:
        """Count the requests that the device has."""
        return self.ring.outstanding

    def poll(self, limit: int = 0) -> list[Completion]:
        """Return what the device has given back, at most `limit` of it unless that is 0."""
        for used in self.ring.collect():
            self._done.append(Completion(self._cookies.pop(used.token), used.written))
        limit = limit or len(self._done)
        found, self._done = self._done[:limit], self._done[limit:]
        return found

    def wait(self, count: int = 0, *, timeout: float = 10.0) -> list[Completion]:
        """Wait until `count` requests are back (0: all), and return at least these.

        Raises DriverError if the device does not have so many; NoAnswerError after `timeout`
        seconds, DeviceGoneError if it has gone; nothing that came back is lost then.
        """
        self.flush()
        found = self.poll()
        wanted = count or len(found) + self.outstanding
        if wanted > len(found) + self.outstanding:
            raise DriverError(f"{wanted} wanted, {len(found) + self.outstanding} on their way")
        end = time.monotonic() + timeout
        while len(found) < wanted:
            if not self.ring.enable_calls():
                self._sleep(end, found)
            self.ring.disable_calls()
            found += self.poll()
        return found

    def _sleep(self, end: float, found: list[Completion]) -> None:
        """Wait for a call, in pieces so short that a device that dies is noticed."""
        what = f"queue {self.index}: {self.outstanding} requests"
        try:
            while not self._transport.wait_call(self.index, CHECK_EVERY):
                if not self._transport.alive:
                    raise DeviceGoneError(f"{what} are lost with their device")
                if time.monotonic() > end:
                    raise NoAnswerError(f"{what} do not come back")
        except PyvmError as err:
            self._done = found
            raise DeviceGoneError(f"{what} are lost with their device: {err}") from err
        except DriverError:
            self._done = found
            raise

    def abandon(self) -> list[Any]:
        """Forget what the device has, after a reset or its end; return the cookies, oldest first.

        What was not flushed is forgotten, too, and comes last.
        """
        if self._draft is not None:
            self._cookies[-1] = self._draft.cookie
            self._draft = None
        cookies = list(self._cookies.values())
        self._cookies.clear()
        self._ready.clear()
        self._done.clear()
        return cookies

    def dump(self) -> dict[str, Any]:
        """Return the state of the queue as plain JSON values; see README.md."""
        ring = self.ring
        avail, used = ring.cursors()
        return {
            "index": self.index,
            "size": ring.size,
            "layout": ring.layout,
            "desc": ring.desc_gpa,
            "driver": ring.avail_gpa,
            "device": ring.used_gpa,
            "next_avail": avail,
            "next_used": used,
            "free": ring.free_places,
            "outstanding": ring.outstanding,
            "unflushed": len(self._ready) + (self._draft is not None),
            "event_idx": ring.event_idx,
            "indirect": ring.indirect,
            "in_order": ring.in_order,
        }
