"""vmm.pci, vmm.pcifunc: mechanism 1, the header, slots, reset, the host bridge."""

from __future__ import annotations

import pytest

from config.errors import ConfigError
from tests.unit.pci_guest import BAR0, CAPABILITIES, COMMAND, STATUS, Card, Guest, card
from vmm.bus import Bus
from vmm.pci import SEABIOS_GSIS, PciBus, intx_gsi


@pytest.fixture
def guest() -> Guest:
    return Guest()


# Configuration mechanism 1.


@pytest.mark.parametrize("slot", [1, 17, 31])
def test_an_empty_slot_reads_all_ones(guest: Guest, slot: int) -> None:
    """PCI 3.0 §6.1: vendor id FFFF means that nobody is there."""
    assert guest.read(slot, 0) == 0xFFFFFFFF
    assert guest.read(slot, 0, 2) == 0xFFFF
    guest.write(slot, COMMAND, 2, 7)
    assert guest.read(slot, COMMAND, 1) == 0xFF


@pytest.mark.parametrize("other", [0, 1 << 31 | 1 << 16, 1 << 31 | 0xFF << 16, 1 << 31 | 1 << 8])
def test_other_buses_functions_and_a_clear_enable_bit_name_nothing(
    guest: Guest, other: int
) -> None:
    """Reads give all-ones and writes are dropped, as on a bus where nobody answers."""
    guest.pio.write(0xCF8, 4, other | COMMAND)
    assert guest.pio.read(0xCFC, 4) == 0xFFFFFFFF
    guest.pio.write(0xCFC, 2, 7)
    assert guest.read(0, COMMAND, 2) == 0


def test_data_port_takes_bytes_words_and_dwords(guest: Guest) -> None:
    """§3.2.2.3.2: the low bits of the port choose the byte inside the register."""
    slot = Card(guest).slot
    assert guest.read(slot, 0) == 0x10421AF4
    assert [guest.read(slot, at, 1) for at in range(4)] == [0xF4, 0x1A, 0x42, 0x10]
    assert [guest.read(slot, at, 2) for at in (0, 1, 2)] == [0x1AF4, 0x421A, 0x1042]
    guest.write(slot, 0x3C, 1, 0x5A)
    assert guest.read(slot, 0x3C, 1) == 0x5A
    guest.write(slot, COMMAND + 1, 1, 0x04)  # the upper byte of the command register
    assert guest.read(slot, COMMAND, 2) == 0x400


def test_accesses_past_the_data_port_do_not_wrap(guest: Guest) -> None:
    """A dword at 0xCFE is two bytes of configuration space and two of nobody's."""
    slot = Card(guest).slot
    guest.select(slot, 0)
    assert guest.pio.read(0xCFE, 4) == 0xFFFF1042


def test_address_register_is_dword_only(guest: Guest) -> None:
    """Other sizes at 0xCF8 belong to other devices; Linux probes with a byte at 0xCFB."""
    guest.pio.write(0xCF8, 4, 0x80000000)
    guest.pio.write(0xCFB, 1, 0x01)
    guest.pio.write(0xCF8, 2, 0x1234)
    guest.pio.write(0xCFA, 4, 0x55555555)
    assert guest.pio.read(0xCF8, 4) == 0x80000000
    assert guest.pio.read(0xCF8, 2) == 0xFFFF
    guest.pio.write(0xCF8, 4, 0xFFFFFFFF)
    assert guest.pio.read(0xCF8, 4) == 0x80FFFFFC  # reserved bits read 0


def test_port_cf9_is_the_reset_controls(guest: Guest) -> None:
    """A byte at 0xCF9 is the reset control register, not part of the address register."""
    guest.pio.write(0xCF9, 1, 0x06)
    assert guest.reset_control.writes == [(0, 1, 0x06)]
    assert guest.pio.read(0xCF9, 1) == 0x44
    assert guest.reset_control.reads == [(0, 1)]
    guest.pio.write(0xCF9, 2, 0x0606)
    assert guest.pio.read(0xCF9, 2) == 0xFFFF
    assert (len(guest.reset_control.writes), len(guest.reset_control.reads)) == (1, 1)
    assert guest.pio.read(0xCF8, 4) == 0


def test_scan_finds_single_function_devices_only(guest: Guest) -> None:
    """Header type 0 without the multi-function bit: a scan asks once per empty slot."""
    for name in ("a", "b"):
        Card(guest, name)
    found = [slot for slot in range(32) if guest.read(slot, 0) != 0xFFFFFFFF]
    assert found == [0, 1, 2]
    assert [guest.read(slot, 0x0E, 1) for slot in found] == [0, 0, 0]


# Configuration space.


def test_ids_cannot_be_written(guest: Guest) -> None:
    """§6.2.1: vendor, device, class, revision and subsystem ids are read-only."""
    slot = Card(guest).slot
    before = [guest.read(slot, at) for at in (0x00, 0x08, 0x2C)]
    for at in (0x00, 0x08, 0x2C):
        guest.write(slot, at, 4, 0xFFFFFFFF)
    assert [guest.read(slot, at) for at in (0x00, 0x08, 0x2C)] == before
    assert before == [0x10421AF4, 0x01000001, 0x00020B5D]


def test_command_has_its_bits_and_no_more(guest: Guest) -> None:
    """§6.2.2: unimplemented command bits read 0; status cannot be written."""
    slot = Card(guest).slot
    guest.write(slot, COMMAND, 4, 0xFFFFFFFF)
    assert guest.read(slot, COMMAND, 2) == 0x0547
    assert guest.read(slot, STATUS, 2) == 0


def test_rom_bar_and_unused_bars_read_zero(guest: Guest) -> None:
    """§6.2.5: hard-wired to zero means not implemented."""
    slot = Card(guest).slot
    for at in (0x18, 0x1C, 0x20, 0x24, 0x30):
        guest.write(slot, at, 4, 0xFFFFFFFF)
        assert guest.read(slot, at) == 0


def test_capabilities_form_a_list_in_order_of_adding(guest: Guest) -> None:
    """§6.7: status bit 4 announces the list, 0x34 its start, 0 its end; entries are aligned."""
    function = card()
    offsets = [function.add_capability(9, bytes(size)) for size in (1, 14, 3)]
    slot = guest.bus.add(function)
    assert guest.read(slot, STATUS, 2) == 0x10
    assert guest.capabilities(slot) == [(9, at) for at in offsets]
    assert all(at % 4 == 0 and at >= 0x40 for at in offsets)


def test_no_capabilities_no_list(guest: Guest) -> None:
    """Without the status bit the pointer means nothing, and reads 0."""
    slot = Card(guest).slot
    assert guest.read(slot, STATUS, 2) & 0x10 == 0
    assert guest.read(slot, CAPABILITIES, 1) == 0


def test_capabilities_must_fit_the_space() -> None:
    """The 192 bytes after the header are all there is; overflowing them is our own fault."""
    function = card()
    function.add_capability(9, bytes(0xBE))
    with pytest.raises(ValueError, match="no room for capability"):
        function.add_capability(9, b"")


def test_bus_without_reset_control_ignores_cf9() -> None:
    """The handler is optional; its port then belongs to nobody."""
    bare = Bus("port")
    PciBus(bare, Bus("address"))
    bare.write(0xCF9, 1, 6)
    assert bare.read(0xCF9, 1) == 0xFF


# Slots and interrupt pins.


def test_a_full_bus_says_so(guest: Guest) -> None:
    """31 devices fit beside the host bridge; the next is an error with a remedy."""
    for number in range(31):
        guest.bus.add(card(f"card{number}"))
    with pytest.raises(ConfigError, match=r"room for 31 devices \(remove"):
        guest.bus.add(card("one too many"))


def test_full_io_space_says_so(guest: Guest) -> None:
    """Fifteen 4 KiB blocks of ports exist above 0x1000."""
    for number in range(15):
        Card(guest, f"card{number}")
    with pytest.raises(ConfigError, match="no port space is left for one too many BAR0"):
        Card(guest, "one too many")


def test_a_taken_slot_is_refused(guest: Guest) -> None:
    """Two functions cannot share a slot."""
    with pytest.raises(ValueError, match="slot 0 is taken by hostbridge"):
        guest.bus.add(card(), 0)


def test_intx_lines_go_round() -> None:
    """Slots take the nine free legacy interrupts in turn, as the DSDT tells the guest."""
    assert [intx_gsi(slot) for slot in range(1, 12)] == [5, 10, 11, 7, 3, 12, 14, 15, 6, 5, 10]


def test_intx_lines_as_seabios_has_them() -> None:
    """SeaBIOS counts slots modulo four on an i440FX, and its MP table says so."""
    bus = PciBus(Bus("port"), Bus("address"), gsis=SEABIOS_GSIS)
    assert [bus.intx_gsi(slot) for slot in range(1, 10)] == [10, 10, 11, 11, 10, 10, 11, 11, 10]


# Reset.


def test_reset_returns_everything_to_power_on(guest: Guest) -> None:
    """After a bus reset a guest finds the bytes it found the first time, and nothing decodes."""
    it = Card(guest)
    before = guest.dump(0) + guest.dump(it.slot)
    for slot in (0, it.slot):
        for at in range(0, 256, 4):
            guest.write(slot, at, 4, 0xFFFFFFFF)
    guest.write(it.slot, BAR0, 4, 0x9000)
    assert guest.pio.find(0x9000) is not None

    guest.bus.reset()
    assert guest.pio.read(0xCF8, 4) == 0
    assert guest.dump(0) + guest.dump(it.slot) == before
    assert guest.pio.find(0x9000) is None
    assert it.moves[-1] == ("io", None)


# The host bridge.


def test_host_bridge_is_the_one_firmware_expects(guest: Guest) -> None:
    """SeaBIOS looks for 8086:1237 and knows the machine by the subsystem 1af4:1100."""
    assert guest.read(0, 0) == 0x12378086
    assert guest.read(0, 0x2C) == 0x11001AF4
    assert guest.read(0, 0x0A, 2) == 0x0600
    assert guest.read(0, 0x3D, 1) == 0  # no interrupt pin


def test_pam_registers_store(guest: Guest) -> None:
    """Firmware unlocks shadow RAM with 0x30 and 0x33 and reads back what it wrote."""
    assert guest.read(0, 0x59, 1) == 0
    guest.write(0, 0x59, 1, 0x30)
    guest.write(0, 0x5A, 2, 0x3333)
    guest.write(0, 0x5C, 4, 0x33333333)
    assert [guest.read(0, at, 1) for at in range(0x58, 0x61)] == [0, 0x30, *[0x33] * 6, 0]
