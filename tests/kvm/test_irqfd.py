"""What vmm.callfd relies on, asked of the running kernel: no guest code runs here.

A local APIC's IRR, read through KVM_GET_LAPIC, shows which vectors were delivered.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest

from tests.unit.interrupt_lab import ENABLE, MASTER
from tests.unit.pci_guest import COMMAND, Guest, card
from vmm.callfd import CallFd
from vmm.interrupts import Interrupts
from vmm.irq import Message, Router
from vmm.kvm import System, Vcpu, Vm

if TYPE_CHECKING:
    from collections.abc import Iterator

VECTOR: Final = 0x41
MESSAGE: Final = Message(0xFEE00000, VECTOR)  # fixed delivery to APIC 0
# Local APIC registers (Intel SDM vol. 3 table 11-1).
SVR: Final = 0xF0
IRR: Final = 0x200 + VECTOR // 32 * 16
DEADLINE: Final = 10.0  # seconds
ROUNDS: Final = 300


class Apic:
    """A VM with interrupt chips and one vCPU that never runs."""

    def __init__(self) -> None:
        self.system = System()
        self.vm = Vm(self.system)
        self.vm.create_chips()
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        self._write(SVR, 0x1FF)  # software-enabled: it accepts interrupts

    def close(self) -> None:
        """Free everything."""
        self.vcpu.close()
        self.vm.close()
        self.system.close()

    def _write(self, register: int, value: int) -> None:
        state = self.vcpu.lapic()
        struct.pack_into("<I", state.regs, register, value)
        self.vcpu.set_lapic(state)

    def take(self) -> bool:
        """Return whether VECTOR was delivered since the last call."""
        (word,) = struct.unpack_from("<I", self.vcpu.lapic().regs, IRR)
        if word:  # else a delivery between the read and the write would be wiped out
            self._write(IRR, 0)
        return bool(word)

    def wait(self) -> bool:
        """Like take(), but give the kernel's worker time: it delivers what attaching found."""
        end = time.monotonic() + DEADLINE
        while not (taken := self.take()) and time.monotonic() < end:
            os.sched_yield()
        return taken


@pytest.fixture
def apic() -> Iterator[Apic]:
    it = Apic()
    yield it
    it.close()


@pytest.fixture
def call() -> Iterator[CallFd]:
    it = CallFd()
    yield it
    it.close()


def routed(apic: Apic) -> int:
    """Return a GSI that sends MESSAGE."""
    router = Router(apic.vm, 4096)
    gsi = router.allocate()
    router.route(gsi, MESSAGE)
    return gsi


def test_an_attached_eventfd_delivers_by_itself(apic: Apic, call: CallFd) -> None:
    """A write while attached interrupts at once and leaves nothing behind after the detach."""
    gsi = routed(apic)
    call.move(apic.vm, gsi)
    os.eventfd_write(call.fd, 1)
    assert apic.take()
    call.move(apic.vm, None)
    assert not call.waiting()
    assert not apic.take()


def test_a_detached_eventfd_keeps_the_signal(apic: Apic, call: CallFd) -> None:
    """Nothing is delivered, the counter says so, and looking at it changes nothing."""
    gsi = routed(apic)
    call.move(apic.vm, gsi)
    call.move(apic.vm, None)
    os.eventfd_write(call.fd, 1)
    assert [call.waiting(), call.waiting()] == [True, True]
    assert not apic.take()


def test_attaching_delivers_what_waited_once(apic: Apic, call: CallFd) -> None:
    """Attach looks at the counter; the detach after it waits for that delivery and clears."""
    gsi = routed(apic)
    for _ in range(100):
        os.eventfd_write(call.fd, 3)
        call.move(apic.vm, gsi)
        call.move(apic.vm, None)
        assert apic.take()
        assert not call.waiting()
    call.move(apic.vm, gsi)
    assert not apic.take()
    call.move(apic.vm, None)


def test_two_eventfds_share_a_gsi_and_a_resample_eventfd(apic: Apic, call: CallFd) -> None:
    """Queues of one device share the pin, so KVM must take several irqfds with one resample."""
    other = CallFd()
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    call.move(apic.vm, 5, resample)
    other.move(apic.vm, 5, resample)
    for it in (call, other):
        os.eventfd_write(it.fd, 1)
        it.move(apic.vm, None)
    os.close(resample)
    other.close()


def test_no_signal_is_lost_while_the_guest_masks(apic: Apic) -> None:
    """A device signals from another thread while the vector's mask bit flips: each one arrives."""
    guest = Guest()
    function = card()
    router = Router(apic.vm, 4096)
    interrupts = Interrupts(function, router, 1, 5, lambda: False)
    slot = guest.bus.add(function)
    guest.bus.connect()
    guest.write(slot, COMMAND, 2, MASTER | 2)
    bar = guest.read(slot, 0x14)
    guest.mmio.write(bar, 8, MESSAGE.address)
    guest.mmio.write(bar + 8, 4, MESSAGE.data)
    guest.write(slot, dict(guest.capabilities(slot))[0x11] + 2, 2, ENABLE)
    interrupts.set_vector(0, 0)
    fd = interrupts.call_fd(0)
    assert fd is not None
    go, signalled = threading.Semaphore(0), threading.Semaphore(0)

    def device() -> None:
        for _ in range(ROUNDS):
            go.acquire()
            os.eventfd_write(fd, 1)
            signalled.release()

    thread = threading.Thread(target=device, daemon=True)
    thread.start()
    for _ in range(ROUNDS):
        go.release()
        while not signalled.acquire(blocking=False):
            for masked in (0, 1):
                guest.mmio.write(bar + 12, 4, masked)
        delivered, pending = apic.take(), bool(guest.mmio.read(bar + 0x800, 4))
        assert delivered != pending  # one signal: it went out or it waits
        guest.mmio.write(bar + 12, 4, 0)
        assert delivered or apic.wait()
        guest.mmio.write(bar + 12, 4, 1)
        assert not apic.take()  # and not twice
    thread.join(DEADLINE)
    interrupts.close()
