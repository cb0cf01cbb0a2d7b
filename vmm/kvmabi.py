"""The KVM ABI as data: request numbers, structures, exit reasons, capabilities (linux/kvm.h).

Nothing here does anything. Structures are ctypes, since the kernel reads and writes them; a
unit test checks every size against the header's.
"""

from __future__ import annotations

from ctypes import Array, Structure, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum
from typing import Final

API_VERSION: Final = 12


class Cap(IntEnum):
    """What KVM_CHECK_EXTENSION is asked for."""

    IRQCHIP = 0
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    MP_STATE = 14
    COALESCED_MMIO = 15  # value: page of the ring inside the vCPU mapping
    IRQ_ROUTING = 25
    IRQFD = 32
    PIT2 = 33
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    IMMEDIATE_EXIT = 136
    COALESCED_PIO = 162


class Exit(IntEnum):
    """KVM_EXIT_*: why KVM_RUN came back."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


class InternalError(IntEnum):
    """KVM_INTERNAL_ERROR_*: the suberror of KVM_EXIT_INTERNAL_ERROR."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class UserspaceMemoryRegion(Structure):
    """Guest RAM slot; addresses and size in bytes, page aligned."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),  # GPA
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),  # HVA
    )


class Regs(Structure):
    """General registers of a vCPU."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
        )
    )


class Segment(Structure):
    """One segment register with its hidden part (Intel SDM vol. 3 §3.4.3)."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class Dtable(Structure):
    """GDTR or IDTR."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class Sregs(Structure):
    """Segment, control and APIC base registers of a vCPU."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Dtable),
        ("idt", Dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class LapicState(Structure):
    """The local APIC's 1 KiB register page."""

    _fields_ = (("regs", c_uint8 * 1024),)


class MpState(Structure):
    """Multiprocessing state: 0 runnable, 1 uninitialized, 2 INIT received, 3 halted."""

    _fields_ = (("mp_state", c_uint32),)


class PitConfig(Structure):
    """KVM_CREATE_PIT2; flag 1 lets the kernel answer port 0x61 as well."""

    _fields_ = (("flags", c_uint32), ("pad", c_uint32 * 15))


class IrqLevel(Structure):
    """KVM_IRQ_LINE: put one GSI high or low."""

    _fields_ = (("irq", c_uint32), ("level", c_uint32))


class Irqfd(Structure):
    """KVM_IRQFD; flags 1 deassign, 2 resample."""

    _fields_ = (
        *((name, c_uint32) for name in ("fd", "gsi", "flags", "resamplefd")),
        ("pad", c_uint8 * 16),
    )


class Ioeventfd(Structure):
    """KVM_IOEVENTFD; flags 1 datamatch, 2 pio, 4 deassign."""

    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class CoalescedZone(Structure):
    """A range whose writes KVM queues in the ring instead of exiting; pio 1 means ports."""

    _fields_ = (("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32))


class Msi(Structure):
    """KVM_SIGNAL_MSI: one message-signalled interrupt, now."""

    _fields_ = (
        *((name, c_uint32) for name in ("address_lo", "address_hi", "data", "flags", "devid")),
        ("pad", c_uint8 * 12),
    )


class RoutingEntry(Structure):
    """One row of the GSI routing table; type 1 irqchip (irqchip, pin), type 2 MSI."""

    _fields_ = (
        *((name, c_uint32) for name in ("gsi", "type", "flags", "pad")),
        ("u", c_uint32 * 8),  # irqchip: chip, pin; MSI: address low, high, data
    )


class CpuidEntry(Structure):
    """One CPUID leaf; flag 1 means the index (ECX) is significant."""

    _fields_ = (
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    )


class MsrEntry(Structure):
    """One model-specific register."""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


def counted(entry: type[Structure], count: int, *, pad: bool) -> type[Structure]:
    """Return a struct of a u32 count (and u32 padding) followed by `count` entries."""
    array: type[Array[Structure]] = entry * count
    head = (("nr", c_uint32), ("pad", c_uint32)) if pad else (("nr", c_uint32),)
    return type(f"{entry.__name__}s", (Structure,), {"_fields_": (*head, ("entries", array))})


CPUIDS_MAX: Final = 256
Cpuid = counted(CpuidEntry, CPUIDS_MAX, pad=True)


def _ioc(direction: int, number: int, size: int = 0) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def _io(number: int) -> int:
    return _ioc(0, number)


def _iow(number: int, struct: type[Structure]) -> int:
    return _ioc(1, number, sizeof(struct))


def _ior(number: int, struct: type[Structure]) -> int:
    return _ioc(2, number, sizeof(struct))


# System fd.
GET_API_VERSION: Final = _io(0x00)
CREATE_VM: Final = _io(0x01)
CHECK_EXTENSION: Final = _io(0x03)
GET_VCPU_MMAP_SIZE: Final = _io(0x04)
GET_SUPPORTED_CPUID: Final = _ioc(3, 0x05, 8)  # struct kvm_cpuid2 without its entries
# VM fd.
CREATE_VCPU: Final = _io(0x41)
SET_USER_MEMORY_REGION: Final = _iow(0x46, UserspaceMemoryRegion)
SET_TSS_ADDR: Final = _io(0x47)
SET_IDENTITY_MAP_ADDR: Final = _ioc(1, 0x48, 8)
CREATE_IRQCHIP: Final = _io(0x60)
IRQ_LINE: Final = _iow(0x61, IrqLevel)
REGISTER_COALESCED_MMIO: Final = _iow(0x67, CoalescedZone)
UNREGISTER_COALESCED_MMIO: Final = _iow(0x68, CoalescedZone)
SET_GSI_ROUTING: Final = _ioc(1, 0x6A, 8)  # struct kvm_irq_routing without its entries
IRQFD: Final = _iow(0x76, Irqfd)
CREATE_PIT2: Final = _iow(0x77, PitConfig)
IOEVENTFD: Final = _iow(0x79, Ioeventfd)
SIGNAL_MSI: Final = _iow(0xA5, Msi)
# vCPU fd.
RUN: Final = _io(0x80)
GET_REGS: Final = _ior(0x81, Regs)
SET_REGS: Final = _iow(0x82, Regs)
GET_SREGS: Final = _ior(0x83, Sregs)
SET_SREGS: Final = _iow(0x84, Sregs)
SET_MSRS: Final = _ioc(1, 0x89, 8)  # struct kvm_msrs without its entries
GET_LAPIC: Final = _ior(0x8E, LapicState)
SET_LAPIC: Final = _iow(0x8F, LapicState)
SET_CPUID2: Final = _ioc(1, 0x90, 8)  # struct kvm_cpuid2 without its entries
GET_MP_STATE: Final = _ior(0x98, MpState)
KVMCLOCK_CTRL: Final = _io(0xAD)
