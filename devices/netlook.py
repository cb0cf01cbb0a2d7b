"""Who sees a network device's frames on their way: filter, local link, capture.

Each direction is told only what there is to see: with none of the three nobody looks, and a frame
costs nothing more than its system call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from devices.device import WARNING
from devices.netcapture import Captures
from devices.netfilter import Filter
from devices.netlocal import ANNOUNCE_EVERY, Local

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.device import Host
    from devices.netqueues import QueuePair


class Onlookers:
    """All three, for all queue pairs of a device."""

    def __init__(
        self,
        host: Host,
        settings: Mapping[str, Any],
        pairs: Sequence[QueuePair],
    ) -> None:
        """Take lladdr, locked and local of the device's settings. Raises ConfigError."""
        self._pairs = pairs
        self._locked = settings["locked"]
        lladdr = bytes.fromhex(settings["lladdr"].replace(":", ""))
        self.filter = Filter(lladdr, locked=self._locked)
        self.captures = Captures(host, "vionet")
        self._local: Local | None = None
        if settings["local"] is not None:
            self._local = Local(settings["local"], lambda text: host.log(WARNING, text))
        self._advertise = host.timer(self.tell)
        #: Whether there is a driver, and a link, to tell something.
        self.listening = False
        self.apply()

    def apply(self) -> None:
        """Have as little looked at as possible; after every change of the filter."""
        if self._local is not None:
            self._local.lladdr = self.filter.lladdr
        keep = self._keep if self._local is not None else None
        shower = self.captures.shower
        shows = (shower(sent=False), shower(sent=True)) if self.captures.active else None
        for pair in self._pairs:
            pair.look(self.filter, locked=self._locked, keep=keep, shows=shows)

    def command(self, kind: int, command: int, data: bytes) -> bool:
        """Do a driver's command about addresses or VLANs."""
        good = self.filter.control(kind, command, data)
        self.apply()
        return good

    def reset(self) -> None:
        """Forget what a driver has set."""
        self.listening = False
        self._advertise.disarm()
        self.filter.reset()
        self.apply()

    def _keep(self, head: bytes, iov: Sequence[bytes | memoryview]) -> bool:
        """Answer a frame to the host's end of a local link; False if it is not one."""
        if self._local is None or not self._local.wants(head):
            return False
        return self.answer(b"".join(iov[1:]), partial=iov[0][0] & 1 == 1)

    def answer(self, frame: bytes, *, partial: bool) -> bool:
        """Answer a frame if it is for the host's end of a local link; return whether it is."""
        if self._local is None:
            return False
        answers = self._local.answer(frame, partial=partial)
        for answer in answers or ():
            self._pairs[0].receiver.inject(answer)
        return answers is not None

    def tell(self) -> None:
        """Say on a local link what is said there unasked, now and later."""
        if self._local is not None and self.listening:
            for frame in self._local.announce():
                self._pairs[0].receiver.inject(frame)
                self._advertise.arm(ANNOUNCE_EVERY)

    def begin_capture(self, value: Any, fd: int) -> dict[str, Any]:
        """Begin a capture; see Captures.begin."""
        facts = self.captures.begin(value, fd)
        self.apply()
        return facts

    def end_capture(self) -> dict[str, Any]:
        """End it, if there is one; return its totals."""
        facts = self.captures.end()
        self.apply()
        return facts

    def facts(self) -> dict[str, Any]:
        """Return what there is to tell, as plain JSON."""
        return {
            "lladdr": self.filter.lladdr.hex(":"),
            "local": {} if self._local is None else dict(self._local.counts),
            "capture": self.captures.facts(),
        }


class Verdicts(dict[bytes, bool]):
    """Remembers what a filter says about heads of frames: there are few different ones."""

    MOST: Final = 1024

    def __init__(self, judge: Callable[[bytes], bool]) -> None:
        super().__init__()
        self._judge = judge

    def __missing__(self, head: bytes) -> bool:
        if len(self) >= self.MOST:
            self.clear()
        self[head] = verdict = self._judge(head)
        return verdict
