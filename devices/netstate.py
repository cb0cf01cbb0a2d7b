"""The link of a network device: whether it is up, who wants that, and who has lost it.

It is up if the user wants it and the way out lives. Driver and, on a tap, the host see it. A tap
that is taken down is waited for; whatever else fails takes the link along for good. Each of these
is told in the log once, however many frames meet it.
"""

from __future__ import annotations

from contextlib import suppress
from select import EPOLLIN, EPOLLOUT
from typing import TYPE_CHECKING

from devices.device import INFO, WARNING
from devices.netport import Watch
from devices.tap import is_down

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from devices.device import Host
    from devices.netport import Backend


class Link:
    """Watches the ports of a backend, too."""

    def __init__(
        self, host: Host, backend: Backend, changed: Callable[[], None], *, wanted: bool
    ) -> None:
        """Begin as the user wants it; `changed` is called whenever `up` is different later."""
        self._host, self._backend, self._changed = host, backend, changed
        self._down = False  # waiting for a tap to come up again
        #: Whether the user wants it.
        self.wanted = wanted
        #: What the way out was lost to; "" while it lives.
        self.lost = ""
        self.watches: list[Watch] = []
        if not wanted:
            backend.carrier(False)

    @property
    def up(self) -> bool:
        """Whether frames go through."""
        return self.wanted and not self.lost

    def watch(
        self, readable: Sequence[Callable[[], None]], writable: Sequence[Callable[[], None]]
    ) -> None:
        """Tell these, one per port, what has become of them when they wanted to know."""
        for port, read, write in zip(self._backend.ports, readable, writable, strict=True):
            self.watches.append(Watch(self._host, port, read, self._recovering(write), self._gone))

    def _recovering(self, writable: Callable[[], None]) -> Callable[[], None]:
        """Return what to do when a port can be written to: a tap that was down is up again."""

        def ready() -> None:
            if not self._down:
                writable()
                return
            self.drop(EPOLLOUT)
            self._down, self.lost = False, ""
            self._host.log(INFO, "the tap is up again")
            if self.up:
                self._changed()

        return ready

    def set_wanted(self, wanted: bool) -> None:
        """Plug the cable in, or pull it; what waited meanwhile is gone."""
        if wanted == self.wanted:
            return
        was = self.up
        self._backend.carrier(wanted)
        if wanted:
            with suppress(OSError):
                self._backend.drain()
        self.wanted = wanted
        if was != self.up:
            self._changed()

    def failed(self, err: OSError) -> None:
        """Take note that a port could not be read from or written to."""
        if self.lost:
            return
        was, self._down = self.up, is_down(err)
        self.lost = err.strerror or str(err)
        if self._down:
            self._host.log(WARNING, "the tap was taken down: no link until it is up again")
        else:
            self._host.log(WARNING, f"the link is lost for good: {self.lost}")
        if was:
            self._changed()
        self.wait()

    def wait(self) -> None:
        """See to it that the return of the tap is noticed, if that is what is missing."""
        if self._down:
            self.watches[0].want(EPOLLOUT)
        elif self.lost:
            self.drop(EPOLLIN | EPOLLOUT)

    def drop(self, events: int) -> None:
        """Watch no port for these."""
        for watch in self.watches:
            watch.drop(events)

    def _gone(self) -> None:
        """A port has come to its end."""
        self._down = False
        if not self.lost:
            self.failed(OSError(0, "the other end is gone"))
        self.wait()

    def attempt(self, function: Callable[[int], None], value: int) -> bool:
        """Set something of the backend; one that is lost is no reason to fail."""
        try:
            function(value)
        except OSError as err:
            if not self.lost:
                self._host.log(WARNING, f"cannot set up the interface: {err.strerror}")
            return False
        return True
