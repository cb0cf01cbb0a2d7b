"""What a network device needs of its way out, and the books it keeps.

A `Backend` is a tap or a passt socket, and has one `Port` per queue pair. Frames go in and out
with a virtio header in front of them, whatever becomes of it behind.
"""

from __future__ import annotations

from select import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING, Any, Final, Protocol

from devices.spec import SPECS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.device import Host

BROKEN: Final = EPOLLERR | EPOLLHUP


class Port(Protocol):
    """One queue pair's way out. All calls return at once."""

    fd: int
    edge: int  # EPOLLET, or 0: what to watch the descriptor with

    @property
    def receive(self) -> Callable[[Sequence[memoryview]], int]:
        """Read one frame into views, header first; return its bytes, the header's among them.

        What does not fit is lost: the return value is then the room there was. Raises
        BlockingIOError if there is none, OSError.
        """

    @property
    def send(self) -> Callable[[Sequence[bytes | memoryview]], int]:
        """Write one frame, its first part the header. Raises BlockingIOError, unsent; OSError."""

    @property
    def buffered(self) -> bool:
        """Whether a frame can be received though the descriptor is not readable."""


class Backend(Protocol):
    """The interface as a whole. Raises OSError from whatever is refused."""

    ports: Sequence[Port]
    features: int  # those of offloading that it makes possible

    def offload(self, features: int) -> None:
        """Have only such frames arrive as a driver with these features can take."""

    def set_header(self, length: int) -> None:
        """Have a header of 10 or 12 bytes in front of each frame."""

    def attach(self, pairs: int) -> None:
        """Have frames arrive on the first `pairs` queues only."""

    def carrier(self, up: bool) -> None:
        """Show the other side that the link is up or down."""

    def drain(self) -> None:
        """Throw away the frames that wait to be read."""


class Watch:
    """Watches one port's descriptor, for what its two directions want to know."""

    def __init__(
        self,
        host: Host,
        port: Port,
        readable: Callable[[], None],
        writable: Callable[[], None],
        broken: Callable[[], None],
    ) -> None:
        """Call `readable` and `writable` when they are wanted, `broken` at the end of the port."""
        self._host, self._fd, self._edge = host, port.fd, port.edge
        self._readable, self._writable, self._broken = readable, writable, broken
        self._events = 0

    def want(self, events: int) -> None:
        """Watch for these of EPOLLIN and EPOLLOUT from now on, too."""
        self._set(self._events | events)

    def drop(self, events: int) -> None:
        """Watch for these no more; without any, the port's end goes unnoticed, too."""
        self._set(self._events & ~events)

    def _set(self, events: int) -> None:
        if events != self._events:
            if self._events:
                self._host.unwatch(self._fd)
            self._events = events
            if events:
                self._host.watch(self._fd, self._ready, events | self._edge)

    def _ready(self, events: int) -> None:
        if events & BROKEN and not events & EPOLLIN:
            self._set(0)
            self._broken()
            return
        if events & EPOLLOUT:
            self._writable()
        if events & EPOLLIN:
            self._readable()


class Counters:
    """What went one way: frames, their bytes without headers, and why others did not."""

    __slots__ = ("_way", "bytes", "drops", "frames")

    def __init__(self, way: str) -> None:
        """Count for "rx" or "tx"."""
        self._way = way
        self.frames = self.bytes = 0
        self.drops: dict[str, int] = {}

    def drop(self, reason: str) -> None:
        """Count a frame that goes no further; reasons are those of the device's spec."""
        self.drops[reason] = self.drops.get(reason, 0) + 1

    def publish(self, totals: memoryview) -> None:
        """Write everything where the VM process may look."""
        way = self._way
        totals[_SLOTS[f"{way}_frames"]] = self.frames
        totals[_SLOTS[f"{way}_bytes"]] = self.bytes
        for reason, count in self.drops.items():
            totals[_SLOTS[f"{way}_{reason.replace(' ', '_')}"]] = count

    def resume(self, totals: memoryview) -> None:
        """Go on from what a predecessor has written there."""
        way = self._way
        self.frames, self.bytes = totals[_SLOTS[f"{way}_frames"]], totals[_SLOTS[f"{way}_bytes"]]
        for name, slot in _SLOTS.items():
            if name.startswith(f"{way}_") and slot >= _FIRST_DROP and totals[slot]:
                self.drops[name.removeprefix(f"{way}_").replace("_", " ")] = totals[slot]

    def facts(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return {"frames": self.frames, "bytes": self.bytes, "drops": dict(self.drops)}

    def add(self, other: Counters) -> None:
        """Count what another has counted, too."""
        self.frames += other.frames
        self.bytes += other.bytes
        for reason, count in other.drops.items():
            self.drops[reason] = self.drops.get(reason, 0) + count


_SLOTS: Final = {name: slot for slot, name in enumerate(SPECS["vionet"].counters)}
_FIRST_DROP: Final = 4
