"""CPUID as the guest sees it: one socket, N cores, no nesting."""

from __future__ import annotations

import pytest

from vmm import cpu
from vmm.kvmabi import CpuidEntry


def host() -> list[CpuidEntry]:
    """A host of two sockets with hyper-threads, VMX and SVM at once."""
    return [
        CpuidEntry(0, 0, 0, 0x1F),
        CpuidEntry(1, 0, 0, 0, 0x07100800, 1 << 5 | 1 << 27 | 1 << 21, 0),
        CpuidEntry(4, 0, 1, 1 << 5 | 1 | 7 << 14 | 0x3F << 26),  # L1 data
        CpuidEntry(4, 3, 1, 3 << 5 | 3 | 7 << 14 | 0x3F << 26),  # L3 unified
        CpuidEntry(0xB, 0, 1, 1, 2, 1 << 8, 7),
        CpuidEntry(0x1F, 0, 1, 1, 2, 1 << 8, 7),
        CpuidEntry(0x80000000, 0, 0, 0x8000001F),
        CpuidEntry(0x80000001, 0, 0, 0, 0, 1 << 2),
        CpuidEntry(0x80000008, 0, 0, 0x3030, 0, 0x7F),
    ]


def leaf(table: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    """The one entry of a leaf."""
    (entry,) = [e for e in table if (e.function, e.index) == (function, index)]
    return entry


@pytest.mark.parametrize("vcpus", [1, 2, 3, 32])
def test_topology(vcpus: int) -> None:
    """Every leaf that tells of cores tells the same: `vcpus` cores of one thread each."""
    bits = (vcpus - 1).bit_length()
    for apic_id in range(vcpus):
        table = cpu.cpuid(host(), apic_id, vcpus, tsc_deadline=True)
        one = leaf(table, 1)
        assert one.ebx >> 24 == apic_id
        assert one.ebx >> 16 & 0xFF == vcpus
        assert bool(one.edx & cpu.EDX_HTT) == (vcpus > 1)
        assert leaf(table, 4, 0).eax >> 14 & 0xFFF == 0  # an L1 of its own
        assert leaf(table, 4, 3).eax >> 14 & 0xFFF == vcpus - 1
        assert leaf(table, 4, 3).eax >> 26 == vcpus - 1
        assert (leaf(table, 0xB, 0).ebx, leaf(table, 0xB, 0).eax) == (1, 0)
        assert (leaf(table, 0xB, 1).ebx, leaf(table, 0xB, 1).eax) == (vcpus, bits)
        assert {leaf(table, 0xB, at).edx for at in range(3)} == {apic_id}
        assert leaf(table, 0x80000008).ecx == bits << 12 | vcpus - 1
        assert leaf(table, 0x8000001E).eax == apic_id
        assert not [e for e in table if e.function == 0x1F]


def test_features() -> None:
    """A hypervisor is announced, nesting is not, and OSXSAVE is left to KVM."""
    table = cpu.cpuid(host(), 0, 2, tsc_deadline=True)
    assert leaf(table, 1).ecx == 1 << 31 | 1 << 24 | 1 << 21
    assert leaf(table, 0x80000001).ecx == cpu.ECX_CMP_LEGACY
    without = cpu.cpuid(host(), 0, 1, tsc_deadline=False)
    assert leaf(without, 1).ecx == 1 << 31 | 1 << 21
    assert leaf(without, 0x80000001).ecx == 0


def test_the_hosts_table_is_not_changed() -> None:
    """Each vCPU gets its own copy: the table KVM gave serves all of them."""
    table = host()
    before = [bytes(entry) for entry in table]
    cpu.cpuid(table, 3, 4, tsc_deadline=True)
    assert [bytes(entry) for entry in table] == before
