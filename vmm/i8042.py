"""The keyboard controller: reset line, and a keyboard that can type Ctrl-Alt-Del.

One handler for ports 0x60 to 0x64: offset 0 is the data port, offset 4 the status (read) and
command (write) port, the rest answers all-ones. There is no auxiliary port: a byte meant for a
mouse comes back as 0xFE with the time-out bit, which drivers take for "nobody there" at once.

The input buffer is never full. Answers to controller commands go before keyboard bytes and raise
no interrupt, since every driver polls for them. FastA20 is the other old way to reset, port 0x92.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

DATA: Final = 0
COMMAND: Final = 4
QUEUE_SIZE: Final = 16  # bytes the keyboard keeps, as a real one

STATUS_OBF: Final = 0x01  # a byte waits at the data port
STATUS_SYS: Final = 0x04  # self-test passed; shows CTR_SYS
STATUS_A2: Final = 0x08  # the last write went to the command port
STATUS_UNLOCKED: Final = 0x10
STATUS_AUX: Final = 0x20  # the waiting byte is the mouse's
STATUS_TIMEOUT: Final = 0x40

CTR_KBD_INT: Final = 0x01
CTR_SYS: Final = 0x04
CTR_KBD_DISABLE: Final = 0x10
CTR_AUX_DISABLE: Final = 0x20  # stuck at 1: there is no such port
CTR_TRANSLATE: Final = 0x40  # scan set 2 from the keyboard becomes set 1
# As a BIOS leaves it, since a directly booted kernel finds no BIOS before it.
CTR_POWER_ON: Final = CTR_KBD_INT | CTR_SYS | CTR_AUX_DISABLE | CTR_TRANSLATE

OUTPUT_RESET: Final = 0x01  # low resets the machine
OUTPUT_A20: Final = 0x02

ACK: Final = 0xFA
RESEND: Final = 0xFE
_NO_MOUSE: Final = RESEND | (STATUS_AUX | STATUS_TIMEOUT) << 8

# Press Ctrl, Alt, Del; release them in reverse.
_CHORD_SET_1: Final = bytes.fromhex("1d 38 e053 e0d3 b8 9d")
_CHORD_SET_2: Final = bytes.fromhex("14 11 e071 e0f071 f011 f014")


class I8042:
    """Controller and keyboard. Any thread may call; `set_irq` runs under the lock."""

    def __init__(self, set_irq: Callable[[bool], None], reset: Callable[[str], None]) -> None:
        self._set_irq, self._reset_machine = set_irq, reset
        self._lock = Lock()
        self._irq = False
        self._power_on()

    def _power_on(self) -> None:
        self._ctr = CTR_POWER_ON
        self._output_port = OUTPUT_RESET | OUTPUT_A20
        self._awaits = 0  # controller command whose data byte comes next
        self._after_command = False  # STATUS_A2
        self._answer: int | None = None  # byte, and status bits << 8
        self._keys: deque[int] = deque()
        self._key_command = 0  # keyboard command whose argument comes next
        self._scanning = True
        self._scan_set = 2

    def reset(self) -> None:
        """Return to the power-on state."""
        with self._lock:
            self._power_on()
            self._update()

    def ctrl_alt_del(self) -> bool:
        """Type Ctrl-Alt-Del; False if the guest has the keyboard off or does not read it."""
        with self._lock:
            set_1 = self._ctr & CTR_TRANSLATE or self._scan_set == 1
            chord = _CHORD_SET_1 if set_1 else _CHORD_SET_2
            typed = self._scanning and self._send(*chord)
            self._update()
        return typed

    def keys_wait(self) -> bool:
        """Tell whether the guest has yet to read what was typed."""
        with self._lock:
            return bool(self._keys)

    def read(self, offset: int, size: int) -> int:
        """Read the data port or the status; `size` is 1."""
        with self._lock:
            if offset == COMMAND:
                return self._status()
            return self._read_data() if offset == DATA else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a data byte or a command; `size` is 1."""
        reset = False
        with self._lock:
            if offset == COMMAND:
                reset = self._command(value & 0xFF)
            elif offset == DATA:
                reset = self._write_data(value & 0xFF)
            self._update()
        if reset:
            self._reset_machine("i8042")

    # Under the lock: the controller

    def _key_waits(self) -> bool:
        return bool(self._keys) and not self._ctr & CTR_KBD_DISABLE

    def _status(self) -> int:
        value = STATUS_UNLOCKED | self._ctr & CTR_SYS
        if self._after_command:
            value |= STATUS_A2
        if self._answer is not None:
            return value | STATUS_OBF | self._answer >> 8
        return value | STATUS_OBF if self._key_waits() else value

    def _read_data(self) -> int:
        if self._answer is not None:
            value, self._answer = self._answer & 0xFF, None
        elif self._key_waits():
            value = self._keys.popleft()
            self._drive(False)  # IRQ 1 is edge-triggered: each byte needs an edge of its own
        else:
            value = 0
        self._update()
        return value

    def _command(self, command: int) -> bool:
        """Do one controller command; True if it resets the machine."""
        self._after_command = True
        self._awaits = 0
        if command & 0xE0 == 0x20:  # read controller RAM; byte 0 is CTR
            self._answer = self._ctr if command == 0x20 else 0
        elif command & 0xE0 == 0x60 or command in {0xD1, 0xD2, 0xD3, 0xD4}:
            self._awaits = command
        elif command == 0xA9:  # test the auxiliary port: "data line stuck high"
            self._answer = 0x04
        elif command == 0xAA:  # self-test passed
            self._ctr |= CTR_SYS
            self._answer = 0x55
        elif command == 0xAB:  # keyboard port is good
            self._answer = 0x00
        elif command == 0xAD:
            self._ctr |= CTR_KBD_DISABLE
        elif command == 0xAE:
            self._ctr &= ~CTR_KBD_DISABLE
        elif command == 0xC0:  # input port: keyboard not locked
            self._answer = 0x80
        elif command == 0xD0:
            self._answer = self._output_port | (0x10 if self._key_waits() else 0)
        elif command & 0xF0 == 0xF0:  # pulse the lines whose bits are 0; bit 0 is reset
            return not command & OUTPUT_RESET
        return False  # A7 and A8 switch a port that is not there; others do not exist

    def _write_data(self, value: int) -> bool:
        """Take a data byte; True if it resets the machine."""
        self._after_command = False
        command, self._awaits = self._awaits, 0
        if not command:
            self._ctr &= ~CTR_KBD_DISABLE  # talking to the keyboard switches it on
            self._keyboard(value)
        elif command == 0x60:
            self._ctr = value | CTR_AUX_DISABLE
        elif command == 0xD1:
            self._output_port = value & OUTPUT_A20 | OUTPUT_RESET
            return not value & OUTPUT_RESET
        elif command == 0xD2:  # pretend the keyboard sent it
            self._send(value)
        elif command in {0xD3, 0xD4}:
            self._answer = _NO_MOUSE
        return False

    # Under the lock: the keyboard

    def _send(self, *codes: int) -> bool:
        """Queue `codes` whole or not at all."""
        if len(self._keys) + len(codes) > QUEUE_SIZE:
            return False
        self._keys.extend(codes)
        return True

    def _keyboard(self, value: int) -> None:
        command, self._key_command = self._key_command, 0
        if command == 0xF0 and value == 0:
            self._send(ACK, self._scan_set)
        elif command:  # argument of LEDs, typematic rate or scan set
            if command == 0xF0 and value <= 3:
                self._scan_set = value
            self._send(ACK)
        elif value in {0xED, 0xF0, 0xF3}:
            self._key_command = value
            self._send(ACK)
        elif value == 0xEE:
            self._send(0xEE)
        elif value == 0xF2:  # an MF2 keyboard; the controller translates 0x83 like a scan code
            self._send(ACK, 0xAB, 0x41 if self._ctr & CTR_TRANSLATE else 0x83)
        elif value == 0xF4:
            self._scanning = True
            self._send(ACK)
        elif value in {0xF5, 0xF6}:  # defaults; F5 stops scanning as well
            self._scan_set = 2
            self._scanning = self._scanning and value == 0xF6
            self._send(ACK)
        elif value == 0xFF:
            self._scan_set, self._scanning = 2, True
            self._keys.clear()
            self._send(ACK, 0xAA)  # basic assurance test passed
        else:
            self._send(RESEND)

    def _update(self) -> None:
        self._drive(self._key_waits() and self._answer is None and bool(self._ctr & CTR_KBD_INT))

    def _drive(self, irq: bool) -> None:
        if irq != self._irq:
            self._irq = irq
            self._set_irq(irq)


class FastA20:
    """System control port A, 0x92: bit 0 resets the machine, bit 1 is the A20 gate (no effect)."""

    def __init__(self, reset: Callable[[str], None]) -> None:
        self._reset_machine = reset
        self._value = OUTPUT_A20

    def reset(self) -> None:
        """Return to the power-on state: A20 open, no reset asked for."""
        self._value = OUTPUT_A20

    def read(self, offset: int, size: int) -> int:
        """Read what was written."""
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `value`; bit 0 going from 0 to 1 resets the machine."""
        rises = value & ~self._value & 0x01
        self._value = value & 0xFF
        if rises:
            self._reset_machine("port 0x92")
