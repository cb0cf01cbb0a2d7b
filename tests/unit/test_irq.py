"""vmm.irq: the routing table KVM gets, and lines that devices share."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from config.errors import HostError, KvmError
from tests.unit.fake_vm import FakeVm
from vmm.irq import IOAPIC, NR_PINS, PIC_MASTER, PIC_SLAVE, TO_MSI, Message, Router, pin_routes

ADDRESS = 0xFEE01000


def msi_rows(vm: FakeVm) -> dict[int, tuple[int, int, int]]:
    """Return the messages of the table KVM has now, by GSI."""
    return {
        entry.gsi: (entry.u[0], entry.u[1], entry.u[2])
        for entry in vm.tables[-1]
        if entry.type == TO_MSI
    }


def test_pins_keep_the_kernels_own_routes() -> None:
    """GSI n leads to I/O APIC pin n, and below 16 to pin n of the PIC pair as well."""
    rows = {(entry.gsi, entry.u[0], entry.u[1]) for entry in pin_routes()}

    apic = {(gsi, IOAPIC, gsi) for gsi in range(24)}
    master = {(gsi, PIC_MASTER, gsi) for gsi in range(8)}
    slave = {(gsi, PIC_SLAVE, gsi - 8) for gsi in range(8, 16)}
    assert rows == apic | master | slave
    assert len(pin_routes()) == 40


def test_every_table_repeats_the_pins_and_all_messages() -> None:
    """KVM_SET_GSI_ROUTING replaces everything, so everything is in each call."""
    vm = FakeVm()
    router = Router(vm)
    first, second = router.allocate(), router.allocate()

    router.route(first, Message(ADDRESS, 0x41))
    router.route(second, Message(ADDRESS, 0x42))

    assert [bytes(entry) for entry in vm.tables[-1][:40]] == [bytes(e) for e in pin_routes()]
    assert msi_rows(vm) == {first: (ADDRESS, 0, 0x41), second: (ADDRESS, 0, 0x42)}


def test_the_high_half_of_an_address_has_its_own_word() -> None:
    """KVM takes a 64-bit message address as address_lo and address_hi."""
    vm = FakeVm()
    router = Router(vm)
    gsi = router.allocate()

    router.route(gsi, Message(0x1_FEE0_0000, 7))

    assert msi_rows(vm) == {gsi: (0xFEE00000, 1, 7)}


def test_an_unchanged_route_costs_no_ioctl() -> None:
    """Masking and unmasking routes the same message again; KVM need not hear of it."""
    vm = FakeVm()
    router = Router(vm)
    gsi = router.allocate()
    for _ in range(3):
        router.route(gsi, Message(ADDRESS, 0x41))
    assert len(vm.tables) == 1

    router.route(gsi, Message(ADDRESS, 0x42))
    assert len(vm.tables) == 2


def test_a_refused_table_is_not_remembered() -> None:
    """When KVM refuses, the next attempt asks again instead of believing it was done."""
    vm = FakeVm()
    router = Router(vm)
    gsi = router.allocate()

    def refuse() -> None:
        raise KvmError("no")

    vm.adversary = refuse
    with pytest.raises(KvmError):
        router.route(gsi, Message(ADDRESS, 0x41))
    vm.adversary = lambda: None
    router.route(gsi, Message(ADDRESS, 0x41))
    assert msi_rows(vm) == {gsi: (ADDRESS, 0, 0x41)}


def test_forgotten_routes_are_sent_again() -> None:
    """A reset brings a new KVM table, so a route set before it must be set anew."""
    vm = FakeVm()
    router = Router(vm)
    gsi, other = router.allocate(), router.allocate()
    router.route(gsi, Message(ADDRESS, 0x41))

    router.forget([gsi])
    router.route(other, Message(ADDRESS, 0x42))
    assert msi_rows(vm) == {other: (ADDRESS, 0, 0x42)}
    router.route(gsi, Message(ADDRESS, 0x41))
    assert gsi in msi_rows(vm)


def test_gsis_are_above_the_pins_and_distinct_until_the_table_is_full() -> None:
    """KVM takes at most KVM_CAP_IRQ_ROUTING rows and no GSI beyond them; then it is an error."""
    router = Router(FakeVm(), max_routes=4096)
    gsis = [router.allocate() for _ in range(4096 - 40)]

    assert len(set(gsis)) == len(gsis)
    assert min(gsis) == NR_PINS
    assert max(gsis) < 4096
    with pytest.raises(HostError, match="no interrupt route left"):
        router.allocate()

    router.release(gsis[7:8])
    assert router.allocate() == gsis[7]


def test_a_shared_line_is_high_while_anybody_asserts_it() -> None:
    """Level interrupts share a pin by wired OR; the pin moves only when the OR does."""
    vm = FakeVm()
    router = Router(vm)
    one, two = router.wire(10, "one"), router.wire(10, "two")

    one(True)
    two(True)
    one(True)
    one(False)
    assert vm.lines == [(10, True)]
    two(False)
    two(False)
    assert vm.lines == [(10, True), (10, False)]


def test_lines_of_different_pins_are_apart() -> None:
    """Releasing one pin leaves another pin of the same device alone."""
    vm = FakeVm()
    router = Router(vm)
    router.line(5).set("card", True)
    router.line(10).set("card", True)

    router.line(5).set("card", False)

    assert not vm.level(5)
    assert vm.level(10)


def test_the_last_word_on_a_line_reaches_the_kernel_last() -> None:
    """Two threads that drive a line leave it as our own OR says, whatever the timing."""
    vm = FakeVm()
    line = Router(vm).line(11)

    def toggle(owner: str) -> None:
        for _ in range(500):
            line.set(owner, True)
            line.set(owner, False)
        line.set(owner, owner == "last")

    threads = [threading.Thread(target=toggle, args=(owner,)) for owner in ("first", "last")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert vm.level(11)
    levels = [level for _, level in vm.lines]
    assert all(a != b for a, b in pairwise(levels))  # only changes


@pytest.mark.parametrize(
    ("address", "reaches"),
    [
        *((0xFEE00000, True), (0xFEEFF00C, True)),
        *((0xFEF00000, False), (0x1000, False), (0x1_FEE0_0000, False), (0, False)),
    ],
)
def test_only_the_local_apics_addresses_interrupt(address: int, reaches: bool) -> None:
    """A message to another address is a memory write (Intel SDM vol. 3 §11.11.1)."""
    assert Message(address, 0).interrupts is reaches
