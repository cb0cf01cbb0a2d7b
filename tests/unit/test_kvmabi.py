"""The KVM structures and request numbers are those of linux/kvm.h on x86-64."""

from __future__ import annotations

from ctypes import sizeof

import pytest

from vmm import kvmabi as abi


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        (abi.UserspaceMemoryRegion, 32),
        (abi.Regs, 144),
        (abi.Segment, 24),
        (abi.Dtable, 16),
        (abi.Sregs, 312),
        (abi.LapicState, 1024),
        (abi.PitConfig, 64),
        (abi.IrqLevel, 8),
        (abi.Irqfd, 32),
        (abi.Ioeventfd, 64),
        (abi.CoalescedZone, 16),
        (abi.Msi, 32),
        (abi.RoutingEntry, 48),
        (abi.CpuidEntry, 40),
        (abi.MsrEntry, 16),
        (abi.Cpuid, 8 + 40 * abi.CPUIDS_MAX),
    ],
)
def test_structure_sizes(struct: type, size: int) -> None:
    """Each structure is as long as the kernel's, or an ioctl would read past its end."""
    assert sizeof(struct) == size


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (abi.GET_SUPPORTED_CPUID, 0xC008AE05),
        (abi.SET_USER_MEMORY_REGION, 0x4020AE46),
        (abi.SET_IDENTITY_MAP_ADDR, 0x4008AE48),
        (abi.IRQ_LINE, 0x4008AE61),
        (abi.REGISTER_COALESCED_MMIO, 0x4010AE67),
        (abi.SET_GSI_ROUTING, 0x4008AE6A),
        (abi.IRQFD, 0x4020AE76),
        (abi.CREATE_PIT2, 0x4040AE77),
        (abi.IOEVENTFD, 0x4040AE79),
        (abi.SIGNAL_MSI, 0x4020AEA5),
        (abi.RUN, 0xAE80),
        (abi.GET_REGS, 0x8090AE81),
        (abi.SET_SREGS, 0x4138AE84),
        (abi.SET_MSRS, 0x4008AE89),
        (abi.SET_CPUID2, 0x4008AE90),
        (abi.GET_LAPIC, 0x8400AE8E),
    ],
)
def test_request_numbers(number: int, value: int) -> None:
    """Each request number carries the right direction and size."""
    assert number == value
