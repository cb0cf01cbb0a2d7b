"""vmm.fwcfg: items by port and by DMA, and a guest that points DMA anywhere."""

from __future__ import annotations

from struct import pack, unpack
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.boot_images import Guest
from vmm import fwcfg
from vmm.bus import Bus
from vmm.fwcfg import DMA_ERROR, DMA_READ, DMA_SELECT, DMA_SKIP, DMA_WRITE, TRANSFER_MAX, FwCfg

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
RAM = 2 * MIB
HIGH = 1 << 32
DESCRIPTOR, BUFFER = 0x1000, 0x2000
ITEM = 0x0005


class Firmware:
    """Plays the guest's firmware: ports, and DMA descriptors in its RAM."""

    def __init__(self) -> None:
        self.guest = Guest(RAM, above=MIB)
        self.cfg = FwCfg(self.guest.memory)
        self.pio = Bus("port")
        self.pio.claim(fwcfg.PORTS, fwcfg.NR_PORTS, self.cfg, "fw_cfg")
        self.cfg.load({ITEM: b"\x02\x00"}, {"etc/b": b"bravo", "etc/a": b"alpha" * 100})

    def select(self, item: int) -> None:
        self.pio.write(0x510, 2, item)

    def bytes(self, count: int) -> bytes:
        return bytes(self.pio.read(0x511, 1) for _ in range(count))

    def start(self, gpa: int) -> None:
        """Write the descriptor's address, high half first, each big-endian."""
        high, low = (int.from_bytes(pack(">I", half), "little") for half in divmod(gpa, HIGH))
        self.pio.write(0x514, 4, high)
        self.pio.write(0x518, 4, low)

    def dma(self, control: int, length: int, address: int, at: int = DESCRIPTOR) -> int:
        """Carry out one descriptor; return what became of its control word."""
        self.guest.memory.write(at, pack(">IIQ", control, length, address))
        self.start(at)
        done: int = unpack(">I", self.guest.memory.read(at, 4))[0]
        return done

    def directory(self) -> dict[str, tuple[int, int]]:
        """Return name → (item, size) from item 0x19, read by port."""
        self.select(0x19)
        (count,) = unpack(">I", self.bytes(4))
        rows = [unpack(">IHH56s", self.bytes(64)) for _ in range(count)]
        assert all(not reserved and name.endswith(b"\0") for _, _, reserved, name in rows)
        return {name.rstrip(b"\0").decode(): (item, size) for size, item, _, name in rows}


@pytest.fixture
def firmware() -> Iterator[Firmware]:
    it = Firmware()
    yield it
    it.guest.close()


# By port.


def test_signature_and_id(firmware: Firmware) -> None:
    """Firmware knows the device by "QEMU", and from the id that it has DMA."""
    firmware.select(0)
    assert firmware.bytes(4) == b"QEMU"
    firmware.select(1)
    assert firmware.bytes(4) == bytes((3, 0, 0, 0))
    assert pack("<II", firmware.pio.read(0x514, 4), firmware.pio.read(0x518, 4)) == b"QEMU CFG"


def test_items_end_in_zeros_and_begin_again(firmware: Firmware) -> None:
    """Past the end of an item, and from one that is not there, come zeros."""
    firmware.select(ITEM)
    assert firmware.bytes(4) == b"\x02\0\0\0"
    firmware.select(ITEM)
    assert firmware.bytes(1) == b"\x02"
    for item in (0x000D, 0x8000, 0x7777, 0xFFFF):
        firmware.select(item)
        assert firmware.bytes(8) == bytes(8)


def test_nothing_is_selected_at_first(firmware: Firmware) -> None:
    """Before the first write to the selector the data port has nothing to say."""
    assert firmware.bytes(4) == bytes(4)


def test_directory(firmware: Firmware) -> None:
    """Big-endian sizes and items from 0x20 on, names padded with NULs."""
    assert firmware.directory() == {"etc/a": (0x20, 500), "etc/b": (0x21, 5)}
    firmware.select(0x21)
    assert firmware.bytes(5) == b"bravo"
    firmware.select(0x19)
    row = firmware.bytes(4 + 64)[4:]
    assert row == bytes.fromhex("000001f4 0020 0000") + b"etc/a".ljust(56, b"\0")


def test_a_name_must_fit(firmware: Firmware) -> None:
    """55 bytes and a NUL are all the room there is."""
    firmware.cfg.load({}, {"n" * 55: b"x"})
    assert firmware.directory() == {"n" * 55: (0x20, 1)}
    with pytest.raises(ValueError, match="longer than 55"):
        firmware.cfg.load({}, {"n" * 56: b"x"})


def test_other_widths_do_nothing(firmware: Firmware) -> None:
    """A selector written as a byte or a dword, and data read as a word, are no accesses."""
    firmware.select(0)
    for write in ((0x510, 1), (0x510, 4), (0x511, 1), (0x512, 2), (0x514, 2), (0x518, 1)):
        firmware.pio.write(*write, 0x01)
    assert firmware.bytes(4) == b"QEMU"
    assert firmware.pio.read(0x510, 2) == 0xFFFF
    assert firmware.pio.read(0x510, 1) == 0xFF
    assert firmware.pio.read(0x518, 2) == 0xFFFF


def test_load_returns_to_power_on(firmware: Firmware) -> None:
    """A reset forgets the selection, the place in the item, half an address, and old files."""
    firmware.select(0)
    firmware.bytes(2)
    firmware.pio.write(0x514, 4, 0x01000000)
    firmware.cfg.load({}, {"etc/c": b"charlie"})
    assert firmware.bytes(2) == bytes(2)
    assert firmware.directory() == {"etc/c": (0x20, 7)}
    firmware.guest.memory.write(DESCRIPTOR, pack(">IIQ", DMA_SELECT | DMA_READ, 4, BUFFER))
    firmware.pio.write(0x518, 4, int.from_bytes(pack(">I", DESCRIPTOR), "little"))
    assert firmware.guest.memory.read(BUFFER, 4) == b"QEMU"


# By DMA.


def test_dma_reads_and_skips(firmware: Firmware) -> None:
    """Select, skip and read, in one descriptor or several; what is past the end reads as zeros."""
    memory = firmware.guest.memory
    memory.write(BUFFER, b"\xee" * 16)
    assert firmware.dma(0x21 << 16 | DMA_SELECT | DMA_READ, 3, BUFFER) == 0
    assert memory.read(BUFFER, 4) == b"bra\xee"
    assert firmware.dma(DMA_READ, 8, BUFFER) == 0
    assert memory.read(BUFFER, 9) == b"vo\0\0\0\0\0\0\xee"
    assert firmware.dma(0x20 << 16 | DMA_SELECT | DMA_SKIP, 496, 0) == 0
    assert firmware.dma(DMA_READ, 4, BUFFER) == 0
    assert memory.read(BUFFER, 4) == b"lpha"
    assert firmware.dma(DMA_SKIP, 0xFFFFFFFF, 0) == 0
    assert firmware.dma(DMA_READ, 4, BUFFER) == 0
    assert memory.read(BUFFER, 4) == bytes(4)


def test_dma_and_ports_share_their_place(firmware: Firmware) -> None:
    """What the one has read, the other goes on from."""
    firmware.select(0x21)
    assert firmware.bytes(2) == b"br"
    assert firmware.dma(DMA_READ, 2, BUFFER) == 0
    assert firmware.guest.memory.read(BUFFER, 2) == b"av"
    assert firmware.bytes(1) == b"o"


def test_dma_above_4_gib(firmware: Firmware) -> None:
    """Descriptor and buffer may be anywhere in RAM; the high half holds for one transfer."""
    firmware.select(0)
    assert firmware.dma(DMA_READ, 4, HIGH + 0x100, at=HIGH) == 0
    assert firmware.guest.memory.read(HIGH + 0x100, 4) == b"QEMU"
    firmware.guest.memory.write(0, pack(">IIQ", DMA_SELECT | DMA_READ, 4, BUFFER))
    firmware.pio.write(0x518, 4, 0)
    assert firmware.guest.memory.read(BUFFER, 4) == b"QEMU"


def test_dma_writes_nothing_to_the_device(firmware: Firmware) -> None:
    """No item can be written: the error bit, and the item as it was."""
    firmware.guest.memory.write(BUFFER, b"evil")
    assert firmware.dma(DMA_SELECT | DMA_WRITE, 4, BUFFER) == DMA_ERROR
    firmware.select(0)
    assert firmware.bytes(4) == b"QEMU"


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (RAM, 1),  # just past RAM
        (RAM - 4, 5),  # runs out of it
        (0xFFFC0000, 16),  # the ROM
        (0xFEE00000, 4),  # the local APIC
        (HIGH + MIB - 1, 2),
        ((1 << 64) - 4, 8),  # wraps
        (0, TRANSFER_MAX + 1),
        (0, 0xFFFFFFFF),
    ],
)
def test_dma_to_what_is_no_ram(firmware: Firmware, address: int, length: int) -> None:
    """The error bit; nothing written, nothing taken from the item."""
    before = firmware.guest.memory.read(DESCRIPTOR + 16, RAM - DESCRIPTOR - 16)
    assert firmware.dma(0x21 << 16 | DMA_SELECT | DMA_READ, length, address) == DMA_ERROR
    assert firmware.guest.memory.read(DESCRIPTOR + 16, RAM - DESCRIPTOR - 16) == before
    assert firmware.bytes(5) == b"bravo"


@pytest.mark.parametrize("gpa", [RAM, RAM - 15, HIGH + MIB - 4, (1 << 64) - 8, 0xFFFFFFF0])
def test_a_descriptor_that_is_no_ram(firmware: Firmware, gpa: int) -> None:
    """There is nowhere to put an error: RAM and item stay as they were."""
    firmware.select(0)
    before = firmware.guest.memory.read(0, RAM)
    firmware.start(gpa)
    assert firmware.guest.memory.read(0, RAM) == before
    assert firmware.bytes(4) == b"QEMU"


def test_a_descriptor_inside_its_own_buffer(firmware: Firmware) -> None:
    """It was read once: what the data did to it changes nothing but where the answer lands."""
    assert firmware.dma(0x20 << 16 | DMA_SELECT | DMA_READ, 64, DESCRIPTOR - 8) == 0
    got = firmware.guest.memory.read(DESCRIPTOR - 8, 64)
    expected = bytearray((b"alpha" * 100)[:64])
    expected[8:12] = bytes(4)
    assert got == bytes(expected)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x510, 0x511, 0x514, 0x518]),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.integers(0, 0xFFFFFFFF), st.sampled_from([0x00100000, 0x19, 0])),
        ),
        max_size=20,
    ),
    st.binary(min_size=16, max_size=16),
)
def test_no_access_breaks_it(accesses: list[tuple[int, int, int]], descriptor: bytes) -> None:
    """Whatever a guest writes, the device goes on serving the next one who asks properly."""
    firmware = Firmware()
    try:
        firmware.guest.memory.write(DESCRIPTOR, descriptor)
        for port, size, value in accesses:
            firmware.pio.write(port, size, value & (1 << 8 * size) - 1)
            firmware.pio.read(port, size)
        firmware.select(0)
        assert firmware.bytes(4) == b"QEMU"
        assert len(firmware.directory()) == 2
    finally:
        firmware.guest.close()
