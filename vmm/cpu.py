"""What a vCPU is and where it begins: CPUID, boot-time MSRs, and the state of vCPU 0 at entry.

The guest sees one socket of N cores without hyper-threads, whatever the host's own topology.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vmm import kvmabi as abi
from vmm.loader import BOOT_CS, BOOT_DS, BOOT_TSS, REAL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.boot import Entry
    from vmm.kvm import Vcpu
    from vmm.kvmabi import CpuidEntry

# CPUID leaf 1 (Intel SDM vol. 2A, CPUID).
ECX_VMX: Final = 1 << 5
ECX_TSC_DEADLINE: Final = 1 << 24
ECX_OSXSAVE: Final = 1 << 27  # KVM sets it when the guest sets CR4.OSXSAVE
ECX_HYPERVISOR: Final = 1 << 31
EDX_HTT: Final = 1 << 28
# CPUID leaf 0x80000001 (AMD APM vol. 3, appendix E).
ECX_CMP_LEGACY: Final = 1 << 1
ECX_SVM: Final = 1 << 2

INDEX_SIGNIFICANT: Final = 1  # CpuidEntry.flags

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
CR0_NE: Final = 1 << 5
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
RFLAGS_RESERVED: Final = 1 << 1

MSR_MISC_ENABLE: Final = 0x1A0
MISC_ENABLE_FAST_STRING: Final = 1
MSR_MTRR_DEF_TYPE: Final = 0x2FF
MTRR_ENABLED_WRITE_BACK: Final = 1 << 11 | 6

# Local APIC: the BIOS leaves the PIC wired through on LINT0 and NMI on LINT1 (MP 1.4 §3.6.2.2).
LVT_LINT0: Final = 0x350
LVT_LINT1: Final = 0x360
DELIVERY_NMI: Final = 4 << 8
DELIVERY_EXTINT: Final = 7 << 8


def cpuid(
    supported: Iterable[CpuidEntry], apic_id: int, vcpus: int, *, tsc_deadline: bool
) -> list[CpuidEntry]:
    """Return the CPUID table of one vCPU: what KVM supports, less nesting, with our topology."""
    core_bits = (vcpus - 1).bit_length()
    table = []
    for leaf in supported:
        entry = abi.CpuidEntry.from_buffer_copy(leaf)
        if entry.function in {0xB, 0x1F, 0x8000001E}:
            continue  # host topology; ours follows below
        if entry.function == 1:
            entry.ebx = entry.ebx & 0xFFFF | vcpus << 16 | apic_id << 24
            entry.ecx = entry.ecx & ~(ECX_VMX | ECX_OSXSAVE) | ECX_HYPERVISOR
            if tsc_deadline:
                entry.ecx |= ECX_TSC_DEADLINE
            entry.edx = entry.edx & ~EDX_HTT | (EDX_HTT if vcpus > 1 else 0)
        elif entry.function == 4 and entry.eax & 0x1F:
            # Caches up to level 2 belong to one core, the last level to the socket.
            sharers = vcpus if entry.eax >> 5 & 7 > 2 else 1
            entry.eax = entry.eax & 0x3FFF | sharers - 1 << 14 | vcpus - 1 << 26
        elif entry.function == 0x8000001D and entry.eax & 0x1F:
            sharers = vcpus if entry.eax >> 5 & 7 > 2 else 1
            entry.eax = entry.eax & 0x3FFF | sharers - 1 << 14
        elif entry.function == 0x80000001:
            entry.ecx = entry.ecx & ~(ECX_SVM | ECX_CMP_LEGACY)
            entry.ecx |= ECX_CMP_LEGACY if vcpus > 1 else 0
        elif entry.function == 0x80000008:
            entry.ecx = core_bits << 12 | vcpus - 1
        table.append(entry)
    table += _topology(table, apic_id, vcpus, core_bits)
    return table


def _topology(
    table: list[CpuidEntry], apic_id: int, vcpus: int, core_bits: int
) -> list[CpuidEntry]:
    """Return the leaves that spell out socket, core and thread."""

    def leaf(function: int, index: int, *words: int) -> CpuidEntry:
        return abi.CpuidEntry(function, index, INDEX_SIGNIFICANT, *words)

    leaves = []
    if any(entry.function == 0 and entry.eax >= 0xB for entry in table):
        leaves = [  # EAX bits to shift away, EBX logical CPUs, ECX level and its type, EDX id
            leaf(0xB, 0, 0, 1, 1 << 8, apic_id),
            leaf(0xB, 1, core_bits, vcpus, 2 << 8 | 1, apic_id),
            leaf(0xB, 2, 0, 0, 2, apic_id),
        ]
    if any(entry.function == 0x80000000 and entry.eax >= 0x8000001E for entry in table):
        leaves.append(abi.CpuidEntry(0x8000001E, 0, 0, apic_id, apic_id, 0, 0))
    return leaves


def set_up(vcpu: Vcpu, table: list[CpuidEntry], entry: Entry) -> None:
    """Make a fresh vCPU ready. Number 0 starts at `entry`; the others wait for INIT and SIPI."""
    vcpu.set_cpuid(table)
    vcpu.set_msrs(
        [
            (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ]
    )
    _wire_lapic(vcpu)
    if vcpu.index == 0 and entry.mode != REAL:
        _set_entry(vcpu, entry)


def _wire_lapic(vcpu: Vcpu) -> None:
    lapic = vcpu.lapic()
    regs = memoryview(lapic).cast("B").cast("I")
    regs[LVT_LINT0 // 4] = DELIVERY_EXTINT
    regs[LVT_LINT1 // 4] = DELIVERY_NMI
    regs.release()
    vcpu.set_lapic(lapic)


def _set_entry(vcpu: Vcpu, entry: Entry) -> None:
    """Flat segments, then either paging with the identity map or plain 32-bit mode."""
    long_mode = entry.mode == "long"
    sregs = vcpu.sregs()
    sregs.cs = abi.Segment(0, 0xFFFFFFFF, BOOT_CS, 0xB, 1, 0, not long_mode, 1, long_mode, 1)
    data = abi.Segment(0, 0xFFFFFFFF, BOOT_DS, 3, 1, 0, 1, 1, 0, 1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, data)
    sregs.tr = abi.Segment(0, 0x67, BOOT_TSS, 0xB, 1)
    sregs.gdt.base, sregs.gdt.limit = entry.gdt, entry.gdt_limit
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | (CR0_PG if long_mode else 0)
    sregs.cr3 = entry.cr3
    sregs.cr4 = CR4_PAE if long_mode else 0
    sregs.efer = EFER_LME | EFER_LMA if long_mode else 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.Regs(rip=entry.rip, rflags=RFLAGS_RESERVED, **dict(entry.regs)))
