"""The machine on this host's own KVM: exits, interrupts, resets, CPUs, memory-mapped accesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.errors import KvmError
from tests.kvm.lab import GUESTS, Lab, lab
from vmm.kvmabi import Exit

pytestmark = pytest.mark.kvm

DEVICE = 0xF0000000


def exit_status(value: int) -> int:
    """What isa-debug-exit makes of a guest's value."""
    return value << 1 | 1


def test_ports() -> None:
    """Port accesses of 1, 2 and 4 bytes, unclaimed ports, REP INS and REP OUTS reach the chips."""
    with lab("ports") as bench:
        bench.run()
        assert bench.lines == ["string output works"]
        assert bench.status == exit_status(0x10)
        assert bench.machine.exits()["io"] > 5


def test_uart_by_interrupt() -> None:
    """THRE and received data interrupt the guest; what is typed comes back; nothing is lost."""
    with lab("uart") as bench:
        bench.run(until=lambda: b"ready\n" in bench.serial)
        typed = bytes(range(32, 80)) + b"Q"
        sent = 0

        def feed() -> None:
            nonlocal sent
            sent += bench.machine.board.uart.receive(typed[sent:])

        bench.machine.board.uart.on_room = lambda: bench.loop.call(feed)
        feed()
        bench.serve()
        assert bytes(bench.serial) == b"ready\n" + typed
        assert bench.status == exit_status(0x11)


def test_resets() -> None:
    """Keyboard controller, 0xCF9 and triple fault reset in place; memory keeps its bytes."""
    with lab("reset") as bench:
        bench.run()
        assert bench.resets == ["i8042", "port 0xCF9", "triple fault"]
        assert bench.lines == ["8042", "cf9", "triple fault", "three resets"]
        assert bench.status == exit_status(0x12)


@pytest.mark.parametrize("vcpus", [1, 2, 4, 32])
def test_smp(vcpus: int) -> None:
    """Every CPU of vm.yaml starts by INIT and SIPI."""
    with lab("smp", vcpus=vcpus) as bench:
        bench.run()
        assert bench.status == exit_status(0x20 + vcpus) & 0xFF


class Recorder:
    """A register file at DEVICE: reads as its offset in every byte, remembers writes."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes([offset]) * size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


def test_mmio() -> None:
    """MOV, MOVZX, OR and REP STOS to a device arrive with the right address, width and value."""
    device = Recorder()
    with lab("mmio") as bench:
        bench.machine.board.mmio.claim(DEVICE, 0x100, device, "recorder")
        bench.run()
        assert bench.status == exit_status(0x13), bench.lines
    assert device.writes == [
        (0x20, 1, 0x11),
        (0x24, 2, 0x2233),
        (0x28, 4, 0x44556677),
        (0x2C, 4, 0x8899AABB),
        (0x30, 4, 0x30303031),
        *((offset, 4, 0xDEADBEEF) for offset in (0x40, 0x44, 0x48)),
    ]


def test_pause_and_resume() -> None:
    """A paused guest makes no progress; resumed, it goes on where it was."""
    with lab("uart") as bench:
        bench.run(until=lambda: b"ready\n" in bench.serial)
        bench.machine.pause()
        before = bench.machine.exits()
        bench.machine.board.uart.receive(b"x")
        assert bytes(bench.serial) == b"ready\n"
        assert bench.machine.exits() == before
        bench.machine.resume()
        bench.serve(until=lambda: bytes(bench.serial).endswith(b"x"))
        bench.machine.board.uart.receive(b"Q")
        bench.serve()
        assert bench.status == exit_status(0x11)


def test_pause_many_times() -> None:
    """Pausing races with CPUs that are on their way into the guest; none is missed."""
    with lab("smp", vcpus=4) as bench:
        bench.machine.power_on()
        for _ in range(200):
            bench.machine.resume()
            bench.machine.pause()
        bench.machine.resume()
        bench.serve()
        assert bench.status == exit_status(0x24)


def test_internal_error_is_named(tmp_path: Any) -> None:
    """An instruction that KVM cannot run ends the VM with its bytes and its address."""
    code = bytearray(Path(GUESTS, "storm.bin").read_bytes())
    # Jump to an address that no memory slot backs: no KVM can fetch an instruction there.
    at = len(code) - 64 - 5
    code[at : at + 5] = b"\xe9" + (0xF8000000 - (0x100000 + at + 5)).to_bytes(4, "little")
    path = tmp_path / "wild.bin"
    path.write_bytes(code)
    bench = Lab(str(path)[: -len(".bin")])
    try:
        bench.run()
        assert isinstance(bench.error, KvmError)
        assert "0xf8000000" in str(bench.error)
        assert bench.machine.exits()[Exit.INTERNAL_ERROR.name.lower()] == 1
    finally:
        bench.close()
