"""The MC146818: time in every format, interrupts without idle timers, and hostile writes."""

from __future__ import annotations

import calendar
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.board_fakes import FakeClock, Line
from vmm import cmostime as t
from vmm import rtc as r
from vmm.rtc import Rtc

MIB = 1 << 20
GIB = 1 << 30
NOON = calendar.timegm((2024, 2, 29, 12, 34, 56, 0, 0, 0))  # a Thursday
READ_BACK = (t.CENTURY, t.YEAR, t.MONTH, t.DAY_OF_MONTH, t.HOURS, t.MINUTES, t.SECONDS)


class Chip:
    """An RTC with its wires."""

    def __init__(self, now: float = NOON, low: int = 256 * MIB, high: int = 0) -> None:
        self.line, self.clock = Line(), FakeClock(now)
        self.rtc = Rtc(self.line, low, high, timer=self.clock.timer, vcpus=4, clock=self.clock)

    @property
    def armed(self) -> bool:
        return self.clock.timers[0].due is not None

    def read(self, register: int) -> int:
        self.rtc.write(0, 1, register)
        return self.rtc.read(1, 1)

    def write(self, register: int, value: int) -> None:
        self.rtc.write(0, 1, register)
        self.rtc.write(1, 1, value)

    def flags(self) -> int:
        """Read register C; the periodic flag, which always sets, only if it is enabled."""
        enabled = self.read(t.REG_B) & r.PERIODIC
        return self.read(r.REG_C) & ~(r.PERIODIC ^ enabled)

    def time(self) -> str:
        """The time as a guest in BCD and 24-hour mode reads it."""
        return "".join(f"{self.read(n):02x}" for n in READ_BACK)

    def set_time(self, digits: str) -> None:
        """Set it as Linux does: SET, hold the divider, write, let go of SET, then the divider."""
        b = self.read(t.REG_B)
        self.write(t.REG_B, b | r.B_SET)
        self.write(r.REG_A, 0x76)
        for register, value in zip(READ_BACK, bytes.fromhex(digits), strict=True):
            self.write(register, value)
        self.write(t.REG_B, b)
        self.write(r.REG_A, r.A_POWER_ON)


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_power_on_shows_the_hosts_time_in_bcd_and_24_hours(chip: Chip) -> None:
    """A guest that only reads finds UTC, century and weekday included."""
    assert chip.time() == "20240229123456"
    assert chip.read(t.DAY_OF_WEEK) == 5
    assert chip.read(t.REG_B) == t.B_24H
    assert chip.read(r.REG_D) == r.D_VALID
    assert chip.read(r.REG_A) == 0x26
    chip.clock.pass_by(4)
    assert chip.time() == "20240229123500"
    assert not chip.armed


@pytest.mark.parametrize(
    ("mode", "hour", "expected"),
    [
        (t.B_24H, 0, 0x00),
        (t.B_24H, 23, 0x23),
        (t.B_24H | t.B_BINARY, 23, 23),
        (0, 0, 0x12),
        (0, 11, 0x11),
        (0, 12, 0x92),
        (0, 23, 0x91),
        (t.B_BINARY, 0, 12),
        (t.B_BINARY, 13, 0x81),
    ],
)
def test_hour_formats(mode: int, hour: int, expected: int) -> None:
    """Hours count to 12 with a PM bit or to 24, in BCD or binary, and read back what was set."""
    chip = Chip(calendar.timegm((2024, 1, 1, hour, 59, 58, 0, 0, 0)))
    chip.write(t.REG_B, mode)
    assert chip.read(t.HOURS) == expected
    assert chip.read(t.MINUTES) == (59 if mode & t.B_BINARY else 0x59)

    chip.write(t.HOURS, expected)
    chip.write(t.REG_B, t.B_24H | t.B_BINARY)
    assert chip.read(t.HOURS) == hour


@pytest.mark.parametrize(
    "digits",
    ["19700101000000", "19991231235959", "20000229120000", "20991231235959", "24000229000000"],
)
def test_time_can_be_set(chip: Chip, digits: str) -> None:
    """The guest's time is the host's plus an offset; it goes on from what was set."""
    chip.set_time(digits)
    assert chip.time() == digits

    chip.clock.pass_by(86400 * 365.25 * 4)
    later = calendar.timegm(time.strptime(digits, "%Y%m%d%H%M%S")) + 86400 * 1461
    assert chip.time() == time.strftime("%Y%m%d%H%M%S", time.gmtime(later))


def test_first_update_follows_half_a_second_after_the_divider_is_released(chip: Chip) -> None:
    """Linux sets the clock half a second early and counts on this."""
    chip.clock.pass_by(0.9)
    chip.set_time("20200101000000")
    chip.clock.pass_by(0.49)
    assert chip.read(t.SECONDS) == 0
    chip.clock.pass_by(0.02)
    assert chip.read(t.SECONDS) == 1


def test_set_freezes_the_registers_and_loses_no_time(chip: Chip) -> None:
    """SET holds the registers for the guest; if it wrote none of them, time went on behind."""
    chip.write(t.REG_B, r.B_SET | t.B_24H)
    chip.clock.pass_by(10)
    assert chip.time() == "20240229123456"
    chip.write(t.REG_B, t.B_24H)
    assert chip.time() == "20240229123506"


def test_single_registers_can_be_written_without_set(chip: Chip) -> None:
    """Writing the hour alone changes the hour alone."""
    chip.write(t.HOURS, 0x05)
    assert chip.time() == "20240229053456"


def test_update_in_progress_precedes_each_second(chip: Chip) -> None:
    """UIP is up for the last 2.2 ms before the registers change, and never while SET holds them."""
    chip.clock.pass_by(0.9970)
    assert not chip.read(r.REG_A) & r.A_UIP
    chip.clock.pass_by(0.0020)
    assert chip.read(r.REG_A) & r.A_UIP
    chip.write(t.REG_B, r.B_SET | t.B_24H)
    assert not chip.read(r.REG_A) & r.A_UIP
    chip.write(t.REG_B, t.B_24H)
    chip.clock.pass_by(0.0010)
    assert not chip.read(r.REG_A) & r.A_UIP
    assert chip.time() == "20240229123457"


def test_update_interrupt(chip: Chip) -> None:
    """UIE interrupts once a second, once register C was read; nobody is woken before that."""
    chip.write(t.REG_B, t.B_24H | r.UPDATE)
    assert chip.armed
    assert chip.clock.pass_by(1.5) == 1
    assert chip.line.take() == [True]
    assert chip.clock.pass_by(60) == 0

    assert chip.flags() == r.C_IRQ | r.UPDATE
    assert chip.line.take() == [False]
    chip.clock.pass_by(0.6)
    assert chip.line.take() == [True]


def test_periodic_interrupt_rates(chip: Chip) -> None:
    """A guest that answers gets the rate of the data sheet's table: 256, 128, 8192 … 2 Hz."""
    for rate in range(16):
        chip.write(r.REG_A, 0x20 | rate)
        chip.write(t.REG_B, t.B_24H | r.PERIODIC)
        chip.read(r.REG_C)
        end, count = chip.clock.now + 1, 0
        timer = chip.clock.timers[0]
        while timer.due is not None and timer.due <= end:
            chip.clock.pass_by(timer.due - chip.clock.now)
            count += chip.flags() & r.PERIODIC > 0
        expected = {0: 0, 1: 256, 2: 128}.get(rate, 32768 >> rate - 1 if rate else 0)
        # Being woken a tick late and at once rearmed, the fastest rate keeps all its interrupts.
        assert count == pytest.approx(expected, abs=1), rate


def test_periodic_interrupt_waits_for_its_answer(chip: Chip) -> None:
    """8192 Hz costs nothing while the guest does not read register C: one wake-up, not 8192."""
    chip.write(r.REG_A, 0x23)
    chip.write(t.REG_B, t.B_24H | r.PERIODIC)

    assert chip.clock.pass_by(1) == 1
    assert chip.line.take() == [True]


def test_alarm_interrupt(chip: Chip) -> None:
    """The alarm fires at its time of day, today or tomorrow, and once."""
    for register, value in (
        (t.HOURS_ALARM, 0x12),
        (t.MINUTES_ALARM, 0x34),
        (t.SECONDS_ALARM, 0x50),
    ):
        chip.write(register, value)
    chip.write(t.REG_B, t.B_24H | r.ALARM)
    chip.clock.pass_by(86400 - 7)
    assert not chip.line.level
    chip.clock.pass_by(2)
    assert chip.line.level
    assert chip.flags() == r.C_IRQ | r.ALARM | r.UPDATE


@pytest.mark.parametrize(
    ("hour", "minute", "second", "wait"),
    [
        (0xFF, 0xFF, 0xFF, 1),
        (0xFF, 0xFF, 0x00, 4),
        (0xC0, 0x35, 0x00, 4),
        (0xC0, 0x34, 0x00, 3604 - 60),
        (0x13, 0xFF, 0xFF, 1504),
        (0x12, 0xFF, 0x56, 60),
        (0x12, 0x34, 0x56, 86400),
        (0x00, 0x00, 0x00, 41104),
    ],
)
def test_alarm_wildcards(chip: Chip, hour: int, minute: int, second: int, wait: int) -> None:
    """An alarm byte of 0xC0 and above matches any value: alarms every hour, minute, second."""
    for register, value in (
        (t.HOURS_ALARM, hour),
        (t.MINUTES_ALARM, minute),
        (t.SECONDS_ALARM, second),
    ):
        chip.write(register, value)
    chip.write(t.REG_B, t.B_24H | r.ALARM)

    chip.clock.pass_by(wait - 0.5)
    assert not chip.line.level
    chip.clock.pass_by(0.6)
    assert chip.line.level


def test_impossible_alarms_never_fire(chip: Chip) -> None:
    """Minute 0x99 does not come, and waiting for it does not spin."""
    chip.write(t.MINUTES_ALARM, 0x99)
    chip.write(t.REG_B, t.B_24H | r.ALARM)

    assert not chip.armed


def test_alarm_survives_a_host_clock_that_is_set(chip: Chip) -> None:
    """When the host's clock jumps forward past an alarm, it fires within a minute."""
    chip.write(t.HOURS_ALARM, 0x20)
    chip.write(t.REG_B, t.B_24H | r.ALARM)
    jumped = chip.clock.now + 10 * 3600
    timer = chip.clock.timers[0]
    assert timer.due is not None
    assert timer.due - chip.clock.now <= r.LOOK_AGAIN

    chip.clock.now = jumped
    timer.callback()

    assert chip.line.level


def test_host_clock_set_back_is_survived(chip: Chip) -> None:
    """A host clock that jumps back leaves timers armed for the future, not spinning."""
    chip.write(t.REG_B, t.B_24H | r.UPDATE)
    chip.clock.now -= 5000
    chip.clock.timers[0].callback()
    chip.read(r.REG_C)
    assert chip.clock.pass_by(1.1) == 1


def test_flags_can_be_polled(chip: Chip) -> None:
    """Flags of register C set without interrupts and clear when read; no timer runs for them."""
    chip.write(r.REG_A, 0x2F)
    chip.read(r.REG_C)
    chip.clock.pass_by(1.2)
    assert chip.read(r.REG_C) == r.UPDATE | r.PERIODIC
    assert chip.read(r.REG_C) == 0
    assert chip.line.changes == []
    assert chip.clock.timers[0].armings == 0


def test_set_stops_updates_and_clears_their_enable(chip: Chip) -> None:
    """Setting SET clears UIE, as on the chip, and updates do not happen until it is cleared."""
    chip.write(t.REG_B, t.B_24H | r.UPDATE)
    chip.write(t.REG_B, t.B_24H | r.UPDATE | r.B_SET)
    assert chip.read(t.REG_B) == t.B_24H | r.B_SET
    chip.read(r.REG_C)
    chip.clock.pass_by(5)
    assert not chip.read(r.REG_C) & r.UPDATE
    assert not chip.armed


def test_cmos_memory_is_the_guests(chip: Chip) -> None:
    """Other bytes keep what is written, the index wraps at 128, and C and D are read-only."""
    chip.write(0x40, 0xA5)
    assert chip.read(0x40 | 0x80) == 0xA5  # bit 7 is the NMI mask
    chip.write(r.REG_C, 0xFF)
    chip.write(r.REG_D, 0x00)
    assert chip.read(r.REG_C) & 0x0F == 0
    assert chip.read(r.REG_D) == r.D_VALID
    assert chip.rtc.read(0, 1) == 0xFF


def word(chip: Chip, at: int, size: int = 2) -> int:
    return sum(chip.read(at + n) << 8 * n for n in range(size))


@pytest.mark.parametrize(
    ("low", "high", "extended", "above_16m", "above_4g"),
    [
        (8 * MIB, 0, 7 * 1024, 0, 0),
        (256 * MIB, 0, 0xFFFF, 240 * 16, 0),
        (3840 * MIB, 1 * GIB, 0xFFFF, (3840 - 16) * 16, 1024 * 16),
        (3840 * MIB, 2 << 40, 0xFFFF, (3840 - 16) * 16, 0xFFFFFF),
    ],
)
def test_memory_bytes(low: int, high: int, extended: int, above_16m: int, above_4g: int) -> None:
    """CMOS tells firmware the memory sizes, each saturating at its width; and the CPUs."""
    chip = Chip(low=low, high=high)

    assert word(chip, 0x15) == 640
    assert word(chip, 0x17) == word(chip, 0x30) == extended
    assert word(chip, 0x34) == above_16m
    assert word(chip, 0x5B, 3) == above_4g
    assert chip.read(0x5F) == 3


def test_reset_keeps_time_and_memory_but_not_interrupts(chip: Chip) -> None:
    """A machine reset leaves what the battery feeds; interrupts, SET and resume codes go."""
    chip.set_time("20300101000000")
    chip.write(0x40, 0xA5)
    chip.write(0x34, 0)
    chip.write(r.SHUTDOWN_STATUS, 0x0A)
    chip.write(t.REG_B, r.UPDATE)
    chip.clock.pass_by(1)
    assert chip.line.level
    chip.write(t.REG_B, r.B_SET | r.PERIODIC | t.B_BINARY)

    chip.rtc.reset()

    assert not chip.line.level
    assert not chip.armed
    assert chip.time() == "20300101000001"
    assert chip.read(0x40) == 0xA5
    assert word(chip, 0x34) == 240 * 16
    assert chip.read(r.SHUTDOWN_STATUS) == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*range(16), t.CENTURY]),
            st.integers(0, 255),
            st.sampled_from([0.0, 0.001, 0.4, 61.0, 90000.0]),
        ),
        max_size=40,
    ),
    st.sampled_from([0.0, float(NOON), 4e9, 1e11]),
)
def test_nothing_a_guest_writes_raises(steps: list[tuple[int, int, float]], start: float) -> None:
    """Rubbish in any register at any time: every register still reads as a byte."""
    chip = Chip(start)
    for register, value, wait in steps:
        chip.write(register, value)
        chip.clock.pass_by(wait)
        for other in range(16):
            assert 0 <= chip.read(other) <= 0xFF
    chip.write(t.REG_B, t.B_24H)
    chip.write(r.REG_A, r.A_POWER_ON)
    assert chip.time().isdigit()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 253402300799), st.sampled_from([0, t.B_24H, t.B_BINARY, 6]))
def test_store_and_load_are_inverse(seconds: int, mode: int) -> None:
    """Every second of the years 1970 to 9999 survives the registers, in every format."""
    ram = bytearray(128)
    ram[t.REG_B] = mode
    t.store(ram, seconds)
    assert t.load(ram) == seconds


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=128, max_size=128), st.integers(-(10**11), 10**12))
def test_any_bytes_mean_some_time(data: bytes, seconds: int) -> None:
    """What load() makes of any bytes can be stored again; next_alarm() ends, within a day."""
    ram = bytearray(data)
    t.store(ram, t.load(ram))
    after = t.next_alarm(ram, seconds)
    assert after is None or seconds < after <= seconds + 86400
