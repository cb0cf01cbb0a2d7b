"""The keyboard controller: what Linux, the BSDs and SeaBIOS ask of it, and its resets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.board_fakes import Line
from vmm import i8042 as k
from vmm.i8042 import I8042, FastA20


class Keyboard:
    """A controller with its wires."""

    def __init__(self) -> None:
        self.line = Line()
        self.resets: list[str] = []
        self.chip = I8042(self.line, self.resets.append)

    def status(self) -> int:
        return self.chip.read(k.COMMAND, 1)

    def command(self, value: int, argument: int | None = None) -> None:
        self.chip.write(k.COMMAND, 1, value)
        if argument is not None:
            self.chip.write(k.DATA, 1, argument)

    def data(self) -> int:
        """Read a byte that is there."""
        assert self.status() & k.STATUS_OBF
        return self.chip.read(k.DATA, 1)

    def tell(self, value: int) -> bytes:
        """Send the keyboard a byte; returns all it answers."""
        self.chip.write(k.DATA, 1, value)
        return self.drain()

    def drain(self) -> bytes:
        answer = bytearray()
        while self.status() & k.STATUS_OBF:
            answer.append(self.chip.read(k.DATA, 1))
        return bytes(answer)


@pytest.fixture
def keyboard() -> Keyboard:
    return Keyboard()


def test_power_on_is_what_a_bios_leaves(keyboard: Keyboard) -> None:
    """Nothing waits, self-test passed, not locked, translation on: Linux needs no more set-up."""
    assert keyboard.status() == k.STATUS_UNLOCKED | k.STATUS_SYS
    keyboard.command(0x20)
    assert keyboard.data() == 0x65
    assert keyboard.line.changes == []


def test_ctr_can_be_written_but_there_is_no_mouse_port(keyboard: Keyboard) -> None:
    """Command 0x60 stores CTR; the bit that disables the auxiliary port stays set."""
    keyboard.command(0x60, 0x00)
    keyboard.command(0xA8)  # enable what is not there
    keyboard.command(0x20)

    assert keyboard.data() == k.CTR_AUX_DISABLE
    assert not keyboard.status() & k.STATUS_SYS


@pytest.mark.parametrize(
    ("command", "answer"), [(0xAA, 0x55), (0xAB, 0x00), (0xC0, 0x80), (0xD0, 0x03), (0x21, 0x00)]
)
def test_controller_commands_answer_at_once(keyboard: Keyboard, command: int, answer: int) -> None:
    """Each query has its byte ready for the first status read, and polling it interrupts nobody."""
    keyboard.command(command)

    assert keyboard.status() & (k.STATUS_OBF | k.STATUS_AUX) == k.STATUS_OBF
    assert keyboard.data() == answer
    assert not keyboard.status() & k.STATUS_OBF
    assert keyboard.line.changes == []


def test_self_test_sets_the_system_flag(keyboard: Keyboard) -> None:
    """Command 0xAA passes and sets SYS again."""
    keyboard.command(0x60, 0)
    keyboard.command(0xAA)
    assert keyboard.data() == 0x55
    assert keyboard.status() & k.STATUS_SYS


def test_no_mouse_is_a_fast_answer(keyboard: Keyboard) -> None:
    """Every probe for an auxiliary port is answered with "no": a driver never has to time out.

    Linux gives up when the echo is wrong and the port test is neither 0, 0xFA nor 0xFF; OpenBSD
    takes any echo for a port, but gives up when a mouse only ever says "resend".
    """
    keyboard.command(0xA9)
    assert keyboard.data() not in {0x00, 0x01, 0xFA, 0xFF}
    for command in (0xD3, 0xD4):
        keyboard.command(command, 0x5A)
        assert keyboard.status() & (k.STATUS_AUX | k.STATUS_TIMEOUT | k.STATUS_OBF) == 0x61
        assert keyboard.data() == k.RESEND
    assert keyboard.line.changes == []


def test_status_tells_commands_from_data(keyboard: Keyboard) -> None:
    """A2 shows whether the last write was a command."""
    keyboard.command(0xD1)
    assert keyboard.status() & k.STATUS_A2
    keyboard.chip.write(k.DATA, 1, 0x03)
    assert not keyboard.status() & k.STATUS_A2


def test_linux_binds_the_keyboard(keyboard: Keyboard) -> None:
    """Linux's probe: identity, defaults, LEDs, rate, enable; each byte is answered with ACK."""
    assert keyboard.tell(0xF2) == bytes((k.ACK, 0xAB, 0x41))
    assert keyboard.tell(0xF5) == bytes((k.ACK,))
    for command, argument in ((0xED, 0x00), (0xF3, 0x00)):
        assert keyboard.tell(command) == bytes((k.ACK,))
        assert keyboard.tell(argument) == bytes((k.ACK,))
    assert keyboard.tell(0xF4) == bytes((k.ACK,))


def test_other_keyboard_commands(keyboard: Keyboard) -> None:
    """Reset, echo, defaults and scan sets answer as a real keyboard; what is unknown, "resend"."""
    assert keyboard.tell(0xFF) == bytes((k.ACK, 0xAA))
    assert keyboard.tell(0xEE) == bytes((0xEE,))
    assert keyboard.tell(0xF6) == bytes((k.ACK,))
    keyboard.tell(0xF0)
    assert keyboard.tell(1) == bytes((k.ACK,))
    keyboard.tell(0xF0)
    assert keyboard.tell(0) == bytes((k.ACK, 1))
    assert keyboard.tell(0x17) == bytes((k.RESEND,))


def test_identity_without_translation(keyboard: Keyboard) -> None:
    """With translation off the second identity byte is the keyboard's own."""
    keyboard.command(0x60, 0x01)
    assert keyboard.tell(0xF2) == bytes((k.ACK, 0xAB, 0x83))


def test_every_keyboard_byte_has_its_own_edge(keyboard: Keyboard) -> None:
    """IRQ 1 is edge-triggered: the line falls and rises again between two waiting bytes."""
    keyboard.chip.write(k.DATA, 1, 0xF2)
    assert keyboard.line.take() == [True]
    for expected in ([False, True], [False, True], [False]):
        keyboard.data()
        assert keyboard.line.take() == expected


def test_no_interrupt_unless_ctr_allows(keyboard: Keyboard) -> None:
    """With the interrupt disabled a byte can be polled; enabling it raises the line at once."""
    keyboard.command(0x60, 0x44)
    keyboard.chip.write(k.DATA, 1, 0xEE)
    assert keyboard.status() & k.STATUS_OBF
    assert keyboard.line.changes == []

    keyboard.command(0x60, 0x45)
    assert keyboard.line.level


def test_disabled_keyboard_waits(keyboard: Keyboard) -> None:
    """Keys pressed while the interface is off show up once it is on; talking switches it on."""
    keyboard.command(0xAD)
    assert keyboard.chip.ctrl_alt_del()
    assert not keyboard.status() & k.STATUS_OBF
    assert not keyboard.line.level

    keyboard.command(0xAE)
    assert keyboard.line.level
    assert keyboard.data() == 0x1D
    keyboard.command(0xAD)
    keyboard.drain()
    assert keyboard.tell(0xEE)[-1] == 0xEE


def test_ctrl_alt_del_in_both_scan_sets(keyboard: Keyboard) -> None:
    """Presses come in order Ctrl, Alt, Del and all keys are let go; translated or not."""
    assert keyboard.chip.ctrl_alt_del()
    assert keyboard.drain().hex(" ") == "1d 38 e0 53 e0 d3 b8 9d"

    keyboard.command(0x60, 0x05)
    assert keyboard.chip.ctrl_alt_del()
    assert keyboard.drain().hex(" ") == "14 11 e0 71 e0 f0 71 f0 11 f0 14"


def test_ctrl_alt_del_is_whole_or_refused(keyboard: Keyboard) -> None:
    """A guest that does not read keys gets no half chord, and a keyboard it switched off none."""
    assert keyboard.chip.ctrl_alt_del()
    assert keyboard.chip.ctrl_alt_del()
    assert not keyboard.chip.ctrl_alt_del()
    assert len(keyboard.drain()) == k.QUEUE_SIZE

    keyboard.tell(0xF5)
    assert not keyboard.chip.ctrl_alt_del()
    assert keyboard.drain() == b""


def test_controller_answers_go_before_keys(keyboard: Keyboard) -> None:
    """A driver that reads CTR while a key waits gets CTR, then the key with its interrupt."""
    keyboard.chip.ctrl_alt_del()
    keyboard.line.take()
    keyboard.command(0x20)
    assert not keyboard.line.level

    assert keyboard.data() == 0x65
    assert keyboard.line.level
    assert keyboard.data() == 0x1D


def test_a_byte_can_be_put_into_the_output_buffer(keyboard: Keyboard) -> None:
    """Command 0xD2 makes its argument look typed, interrupt and all."""
    keyboard.command(0xD2, 0x1E)
    assert keyboard.line.level
    assert keyboard.data() == 0x1E


@pytest.mark.parametrize("command", [0xF0, 0xFE, 0xFC])
def test_pulsing_output_bit_0_resets(keyboard: Keyboard, command: int) -> None:
    """Commands 0xF0–0xFF pulse the lines whose bits are clear; 0xFE is what Linux writes."""
    keyboard.command(command)
    assert keyboard.resets == ["i8042"]


def test_what_does_not_reset(keyboard: Keyboard) -> None:
    """0xFF pulses nothing, and 0xDF through 0xD1 is how old kernels open the A20 gate."""
    keyboard.command(0xFF)
    keyboard.command(0xD1, 0xDF)
    assert keyboard.resets == []


def test_output_port_write_can_reset(keyboard: Keyboard) -> None:
    """Command 0xD1 with bit 0 low pulls the reset line; A20 can be read back."""
    keyboard.command(0xD1, 0x01)
    keyboard.command(0xD0)
    assert keyboard.data() == 0x01
    assert keyboard.resets == []

    keyboard.command(0xD1, 0x02)
    assert keyboard.resets == ["i8042"]


def test_reset_returns_to_power_on(keyboard: Keyboard) -> None:
    """reset() forgets CTR, half commands and waiting bytes, and drops the line."""
    keyboard.chip.ctrl_alt_del()
    keyboard.command(0x60, 0x01)
    keyboard.command(0xD1)

    keyboard.chip.reset()

    assert not keyboard.line.level
    assert keyboard.status() == k.STATUS_UNLOCKED | k.STATUS_SYS
    assert keyboard.tell(0xEE) == bytes((0xEE,))
    assert keyboard.resets == []


def test_ports_between_are_empty(keyboard: Keyboard) -> None:
    """Offsets 1 to 3 belong to nobody here: all-ones, and writes do nothing."""
    for offset in (1, 2, 3):
        keyboard.chip.write(offset, 1, 0xFE)
        assert keyboard.chip.read(offset, 1) == 0xFF
    assert keyboard.resets == []


STEPS = st.lists(st.tuples(st.sampled_from("rwcK"), st.integers(0, 255)), max_size=80)


@settings(max_examples=80, deadline=None)
@given(STEPS)
def test_nothing_a_guest_does_breaks_it(steps: list[tuple[str, int]]) -> None:
    """Any sequence leaves at most 17 bytes waiting, and no line up without a byte."""
    keyboard = Keyboard()
    for what, value in steps:
        if what == "r":
            assert 0 <= keyboard.chip.read(k.DATA, 1) <= 0xFF
        elif what == "K":
            keyboard.chip.ctrl_alt_del()
        else:
            keyboard.chip.write(k.COMMAND if what == "c" else k.DATA, 1, value)
        assert 0 <= keyboard.status() <= 0xFF
        if keyboard.line.level:
            assert keyboard.status() & k.STATUS_OBF
    assert len(keyboard.drain()) <= k.QUEUE_SIZE + 1


def test_fast_reset_port() -> None:
    """Port 0x92 keeps the A20 bit; bit 0 resets when it rises, not while it stays."""
    resets: list[str] = []
    port = FastA20(resets.append)
    assert port.read(0, 1) == 0x02
    port.write(0, 1, 0x00)
    assert port.read(0, 1) == 0x00
    assert resets == []
    port.write(0, 1, 0x03)
    port.write(0, 1, 0x03)
    assert resets == ["port 0x92"]
    port.reset()
    assert port.read(0, 1) == 0x02
