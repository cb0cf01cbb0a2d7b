"""The PCI bus: how a guest finds devices, and how their registers get into its address spaces.

A guest asks "who is there?" through two ports, configuration mechanism 1 (PCI 3.0 §3.2.2.3.2):

    out 0xCF8 ◄─ 31      30…24     23…16   15…11   10…8       7…2         1…0
                 enable  reserved  bus     slot    function   register    0
    in/out 0xCFC…0xCFF   the four bytes of that register, singly or together

There is one bus, function 0 of each slot, and no bridge to other buses. Whatever else the guest
names reads as all-ones, which is how it learns that a slot is empty.

A device answers in config space first (`pcifunc`); its registers proper are behind BARs, and a
BAR is live only while it can be: decoding switched on, the address inside the window of its
space, nobody else there. A BAR that cannot decode is silent until one of these changes.

Locking: PciBus.lock guards every function's configuration space and where BARs decode. It is
taken first: Interrupts.lock and a device's own locks come under it, and whoever holds one of
those must not ask for configuration space. BAR accesses find their handler through the Bus and
take no lock here.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import ConfigError
from vmm import log
from vmm.memory import PCI_WINDOW, PCI_WINDOW_END
from vmm.pcifunc import Header, PciFunction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.bus import Bus, Handler
    from vmm.pcifunc import Bar

CONFIG_ADDRESS: Final = 0xCF8  # four ports; a byte access to the second is the reset control's
CONFIG_DATA: Final = 4  # offset of 0xCFC
RESET_CONTROL: Final = 1  # offset of 0xCF9

ENABLE: Final = 1 << 31
ADDRESS_BITS: Final = ENABLE | 0x00FFFFFC
OTHER_BUS_OR_FUNCTION: Final = 0x00FF0700
ALL_ONES: Final = 0xFFFFFFFF

SLOTS: Final = 32
IO_START: Final = 0x1000  # ISA devices are below
IO_END: Final = 0x10000

# INTA of slot n leads to a legacy interrupt nobody else needs; the DSDT's _PRT says the same.
INTX_GSIS: Final = (5, 10, 11, 7, 3, 12, 14, 15, 6)
# Where SeaBIOS believes that it leads: on an i440FX it works this out instead of asking, and puts
# it into each function's interrupt line and into the MP table that it makes (src/fw/pciinit.c).
SEABIOS_GSIS: Final = (10, 10, 11, 11)


def intx_gsi(slot: int, gsis: Sequence[int] = INTX_GSIS) -> int:
    """Return the GSI of slot 1…31's INTA pin; slots share when there are more than `gsis`."""
    return gsis[(slot - 1) % len(gsis)]


class Space(NamedTuple):
    """An address space with the window in which BARs may lie: [start, end)."""

    bus: Bus
    start: int
    end: int
    width: int  # widest access a handler behind a BAR gets, bytes


class HostBridge(PciFunction):
    """Slot 0: an 82441FX (i440FX), told apart from real ones by its subsystem ids.

    Firmware copies itself to RAM at 0xC0000–0xFFFFF and asks for that memory through the PAM
    registers: per segment bit 0 (and 4) send reads to RAM, bit 1 (and 5) writes (82441FX data
    sheet, PAM[6:0]). They are stored and change nothing: all of it is RAM at all times, and
    `vmm.firmware` puts a copy of the ROM there at power-on. They read 0 then, "not RAM yet",
    so SeaBIOS copies itself from below 4 GiB, which is right for an image of any size.
    """

    PAM0: Final = 0x59
    NR_PAM: Final = 7

    def __init__(self) -> None:
        super().__init__(
            "hostbridge", 0x8086, 0x1237, 0x060000, revision=2, subsystem=(0x1AF4, 0x1100)
        )
        self.declare(self.PAM0, self.NR_PAM, 0, (1 << 8 * self.NR_PAM) - 1)


class PciBus:
    """Bus 0: its slots, its ports, and the claims of its BARs."""

    def __init__(
        self,
        pio: Bus,
        mmio: Bus,
        reset_control: Handler | None = None,
        gsis: Sequence[int] = INTX_GSIS,
    ) -> None:
        """Claim ports 0xCF8–0xCFF and put the host bridge into slot 0.

        `reset_control` gets byte accesses to port 0xCF9, as its offset 0; `gsis` are where the
        slots' INTA pins lead, over and over from slot 1 on.
        """
        self.lock = threading.Lock()
        self._io = Space(pio, IO_START, IO_END, 4)
        self._memory = Space(mmio, PCI_WINDOW, PCI_WINDOW_END, 8)
        self._functions: dict[int, PciFunction] = {}
        self._homes: dict[Bar, int] = {}  # where each BAR is at power-on
        self._gsis = gsis
        self.add(HostBridge(), 0)
        self._ports = ConfigPorts(self, reset_control)
        pio.claim(CONFIG_ADDRESS, 8, self._ports, "PCI configuration")

    def free_slot(self) -> int:
        """Return the slot that add() would take next. Raises ConfigError when all are taken."""
        for slot in range(SLOTS):
            if slot not in self._functions:
                return slot
        raise ConfigError(
            f"the PCI bus has room for {SLOTS - 1} devices", hint="remove disks or interfaces"
        )

    def add(self, function: PciFunction, slot: int | None = None) -> int:
        """Plug `function` in and return its slot. Its BARs get addresses a guest may keep.

        Raises ConfigError when the bus or an address space is full, ValueError for a taken slot.
        """
        if slot is None:
            slot = self.free_slot()
        if slot in self._functions:
            raise ValueError(f"slot {slot} is taken by {self._functions[slot].name}")
        for bar in function.bars.values():
            self._homes[bar] = home = self._home(bar, slot)
            bar.place(home)
            function.watch(bar.offset, bar.width, after_write=self._place_bars)
        command = Header.COMMAND.value
        function.watch(command.offset, command.width, after_write=self._place_bars)
        function.reset()
        self._functions[slot] = function
        return slot

    def function(self, slot: int) -> PciFunction | None:
        """Return what is in `slot`."""
        return self._functions.get(slot)

    def functions(self) -> list[tuple[int, PciFunction]]:
        """Return every slot that is taken with its function, in order."""
        return sorted(self._functions.items())

    def intx_gsi(self, slot: int) -> int:
        """Return the GSI of slot 1…31's INTA pin."""
        return intx_gsi(slot, self._gsis)

    def reset(self) -> None:
        """Return every function to power-on: nothing decodes, nothing interrupts.

        Call it with the vCPUs parked and the VM's descriptor still open: devices take their
        eventfds back from KVM.
        """
        with self.lock:
            self._ports.address = 0
            for function in self._functions.values():
                function.reset()
            self._place_bars()

    def connect(self) -> None:
        """Let the devices wire up to a VM that has its interrupt chips; after every reset too."""
        with self.lock:
            for function in self._functions.values():
                function.connect()

    def _home(self, bar: Bar, slot: int) -> int:
        """Pick a power-on address: for I/O 0x1000 · slot if free, else the lowest that is."""
        space = self._space(bar)
        taken = sorted(
            (home, home + other.size)
            for other, home in self._homes.items()
            if other.is_io == bar.is_io
        )
        candidates = [IO_START * slot] if bar.is_io else []
        candidates += [space.start, *(end for _, end in taken)]
        for candidate in candidates:
            start = (candidate + bar.size - 1) & -bar.size
            end = start + bar.size
            inside = space.start <= start and end <= space.end
            if inside and not any(start < other_end and other < end for other, other_end in taken):
                return start
        raise ConfigError(
            f"no {space.bus.name} space is left for {bar.name}", hint="remove disks or interfaces"
        )

    def _space(self, bar: Bar) -> Space:
        return self._io if bar.is_io else self._memory

    def _place_bars(self) -> None:
        """Make what decodes agree with what the registers say; the lock is held.

        All that must move let go first, so two BARs can swap addresses, and every silent BAR
        is tried again, since the one in its way may just have left.
        """
        bars = [bar for function in self._functions.values() for bar in function.bars.values()]
        for bar in bars:
            if bar.address is not None and bar.address != bar.wanted:
                address = bar.address
                bar.moved(None)
                self._space(bar).bus.release(address)
        for bar in bars:
            wanted = bar.wanted
            if bar.address is None and wanted is not None and wanted != bar.address_bits:
                self._claim(bar, wanted)

    def _claim(self, bar: Bar, address: int) -> None:
        space = self._space(bar)
        if not (space.start <= address and address + bar.size <= space.end):
            log.limited("BAR", f"{space.bus.name} {address:#x} is outside the window", bar.name)
            return
        try:
            space.bus.claim(address, bar.size, bar.handler, bar.name, space.width)
        except ValueError as err:
            log.limited("BAR", str(err), bar.name)
            return
        bar.moved(address)


class ConfigPorts:
    """Ports 0xCF8–0xCFF: the address register, and the window on what it names."""

    def __init__(self, bus: PciBus, reset_control: Handler | None) -> None:
        self._bus, self._reset_control = bus, reset_control
        self.address = 0

    def read(self, offset: int, size: int) -> int:
        """Answer a port read; what names nothing is all-ones."""
        if offset < CONFIG_DATA:
            if (offset, size) == (0, 4):
                return self.address
            if (offset, size) == (RESET_CONTROL, 1) and self._reset_control is not None:
                return self._reset_control.read(0, 1)
            return ALL_ONES
        with self._bus.lock:
            function = self._selected()
            if function is None:
                return ALL_ONES
            return function.config_read(self._register(offset), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a port write; what names nothing is dropped."""
        if offset < CONFIG_DATA:
            if (offset, size) == (0, 4):
                self.address = value & ADDRESS_BITS
            elif (offset, size) == (RESET_CONTROL, 1) and self._reset_control is not None:
                self._reset_control.write(0, 1, value)
            return
        with self._bus.lock:
            function = self._selected()
            if function is not None:
                function.config_write(self._register(offset), size, value)

    def _selected(self) -> PciFunction | None:
        address = self.address
        if not address & ENABLE or address & OTHER_BUS_OR_FUNCTION:
            return None
        return self._bus.function(address >> 11 & 31)

    def _register(self, offset: int) -> int:
        return self.address & 0xFC | offset - CONFIG_DATA
