"""The serial port: a 16550A (TL16C550) on a wire of unlimited speed.

Eight one-byte registers, offset from the base: 0 RBR/THR, 1 IER, 2 IIR/FCR, 3 LCR, 4 MCR, 5 LSR,
6 MSR, 7 SCR; with LCR.DLAB set, 0 and 1 are the divisor instead.

There is no baud clock. A transmitted byte is gone at once, so THR is always empty; received
bytes below the trigger level raise the character timeout at once. The receiver takes from the
host only what fits its 16-byte FIFO, hence nothing grows with what the host sends. DCD, DSR and
CTS are always up. INTRPT is the chip's own pin: OUT2 does not gate it, as it would on an ISA card.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

FIFO_SIZE: Final = 16

DATA: Final = 0  # RBR when read, THR when written, DLL with DLAB
IER: Final = 1  # DLM with DLAB
IIR: Final = 2  # FCR when written
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

IER_RDI: Final = 0x01  # received data
IER_THRI: Final = 0x02  # transmitter holding register empty
IER_RLSI: Final = 0x04  # receiver line status
IER_MSI: Final = 0x08  # modem status

IIR_MSI: Final = 0x00
IIR_NO_INT: Final = 0x01
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RLSI: Final = 0x06
IIR_TIMEOUT: Final = 0x0C  # received data below the trigger level
IIR_FIFO: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
TRIGGER: Final = (1, 4, 8, 14)  # bytes, by FCR bits 7:6

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10

LSR_DR: Final = 0x01
LSR_OE: Final = 0x02
LSR_BI: Final = 0x10
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40
LSR_FIFO_ERROR: Final = 0x80

MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
CONNECTED: Final = MSR_DCD | MSR_DSR | MSR_CTS

_BREAK: Final = 0x100  # a FIFO entry: a NUL that came as a break


class Uart:
    """One 16550A. Any thread may call; `set_irq` runs under the state lock, in state order.

    `transmit` gets what the guest sends, in order, outside of the state lock: it may call
    receive(), but must not write the guest's registers.
    """

    def __init__(self, set_irq: Callable[[bool], None], transmit: Callable[[bytes], None]) -> None:
        self._set_irq, self._transmit = set_irq, transmit
        #: Called when the guest has emptied the receiver after receive() had to refuse bytes.
        self.on_room: Callable[[], None] = lambda: None
        #: Called with `batching` when it changes.
        self.on_batching: Callable[[bool], None] = lambda batching: None
        self._lock = Lock()
        # Keeps bytes in order between the state change and `transmit`. Never taken by receive(),
        # so the console may hold its own lock while it calls either way.
        self._order = Lock()
        self._irq = False
        self._refused = False
        self._power_on()

    def _power_on(self) -> None:
        self._ier = self._lcr = self._mcr = self._scr = 0
        # 115200 baud, as a BIOS leaves it: guests divide by this to learn the console's speed.
        self._divisor = 1
        self._rx: deque[int] = deque()  # byte values, or _BREAK
        self._fifo = False
        self._trigger = TRIGGER[0]
        self._byte_by_byte = False  # sends by interrupt, without FIFO
        self._errors = 0  # LSR_OE and LSR_BI until LSR is read
        self._thre_pending = False
        self._lines = CONNECTED
        self._deltas = 0  # MSR bits 3:0

    def reset(self) -> None:
        """Return to the power-on state; bytes not yet read by the guest are lost."""
        with self._lock:
            was_batching = self.batching
            self._power_on()
            self._update()
            room = self._take_room()
        if not was_batching:
            self.on_batching(True)
        if room:
            self.on_room()

    # The host's side

    @property
    def room(self) -> int:
        """How many bytes receive() takes now; 0 while the guest has the port in loopback."""
        with self._lock:
            return self._room()

    @property
    def batching(self) -> bool:
        """Whether writes to THR may reach write_many() late: nobody waits for each one's interrupt.

        So it is unless the guest enables the THRE interrupt without FIFO, and again once it
        switches the FIFO on or is reset. A guest that polls reads LSR, which brings them here.
        """
        return not self._byte_by_byte

    def receive(self, data: bytes) -> int:
        """Hand `data` to the guest; returns how many leading bytes there was room for."""
        with self._lock:
            count = min(len(data), self._room())
            self._rx.extend(data[:count])
            self._refused = self._refused or count < len(data)
            self._update()
        return count

    def send_break(self) -> bool:
        """Send a break (a NUL with LSR.BI set); False if there was no room for it."""
        with self._lock:
            if not self._room():
                return False
            self._store(_BREAK)
            self._update()
        return True

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """Read one register; `size` is 1."""
        with self._lock:
            value = self._read(offset)
            self._update()
            room = self._take_room()
        if room:
            self.on_room()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write one register; `size` is 1."""
        if offset == DATA:
            self.write_many(bytes((value & 0xFF,)))
            return
        with self._lock:
            was_batching = self.batching
            self._write(offset, value & 0xFF)
            self._update()
            room = self._take_room()
            batching = self.batching
        if batching != was_batching:
            self.on_batching(batching)
        if room:
            self.on_room()

    def write_many(self, data: bytes) -> None:
        """Do a run of one-byte writes to offset 0, as KVM's coalesced PIO hands them over.

        The state afterwards and the bytes sent are those of as many write(0, 1, byte) calls.
        Only the interrupt line is shorter: one pulse for the run, not one for each byte.
        """
        if not data:
            return
        with self._order:
            with self._lock:
                if self._lcr & LCR_DLAB:
                    self._divisor = self._divisor & 0xFF00 | data[-1]
                    return
                # Writing THR takes the interrupt back and, as the byte is gone at once, raises it
                # anew. A driver that never reads IIR lives on that edge.
                self._thre_pending = False
                self._update()
                looped = self._mcr & MCR_LOOP
                if looped:
                    for byte in data:
                        self._store(byte)
                self._thre_pending = True
                self._update()
            if not looped:
                self._transmit(data)

    # Under the lock

    def _read(self, offset: int) -> int:
        if offset == LSR:  # first: a polling driver reads it once for each byte
            return self._read_lsr()
        if offset == DATA:
            return self._divisor & 0xFF if self._lcr & LCR_DLAB else self._take()
        if offset == IER:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == IIR:
            cause = self._cause()
            if cause == IIR_THRI:
                self._thre_pending = False
            return cause | (IIR_FIFO if self._fifo else 0)
        if offset == MSR:
            value = self._lines | self._deltas
            self._deltas = 0
            return value
        if offset == LCR:
            return self._lcr
        return self._mcr if offset == MCR else self._scr

    def _write(self, offset: int, value: int) -> None:
        if offset == IER:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
                return
            # THR is empty, so enabling its interrupt raises it at once.
            if value & IER_THRI and not self._ier & IER_THRI:
                self._thre_pending = True
                self._byte_by_byte = not self._fifo
            self._ier = value & 0x0F
        elif offset == IIR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._write_mcr(value & 0x1F)
        elif offset == SCR:
            self._scr = value
        # LSR and MSR are read-only.

    def _write_fcr(self, value: int) -> None:
        fifo = bool(value & FCR_ENABLE)
        if fifo != self._fifo or (fifo and value & FCR_CLEAR_RX):
            self._rx.clear()
        self._fifo = fifo
        self._byte_by_byte = not fifo and (self._byte_by_byte or bool(self._ier & IER_THRI))
        self._trigger = TRIGGER[value >> 6] if fifo else TRIGGER[0]

    def _write_mcr(self, value: int) -> None:
        self._mcr = value
        lines = CONNECTED
        if value & MCR_LOOP:
            lines = (
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        changed, fallen = self._lines ^ lines, self._lines & ~lines
        self._deltas |= (changed & ~MSR_RI | fallen & MSR_RI) >> 4  # of RI only the falling edge
        self._lines = lines

    def _read_lsr(self) -> int:
        value = LSR_THRE | LSR_TEMT | self._errors
        if self._rx:
            value |= LSR_DR
        if self._fifo and (self._errors & LSR_BI or _BREAK in self._rx):
            value |= LSR_FIFO_ERROR
        self._errors = 0
        return value

    def _room(self) -> int:
        if self._mcr & MCR_LOOP:
            return 0
        return (FIFO_SIZE if self._fifo else 1) - len(self._rx)

    def _take_room(self) -> bool:
        """Whether on_room is due. Only when empty: the host then refills in one go."""
        if not self._refused or self._rx or self._mcr & MCR_LOOP:
            return False
        self._refused = False
        return True

    def _store(self, entry: int) -> None:
        """Receive one character with nobody to hold it back."""
        if len(self._rx) == (FIFO_SIZE if self._fifo else 1):
            self._errors |= LSR_OE
            if self._fifo:
                return  # the FIFO keeps what it has; the newcomer is lost
            self._rx.clear()  # a lone RBR is overwritten
        self._rx.append(entry)
        if len(self._rx) == 1:
            self._reveal()

    def _take(self) -> int:
        if not self._rx:
            return 0
        entry = self._rx.popleft()
        if self._rx:
            self._reveal()
        return entry & 0xFF

    def _reveal(self) -> None:
        """A character came to the top of the FIFO: its errors show in LSR from now on."""
        if self._rx[0] == _BREAK:
            self._errors |= LSR_BI

    def _cause(self) -> int:
        """Return the interrupt IIR reports: the pending one of the highest priority."""
        if self._ier & IER_RLSI and self._errors:
            return IIR_RLSI
        if self._ier & IER_RDI and self._rx:
            return IIR_TIMEOUT if len(self._rx) < self._trigger else IIR_RDI
        if self._ier & IER_THRI and self._thre_pending:
            return IIR_THRI
        if self._ier & IER_MSI and self._deltas:
            return IIR_MSI
        return IIR_NO_INT

    def _update(self) -> None:
        irq = self._cause() != IIR_NO_INT
        if irq != self._irq:
            self._irq = irq
            self._set_irq(irq)
