"""vmm.firmware: which files are firmware, and where their bytes go."""

from __future__ import annotations

import os
from ctypes import string_at
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError
from config.model import BootConfig, VmConfig
from tests.descriptors import count_before
from tests.unit.boot_images import Guest
from tests.unit.pci_guest import Registers
from vmm import boot, firmware
from vmm.bus import Bus
from vmm.firmware import Firmware
from vmm.loader import Entry
from vmm.pci import PciBus
from vmm.pcifunc import BAR_IO, PciFunction

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
FAR_JUMP = bytes.fromhex("ea5be000f0").ljust(16, b"\0")


def image(size: int, vector: bytes = FAR_JUMP) -> bytes:
    """Return bytes that differ from place to place, with a reset vector."""
    body = b"".join(at.to_bytes(4, "little") for at in range(0, size - 16, 4))
    return body + vector


class FakeVm:
    """Remembers the ROM's memory slot and what was behind it."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, int, int, int]] = []
        self.rom = b""

    def set_memory(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.slots.append((slot, gpa, size, flags))
        self.rom = string_at(hva, size)


class FakeBoard:
    """Ports and a PCI bus, which is all of a board that firmware touches."""

    def __init__(self) -> None:
        self.pio = Bus("port")
        self.pci = PciBus(self.pio, Bus("address"))

    def add(self, *sizes: int) -> None:
        """Plug in a device with such I/O BARs."""
        function, handler = PciFunction("card", 0x1AF4, 0x1042, 0x010000), Registers()
        for index, size in enumerate(sizes):
            function.add_bar(index, size, handler, flags=BAR_IO)
        self.pci.add(function)


@pytest.fixture
def guest() -> Iterator[Guest]:
    it = Guest()
    yield it
    it.close()


def power_on(
    rom: Firmware, guest: Guest, board: FakeBoard, *, memory: int = 8 * MIB, name: str = "seabios"
) -> tuple[FakeVm, Entry]:
    vm: Any = FakeVm()
    config = VmConfig("fw", BootConfig(firmware=name), memory=memory)
    fake: Any = board
    return vm, rom.power_on(config, vm, guest.memory, fake)


def opened(tmp_path: Path, data: bytes) -> Firmware:
    path = tmp_path / "bios.bin"
    path.write_bytes(data)
    made = boot.open_boot(BootConfig(firmware=str(path)))
    assert isinstance(made, Firmware)
    return made


# Where it goes.


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 256 * KIB, 4 * MIB])
def test_where_the_bytes_go(tmp_path: Path, guest: Guest, size: int) -> None:
    """All of it read-only up to 4 GiB, its last 128 KiB up to 1 MiB; F000:FFF0 is in both."""
    data = image(size)
    board = FakeBoard()
    guest.fill(0xAA)
    with opened(tmp_path, data) as rom:
        vm, entry = power_on(rom, guest, board)
        assert vm.slots == [(firmware.SLOT, (1 << 32) - size, size, 2)]
        assert vm.rom == data
    low = min(size, 128 * KIB)
    assert guest.memory.read(MIB - low, low) == data[-low:]
    assert guest.memory.read(MIB - low - 1, 1) == b"\xaa"
    assert guest.memory.read(MIB, 1) == b"\xaa"
    assert (entry.mode, entry.rip) == ("real", 0xFFF0)


def test_a_reset_puts_the_same_bytes_back(tmp_path: Path, guest: Guest) -> None:
    """The copy is fresh, the file may be gone, and fw_cfg is where it was."""
    data, board = image(64 * KIB), FakeBoard()
    with opened(tmp_path, data) as rom:
        power_on(rom, guest, board)
        (tmp_path / "bios.bin").unlink()
        guest.fill(0)
        board.pio.write(0x510, 2, 0)
        vm, _ = power_on(rom, guest, board)
        assert vm.rom == data
        assert board.pio.read(0x511, 1) == 0  # nothing selected any more
        board.pio.write(0x510, 2, 0)
        assert bytes(board.pio.read(0x511, 1) for _ in range(4)) == b"QEMU"
    assert guest.memory.read(MIB - 64 * KIB, 64 * KIB) == data


def test_opening_keeps_no_descriptor(tmp_path: Path) -> None:
    """The image is in memory; errors leave nothing open either."""
    before = count_before()
    with opened(tmp_path, image(64 * KIB)) as rom:
        assert rom.path == str(tmp_path / "bios.bin")
        assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ConfigError):
        opened(tmp_path, b"no firmware")
    assert len(os.listdir("/proc/self/fd")) == before


# What is none.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x" * 1000, "its size, 1000 bytes, is no multiple of 64 KiB.*is it a firmware image"),
        (image(64 * KIB)[:-1], "is no multiple of 64 KiB"),
        (image(4 * MIB + 64 * KIB), r"4\.1 MiB is more than fits below 4 GiB \(4 MiB\).*disks:"),
        (bytes(64 * KIB), "no jump at its reset vector, 16 bytes before the end, but 00 00 00 00"),
        (b"\xff" * 128 * KIB, "no jump at its reset vector, .* but ff ff ff ff"),
        (image(64 * KIB, b"\x90" * 16), "no jump at its reset vector"),
        (image(64 * KIB, b"GRUB loading ..."), "no jump .* but 47 52 55 42.*no firmware for a PC"),
        (b"", "the file is empty"),
    ],
)
def test_what_is_no_firmware(tmp_path: Path, data: bytes, message: str) -> None:
    """One error that names the file, what is wrong, and what to do."""
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path, data)
    assert str(caught.value).startswith(f"firmware {tmp_path}/bios.bin: ")


@pytest.mark.parametrize(
    "vector", ["ea5be000f0", "e9 34ff", "eb e0", "90 90 e9 00 ff", "fa fc ea", "0f09 e9", "66 ea"]
)
def test_what_may_stand_at_the_reset_vector(tmp_path: Path, vector: str) -> None:
    """Far, near and short jumps, and what firmware puts before them."""
    code = bytes.fromhex(vector)
    opened(tmp_path, image(64 * KIB, code + bytes(16 - len(code)))).close()


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is the user's to mend, SeaBIOS is the package manager's."""
    with pytest.raises(ConfigError, match=r"firmware /none: cannot open: No such file.*boot\.fi"):
        boot.open_boot(BootConfig(firmware="/none"))
    monkeypatch.setattr(firmware, "SEABIOS_PATHS", (str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(
        ConfigError, match=r"firmware seabios is not installed \(no .*/a\) \(apt-get install seabi"
    ):
        boot.open_boot(BootConfig(firmware="seabios"))
    (tmp_path / "b").write_bytes(image(64 * KIB))
    with boot.open_boot(BootConfig(firmware="seabios")) as rom:
        assert isinstance(rom, Firmware)
        assert rom.path == str(tmp_path / "b")


# Machines that it cannot run.


def test_too_little_memory(tmp_path: Path, guest: Guest) -> None:
    """SeaBIOS would stop with a message that nobody sees."""
    with opened(tmp_path, image(64 * KIB)) as rom:
        with pytest.raises(ConfigError, match=r"memory 2 MiB is too little .*set memory to at le"):
            power_on(rom, guest, FakeBoard(), memory=2 * MIB)
        power_on(rom, guest, FakeBoard(), memory=4 * MIB)


def test_too_many_devices_for_seabios(tmp_path: Path, guest: Guest) -> None:
    """Its ports go to eight devices; another firmware may know better."""
    board = FakeBoard()
    for _ in range(8):
        board.add(0x1000, 0x100)
    with opened(tmp_path, image(64 * KIB)) as rom:
        power_on(rom, guest, board)
        board.add(0x1000)
        with pytest.raises(ConfigError, match=r"I/O ports for 8 virtio devices, this VM has 9"):
            power_on(rom, guest, board)
        power_on(rom, guest, board, name="/path/to/another")
        modern = FakeBoard()
        for _ in range(9):
            modern.add(0x1000)
        with pytest.raises(ConfigError, match="this VM has 9"):
            power_on(rom, guest, modern)
