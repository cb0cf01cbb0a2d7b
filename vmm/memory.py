"""Guest RAM: the memory map of the machine, the sealed memfd behind it, its KVM slots.

    0          0xA0000   RAM (last KiB: EBDA with the MP table)
    0xA0000    1 MiB     backed but reserved: VGA hole, option ROMs, ACPI tables
    1 MiB      0xF0000000  RAM
    0xF0000000 0xFEC00000  PCI memory window
    0xFEC00000 0xFF000000  I/O APIC, local APICs, KVM's own pages
    0xFFC00000 4 GiB     firmware
    4 GiB      …         the rest of RAM

The first MiB counts against the configured size, as in vmd; RAM below the hole is filled first.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import ConfigError, HostError
from devices.guestmem import GuestMemory, Region
from vmm.loader import E820_RAM, E820_RESERVED, E820Range

if TYPE_CHECKING:
    from vmm.kvm import Vm

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

EBDA: Final = 0x9FC00
LOW_RAM_END: Final = 0xA0000
HIGH_RAM: Final = 0x100000
PCI_WINDOW: Final = 0xF0000000
PCI_WINDOW_END: Final = 0xFEC00000
KVM_IDENTITY_MAP: Final = 0xFEFFC000
KVM_TSS: Final = 0xFEFFD000  # three pages
FIRMWARE: Final = 0xFFC00000
ABOVE_4G: Final = 1 << 32


class Split(NamedTuple):
    """How many bytes of RAM lie below the PCI hole, and how many above 4 GiB."""

    low: int
    high: int


def split(size: int) -> Split:
    """Fill the space below the hole first; `size` in bytes."""
    low = min(size, PCI_WINDOW)
    return Split(low, size - low)


def regions(size: int) -> list[Region]:
    """Return guest RAM of `size` bytes as stretches of one memfd."""
    low, high = split(size)
    return [Region(0, low, 0), *([Region(ABOVE_4G, high, low)] if high else [])]


def e820(size: int) -> list[E820Range]:
    """Return the memory map the guest is told, in address order."""
    low, high = split(size)
    ranges = [
        E820Range(0, EBDA, E820_RAM),
        E820Range(EBDA, HIGH_RAM - EBDA, E820_RESERVED),
        E820Range(HIGH_RAM, low - HIGH_RAM, E820_RAM),
        E820Range(PCI_WINDOW_END, ABOVE_4G - PCI_WINDOW_END, E820_RESERVED),
        E820Range(ABOVE_4G, high, E820_RAM),
    ]
    return [item for item in ranges if item.size > 0]


def host_memory() -> int:
    """Return the host's RAM plus swap in bytes."""
    total = 0
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith(("MemTotal:", "SwapTotal:")):
                total += int(line.split()[1]) * KIB
    return total


class Ram:
    """Guest RAM in a memfd that can neither shrink nor grow, so no sharer can be SIGBUSed."""

    def __init__(self, name: str, size: int) -> None:
        """Make `size` bytes of RAM. Raises ConfigError if the host could never provide them."""
        have = host_memory()
        if size > have:
            raise ConfigError(
                f"memory {size // MIB}M is more than this host has ({have // MIB}M)", vm=name
            )
        self.size = size
        self.fd = os.memfd_create(f"pyvmd-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self.memory = GuestMemory(self.fd, regions(size))
        except OSError as err:
            os.close(self.fd)
            raise HostError(f"cannot make {size // MIB}M of guest RAM: {err.strerror}") from err

    def plug_into(self, vm: Vm) -> None:
        """Give every region a memory slot of `vm`, and KVM the pages it keeps for itself."""
        vm.place_kernel_pages(KVM_IDENTITY_MAP, KVM_TSS)
        for slot, region in enumerate(self.memory.regions):
            view = self.memory.view(region.gpa, region.size)
            hva = ctypes.addressof(ctypes.c_char.from_buffer(view))
            vm.set_memory(slot, region.gpa, region.size, hva)

    def resident(self) -> int:
        """Return how many bytes of guest RAM the host has really given so far."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Unmap and free guest RAM; the KVM VM must be gone."""
        self.memory.close()
        os.close(self.fd)
