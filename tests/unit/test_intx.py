"""vmm.interrupts: the INTx pin, its sharing, its switches, and the status bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.interrupt_lab import ENABLE, INTX_OFF, MASTER, Lab
from tests.unit.pci_guest import card
from vmm.interrupts import CONFIG, Interrupts
from vmm.msix import CAP_MSIX

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=[True, False], ids=["irqfd", "messages"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Every test runs with eventfds and with KICK messages: the guest sees no difference."""
    it = Lab(irqfd=request.param)
    yield it
    it.close()


def serve(lab: Lab) -> bool:
    """Do what a guest's handler does: read ISR, then end the interrupt."""
    served = lab.read_isr()
    lab.eoi()
    return served


def test_the_pin_is_inta_on_the_slots_line(lab: Lab) -> None:
    """PCI 3.0 §6.2.4: pin 1 is INTA; the line register says where firmware would find it."""
    assert lab.guest.read(lab.slot, 0x3C, 2) == 0x0105


def test_the_line_is_a_level(lab: Lab) -> None:
    """It goes high with the first interrupt and low when the guest has dealt with it."""
    assert not lab.line
    lab.signal(0)
    lab.signal(1)
    assert lab.line
    assert serve(lab)
    assert not lab.line
    assert lab.heard() == []


def test_an_interrupt_between_isr_read_and_eoi_is_not_lost(lab: Lab) -> None:
    """EOI lowers the line; a device that asserts again must find it high afterwards."""
    lab.signal(0)
    lab.read_isr()
    lab.signal(1)
    lab.eoi()
    assert lab.line
    assert serve(lab)
    assert not lab.line


def test_eoi_without_reading_isr_keeps_the_line(lab: Lab) -> None:
    """A level stays asserted for as long as the device asserts it."""
    lab.signal(0)
    lab.eoi()
    assert lab.line
    assert serve(lab)
    assert not lab.line


@pytest.mark.parametrize("other_irqfd", [True, False])
def test_devices_share_a_line(lab: Lab, other_irqfd: bool) -> None:
    """Two devices on one GSI, wired either way: the line is the OR of both."""
    function = card("other")
    other = Interrupts(function, lab.router, 1, lab.gsi, lambda: False, irqfd=other_irqfd)
    lab.guest.bus.add(function)
    other.connect()
    lab.signal(0)
    other.notify(0)
    lab.read_isr()
    lab.eoi()
    assert lab.line
    other.lower()
    assert not lab.line
    other.close()


def test_intx_disable_silences_the_line(lab: Lab) -> None:
    """PCI 3.0 §6.2.2: command bit 10 keeps the device from asserting INTx."""
    lab.signal(0)
    lab.command(INTX_OFF)
    assert not lab.line
    lab.signal(1)
    assert not lab.line


def test_intx_enable_raises_what_is_still_asserted(lab: Lab) -> None:
    """A level has no memory of its own: what ISR says when the bit clears decides."""
    lab.command(INTX_OFF)
    lab.signal(0)
    lab.command(0)
    assert lab.line
    assert serve(lab)
    assert not lab.line


def test_intx_enable_raises_nothing_that_was_served_meanwhile(lab: Lab) -> None:
    """A guest that polls ISR with the line off gets no interrupt for it later."""
    lab.command(INTX_OFF)
    lab.signal(0)
    lab.read_isr()
    lab.command(0)
    assert not lab.line


@pytest.mark.parametrize("off", [0, INTX_OFF])
def test_the_status_bit_tells_of_the_interrupt_even_while_disabled(lab: Lab, off: int) -> None:
    """PCI 3.0 §6.2.3: interrupt status shows the device's state whatever command bit 10 is.

    Drivers that share a line and mask by the disable bit (vfio, uio) decide by it.
    """
    lab.command(off)
    assert not lab.status_bit()
    lab.signal(0)
    assert lab.status_bit()
    lab.read_isr()
    assert not lab.status_bit()


def test_the_status_bit_leaves_the_others_alone(lab: Lab) -> None:
    """The capabilities bit beside it must not flicker."""
    for _ in range(2):
        assert lab.guest.read(lab.slot, 0x06, 2) & 0x10
        lab.signal(0)


def test_msix_takes_over_from_intx(lab: Lab) -> None:
    """PCI 3.0 §6.8.2.3: while MSI-X is enabled the function must not use its pin."""
    lab.signal(0)
    lab.use_msix()
    assert not lab.line
    assert not lab.status_bit()
    lab.heard()
    lab.signal(1)
    assert lab.heard() == [0x41]
    assert not lab.line


def test_intx_takes_over_from_msix(lab: Lab) -> None:
    """Disabling MSI-X brings the pin back, with what the device asserts then."""
    lab.use_msix()
    lab.mask(0)
    lab.signal(0)
    lab.control(0)
    assert lab.line
    assert serve(lab)
    lab.control(ENABLE)
    lab.mask(0, False)
    assert lab.heard() == []  # it was served by way of the pin
    lab.control(0)
    assert not lab.line
    lab.signal(1)
    assert lab.line


def test_a_device_reset_lowers_what_the_vm_process_raised(lab: Lab) -> None:
    """Virtio 1.2 §2.4: a reset device interrupts nobody. KVM's own level falls at EOI."""
    lab.interrupts.notify(CONFIG)
    assert lab.line
    lab.interrupts.clear_vectors()
    assert not lab.line


def test_a_bus_reset_lowers_the_line(lab: Lab) -> None:
    """Nothing of the old guest's interrupts may reach the new one."""
    lab.signal(0)
    lab.guest.bus.reset()
    assert not lab.line
    lab.signal(1)  # from a device that has not heard of the reset yet
    lab.isr = False
    lab.guest.bus.connect()
    assert not lab.line
    lab.signal(0)
    assert lab.line


def test_nothing_is_wired_before_the_chips_are_there(lab: Lab) -> None:
    """KVM refuses irqfds without interrupt chips: reset() unplugs, connect() plugs in."""
    lab.guest.bus.reset()
    lab.vm.lines.clear()
    lab.command(MASTER | INTX_OFF)
    lab.command(MASTER)
    lab.control(ENABLE)
    lab.control(0)
    lab.signal(0)
    assert lab.vm.irqfds == {}
    assert lab.vm.lines == []


def test_a_device_without_msix_has_only_its_pin() -> None:
    """A legacy device keeps its register block without the MSI-X gap: no capability, no BAR."""
    lab = Lab(msix_bar=None)
    assert CAP_MSIX not in dict(lab.guest.capabilities(lab.slot))
    assert lab.interrupts.vectors == 0
    assert lab.interrupts.set_vector(0, 0) == 0xFFFF
    lab.signal(CONFIG)
    assert lab.line
    assert serve(lab)
    assert not lab.line
    lab.close()
