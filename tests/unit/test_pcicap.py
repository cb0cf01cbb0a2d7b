"""vmm.pcicap: virtio's capabilities and its window, and the whole space of a virtio device."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_vm import FakeVm
from tests.unit.pci_guest import COMMAND, Guest, Registers, card
from vmm.interrupts import Interrupts
from vmm.irq import Router
from vmm.pci import intx_gsi
from vmm.pcicap import CfgType, ConfigWindow, add_block
from vmm.pcifunc import BAR_IO, PciFunction

GOLDEN = Path(__file__).with_name("golden") / "pci_space.txt"


@pytest.fixture
def guest() -> Guest:
    return Guest()


class Windowed:
    """A function with an I/O BAR of 0x400 bytes, a memory BAR of 4 KiB, and the window."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.io, self.memory = Registers(), Registers()
        function = card()
        function.add_bar(0, 0x400, self.io, flags=BAR_IO)
        function.add_bar(1, 0x1000, self.memory)
        add_block(function, CfgType.COMMON, 0, 0, 56)
        ConfigWindow(function)
        self.slot = guest.bus.add(function)
        self.at = guest.capabilities(self.slot)[1][1]

    def select(self, bar: int, offset: int, length: int) -> None:
        """Write the three selector fields."""
        self.guest.write(self.slot, self.at + 4, 1, bar)
        self.guest.write(self.slot, self.at + 8, 4, offset)
        self.guest.write(self.slot, self.at + 12, 4, length)

    @property
    def data(self) -> int:
        """Where pci_cfg_data is."""
        return self.at + 16


@pytest.fixture
def window(guest: Guest) -> Windowed:
    return Windowed(guest)


def test_a_block_says_where_it_is(guest: Guest) -> None:
    """Virtio 1.2 §4.1.4: cap_len, cfg_type, BAR, offset and length, little-endian."""
    function = card()
    add_block(function, CfgType.DEVICE, 2, 0x300, 60)
    slot = guest.bus.add(function)
    ((identity, at),) = guest.capabilities(slot)
    assert identity == 0x09
    assert guest.read(slot, at + 2, 1) == 16
    assert guest.read(slot, at + 3, 1) == CfgType.DEVICE
    assert guest.read(slot, at + 4, 1) == 2
    assert (guest.read(slot, at + 8), guest.read(slot, at + 12)) == (0x300, 60)
    for offset in range(at, at + 16, 4):
        guest.write(slot, offset, 4, 0xFFFFFFFF)
    assert (guest.read(slot, at + 8), guest.read(slot, at + 12)) == (0x300, 60)


def test_the_notify_block_has_a_multiplier(guest: Guest) -> None:
    """Virtio 1.2 §4.1.4.4: notify_off_multiplier follows, and cap_len counts it."""
    function = card()
    add_block(function, CfgType.NOTIFY, 0, 0x100, 2, notify_multiplier=4)
    slot = guest.bus.add(function)
    ((_, at),) = guest.capabilities(slot)
    assert guest.read(slot, at + 2, 1) == 20
    assert guest.read(slot, at + 16) == 4


@pytest.mark.parametrize(("length", "expected"), [(1, 0x44), (2, 0x3344), (4, 0x11223344)])
def test_a_read_through_the_window_is_a_bar_read(
    guest: Guest, window: Windowed, length: int, expected: int
) -> None:
    """Virtio 1.2 §4.1.4.9.1: reading pci_cfg_data reads cap.length bytes at cap.offset."""
    window.select(0, 0x10, length)
    assert guest.read(window.slot, window.data) == expected
    assert window.io.reads == [(0x10, length)]
    assert guest.read(window.slot, COMMAND, 2) == 0  # it works while nothing decodes


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_write_through_the_window_is_a_bar_write(
    guest: Guest, window: Windowed, length: int
) -> None:
    """Virtio 1.2 §4.1.4.9.1: the first cap.length bytes of pci_cfg_data are written."""
    window.select(1, 0x20, length)
    guest.write(window.slot, window.data, length, 0xA1B2C3D4 & ((1 << 8 * length) - 1))
    assert window.memory.writes == [(0x20, length, 0xA1B2C3D4 & ((1 << 8 * length) - 1))]
    assert window.io.writes == []


def test_selecting_alone_touches_nothing(window: Windowed) -> None:
    """Only an access to pci_cfg_data has an effect; the fields beside it are plain storage."""
    window.select(0, 0x10, 4)
    window.guest.dump(0)
    for at in range(0, 16, 4):
        window.guest.read(window.slot, window.at + at)
    assert (window.io.reads, window.io.writes) == ([], [])


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        *((2, 0, 4), (6, 0, 4), (255, 0, 4)),  # no such BAR
        *((0, 0, 0), (0, 0, 3), (0, 0, 8), (0, 0, 0xFFFFFFFF)),  # no such width
        *((0, 1, 2), (0, 2, 4)),  # unaligned
        *((0, 0x400, 1), (0, 0xFFFFFFFC, 4), (1, 0x1000, 4)),  # past the end
    ],
)
def test_a_senseless_selection_reads_ones_and_drops_writes(
    window: Windowed, bar: int, offset: int, length: int
) -> None:
    """The window never reaches past a BAR, whatever is written into its fields."""
    window.select(bar, offset, length)
    window.guest.write(window.slot, window.data, 4, 0x12345678)
    assert window.guest.read(window.slot, window.data) == 0xFFFFFFFF
    for registers in (window.io, window.memory):
        assert (registers.reads, registers.writes) == ([], [])


def test_a_handler_cannot_answer_more_than_was_asked(window: Windowed) -> None:
    """A device process's answer is cut to the width of the access."""
    window.io.answer = 0x1_FFFF_FFFF
    window.select(0, 0, 1)
    assert window.guest.read(window.slot, window.data, 1) == 0xFF
    window.select(0, 0, 4)
    assert window.guest.read(window.slot, window.data) == 0xFFFFFFFF


def virtio_card(guest: Guest, slot: int) -> PciFunction:
    """Build what the virtio transport builds for a disk with one queue."""
    function = card("vioblk0")
    function.add_bar(0, 0x1000, Registers(), flags=BAR_IO)
    add_block(function, CfgType.COMMON, 0, 0x000, 56)
    add_block(function, CfgType.NOTIFY, 0, 0x100, 2, notify_multiplier=0)
    add_block(function, CfgType.ISR, 0, 0x200, 1)
    add_block(function, CfgType.DEVICE, 0, 0x300, 60)
    ConfigWindow(function)
    Interrupts(function, Router(FakeVm()), 1, intx_gsi(slot), lambda: False, irqfd=False)
    guest.bus.add(function, slot)
    return function


def test_pci_space_is_as_reviewed(guest: Guest, request: pytest.FixtureRequest) -> None:
    """What guests see changes only on purpose: --update-golden, then read the diff."""
    virtio_card(guest, 1)
    text = "".join(f"slot {slot}\n{guest.dump(slot)}\n" for slot in (0, 1))
    if request.config.getoption("--update-golden", default=False):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0xCF8, 0xCFF), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
    )
)
def test_no_port_access_breaks_the_bus(accesses: list[tuple[int, int, int]]) -> None:
    """Any sequence of accesses leaves a bus that resets to the same bytes."""
    guest = Guest()
    virtio_card(guest, 1)
    fresh = guest.dump(0) + guest.dump(1)
    for port, size, value in accesses:
        guest.pio.write(0xCF8, 4, 0x80000000 | value & 0x8FC)  # slots 0 and 1
        guest.pio.write(port, size, value & ((1 << 8 * size) - 1))
        assert 0 <= guest.pio.read(port, size) < 1 << 8 * size
    guest.bus.reset()
    assert guest.dump(0) + guest.dump(1) == fresh
