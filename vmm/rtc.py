"""The clock and CMOS memory: an MC146818 at ports 0x70 (index) and 0x71 (data), IRQ 8.

The guest's time is the host's plus an offset that the guest sets by writing the time. Registers
are computed when they are read; flags of register C are worked out when somebody looks. A host
timer runs only while the guest has enabled an interrupt and answered the last one, so a guest
that does not answer costs nothing.

Everything counts in ticks of the chip's own crystal: a second is tick >> 15. Daylight saving and
the square wave output do not exist.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING, Final

from vmm import cmostime
from vmm.cmostime import B_24H, REG_B

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.loop import Timer

HZ: Final = 32768
SECOND_BITS: Final = 15  # HZ == 1 << SECOND_BITS

REG_A: Final = 0x0A
REG_C: Final = 0x0C
REG_D: Final = 0x0D
SHUTDOWN_STATUS: Final = 0x0F  # tells a BIOS how to resume after a CPU reset
EQUIPMENT: Final = 0x14

A_UIP: Final = 0x80  # update in progress
A_RATE: Final = 0x0F
A_DIVIDER_RESET: Final = 0x60  # both bits set hold the divider chain
A_POWER_ON: Final = 0x26  # 32768 Hz crystal, 1024 Hz periodic rate
B_SET: Final = 0x80  # the time registers belong to the guest

PERIODIC: Final = 0x40  # enable bits in B, flags in C
ALARM: Final = 0x20
UPDATE: Final = 0x10
INTERRUPTS: Final = PERIODIC | ALARM | UPDATE
C_IRQ: Final = 0x80
D_VALID: Final = 0x80  # the battery is good

UPDATE_TICKS: Final = 73  # 244 µs of warning and 1984 µs of update, before each second
LOOK_AGAIN: Final = 60.0  # seconds; an alarm must survive a host clock that is set


class Rtc:
    """The chip. Any thread may call; `set_irq` and the timer are driven under the lock.

    Memory sizes are bytes; `memory_below_4g` is where RAM below 4 GiB ends.
    """

    def __init__(
        self,
        set_irq: Callable[[bool], None],
        memory_below_4g: int,
        memory_above_4g: int,
        *,
        timer: Callable[[Callable[[], None]], Timer],
        vcpus: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._set_irq, self._clock = set_irq, clock
        self._memory = (memory_below_4g, memory_above_4g, vcpus)
        self._lock = Lock()
        self._timer = timer(self._fired)
        self._armed = self._irq = False
        self._ram = bytearray(128)
        self._offset = 0  # ticks to add to the host's time
        self._power_on()

    def reset(self) -> None:
        """Reset the chip; time and CMOS memory have a battery and stay."""
        with self._lock:
            self._power_on()
            self._update()

    def _power_on(self) -> None:
        self._index = self._flags = 0
        self._written = False  # the guest set the time while it was held
        self._ram[REG_A] = A_POWER_ON
        self._ram[REG_B] = B_24H
        self._ram[SHUTDOWN_STATUS] = 0
        self._ram[EQUIPMENT] = 0x02  # a numeric coprocessor, no floppy drives
        self._describe_machine(*self._memory)
        self._seen = self._ticks()

    def _describe_machine(self, below: int, above: int, vcpus: int) -> None:
        """Store what firmware reads: memory sizes, little-endian and saturating; CPUs."""
        for at, size, value in (
            (0x15, 2, 640),  # KiB of base memory
            (0x17, 2, (below >> 10) - 1024),  # KiB from 1 MiB on
            (0x30, 2, (below >> 10) - 1024),
            (0x34, 2, (below >> 16) - 256),  # 64 KiB units from 16 MiB to 4 GiB
            (0x5B, 3, above >> 16),  # 64 KiB units from 4 GiB on
            (0x5F, 1, vcpus - 1),
        ):
            stored = min(max(value, 0), (1 << 8 * size) - 1)
            self._ram[at : at + size] = stored.to_bytes(size, "little")

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """Read port 0x70 (write-only: all-ones) or the selected register; `size` is 1."""
        if offset == 0:
            return 0xFF
        with self._lock:
            if self._index in cmostime.TIME and not self._held():
                cmostime.store(self._ram, self._ticks() >> SECOND_BITS)
            if self._index == REG_A:
                return self._ram[REG_A] | (A_UIP if self._updating() else 0)
            if self._index == REG_C:
                self._advance()
                flags, self._flags = self._flags, 0
                irq = C_IRQ if flags & self._ram[REG_B] & INTERRUPTS else 0
                self._update()
                return flags | irq
            return D_VALID if self._index == REG_D else self._ram[self._index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a register (bit 7, the NMI mask, is ignored) or write it; `size` is 1."""
        value &= 0xFF
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
            elif self._index in cmostime.TIME:
                self._write_time(value)
            elif self._index in {REG_A, REG_B}:
                self._advance()
                self._write_control(value)
                self._update()
            elif self._index in cmostime.ALARM:
                self._advance()
                self._ram[self._index] = value
                self._update()
            elif self._index not in {REG_C, REG_D}:
                self._ram[self._index] = value

    # Under the lock: time

    def _ticks(self) -> int:
        return int(self._clock() * HZ) + self._offset

    def _divider_held(self) -> bool:
        return self._ram[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET

    def _held(self) -> bool:
        """Whether the time registers stand still and hold what the guest writes."""
        return bool(self._ram[REG_B] & B_SET) or self._divider_held()

    def _updating(self) -> bool:
        return not self._held() and self._ticks() % HZ >= HZ - UPDATE_TICKS

    def _write_time(self, value: int) -> None:
        if self._held():
            self._ram[self._index] = value
            self._written = True
            return
        self._advance()
        cmostime.store(self._ram, self._seen >> SECOND_BITS)
        self._ram[self._index] = value
        self._adopt(self._seen % HZ)
        self._update()

    def _write_control(self, value: int) -> None:
        was_held = self._held()
        if not was_held:
            # What the guest finds if this write holds the time.
            cmostime.store(self._ram, self._seen >> SECOND_BITS)
        if self._index == REG_A:
            self._ram[REG_A] = value & ~A_UIP
        else:
            self._ram[REG_B] = value & ~UPDATE if value & B_SET else value
        if was_held and not self._held() and self._written:
            # A released divider makes its first update half a second later.
            self._adopt(HZ // 2 if self._index == REG_A else self._seen % HZ)
            self._written = False

    def _adopt(self, phase: int) -> None:
        """Make the time in the registers, and `phase` ticks into that second, the guest's."""
        ticks = cmostime.load(self._ram) << SECOND_BITS | phase
        self._offset += ticks - self._ticks()
        self._seen = ticks

    # Under the lock: interrupts

    def _rate_bits(self) -> int:
        """Return log2 of the periodic interrupt's period in ticks; 0 if it is off."""
        rate = self._ram[REG_A] & A_RATE
        if not rate or self._divider_held():
            return 0
        return rate + 6 if rate <= 2 else rate - 1

    def _advance(self) -> None:
        """Set the flags of what happened since the last look."""
        before, now = self._seen, self._ticks()
        self._seen = now
        bits = self._rate_bits()
        if bits and now >> bits != before >> bits:
            self._flags |= PERIODIC
        if self._held() or now >> SECOND_BITS == before >> SECOND_BITS:
            return
        self._flags |= UPDATE
        alarm = cmostime.next_alarm(self._ram, before >> SECOND_BITS)
        if alarm is not None and alarm <= now >> SECOND_BITS:
            self._flags |= ALARM

    def _update(self) -> None:
        """Drive the line; while it is low, arm the timer for what will raise it."""
        enabled = self._ram[REG_B] & INTERRUPTS
        irq = bool(self._flags & enabled)
        if irq != self._irq:
            self._irq = irq
            self._set_irq(irq)
        now = self._ticks()
        due = None if irq else self._due(now, enabled)
        if due is not None:
            # One tick more, lest rounding wakes us just before the event.
            self._timer.arm(min((due - now + 1) / HZ, LOOK_AGAIN))
        elif self._armed:
            self._timer.disarm()
        self._armed = due is not None

    def _due(self, now: int, wanted: int) -> int | None:
        """Return the tick of the first of the `wanted` events."""
        due: list[int] = []
        bits = self._rate_bits()
        if wanted & PERIODIC and bits:
            due.append((now >> bits) + 1 << bits)
        if not self._held():
            second = now >> SECOND_BITS
            if wanted & UPDATE:
                due.append(second + 1 << SECOND_BITS)
            if wanted & ALARM:
                alarm = cmostime.next_alarm(self._ram, second)
                due += [] if alarm is None else [alarm << SECOND_BITS]
        return min(due, default=None)

    def _fired(self) -> None:
        with self._lock:
            self._advance()
            self._update()
