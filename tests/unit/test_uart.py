"""The 16550A, register by register (TL16C550 data sheet), and what Linux's driver asks of it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.board_fakes import Line
from vmm import uart as u
from vmm.uart import Uart


class Port:
    """A UART with its wires, as a driver and a terminal see it."""

    def __init__(self) -> None:
        self.line = Line()
        self.sent = bytearray()
        self.batching: list[bool] = []
        self.rooms = 0
        self.uart = Uart(self.line, self.sent.extend)
        self.uart.on_batching = self.batching.append
        self.uart.on_room = self._room

    def _room(self) -> None:
        self.rooms += 1

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def registers(self) -> list[int]:
        """Everything a guest could find, read in an order that loses nothing."""
        line = self.line.level
        lcr = self.read(u.LCR)
        self.write(u.LCR, lcr | u.LCR_DLAB)
        divisor = [self.read(u.DATA), self.read(u.IER)]
        self.write(u.LCR, lcr & ~u.LCR_DLAB)
        state = [line, lcr, *divisor, *(self.read(n) for n in (u.IER, u.MCR, u.SCR, u.MSR))]
        state += [self.read(u.IIR), self.read(u.LSR), self.uart.room]
        while self.read(u.LSR) & u.LSR_DR:
            state.append(self.read(u.DATA))
        return state


@pytest.fixture
def port() -> Port:
    return Port()


def fifo_on(port: Port, trigger: int = 0) -> None:
    port.write(u.IIR, u.FCR_ENABLE | trigger << 6)


def test_power_on_state(port: Port) -> None:
    """After power-on nothing is pending, the transmitter is empty, the cable is connected."""
    values = [port.read(offset) for offset in range(8)]

    assert values == [0, 0, u.IIR_NO_INT, 0, 0, u.LSR_THRE | u.LSR_TEMT, u.CONNECTED, 0]
    assert port.line.changes == []


def test_divisor_is_never_zero_at_power_on(port: Port) -> None:
    """Linux's early console divides by the divisor it finds; it must not be 0."""
    port.write(u.LCR, u.LCR_DLAB)

    assert port.read(u.DATA) | port.read(u.IER) << 8 == 1


def test_dlab_turns_registers_0_and_1_into_the_divisor(port: Port) -> None:
    """With DLAB set a write to offset 0 is DLL, not a byte on the wire."""
    port.write(u.IER, 0x05)
    port.write(u.LCR, u.LCR_DLAB | 3)
    port.write(u.DATA, 0x34)
    port.write(u.IER, 0x12)

    assert (port.read(u.DATA), port.read(u.IER)) == (0x34, 0x12)
    port.write(u.LCR, 3)
    assert port.read(u.IER) == 0x05
    assert port.sent == b""


def test_plain_registers_keep_what_they_have_bits_for(port: Port) -> None:
    """LCR and SCR hold 8 bits, MCR 5, IER 4; LSR and MSR cannot be written."""
    for offset in (u.LCR, u.MCR, u.IER, u.SCR):
        port.write(offset, 0xFF & ~(u.LCR_DLAB if offset == u.LCR else 0))
    port.write(u.LSR, 0xFF)
    port.write(u.MSR, 0xFF)

    assert [port.read(n) for n in (u.LCR, u.MCR, u.IER, u.SCR)] == [0x7F, 0x1F, 0x0F, 0xFF]
    port.write(u.MCR, 0)
    port.read(u.MSR)
    assert port.read(u.MSR) == u.CONNECTED
    assert port.read(u.LSR) == u.LSR_THRE | u.LSR_TEMT


def test_transmit_is_instant(port: Port) -> None:
    """A byte written to THR is on the wire when the write returns, and THR is empty again."""
    port.write(u.DATA, 0x41)

    assert port.sent == b"A"
    assert port.read(u.LSR) & (u.LSR_THRE | u.LSR_TEMT) == u.LSR_THRE | u.LSR_TEMT


def test_enabling_the_thre_interrupt_raises_it_each_time(port: Port) -> None:
    """ETBEI going from 0 to 1 with THR empty interrupts; Linux tests that it does so twice."""
    for _ in range(2):
        port.write(u.IER, u.IER_THRI)
        assert port.line.level
        assert port.read(u.IIR) == u.IIR_THRI
        port.write(u.IER, 0)
    assert port.line.take() == [True, False, True, False]


def test_reading_iir_clears_the_thre_interrupt(port: Port) -> None:
    """The THRE interrupt ends when IIR reports it; the next write to THR brings it back."""
    port.write(u.IER, u.IER_THRI)
    assert port.read(u.IIR) == u.IIR_THRI
    assert port.read(u.IIR) == u.IIR_NO_INT
    assert port.line.take() == [True, False]

    port.write(u.DATA, 0x41)
    assert port.line.level
    assert port.read(u.IIR) == u.IIR_THRI


def test_iir_keeps_the_thre_interrupt_when_it_reports_another(port: Port) -> None:
    """Only the reported interrupt is cleared: THRE survives an IIR read that said "data"."""
    port.write(u.IER, u.IER_THRI | u.IER_RDI)
    port.uart.receive(b"x")

    assert port.read(u.IIR) == u.IIR_RDI
    port.read(u.DATA)
    assert port.read(u.IIR) == u.IIR_THRI


def test_each_thr_write_is_a_new_edge(port: Port) -> None:
    """A driver that never reads IIR gets an edge per write, as THR fills and empties again."""
    port.write(u.IER, u.IER_THRI)
    port.line.take()

    port.write(u.DATA, 0x41)
    port.write(u.DATA, 0x42)

    assert port.line.take() == [False, True, False, True]


def test_set_irq_is_called_on_changes_only(port: Port) -> None:
    """No work is done for the interrupt controller while the level stays the same."""
    port.write(u.IER, u.IER_RDI)
    for _ in range(3):
        port.read(u.LSR)
        port.write(u.DATA, 0x41)
    fifo_on(port)
    port.uart.receive(b"abc")
    port.read(u.DATA)

    assert port.line.changes == [True]


def test_interrupt_priorities(port: Port) -> None:
    """Line status comes before data, data before THRE, THRE before modem status."""
    fifo_on(port)
    port.write(u.IER, 0x0F)
    port.uart.send_break()
    port.write(u.MCR, u.MCR_LOOP)  # drops all modem lines

    seen = []
    for register in (u.LSR, u.DATA, None, u.MSR):
        seen.append(port.read(u.IIR) & 0x0F)
        if register is not None:
            port.read(register)

    assert seen == [u.IIR_RLSI, u.IIR_RDI, u.IIR_THRI, u.IIR_MSI]
    assert port.read(u.IIR) & 0x0F == u.IIR_NO_INT
    assert not port.line.level


@pytest.mark.parametrize(("code", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_trigger_level_and_character_timeout(port: Port, code: int, level: int) -> None:
    """Below the trigger level IIR says time-out at once, from the level on "data available"."""
    fifo_on(port, code)
    port.write(u.IER, u.IER_RDI)
    for count in range(1, u.FIFO_SIZE + 1):
        port.uart.receive(b"x")
        expected = u.IIR_RDI if count >= level else u.IIR_TIMEOUT
        assert port.read(u.IIR) == u.IIR_FIFO | expected
        assert port.line.level
    for _ in range(u.FIFO_SIZE):
        assert port.line.level
        port.read(u.DATA)
    assert not port.line.level


def test_without_fifo_one_byte_fits(port: Port) -> None:
    """A 16450 holds one received byte; reading it makes room."""
    assert port.uart.receive(b"abc") == 1
    assert port.uart.room == 0
    assert port.read(u.LSR) & u.LSR_DR
    assert port.read(u.DATA) == ord("a")
    assert port.uart.room == 1
    assert not port.read(u.LSR) & u.LSR_DR


def test_receive_takes_what_fits_and_keeps_the_order(port: Port) -> None:
    """The FIFO takes 16 bytes and not one more, and nothing is lost by being refused."""
    fifo_on(port)
    data = bytes(range(100, 140))

    assert port.uart.receive(data) == u.FIFO_SIZE
    assert port.uart.receive(data[16:]) == 0
    assert bytes(port.read(u.DATA) for _ in range(16)) == data[:16]
    assert not port.read(u.LSR) & u.LSR_OE


def test_on_room_is_called_once_the_guest_has_drained_a_full_fifo(port: Port) -> None:
    """After a refusal the host hears once, when a whole FIFO's worth can go in again."""
    fifo_on(port)
    port.uart.receive(bytes(16))
    for _ in range(16):
        port.read(u.DATA)
    assert port.rooms == 0  # nothing was refused

    port.uart.receive(bytes(17))
    for _ in range(15):
        port.read(u.DATA)
    assert port.rooms == 0
    port.read(u.DATA)
    assert port.rooms == 1
    port.read(u.DATA)
    assert port.rooms == 1


def test_on_room_may_call_back(port: Port) -> None:
    """on_room runs without locks held: it may feed the UART straight away."""
    fifo_on(port)
    pending = bytearray(range(50))

    def feed() -> None:
        del pending[: port.uart.receive(bytes(pending))]

    port.uart.on_room = feed
    feed()
    got = bytes(port.read(u.DATA) for _ in range(50))

    assert got == bytes(range(50))
    assert not pending


def test_transmit_may_call_receive(port: Port) -> None:
    """A terminal that echoes on the spot does not deadlock."""
    uart = Uart(port.line, lambda data: (uart.receive(data), None)[1])

    uart.write(u.DATA, 1, 0x55)

    assert uart.read(u.DATA, 1) == 0x55


def test_switching_the_fifo_clears_the_receiver(port: Port) -> None:
    """A change of FCR bit 0 empties the FIFO; writing it again does not."""
    port.uart.receive(b"x")
    fifo_on(port)
    assert not port.read(u.LSR) & u.LSR_DR
    port.uart.receive(b"y")
    fifo_on(port, 2)
    assert port.read(u.LSR) & u.LSR_DR
    port.write(u.IIR, 0)
    assert not port.read(u.LSR) & u.LSR_DR


def test_writes_are_batched_unless_each_one_is_waited_for(port: Port) -> None:
    """A guest that polls or has the FIFO on may send in runs; one that waits for an interrupt
    after every byte may not, however often it switches that interrupt on and off.
    """
    assert port.uart.batching
    port.write(u.IER, u.IER_RDI | u.IER_RLSI)
    assert port.batching == []

    port.write(u.IER, u.IER_THRI)
    port.write(u.IER, 0)
    port.write(u.IER, u.IER_THRI)
    assert port.batching == [False]
    fifo_on(port)
    port.write(u.IER, 0)
    port.write(u.IER, u.IER_THRI)
    assert port.batching == [False, True]

    port.write(u.IIR, 0)  # the interrupt is still on
    assert port.batching == [False, True, False]
    port.uart.reset()
    assert port.batching == [False, True, False, True]
    port.uart.reset()
    assert port.batching == [False, True, False, True]
    assert port.uart.batching


def test_clearing_the_receive_fifo(port: Port) -> None:
    """FCR bit 1 empties the receiver, drops its interrupt, and makes room."""
    fifo_on(port)
    port.write(u.IER, u.IER_RDI)
    port.uart.receive(bytes(20))

    port.write(u.IIR, u.FCR_ENABLE | u.FCR_CLEAR_RX)

    assert not port.line.level
    assert port.uart.room == u.FIFO_SIZE
    assert port.rooms == 1


def test_break_is_a_nul_with_bi_at_its_place_in_the_stream(port: Port) -> None:
    """LSR.BI shows when the break is at the top of the FIFO, and once (SysRq depends on it)."""
    fifo_on(port)
    port.write(u.IER, u.IER_RLSI)
    port.uart.receive(b"a")
    assert port.uart.send_break()
    port.uart.receive(b"h")

    assert not port.line.level
    assert port.read(u.LSR) & (u.LSR_BI | u.LSR_FIFO_ERROR) == u.LSR_FIFO_ERROR
    assert port.read(u.DATA) == ord("a")
    assert port.line.level
    assert port.read(u.IIR) == u.IIR_FIFO | u.IIR_RLSI
    assert port.read(u.LSR) & (u.LSR_BI | u.LSR_DR) == u.LSR_BI | u.LSR_DR
    assert not port.line.level
    assert not port.read(u.LSR) & u.LSR_BI
    assert [port.read(u.DATA), port.read(u.DATA)] == [0, ord("h")]
    assert not port.read(u.LSR) & u.LSR_FIFO_ERROR


def test_break_needs_room(port: Port) -> None:
    """A break is refused, not lost unseen, while the receiver is full."""
    port.uart.receive(b"a")

    assert not port.uart.send_break()
    port.read(u.DATA)
    assert port.uart.send_break()


def test_loopback_connects_modem_control_to_modem_status(port: Port) -> None:
    """In loopback DTR, RTS, OUT1, OUT2 show as DSR, CTS, RI, DCD (Linux's first test)."""
    for mcr, msr in (
        (u.MCR_DTR, u.MSR_DSR),
        (u.MCR_RTS, u.MSR_CTS),
        (u.MCR_OUT1, u.MSR_RI),
        (u.MCR_OUT2, u.MSR_DCD),
        (0x0F, 0xF0),
        (0, 0),
    ):
        port.write(u.MCR, u.MCR_LOOP | mcr)
        assert port.read(u.MSR) & 0xF0 == msr


def test_modem_status_deltas(port: Port) -> None:
    """A changed line sets its delta until MSR is read; of RI only the falling edge counts."""
    port.write(u.IER, u.IER_MSI)
    port.write(u.MCR, u.MCR_LOOP | 0x0B)  # what was connected stays so
    assert not port.line.level
    port.write(u.MCR, u.MCR_LOOP | 0x0F)  # RI rises: no delta
    assert port.read(u.MSR) == 0xF0

    port.write(u.MCR, u.MCR_LOOP | 0x0B)
    assert port.line.level
    assert port.read(u.MSR) == 0xB0 | 0x04
    port.write(u.MCR, u.MCR_LOOP)
    assert port.read(u.MSR) == 0x0B
    assert port.read(u.MSR) == 0
    assert not port.line.level


def test_loopback_fills_the_fifo_and_overruns(port: Port) -> None:
    """Linux counts 16 bytes that come back of 256, and knows a 16550A by it; nothing is sent."""
    fifo_on(port)
    port.write(u.MCR, u.MCR_LOOP)
    for byte in range(256):
        port.write(u.DATA, byte)
    assert port.read(u.LSR) & u.LSR_OE
    assert not port.read(u.LSR) & u.LSR_OE

    got = []
    while port.read(u.LSR) & u.LSR_DR:
        got.append(port.read(u.DATA))

    assert got == list(range(16))
    assert port.sent == b""


def test_overrun_without_fifo_loses_the_older_byte(port: Port) -> None:
    """A lone RBR is overwritten and LSR.OE says so."""
    port.write(u.MCR, u.MCR_LOOP)
    port.write(u.DATA, 1)
    port.write(u.DATA, 2)

    assert port.read(u.LSR) & u.LSR_OE
    assert port.read(u.DATA) == 2


def test_the_host_is_cut_off_in_loopback(port: Port) -> None:
    """Typing does not mix into a loopback test; it is asked for again afterwards."""
    port.write(u.MCR, u.MCR_LOOP)
    assert port.uart.room == 0
    assert port.uart.receive(b"x") == 0
    assert not port.uart.send_break()

    port.write(u.MCR, 0)

    assert port.rooms == 1
    assert port.uart.receive(b"x") == 1


def test_linux_identifies_a_16550a(port: Port) -> None:
    """The probes of Linux's autoconfig find IER, a FIFO, and none of the chips with more."""
    port.write(u.IER, 0)
    assert port.read(u.IER) == 0
    port.write(u.IER, 0x0F)
    assert port.read(u.IER) & 0x0F == 0x0F
    port.write(u.IER, 0)
    port.write(u.MCR, u.MCR_LOOP | 0x0A)
    assert port.read(u.MSR) & 0xF0 == 0x90
    port.write(u.MCR, 0)
    port.write(u.LCR, 0xBF)  # where a 16650 has its EFR
    port.write(u.IIR, 0)
    port.write(u.LCR, 0)
    fifo_on(port)
    assert port.read(u.IIR) >> 6 == 3  # a FIFO that works
    for lcr in (0x80, 0xBF):
        port.write(u.LCR, lcr)
        assert port.read(u.IIR) != 0  # EFR would read 0: no 16650, no 16850
    port.write(u.LCR, 0)
    port.write(u.IIR, 0x21)  # a 16750 would take bit 5 for 64 bytes
    assert port.read(u.IIR) >> 5 == 6
    port.write(u.IER, 0x40)  # an XScale port has a bit 6
    assert port.read(u.IER) & 0x40 == 0


def test_reset_returns_to_power_on(port: Port) -> None:
    """reset() leaves no trace of the guest: registers, FIFO, line."""
    fifo_on(port, 3)
    for offset in (u.IER, u.LCR, u.MCR, u.SCR):
        port.write(offset, 0x7F)
    port.uart.receive(bytes(16))

    port.uart.reset()

    assert not port.line.level
    assert port.registers() == Port().registers()


SETUPS = st.lists(
    st.tuples(st.sampled_from([u.IER, u.IIR, u.LCR, u.MCR]), st.integers(0, 255)), max_size=6
)


@settings(max_examples=100, deadline=None)
@given(
    setup=SETUPS, typed=st.binary(max_size=20), runs=st.lists(st.binary(max_size=40), max_size=4)
)
def test_a_run_of_writes_equals_single_writes(
    setup: list[tuple[int, int]], typed: bytes, runs: list[bytes]
) -> None:
    """write_many() ends in the state that as many single writes to offset 0 would reach."""
    one, many = Port(), Port()
    for port in (one, many):
        for offset, value in setup:
            port.write(offset, value)
        port.uart.receive(typed)
        port.line.changes.clear()
    for run in runs:
        many.uart.write_many(run)
        for byte in run:
            one.write(u.DATA, byte)

    assert many.sent == one.sent
    assert many.line.level == one.line.level
    assert bool(many.line.rises()) == bool(one.line.rises())
    assert many.registers() == one.registers()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
            st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
            st.tuples(st.just("receive"), st.just(0), st.integers(0, 40)),
            st.tuples(st.just("break"), st.just(0), st.just(0)),
            st.tuples(st.just("reset"), st.just(0), st.just(0)),
        ),
        max_size=60,
    )
)
def test_nothing_a_guest_does_breaks_it(steps: list[tuple[str, int, int]]) -> None:
    """Any sequence leaves a byte-sized answer, a bounded FIFO and a line equal to IIR bit 0."""
    port = Port()
    for what, offset, value in steps:
        if what == "read":
            assert 0 <= port.read(offset) <= 0xFF
        elif what == "write":
            port.write(offset, value)
        elif what == "receive":
            room = port.uart.room
            assert port.uart.receive(bytes(value)) == min(room, value)
        elif what == "break":
            port.uart.send_break()
        else:
            port.uart.reset()
        assert 0 <= port.uart.room <= u.FIFO_SIZE
    level = port.line.level
    assert level == (not port.read(u.IIR) & u.IIR_NO_INT)


def test_bytes_of_two_threads_all_arrive_and_runs_stay_whole() -> None:
    """Two vCPU threads that write at once lose nothing, and no run is torn apart."""
    sent: list[bytes] = []
    uart = Uart(lambda level: None, sent.append)

    def work(byte: int) -> None:
        for _ in range(200):
            uart.write_many(bytes((byte,)) * 5)

    threads = [threading.Thread(target=work, args=(byte,)) for byte in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(sent) == [b"\1" * 5] * 200 + [b"\2" * 5] * 200
