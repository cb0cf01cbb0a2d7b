"""One PCI function as the guest sees it: 256 bytes of configuration space.

A function introduces itself in a 64-byte header and adds what else it can do in a linked list:

    0x00  vendor id   | device id          who made it, what it is: drivers match on these
    0x04  command     | status             what it may do now  | what it has and what happened
    0x08  revision, class code             which kind of device, for those who lack a driver
    0x10  BAR0 … BAR5                      where its registers are: see Bar
    0x2C  subsystem ids                    a second pair of ids, the board's
    0x34  first capability ──┐             0x3C  interrupt line, interrupt pin
    0x40  id, next, body  ◄──┘             each capability names the next; 0 ends the list

What a guest may change is a table, not code: every byte has a mask of writable bits, and the
rest reads as it was declared. Code runs only where a register *does* something (`watch`).

Locking: a function belongs to one PciBus once added, and that bus's lock guards everything here;
watchers run with it held.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus import Handler

SPACE: Final = 256  # bytes; no extended configuration space on this bus

COMMAND_IO: Final = 1 << 0  # answer to I/O BARs
COMMAND_MEMORY: Final = 1 << 1  # answer to memory BARs
COMMAND_MASTER: Final = 1 << 2  # may start transfers: DMA and message-signalled interrupts
COMMAND_PARITY: Final = 1 << 6  # stored, without effect
COMMAND_SERR: Final = 1 << 8  # stored, without effect
COMMAND_INTX_OFF: Final = 1 << 10  # do not drive the interrupt pin
STATUS_INTX: Final = 1 << 3  # the device wants service, whether or not its pin may say so
STATUS_CAPABILITIES: Final = 1 << 4

BAR_IO: Final = 0b01  # low bits of a BAR say what it is, and cannot be written
BAR_MEMORY_64: Final = 0b100


class Reg(NamedTuple):
    """One register of the header: byte offset, width in bytes, and the bits a guest may change."""

    offset: int
    width: int
    writable: int = 0


class Header(Enum):
    """The header of an ordinary device, type 0 (PCI Local Bus 3.0 §6.1). The rest reads 0."""

    VENDOR = Reg(0x00, 2)
    DEVICE = Reg(0x02, 2)
    COMMAND = Reg(
        0x04,
        2,
        COMMAND_IO
        | COMMAND_MEMORY
        | COMMAND_MASTER
        | COMMAND_PARITY
        | COMMAND_SERR
        | COMMAND_INTX_OFF,
    )
    STATUS = Reg(0x06, 2)  # the write-1-to-clear error bits are never set here
    REVISION = Reg(0x08, 1)
    CLASS = Reg(0x09, 3)  # programming interface, sub-class, base class
    CACHE_LINE = Reg(0x0C, 1, 0xFF)  # stored, without effect
    LATENCY = Reg(0x0D, 1, 0xFF)  # stored, without effect
    BAR0 = Reg(0x10, 4)  # add_bar() makes the address bits writable
    SUBSYSTEM_VENDOR = Reg(0x2C, 2)
    SUBSYSTEM = Reg(0x2E, 2)
    CAPABILITIES = Reg(0x34, 1)
    INTERRUPT_LINE = Reg(0x3C, 1, 0xFF)  # a note from firmware to the OS; hardware ignores it
    INTERRUPT_PIN = Reg(0x3D, 1)  # 1 means INTA


FIRST_CAPABILITY: Final = 0x40


class Part(Protocol):
    """What hangs on a function and has a state of its own."""

    def reset(self) -> None:
        """Return to the power-on state and let go of the VM."""

    def connect(self) -> None:
        """The VM has its interrupt chips: wire up to it."""


class Bar:
    """A base address register: the guest asks how much room it needs, then says where.

    The low address bits are hard-wired to zero, so a guest that writes all-ones reads back the
    size; what it writes last is the address. It decodes there only while the command register
    has the space switched on and nobody else is there first.
    """

    def __init__(
        self,
        function: PciFunction,
        index: int,
        size: int,
        handler: Handler,
        *,
        flags: int,
        on_change: Callable[[int | None], None] | None,
    ) -> None:
        if size & (size - 1) or size < 16:
            raise ValueError(f"BAR size {size} is not a power of two of at least 16")
        self.function, self.index, self.size, self.handler = function, index, size, handler
        self.name = f"{function.name} BAR{index}"
        self.is_io = bool(flags & BAR_IO)
        self.offset = Header.BAR0.value.offset + 4 * index  # in configuration space
        self.width = 8 if flags & BAR_MEMORY_64 else 4
        self.address_bits = (1 << 8 * self.width) - size
        self.address: int | None = None  # where it decodes now; the bus's business
        self._flags, self._on_change = flags, on_change

    def place(self, address: int) -> None:
        """Say where it is at power-on."""
        self.function.declare(self.offset, self.width, address | self._flags, self.address_bits)

    @property
    def wanted(self) -> int | None:
        """The address the registers ask for, or None while they keep it from decoding."""
        on = COMMAND_IO if self.is_io else COMMAND_MEMORY
        if not self.function.command & on:
            return None
        return self.function.read(self.offset, self.width) & self.address_bits

    def moved(self, address: int | None) -> None:
        """Note where it decodes from now on and tell the device."""
        self.address = address
        if self._on_change is not None:
            self._on_change(address)


class _Watch(NamedTuple):
    start: int
    end: int
    before_read: Callable[[], None] | None
    after_write: Callable[[], None] | None


class PciFunction:
    """Function 0 of a slot. Declare everything, then give it to PciBus.add()."""

    def __init__(
        self,
        name: str,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
    ) -> None:
        """Describe a function; `class_code` is 24 bits, `subsystem` is (vendor, id)."""
        self.name = name
        self.bars: dict[int, Bar] = {}
        self.parts: list[Part] = []
        self._power_on = bytearray(SPACE)
        self._space = bytearray(SPACE)
        self._writable = bytearray(SPACE)
        self._watches: list[_Watch] = []
        self._link = Header.CAPABILITIES.value.offset  # the byte that names the next capability
        self._free = FIRST_CAPABILITY
        for register in Header:
            self.declare(*register.value[:2], 0, register.value.writable)
        self.define(Header.VENDOR, vendor)
        self.define(Header.DEVICE, device)
        self.define(Header.CLASS, class_code)
        self.define(Header.REVISION, revision)
        self.define(Header.SUBSYSTEM_VENDOR, subsystem[0])
        self.define(Header.SUBSYSTEM, subsystem[1])

    # Declaring, before the guest runs.

    def declare(self, offset: int, width: int, value: int, writable: int = 0) -> None:
        """Set the power-on value and the writable bits of `width` bytes at `offset`."""
        self._power_on[offset : offset + width] = value.to_bytes(width, "little")
        self._writable[offset : offset + width] = writable.to_bytes(width, "little")

    def define(self, register: Header, value: int) -> None:
        """Set the power-on value of a header register."""
        offset, width, writable = register.value
        self.declare(offset, width, value, writable)

    def use_intx(self, gsi: int) -> None:
        """Say that the function drives INTA, and which line firmware would find it on."""
        self.define(Header.INTERRUPT_PIN, 1)
        self.define(Header.INTERRUPT_LINE, gsi)

    def add_bar(
        self,
        index: int,
        size: int,
        handler: Handler,
        *,
        flags: int = 0,
        on_change: Callable[[int | None], None] | None = None,
    ) -> Bar:
        """Put `handler` behind BAR `index`: `size` bytes of memory, or of I/O with BAR_IO.

        BAR_MEMORY_64 takes the next register as well. `on_change(address or None)` hears where
        it decodes, with the bus's lock held. Raises ValueError for a size that no BAR can have.
        """
        self.bars[index] = bar = Bar(self, index, size, handler, flags=flags, on_change=on_change)
        return bar

    def add_capability(self, identity: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability to the list and return its offset.

        `body` follows the two bytes of id and next; `writable` masks it, short means read-only.
        Raises ValueError when the space is full.
        """
        offset, end = self._free, self._free + 2 + len(body)
        if end > SPACE:
            raise ValueError(f"{self.name}: no room for capability {identity:#x}")
        self._power_on[offset:end] = bytes((identity, 0)) + body
        self._writable[offset + 2 : offset + 2 + len(writable)] = writable
        self._power_on[self._link] = offset
        self._link = offset + 1
        self._free = (end + 3) & ~3
        self.define(Header.STATUS, STATUS_CAPABILITIES)
        return offset

    def watch(
        self,
        offset: int,
        length: int,
        *,
        before_read: Callable[[], None] | None = None,
        after_write: Callable[[], None] | None = None,
    ) -> None:
        """Run code when the guest reads, or has written, any of these bytes."""
        self._watches.append(_Watch(offset, offset + length, before_read, after_write))

    # The guest's side; 0 ≤ offset, offset + size ≤ 256.

    def config_read(self, offset: int, size: int) -> int:
        """Answer a configuration read."""
        for watch in self._watches:
            if watch.before_read and offset < watch.end and watch.start < offset + size:
                watch.before_read()
        return self.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Take a configuration write: change the writable bits, then let watchers act."""
        for at in range(offset, offset + size):
            mask = self._writable[at]
            self._space[at] = self._space[at] & ~mask | value & mask
            value >>= 8
        for watch in self._watches:
            if watch.after_write and offset < watch.end and watch.start < offset + size:
                watch.after_write()

    # The device's side.

    @property
    def command(self) -> int:
        """The command register."""
        return self.read(*Header.COMMAND.value[:2])

    def read(self, offset: int, size: int) -> int:
        """Return bytes as they stand, without anybody's watching."""
        return int.from_bytes(self._space[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Change bytes the guest need not be able to write."""
        self._space[offset : offset + size] = value.to_bytes(size, "little")

    def reset(self) -> None:
        """Return to the power-on state, parts included."""
        self._space[:] = self._power_on
        for part in self.parts:
            part.reset()

    def connect(self) -> None:
        """Let the parts wire up to a VM whose interrupt chips exist."""
        for part in self.parts:
            part.connect()
