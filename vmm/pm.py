"""ACPI fixed hardware: power button, sleep control and timer; and the reset control port.

Pm claims twelve ports at BASE: PM1a status (0) and enable (2), PM1a control (4), PM timer (8).
SCI_EN is always set and there is no SMI command: the machine starts in ACPI mode (ACPI 6.3
§4.8.2.5). Sleep type 5 is soft-off; it is the only sleep state. Nobody else wants the global lock
and the RTC wakes nobody, so GBL_STS and RTC_STS never set; their enable bits can be set all the
same, since drivers check that they stick.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.loop import Timer

BASE: Final = 0x600
LENGTH: Final = 12
PM1A_EVT: Final = BASE  # status, then enable: 2 bytes each
PM1A_CNT: Final = BASE + 4  # 2 bytes
PM_TMR: Final = BASE + 8  # 4 bytes, of which 24 bits count

TMR: Final = 1 << 0  # status and enable bits
GBL: Final = 1 << 5
PWRBTN: Final = 1 << 8
RTC: Final = 1 << 10
_ENABLE_BITS: Final = TMR | GBL | PWRBTN | RTC

SCI_EN: Final = 1 << 0
BM_RLD: Final = 1 << 1
SLP_TYP_SHIFT: Final = 10
SLP_EN: Final = 1 << 13
SLP_TYP_S5: Final = 5

PM_TIMER_HZ: Final = 3_579_545
_HALF_TURN: Final = 1 << 23  # TMR_STS sets whenever the timer's top bit changes

RESET_PORT: Final = 0xCF9
RESET_GO: Final = 0x04
RESET_HARD: Final = 0x02


class Pm:
    """PM1a and PM timer. Any thread may call; `set_sci` and the timer are driven under the lock.

    `clock` is monotonic seconds. `power_off` gets "ACPI S5" when the guest powers off.
    """

    def __init__(
        self,
        set_sci: Callable[[bool], None],
        power_off: Callable[[str], None],
        *,
        timer: Callable[[Callable[[], None]], Timer],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._set_sci, self._power_off, self._clock = set_sci, power_off, clock
        self._lock = Lock()
        self._timer = timer(self._fired)
        self._armed = self._sci = False
        self._power_on()

    def _power_on(self) -> None:
        self._status = self._enable = self._control = 0
        self._half_turns = self._ticks() // _HALF_TURN

    def reset(self) -> None:
        """Return to the power-on state; the PM timer counts on."""
        with self._lock:
            self._power_on()
            self._update()

    def power_button(self) -> bool:
        """Press the power button; False if the guest has not asked to be told."""
        with self._lock:
            self._status |= PWRBTN
            self._update()
            return bool(self._enable & PWRBTN)

    def button_waits(self) -> bool:
        """Tell whether the guest has yet to take note of the power button."""
        with self._lock:
            return bool(self._status & PWRBTN)

    def read(self, offset: int, size: int) -> int:
        """Read any registers in one access of up to 8 bytes."""
        timer = self._ticks() & 0xFFFFFF
        if offset == PM_TMR - BASE:  # a guest may use it as its clock: no lock, no more work
            return timer
        with self._lock:
            self._update()
            registers = self._status | self._enable << 16 | (self._control | SCI_EN) << 32
        return (registers | timer << 64) >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write any registers: status bits are cleared by ones, the timer is read-only."""
        # Work on the registers as one number, so that any width at any offset comes out right.
        written = ((1 << 8 * size) - 1) << 8 * offset
        value = value << 8 * offset & written
        with self._lock:
            self._update()
            self._status &= ~value
            enable = self._enable & ~(written >> 16) | value >> 16
            self._enable = enable & _ENABLE_BITS
            control = self._control & ~(written >> 32) | value >> 32
            self._control = control & (7 << SLP_TYP_SHIFT | BM_RLD)
            off = value >> 32 & SLP_EN and self._control >> SLP_TYP_SHIFT == SLP_TYP_S5
            self._update()
        if off:
            self._power_off("ACPI S5")

    def _ticks(self) -> int:
        return int(self._clock() * PM_TIMER_HZ)

    def _update(self) -> None:
        """Bring TMR_STS up to date, drive the SCI, arm the timer if the guest waits for TMR."""
        ticks = self._ticks()
        half_turns = ticks // _HALF_TURN
        if half_turns != self._half_turns:
            self._half_turns = half_turns
            self._status |= TMR
        sci = bool(self._status & self._enable)
        if sci != self._sci:
            self._sci = sci
            self._set_sci(sci)
        waits = bool(self._enable & ~self._status & TMR)
        if waits:
            self._timer.arm(((half_turns + 1) * _HALF_TURN - ticks + 1) / PM_TIMER_HZ)
        elif self._armed:
            self._timer.disarm()
        self._armed = waits

    def _fired(self) -> None:
        with self._lock:
            self._update()


class ResetControl:
    """Port 0xCF9, one byte wide: hard reset when written with bits 1 and 2 both set.

    It lies inside PCI's address port: 0xCF8 takes only 4-byte accesses, 0xCF9 only 1-byte ones.
    """

    def __init__(self, reset: Callable[[str], None]) -> None:
        self._reset_machine = reset
        self._value = 0

    def reset(self) -> None:
        """Return to the power-on state."""
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        """Read the kind of reset last chosen; the bit that starts it reads as 0."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose the kind of reset, and do it if `value` says so."""
        self._value = value & RESET_HARD
        if value & RESET_HARD and value & RESET_GO:
            self._reset_machine("port 0xCF9")
