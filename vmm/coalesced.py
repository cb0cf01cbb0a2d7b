"""Coalesced port writes: KVM queues them in a ring page and the guest runs on.

Used for the serial port's transmit register, where the order of bytes matters and the moment
does not. KVM appends (linux/kvm.h, struct kvm_coalesced_mmio_ring); we consume before every
exit is dispatched, so a later access sees everything written before it. A guest that writes
and then computes for long makes no exit: a timer looks as well.
"""

from __future__ import annotations

import threading
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.loop import Timer
    from vmm.kvm import Vm

_HEAD: Final = 8  # u32 first, u32 last
_ENTRY: Final = Struct("<QIIB7x")  # address, length, 1 for ports, first data byte
_SLOTS: Final = (4096 - _HEAD) // _ENTRY.size

BUSY_PERIOD: Final = 0.02  # seconds between looks while the guest is writing
IDLE_PERIOD: Final = 0.25  # seconds between looks otherwise: bounds how late a byte can be


class CoalescedPort:
    """Drains the ring of one VM into one byte-wide register."""

    def __init__(
        self, port: int, write_many: Callable[[bytes], None], timer: Callable[..., Timer]
    ) -> None:
        self._port, self._write_many = port, write_many
        self._timer = timer(self._look)
        self._lock = threading.Lock()  # every vCPU thread and the timer drain
        self._on = False
        self._vm: Vm | None = None
        self._ring: memoryview | None = None
        self._heads: memoryview | None = None

    def attach(self, vm: Vm, ring: memoryview) -> None:
        """Drain `ring` of `vm` once switched on; it is one page, shared by all its vCPUs."""
        with self._lock:
            self._vm, self._ring, self._heads = vm, ring, ring[:_HEAD].cast("I")

    def switch(self, on: bool) -> None:
        """Let writes be queued, or make each of them an exit again."""
        if self._vm is None or on == self._on:
            return
        self._on = on
        self._vm.coalesce(self._port, 1, on=on)
        if on:
            self._timer.arm(IDLE_PERIOD)
        else:
            self._timer.disarm()
            self.drain()

    def detach(self) -> None:
        """Take what is left and let go of the ring, before its VM is closed."""
        self._timer.disarm()
        self.drain()
        with self._lock:
            if self._heads is not None:
                self._heads.release()
            self._vm = self._ring = self._heads = None
            self._on = False

    def drain(self) -> bool:
        """Hand on what the guest has written; returns whether there was any."""
        heads = self._heads
        if heads is None or heads[0] == heads[1]:
            return False
        with self._lock:
            ring, heads = self._ring, self._heads
            if ring is None or heads is None:
                return False
            first, last = heads[0], heads[1]
            data = bytearray()
            while first != last:
                address, _length, _pio, byte = _ENTRY.unpack_from(ring, _HEAD + first * _ENTRY.size)
                if address == self._port:
                    data.append(byte)
                first = (first + 1) % _SLOTS
            # Under the lock, and before the ring looks empty: else whoever comes by meanwhile, and
            # writes a byte that is not queued, would overtake.
            try:
                if data:
                    self._write_many(bytes(data))
            finally:
                heads[0] = first
            return bool(data)

    def _look(self) -> None:
        self._timer.arm(BUSY_PERIOD if self.drain() else IDLE_PERIOD)
