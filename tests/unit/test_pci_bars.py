"""Base address registers: sizing, decoding, relocation, conflicts (PCI 3.0 §6.2.5)."""

from __future__ import annotations

import pytest

from tests.unit.pci_guest import BAR0, COMMAND, Card, Guest, Registers, card
from vmm import log
from vmm.pcifunc import BAR_IO, BAR_MEMORY_64

IO_ON, MEMORY_ON = 1, 2


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is logged on the guest's account."""
    lines: list[str] = []

    def note(key: str, text: str, who: str = "") -> bool:
        lines.append(f"{who}: {text}")
        return True

    monkeypatch.setattr(log, "limited", note)
    return lines


def test_sizing_a_bar(guest: Guest) -> None:
    """§6.2.5.1: all-ones reads back as the size mask with the type bits; the address returns."""
    slot = Card(guest).slot
    for at, expected in ((BAR0, 0xFFFFF001), (BAR0 + 4, 0xFFFFF000)):
        address = guest.read(slot, at)
        guest.write(slot, at, 4, 0xFFFFFFFF)
        assert guest.read(slot, at) == expected
        guest.write(slot, at, 4, address)
        assert guest.read(slot, at) == address


def test_bars_have_addresses_from_the_start(guest: Guest) -> None:
    """A guest without an allocator finds I/O at 0x1000 · slot and memory from 0xF0000000."""
    cards = [Card(guest, name, slot) for name, slot in (("a", 1), ("b", 2), ("c", 9))]
    assert [guest.read(it.slot, BAR0) for it in cards] == [0x1001, 0x2001, 0x9001]
    memory = [guest.read(it.slot, BAR0 + 4) for it in cards]
    assert memory == [0xF0000000, 0xF0001000, 0xF0002000]


def test_two_io_bars_of_one_device_both_find_room(guest: Guest) -> None:
    """A second I/O BAR takes the lowest free place, aligned to its size."""
    function = card()
    function.add_bar(0, 0x40, Registers(), flags=BAR_IO)
    function.add_bar(2, 0x1000, Registers(), flags=BAR_IO)
    slot = guest.bus.add(function)
    assert guest.read(slot, BAR0) == 0x1001
    assert guest.read(slot, BAR0 + 8) == 0x2001
    assert guest.read(Card(guest, "next").slot, BAR0) == 0x3001  # 0x2000 is taken


@pytest.mark.parametrize(("at", "bit"), [(BAR0, IO_ON), (BAR0 + 4, MEMORY_ON)])
def test_a_bar_decodes_only_while_its_space_is_on(guest: Guest, at: int, bit: int) -> None:
    """§6.2.2: command bits 0 and 1 switch I/O and memory decoding, each its own."""
    it = Card(guest)
    address = guest.read(it.slot, at) & ~0xF
    space = guest.pio if bit == IO_ON else guest.mmio
    assert space.read(address, 4) == 0xFFFFFFFF
    guest.write(it.slot, COMMAND, 2, bit ^ 3)
    assert space.read(address, 4) == 0xFFFFFFFF
    guest.write(it.slot, COMMAND, 2, bit)
    assert space.read(address + 8, 4) == 0x11223344
    guest.write(it.slot, COMMAND, 2, 0)
    assert space.read(address, 4) == 0xFFFFFFFF
    assert [where is None for _, where in it.moves][-2:] == [False, True]


def test_a_moved_bar_follows_its_register(guest: Guest) -> None:
    """Relocation at run time: the old place falls silent, the new one answers, the device hears."""
    it = Card(guest)
    guest.write(it.slot, COMMAND, 2, 3)
    guest.write(it.slot, BAR0, 4, 0xC000)
    guest.write(it.slot, BAR0 + 4, 4, 0xFEB00000)
    guest.pio.write(0xC004, 2, 0xABCD)
    guest.mmio.write(0xFEB00008, 8, 0x1122334455667788)
    assert it.io.writes == [(4, 2, 0xABCD)]
    assert it.memory.writes == [(8, 8, 0x1122334455667788)]
    assert guest.pio.find(0x1000) is None
    assert it.moves[-4:] == [
        *(("io", None), ("io", 0xC000)),
        *(("memory", None), ("memory", 0xFEB00000)),
    ]


@pytest.mark.parametrize(
    ("at", "address"),
    [
        *((BAR0, at) for at in (0, 0x10000, 0x80001000)),
        *((BAR0 + 4, at) for at in (0, 0xE0000000, 0xFEC00000, 0xFEE00000)),
    ],
)
def test_a_bar_outside_its_window_is_silent(
    guest: Guest, warnings: list[str], at: int, address: int
) -> None:
    """No BAR may cover RAM, board devices or interrupt controllers; that is said in the log."""
    it = Card(guest)
    guest.write(it.slot, COMMAND, 2, 3)
    guest.write(it.slot, at, 4, address)
    space = guest.pio if at == BAR0 else guest.mmio
    assert space.find(address) is None
    assert guest.read(it.slot, at) & ~1 == address  # the register still holds it
    assert any(f"{address:#x} is outside the window" in line for line in warnings)


def test_sizing_while_decoding_is_not_worth_a_warning(guest: Guest, warnings: list[str]) -> None:
    """Firmware may size a BAR without switching it off first."""
    it = Card(guest)
    guest.write(it.slot, COMMAND, 2, 3)
    address = guest.read(it.slot, BAR0)
    guest.write(it.slot, BAR0, 4, 0xFFFFFFFF)
    guest.write(it.slot, BAR0, 4, address)
    assert warnings == []
    assert guest.pio.read(address & ~1, 4) == 0x11223344


def test_conflicting_bars_do_not_break_the_bus(guest: Guest, warnings: list[str]) -> None:
    """Who was first keeps the address; the other decodes as soon as the place is free."""
    first, second = Card(guest, "first"), Card(guest, "second")
    guest.write(first.slot, COMMAND, 2, 1)
    guest.write(second.slot, BAR0, 4, 0x1000)
    guest.write(second.slot, COMMAND, 2, 1)
    guest.pio.write(0x1000, 1, 1)
    assert (len(first.io.writes), len(second.io.writes)) == (1, 0)
    assert any("second BAR0" in line and "first BAR0 has it" in line for line in warnings)

    guest.write(first.slot, BAR0, 4, 0x5000)
    guest.pio.write(0x1000, 1, 2)
    assert (len(first.io.writes), len(second.io.writes)) == (1, 1)


def test_a_bar_cannot_take_a_board_devices_ports(guest: Guest, warnings: list[str]) -> None:
    """What the board claimed inside the window stays the board's."""
    board = Registers()
    guest.pio.claim(0x5004, 4, board, "board")
    it = Card(guest)
    guest.write(it.slot, COMMAND, 2, 1)
    guest.write(it.slot, BAR0, 4, 0x5000)
    guest.pio.write(0x5004, 4, 1)
    assert (len(board.writes), len(it.io.writes)) == (1, 0)
    assert any("board has it" in line for line in warnings)


def test_a_64_bit_bar_uses_two_registers(guest: Guest) -> None:
    """§6.2.5.1: type 10b; the upper half sizes as all-ones and counts for the address."""
    registers = Registers()
    function = card()
    function.add_bar(2, 0x4000, registers, flags=BAR_MEMORY_64)
    slot = guest.bus.add(function)
    low, high = BAR0 + 8, BAR0 + 12
    guest.write(slot, COMMAND, 2, 2)
    assert (guest.read(slot, low), guest.read(slot, high)) == (0xF0000004, 0)
    guest.write(slot, low, 4, 0xFFFFFFFF)
    guest.write(slot, high, 4, 0xFFFFFFFF)
    assert (guest.read(slot, low), guest.read(slot, high)) == (0xFFFFC004, 0xFFFFFFFF)
    guest.write(slot, low, 4, 0xF4000000)
    assert guest.mmio.find(0xF4000000) is None
    guest.write(slot, high, 4, 0)
    assert guest.mmio.read(0xF4000000, 4) == 0x11223344


@pytest.mark.parametrize("size", [0, 8, 0x1001, 0x3000])
def test_bar_sizes_are_powers_of_two(size: int) -> None:
    """No other size can be expressed by hard-wired low bits."""
    with pytest.raises(ValueError, match="power of two"):
        card().add_bar(0, size, Registers())
