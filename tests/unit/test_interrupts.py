"""vmm.interrupts: MSI-X delivery, masking without loss, and who leads where."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from config.errors import HostError, KvmError
from tests.descriptors import count_before
from tests.unit.fake_vm import FakeVm
from tests.unit.interrupt_lab import ENABLE, FUNCTION_MASK, MASTER, Lab
from tests.unit.pci_guest import card
from vmm.interrupts import CONFIG, NO_VECTOR, Interrupts
from vmm.irq import Router

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[True, False], ids=["irqfd", "messages"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Every test runs with eventfds and with KICK messages: the guest sees no difference."""
    it = Lab(irqfd=request.param)
    yield it
    it.close()


def test_each_source_sends_its_vectors_message(lab: Lab) -> None:
    """A queue's interrupt is the message of the vector its driver chose."""
    lab.use_msix()
    for queue in (1, CONFIG, 0):
        lab.signal(queue)
    assert lab.heard() == [0x41, 0x42, 0x40]
    assert not lab.line


def test_irqfd_keeps_the_vm_process_out_of_it() -> None:
    """Once set up, an interrupt takes no ioctl and no notify()."""
    lab = Lab()
    lab.use_msix()
    lab.vm.adversary = lambda: pytest.fail("an ioctl was needed")
    lab.signal(0)
    assert lab.heard() == [0x40]
    lab.vm.adversary = lambda: None
    lab.close()


def test_a_masked_vector_is_silent_and_pending(lab: Lab) -> None:
    """PCI 3.0 §6.8.2.9: an interrupt of a masked vector sets its pending bit instead."""
    lab.use_msix()
    lab.mask(1)
    lab.signal(1)
    lab.signal(0)
    assert lab.heard() == [0x40]
    assert lab.pba() == 0b010
    assert lab.pba() == 0b010  # looking does not change it


def test_unmasking_delivers_what_is_pending_once(lab: Lab) -> None:
    """PCI 3.0 §6.8.2.9: the message goes out when the mask comes off, and the bit clears."""
    lab.use_msix()
    lab.mask(1)
    for _ in range(3):
        lab.signal(1)
    lab.mask(1, False)
    assert lab.heard() == [0x41]
    assert lab.pba() == 0
    lab.mask(1)
    lab.mask(1, False)
    assert lab.heard() == []  # nothing came, nothing goes


def test_the_function_mask_masks_every_vector(lab: Lab) -> None:
    """PCI 3.0 §6.8.2.3: function mask keeps everything pending, and release sends it all."""
    lab.use_msix()
    lab.control(ENABLE | FUNCTION_MASK)
    lab.signal(0)
    lab.signal(CONFIG)
    assert (lab.heard(), lab.pba()) == ([], 0b101)
    lab.mask(0)
    lab.control(ENABLE)
    assert (lab.heard(), lab.pba()) == ([0x42], 0b001)
    lab.mask(0, False)
    assert (lab.heard(), lab.pba()) == ([0x40], 0)


def test_a_message_changed_while_masked_is_the_one_sent(lab: Lab) -> None:
    """An interrupt that waited goes to the CPU the vector was moved to, not to the old one."""
    lab.use_msix()
    lab.mask(0)
    lab.signal(0)
    lab.program(0, 0x77)
    lab.mask(0, False)
    lab.signal(0)
    assert lab.heard() == [0x77, 0x77]


def test_queues_may_share_a_vector(lab: Lab) -> None:
    """A driver short of vectors gives one to all queues; pending is then their OR."""
    lab.use_msix()
    for queue in (0, 1):
        assert lab.interrupts.set_vector(queue, 2) == 2
    lab.signal(0)
    lab.signal(1)
    lab.signal(CONFIG)
    assert lab.heard() == [0x42] * 3
    lab.mask(2)
    lab.signal(1)
    assert lab.pba() == 0b100
    lab.mask(2, False)
    assert lab.heard() == [0x42]


def test_moving_a_queue_takes_its_pending_interrupt_along(lab: Lab) -> None:
    """The interrupt belongs to the queue: a new vector must not lose it."""
    lab.use_msix()
    lab.mask(0)
    lab.signal(0)
    lab.interrupts.set_vector(0, 1)
    assert lab.heard() == [0x41]
    assert lab.pba() == 0


def test_without_a_vector_there_is_no_interrupt(lab: Lab) -> None:
    """Virtio 1.2 §4.1.5.1.2: NO_VECTOR means silence, and silence is not made up for later."""
    lab.use_msix()
    assert lab.interrupts.set_vector(0, NO_VECTOR) == NO_VECTOR
    lab.signal(0)
    assert (lab.heard(), lab.pba()) == ([], 0)
    lab.interrupts.set_vector(0, 0)
    assert lab.heard() == []
    lab.signal(0)
    assert lab.heard() == [0x40]


@pytest.mark.parametrize("vector", [3, 0x7FF, 0xFFFE, -1, 1 << 40])
def test_a_vector_past_the_table_is_refused(lab: Lab, vector: int) -> None:
    """CVE-2024-26327: nothing a guest writes may exceed what the capability advertises."""
    lab.use_msix()
    assert lab.interrupts.set_vector(0, vector) == NO_VECTOR
    assert lab.interrupts.vector(0) == NO_VECTOR
    lab.signal(0)
    assert lab.heard() == []


@pytest.mark.parametrize("queue", [2, 0xFFFE, -1, 1 << 40])
def test_a_queue_that_is_not_there_is_harmless(lab: Lab, queue: int) -> None:
    """Cloud Hypervisor #7918: a bad queue_select must not reach a table of vectors."""
    lab.use_msix()
    assert lab.interrupts.vector(queue) == NO_VECTOR
    assert lab.interrupts.set_vector(queue, 0) == NO_VECTOR
    assert lab.interrupts.call_fd(queue) is None
    lab.interrupts.notify(queue)
    assert lab.heard() == []


def test_vectors_set_and_taken_before_msix_is_enabled(lab: Lab) -> None:
    """CVE-2024-4693: firmware and early drivers touch vectors in any order."""
    assert lab.interrupts.set_vector(CONFIG, 2) == 2
    assert lab.interrupts.set_vector(CONFIG, NO_VECTOR) == NO_VECTOR
    assert lab.interrupts.set_vector(CONFIG, NO_VECTOR) == NO_VECTOR
    lab.interrupts.clear_vectors()
    lab.interrupts.set_vector(0, 1)
    lab.control(ENABLE)
    lab.interrupts.set_vector(0, NO_VECTOR)
    lab.control(0)
    lab.interrupts.clear_vectors()
    lab.use_msix()
    lab.signal(CONFIG)
    assert lab.heard() == [0x42]


def test_a_device_reset_takes_the_vectors(lab: Lab) -> None:
    """After a device reset its vector registers read NO_VECTOR and nothing is sent."""
    lab.use_msix()
    lab.interrupts.clear_vectors()
    assert [lab.interrupts.vector(queue) for queue in lab.sources] == [NO_VECTOR] * 3
    lab.signal(0)
    assert lab.heard() == []


def test_messages_wait_for_bus_mastering(lab: Lab) -> None:
    """PCI 3.0 §6.2.2: without bit 2 a device starts no transfer, and a message is one."""
    lab.use_msix()
    lab.command(0)
    lab.signal(0)
    assert lab.heard() == []
    lab.command(MASTER)
    assert lab.heard() == [0x40]


def test_old_drivers_may_leave_bus_mastering_off() -> None:
    """Legacy drivers never set the bit; a transitional device does not insist."""
    lab = Lab(needs_master=False)
    lab.use_msix()
    lab.command(0)
    lab.signal(0)
    assert lab.heard() == [0x40]
    lab.close()


def test_a_message_to_elsewhere_stays_pending(lab: Lab) -> None:
    """A vector that points at RAM writes nothing; it sends once it points at an APIC."""
    lab.use_msix()
    lab.table(0, 0, 0x1000)
    lab.signal(0)
    assert lab.heard() == []
    lab.program(0, 0x40)
    assert lab.heard() == [0x40]


def test_reset_returns_to_power_on(lab: Lab) -> None:
    """After a bus reset: MSI-X off, vectors gone, nothing pending, nothing attached."""
    lab.use_msix()
    lab.mask(0)
    lab.signal(0)
    lab.guest.bus.reset()
    assert lab.vm.irqfds == {}
    assert not lab.interrupts.msix_enabled
    assert [lab.interrupts.vector(queue) for queue in lab.sources] == [NO_VECTOR] * 3
    lab.guest.bus.connect()
    lab.isr = False
    lab.use_msix()
    assert lab.heard() == []
    lab.signal(0)
    assert lab.heard() == [0x40]


def test_a_renewed_vm_gets_its_routes_again(lab: Lab) -> None:
    """A machine reset brings a new KVM VM: reset() lets go of the old, connect() wires the new."""
    lab.use_msix()
    lab.guest.bus.reset()
    lab.vm.__init__()  # type: ignore[misc]  # the same object, as kvm.Vm.renew() does it
    lab.guest.bus.connect()
    lab.use_msix()
    lab.signal(1)
    assert lab.heard() == [0x41]


def test_close_frees_descriptors_and_gsis(lab: Lab) -> None:
    """Nothing is left behind: all eventfds are closed, the GSIs can be had again."""
    lab.use_msix()
    lab.close()
    assert lab.vm.irqfds == {}
    first = lab.router.allocate()
    assert first >= 24
    lab.router.release([first])
    it = Interrupts(card(), lab.router, 2, 5, lambda: False, irqfd=lab.irqfd)
    it.close()


def test_running_out_of_descriptors_is_a_clean_error() -> None:
    """What was opened before the failure is closed again."""
    taken = {int(fd) for fd in os.listdir("/proc/self/fd")}
    before = len(taken)
    room_for_ten = sorted(set(range(before + 11)) - taken)[10]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (room_for_ten, hard))
    try:
        with pytest.raises(HostError, match="card: eventfd"):
            Interrupts(card(), Router(FakeVm()), 64, 5, lambda: False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before


def test_running_out_of_routes_is_a_clean_error() -> None:
    """A device that does not fit gives back the GSIs it got."""
    router = Router(FakeVm(), max_routes=42)
    before = count_before()
    with pytest.raises(HostError, match="no interrupt route left"):
        Interrupts(card(), router, 2, 5, lambda: False)
    assert len(os.listdir("/proc/self/fd")) == before
    assert {router.allocate(), router.allocate()} == {24, 25}


def test_a_device_process_cannot_hang_us_by_its_eventfds() -> None:
    """It shares the open files and may make them blocking; draining must not block (it would)."""
    lab = Lab()
    for queue in lab.sources:
        fd = lab.interrupts.call_fd(queue)
        assert fd is not None
        os.set_blocking(fd, True)
    lab.command(MASTER)
    lab.control(ENABLE)
    for queue in lab.sources:
        lab.interrupts.set_vector(queue, 0)
    lab.guest.bus.reset()
    lab.close()


def test_a_refusal_of_kvm_is_an_error_of_the_host(lab: Lab) -> None:
    """KvmError reaches the vCPU thread, which stops the VM: a half-wired device must not run."""

    def refuse() -> None:
        raise KvmError("no")

    lab.use_msix()
    lab.mask(0)
    lab.signal(0)
    lab.vm.adversary = refuse
    with pytest.raises(KvmError):
        lab.mask(0, False)
    lab.vm.adversary = lambda: None


def test_who_must_know_is_told_of_msix(lab: Lab) -> None:
    """Once when it is switched on, once when it goes: by the guest, or with everything."""
    told: list[bool] = []
    lab.interrupts.on_msix = told.append
    lab.use_msix()
    lab.mask(0)
    lab.control(ENABLE | FUNCTION_MASK)
    assert told == [True]
    lab.control(0)
    assert told == [True, False]
    lab.control(ENABLE)
    lab.interrupts.reset()
    assert told == [True, False, True, False]
