"""The ring of coalesced port writes, with the kernel's part played here."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack_into
from typing import Any

from vmm.coalesced import BUSY_PERIOD, IDLE_PERIOD, CoalescedPort

PORT = 0x3F8
SLOTS = 170  # (4096 - 8) // 24, as linux/kvm.h computes it


class FakeTimer:
    """Notes what it is armed with; fire() plays the loop."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.fire, self.armed = callback, 0.0

    def arm(self, seconds: float, every: float = 0.0) -> None:
        self.armed = seconds

    def disarm(self) -> None:
        self.armed = 0.0

    def close(self) -> None:
        pass


class FakeVm:
    """Notes which zones are coalesced."""

    def __init__(self) -> None:
        self.zones: list[tuple[int, int, bool]] = []

    def coalesce(self, port: int, length: int, *, on: bool) -> None:
        self.zones.append((port, length, on))


class Lab:
    """A CoalescedPort and its ring."""

    def __init__(self) -> None:
        self.page, self.vm = bytearray(4096), FakeVm()
        self.written: list[bytes] = []
        self.timer: Any = None
        self.port = CoalescedPort(PORT, self.written.append, self._timer)
        self.port.attach(self.vm, memoryview(self.page))  # type: ignore[arg-type]

    def _timer(self, callback: Callable[[], None]) -> Any:
        self.timer = FakeTimer(callback)
        return self.timer

    def kernel_appends(self, data: bytes, port: int = PORT) -> None:
        last = int.from_bytes(self.page[4:8], "little")
        for byte in data:
            pack_into("<QIIQ", self.page, 8 + 24 * last, port, 1, 1, byte)
            last = (last + 1) % SLOTS
        self.page[4:8] = last.to_bytes(4, "little")


def test_bytes_arrive_in_order_and_once() -> None:
    """Across the wrap of the ring, every byte is handed on exactly once."""
    lab = Lab()
    sent = bytes(range(256)) * 4
    for at in range(0, len(sent), 100):
        lab.kernel_appends(sent[at : at + 100])
        assert lab.port.drain()
    assert not lab.port.drain()
    assert b"".join(lab.written) == sent


def test_a_full_ring() -> None:
    """The kernel leaves one slot free and exits instead: what is in the ring still comes first."""
    lab = Lab()
    lab.kernel_appends(b"x" * (SLOTS - 1))
    assert lab.port.drain()
    assert lab.written == [b"x" * (SLOTS - 1)]


def test_nobody_overtakes_what_is_handed_on() -> None:
    """As long as bytes are on their way, the ring does not look empty to another vCPU."""
    lab, looks = Lab(), []
    lab.port = CoalescedPort(
        PORT, lambda _data: looks.append(lab.page[:4] == lab.page[4:8]), lab._timer
    )
    lab.port.attach(lab.vm, memoryview(lab.page))  # type: ignore[arg-type]
    lab.kernel_appends(b"first")
    assert lab.port.drain()
    assert looks == [False]
    assert not lab.port.drain()


def test_other_ports_are_skipped() -> None:
    """An entry of a port that is not ours is passed over."""
    lab = Lab()
    lab.kernel_appends(b"no", port=0x2F8)
    lab.kernel_appends(b"yes")
    lab.port.drain()
    assert lab.written == [b"yes"]


def test_switching() -> None:
    """The zone follows the switch; the timer runs only meanwhile, faster while bytes come."""
    lab = Lab()
    assert not lab.timer.armed
    lab.port.switch(True)
    lab.port.switch(True)
    assert lab.vm.zones == [(PORT, 1, True)]
    assert lab.timer.armed == IDLE_PERIOD
    lab.kernel_appends(b"a")
    lab.timer.fire()
    assert lab.timer.armed == BUSY_PERIOD
    lab.timer.fire()
    assert lab.timer.armed == IDLE_PERIOD
    lab.kernel_appends(b"b")
    lab.port.switch(False)
    assert lab.vm.zones[1:] == [(PORT, 1, False)]
    assert not lab.timer.armed
    assert b"".join(lab.written) == b"ab"


def test_detach_takes_what_is_left() -> None:
    """Before its VM goes, the last bytes are handed on; afterwards nothing touches the page."""
    lab = Lab()
    lab.port.switch(True)
    lab.kernel_appends(b"last words")
    lab.port.detach()
    assert lab.written == [b"last words"]
    assert not lab.timer.armed
    lab.kernel_appends(b"ghost")
    assert not lab.port.drain()
    lab.port.switch(True)
    assert lab.vm.zones == [(PORT, 1, True)]
