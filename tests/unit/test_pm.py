"""ACPI fixed hardware: power button, soft-off, PM timer (ACPI 6.3 §4.8), and port 0xCF9."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.board_fakes import FakeClock, Line
from vmm import pm
from vmm.bus import Bus
from vmm.pm import Pm, ResetControl

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
S5 = pm.SLP_TYP_S5 << pm.SLP_TYP_SHIFT | pm.SLP_EN


class Block:
    """The PM registers on a bus, with their wires."""

    def __init__(self) -> None:
        self.sci, self.clock = Line(), FakeClock(1000.0)
        self.offs: list[str] = []
        self.pm = Pm(self.sci, self.offs.append, timer=self.clock.timer, clock=self.clock)
        self.bus = Bus("port")
        self.bus.claim(pm.BASE, pm.LENGTH, self.pm, "ACPI PM")

    def read(self, offset: int, size: int = 2) -> int:
        return self.bus.read(pm.BASE + offset, size)

    def write(self, offset: int, value: int, size: int = 2) -> None:
        self.bus.write(pm.BASE + offset, size, value)

    @property
    def armed(self) -> bool:
        return self.clock.timers[0].due is not None


@pytest.fixture
def block() -> Block:
    return Block()


def test_the_machine_starts_in_acpi_mode(block: Block) -> None:
    """SCI_EN is set and stays set: there is no SMI command that could change it."""
    assert (block.read(STATUS), block.read(ENABLE), block.read(CONTROL)) == (0, 0, pm.SCI_EN)
    block.write(CONTROL, 0)
    assert block.read(CONTROL) == pm.SCI_EN


def test_power_button_raises_the_sci(block: Block) -> None:
    """PWRBTN_STS with PWRBTN_EN is an SCI until the status is cleared by writing a one."""
    block.write(ENABLE, pm.PWRBTN)
    assert block.pm.power_button()
    assert block.sci.level
    assert block.read(STATUS) == pm.PWRBTN

    block.write(STATUS, 0)
    assert block.sci.level
    block.write(STATUS, pm.PWRBTN)
    assert block.sci.take() == [True, False]
    assert block.read(STATUS) == 0


def test_power_button_without_a_listener(block: Block) -> None:
    """The press is told as unheard, remembered, and delivered when the guest enables it."""
    assert not block.pm.power_button()
    assert block.sci.changes == []
    block.write(ENABLE, pm.PWRBTN)
    assert block.sci.take() == [True]


def test_enable_bits_that_exist_can_be_read_back(block: Block) -> None:
    """ACPICA reads an enable bit back and complains if it did not stick; Linux sets RTC_EN too."""
    block.write(ENABLE, 0xFFFF)
    assert block.read(ENABLE) == pm.TMR | pm.GBL | pm.PWRBTN | pm.RTC


@pytest.mark.parametrize("size", [1, 2, 4])
def test_soft_off(block: Block, size: int) -> None:
    """SLP_TYP 5 with SLP_EN powers off, in one write of any width or type first, then enable."""
    if size == 1:
        block.write(CONTROL + 1, S5 >> 8, 1)
    else:
        block.write(CONTROL, S5, size)
    assert block.offs == ["ACPI S5"]


def test_soft_off_in_two_steps(block: Block) -> None:
    """ACPICA writes the type first and then type and enable together: one power-off."""
    block.write(CONTROL, S5 & ~pm.SLP_EN | pm.SCI_EN)
    assert block.offs == []
    block.write(CONTROL, S5 | pm.SCI_EN)
    assert block.offs == ["ACPI S5"]
    assert not block.read(CONTROL) & pm.SLP_EN


def test_other_sleep_types_do_nothing(block: Block) -> None:
    """Only type 5 is announced in the DSDT; the others are ignored."""
    for kind in (0, 1, 2, 3, 4, 6, 7):
        block.write(CONTROL, kind << pm.SLP_TYP_SHIFT | pm.SLP_EN)
    assert block.offs == []


def test_pm_timer_counts_at_its_rate_in_24_bits(block: Block) -> None:
    """3.579545 MHz, modulo 2^24, read-only."""
    first = block.read(TIMER, 4)
    block.clock.pass_by(1.0)
    assert (block.read(TIMER, 4) - first) % (1 << 24) == pytest.approx(pm.PM_TIMER_HZ, abs=1)
    block.write(TIMER, 0, 4)
    block.clock.pass_by(100.0)
    assert block.read(TIMER, 4) < 1 << 24
    assert block.read(TIMER, 2) == block.read(TIMER, 4) & 0xFFFF
    assert block.read(TIMER + 3, 1) == 0


def test_timer_status_sets_when_the_top_bit_changes(block: Block) -> None:
    """TMR_STS sets every 2.34 s, without a timer of the host's while TMR_EN is clear."""
    block.write(STATUS, pm.TMR)
    assert block.read(STATUS) == 0
    block.clock.pass_by(2.35)
    assert block.read(STATUS) == pm.TMR
    block.write(STATUS, pm.TMR)
    assert block.read(STATUS) == 0
    assert block.clock.timers[0].armings == 0


def test_timer_interrupt(block: Block) -> None:
    """TMR_EN makes it an SCI; a guest that does not answer causes one wake-up."""
    block.write(ENABLE, pm.TMR)
    assert block.armed
    assert block.clock.pass_by(60) == 1
    assert block.sci.take() == [True]

    block.write(STATUS, pm.TMR)
    assert block.sci.take() == [False]
    block.clock.pass_by(2.35)
    assert block.sci.take() == [True]
    block.write(ENABLE, 0)
    block.write(STATUS, pm.TMR)
    assert not block.armed


def test_reset_returns_to_power_on(block: Block) -> None:
    """reset() clears status and enables, drops the SCI, and lets the timer count on."""
    block.write(ENABLE, 0xFFFF)
    block.pm.power_button()
    before = block.read(TIMER, 4)
    block.pm.reset()

    assert block.sci.take() == [True, False]
    assert block.read(STATUS, 4) == 0
    assert not block.armed
    assert block.read(TIMER, 4) == before


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 11), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1), st.booleans()
        ),
        max_size=30,
    )
)
def test_wide_and_narrow_accesses_agree(steps: list[tuple[int, int, int, bool]]) -> None:
    """A write of any width equals its bytes written one by one, lowest first."""
    whole, bytewise = Block(), Block()
    for offset, size, random, press in steps:
        value = random & (1 << 8 * size) - 1
        whole.write(offset, value, size)
        for n in range(size):
            bytewise.write(offset + n, value >> 8 * n & 0xFF, 1)
        for block in (whole, bytewise):
            if press:
                block.pm.power_button()
            block.clock.pass_by(0.5)
        for at in (STATUS, ENABLE, CONTROL, 6, TIMER, 10):
            expected = whole.read(at)
            assert expected == bytewise.read(at, 1) | bytewise.read(at + 1, 1) << 8
            assert expected == bytewise.read(at)
        assert whole.sci.level == bytewise.sci.level
        assert set(whole.offs) == set(bytewise.offs)


@pytest.mark.parametrize(
    ("value", "resets"), [(0x06, 1), (0x0E, 1), (0x04, 0), (0x02, 0), (0xF9, 0)]
)
def test_reset_control_port(value: int, resets: int) -> None:
    """0xCF9 resets when bits 1 and 2 are both set: Linux writes 2, then 6 (or 0xE)."""
    asked: list[str] = []
    port = ResetControl(asked.append)
    port.write(0, 1, 0x02)
    assert asked == []
    port.write(0, 1, value)
    assert asked == ["port 0xCF9"] * resets
    assert port.read(0, 1) == value & pm.RESET_HARD
    port.reset()
    assert port.read(0, 1) == 0
