"""Boot through firmware: its image becomes the ROM of the machine, fw_cfg tells it the rest.

    4 GiB    ┬ the whole image, read-only: a write to it is dropped
             │   0xFFFFFFF0  the first instruction of vCPU 0, as F000:FFF0
    1 MiB    ┬ a copy of its last 128 KiB, in RAM
    0xE0000  ┴

The image is read once, with the rights of whoever starts the VM, and kept: a reset copies the
same bytes again, whatever the last guest did to the copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Final, Self

from config.errors import ConfigError
from vmm import acpi, bootfile, fwfiles
from vmm.fwcfg import NR_PORTS, PORTS, FwCfg
from vmm.loader import REAL, Entry, mib
from vmm.memory import ABOVE_4G, FIRMWARE, HIGH_RAM, KIB, MIB

if TYPE_CHECKING:
    from config.model import VmConfig
    from devices.guestmem import GuestMemory
    from vmm.board import Board
    from vmm.bootfile import Image
    from vmm.kvm import Vm
    from vmm.pci import PciBus

SEABIOS: Final = "seabios"
# Where distributions put the build for 256 KiB, which has every driver.
SEABIOS_PATHS: Final = (
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/bios-256k.bin",
    "/usr/share/qemu-kvm/bios-256k.bin",
)
REMEDY: Final = "apt-get install seabios"
BANK: Final = 64 * KIB  # images are whole real-mode segments
SIZE_MAX: Final = ABOVE_4G - FIRMWARE
LOW_COPY: Final = 128 * KIB
RESET_VECTOR: Final = 16  # bytes before the end
MEMORY_MIN: Final = 4 * MIB  # SeaBIOS unpacks itself and its tables there

SLOT: Final = 8  # KVM's number for the ROM; RAM has the first ones
READ_ONLY: Final = 1 << 1  # KVM_MEM_READONLY

# SeaBIOS gives out ports 0x1000–0x9FFF, less than all of them, or stops (src/fw/pciinit.c).
SEABIOS_PORTS: Final = 0x9000

# What may stand before the jump: NOP, CLI, CLD, an operand-size prefix, WBINVD.
_BEFORE_JUMP: Final = (b"\x90", b"\xfa", b"\xfc", b"\x66", b"\x0f\x09")
_JUMPS: Final = b"\xea\xe9\xeb"  # far, near, short


class Firmware:
    """A firmware image, ready to be put into a machine again and again; a context manager."""

    def __init__(self, image: Image) -> None:
        """Read the image. Raises ConfigError for what is no firmware, HostError."""
        _check_size(image)
        self.path = image.path
        self._rom = mmap.mmap(-1, image.size)
        try:
            with memoryview(self._rom) as view:
                image.read_into(view, 0)
            _check_start(image, self._rom[-RESET_VECTOR:])
        except BaseException:
            self._rom.close()
            raise
        self._cfg: FwCfg | None = None

    def power_on(self, config: VmConfig, vm: Vm, memory: GuestMemory, board: Board) -> Entry:
        """Put the ROM in its places and fill fw_cfg; return where vCPU 0 starts.

        Call it once all devices are plugged in, after every reset too. Raises ConfigError for a
        machine that the firmware cannot run, KvmError.
        """
        self._check_machine(config, board.pci)
        size = len(self._rom)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self._rom))
        vm.set_memory(SLOT, ABOVE_4G - size, size, hva, READ_ONLY)
        tail = self._rom[-LOW_COPY:]
        memory.write(HIGH_RAM - len(tail), tail)
        if self._cfg is None:
            self._cfg = FwCfg(memory)
            board.pio.claim(PORTS, NR_PORTS, self._cfg, "fw_cfg")
        tables = acpi.build(config.vcpus, board.pci.intx_gsi, base_gpa=0)
        told = fwfiles.files(config.memory, tables, config.boot.order, board.pci)
        self._cfg.load(fwfiles.items(config.vcpus), told)
        return Entry(REAL, 0xFFF0)

    def close(self) -> None:
        """Free the ROM; the KVM VM must be gone."""
        self._rom.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_machine(self, config: VmConfig, pci: PciBus) -> None:
        if config.memory < MEMORY_MIN:
            raise ConfigError(
                f"memory {mib(config.memory)} is too little for firmware",
                hint=f"set memory to at least {MEMORY_MIN // MIB}M",
            )
        bars = [bar for _, function in pci.functions() for bar in function.bars.values()]
        ports = sum(bar.size for bar in bars if bar.is_io)
        if config.boot.firmware == SEABIOS and ports >= SEABIOS_PORTS:
            raise ConfigError(
                f"SeaBIOS has I/O ports for {(SEABIOS_PORTS - 1) // 0x1000} virtio devices, "
                f"this VM has {sum(bar.is_io and bar.size == 0x1000 for bar in bars)}",
                hint="remove disks or interfaces, or boot a kernel directly",
            )


def open_firmware(name: str) -> Firmware:
    """Open the firmware that vm.yaml names: a path, or "seabios" for the installed one.

    Raises ConfigError for what the user must mend, HostError for what the host refused.
    """
    path = installed() if name == SEABIOS else name
    if not path:
        raise ConfigError(
            f"firmware seabios is not installed (no {SEABIOS_PATHS[0]})",
            hint=REMEDY,
        )
    fd = bootfile.open_image(path, "firmware")
    try:
        return Firmware(bootfile.image_of(fd, path, "firmware"))
    finally:
        os.close(fd)


def installed() -> str:
    """Return the path of the host's SeaBIOS, "" if it has none."""
    return next((path for path in SEABIOS_PATHS if os.path.exists(path)), "")


def _check_size(image: Image) -> None:
    """Refuse what cannot end at 4 GiB in whole banks. Raises ConfigError."""
    if image.size > SIZE_MAX:
        raise image.wrong(
            f"{mib(image.size)} is more than fits below 4 GiB ({mib(SIZE_MAX)})",
            "a disk or CD-ROM image belongs to disks: or cdrom:",
        )
    if image.size % BANK:
        raise image.wrong(
            f"its size, {image.size} bytes, is no multiple of 64 KiB", "is it a firmware image?"
        )


def _check_start(image: Image, vector: bytes) -> None:
    """Refuse what does not begin with a jump, as all firmware must. Raises ConfigError."""
    code = vector
    while skip := next((prefix for prefix in _BEFORE_JUMP if code.startswith(prefix)), b""):
        code = code[len(skip) :]
    if not code or code[0] not in _JUMPS:
        raise image.wrong(
            f"no jump at its reset vector, 16 bytes before the end, but {vector[:4].hex(' ')}",
            "it is no firmware for a PC",
        )
