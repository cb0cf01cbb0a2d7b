"""KVM through its three kinds of descriptor: the system, a VM, a vCPU (linux/kvm.h).

One thin wrapper per descriptor, one method per ioctl; `kvmabi` holds the numbers and structs.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from ctypes import Structure, addressof, c_int, c_uint64, c_ulong
from typing import TYPE_CHECKING, Final

from config.errors import HostError, KvmError
from vmm import kvmabi as abi
from vmm.kvmabi import Cap, Exit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEVICE: Final = "/dev/kvm"

# fcntl.ioctl takes a C int and cannot carry KVM_SET_TSS_ADDR's argument; this one can.
_ioctl = ctypes.CDLL(None, use_errno=True).ioctl
_ioctl.argtypes = (c_int, c_ulong, c_ulong)
_ioctl.restype = c_int

_HINTS: Final = {
    errno.ENOMEM: "free some memory or give the VM less",
    errno.EBUSY: "another hypervisor on this host holds the CPU's virtualisation",
}
_NO_DEVICE: Final = "load kvm_intel or kvm_amd and enable virtualisation in the host's firmware"

# What this monitor cannot do without.
REQUIRED: Final = (
    Cap.IRQCHIP,
    Cap.USER_MEMORY,
    Cap.SET_TSS_ADDR,
    Cap.EXT_CPUID,
    Cap.MP_STATE,
    Cap.IRQ_ROUTING,
    Cap.PIT2,
    Cap.SET_IDENTITY_MAP_ADDR,
    Cap.SIGNAL_MSI,
    Cap.READONLY_MEM,
    Cap.IMMEDIATE_EXIT,
)


def request(fd: int, nr: int, arg: Structure | int, what: str) -> int:
    """Issue one ioctl; other threads run while the kernel works. Raises KvmError."""
    rc: int = _ioctl(fd, nr, arg if isinstance(arg, int) else addressof(arg))
    if rc < 0:
        err = ctypes.get_errno()
        raise KvmError(f"{what}: {os.strerror(err)}", hint=_HINTS.get(err, ""))
    return rc


class System:
    """/dev/kvm: what the host's KVM can do, and the maker of VMs."""

    def __init__(self, device: str = DEVICE) -> None:
        try:
            self.fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            hint = _NO_DEVICE
            if err.errno in {errno.EACCES, errno.EPERM}:
                from vmm.checks import join_group  # only asked for in trouble

                hint = join_group(device)
            raise HostError(f"cannot open {device}: {err.strerror}", hint=hint) from err
        try:
            self._check()
        except BaseException:
            os.close(self.fd)
            raise
        self.vcpu_mmap_size = request(self.fd, abi.GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")

    def _check(self) -> None:
        version = request(self.fd, abi.GET_API_VERSION, 0, "KVM_GET_API_VERSION")
        if version != abi.API_VERSION:
            raise KvmError(f"KVM API version {version}, this program speaks {abi.API_VERSION}")
        missing = [cap.name for cap in REQUIRED if not self.capability(cap)]
        if missing:
            raise KvmError(
                f"this host's KVM lacks {', '.join(missing)}", hint="a newer kernel has them"
            )

    def capability(self, cap: Cap) -> int:
        """Return KVM's answer for one capability; 0 means it is not there."""
        answer: int = _ioctl(self.fd, abi.CHECK_EXTENSION, cap)
        return max(answer, 0)

    @property
    def max_vcpus(self) -> int:
        """How many vCPUs one VM may have."""
        return self.capability(Cap.MAX_VCPUS) or self.capability(Cap.NR_VCPUS) or 4

    def supported_cpuid(self) -> list[abi.CpuidEntry]:
        """Return every CPUID leaf that KVM can give a guest."""
        table = abi.Cpuid(nr=abi.CPUIDS_MAX)
        request(self.fd, abi.GET_SUPPORTED_CPUID, table, "KVM_GET_SUPPORTED_CPUID")
        return list(table.entries[: table.nr])

    def create_vm(self) -> Vm:
        """Return a new, empty VM."""
        return Vm(self)

    def close(self) -> None:
        """Close /dev/kvm; VMs made from it live on."""
        os.close(self.fd)


class Vm:
    """One VM of the kernel: memory slots, interrupt chips, eventfds.

    renew() swaps in a fresh VM behind the same object. That is how a guest is reset: the path is
    the one every start takes, so nothing of the old guest's state can be forgotten.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self.fd = self._create()

    def renew(self) -> None:
        """Replace the VM by a new one. Its vCPUs must be closed; all wiring is gone."""
        os.close(self.fd)
        self.fd = self._create()

    def _create(self) -> int:
        fd = request(self._system.fd, abi.CREATE_VM, 0, "KVM_CREATE_VM")
        os.set_inheritable(fd, False)
        return fd

    def place_kernel_pages(self, identity_map: int, tss: int) -> None:
        """Tell KVM which unused guest pages (GPAs) it may use for its own real-mode tricks."""
        where = c_uint64(identity_map)
        request(self.fd, abi.SET_IDENTITY_MAP_ADDR, addressof(where), "KVM_SET_IDENTITY_MAP_ADDR")
        request(self.fd, abi.SET_TSS_ADDR, tss, "KVM_SET_TSS_ADDR")

    def create_chips(self) -> None:
        """Put PIC, I/O APIC, local APICs and PIT (with port 0x61) into the kernel."""
        request(self.fd, abi.CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
        request(self.fd, abi.CREATE_PIT2, abi.PitConfig(flags=1), "KVM_CREATE_PIT2")

    def set_memory(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Map `size` bytes at `hva` to the guest at `gpa`; size 0 removes the slot."""
        region = abi.UserspaceMemoryRegion(slot, flags, gpa, size, hva)
        request(self.fd, abi.SET_USER_MEMORY_REGION, region, f"memory slot {slot} at {gpa:#x}")

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive one interrupt line of PIC and I/O APIC."""
        request(self.fd, abi.IRQ_LINE, abi.IrqLevel(gsi, level), f"KVM_IRQ_LINE {gsi}")

    def irqfd(
        self, fd: int, gsi: int, resample_fd: int | None = None, *, deassign: bool = False
    ) -> None:
        """Let a write to eventfd `fd` raise `gsi`; with `resample_fd` the line is a level."""
        flags = (1 if deassign else 0) | (2 if resample_fd is not None else 0)
        request(self.fd, abi.IRQFD, abi.Irqfd(fd, gsi, flags, resample_fd or 0), f"irqfd {gsi}")

    def ioeventfd(
        self,
        fd: int,
        address: int,
        length: int,
        datamatch: int | None = None,
        *,
        pio: bool = True,
        deassign: bool = False,
    ) -> None:
        """Let a guest write of `length` bytes (0: any) to `address` signal `fd` and not exit."""
        flags = (1 if datamatch is not None else 0) | (2 if pio else 0) | (4 if deassign else 0)
        wire = abi.Ioeventfd(datamatch or 0, address, length, fd, flags)
        request(self.fd, abi.IOEVENTFD, wire, f"ioeventfd {address:#x}")

    def set_gsi_routing(self, entries: Sequence[abi.RoutingEntry]) -> None:
        """Replace the whole table of GSI → chip pin or MSI."""
        table = abi.counted(abi.RoutingEntry, max(len(entries), 1), pad=True)()
        table.nr = len(entries)
        table.entries[: len(entries)] = entries
        request(self.fd, abi.SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING")

    def signal_msi(self, address: int, data: int) -> None:
        """Send one message-signalled interrupt now."""
        wire = abi.Msi(address & 0xFFFFFFFF, address >> 32, data)
        request(self.fd, abi.SIGNAL_MSI, wire, f"MSI {address:#x}")

    def coalesce(self, port: int, length: int, *, on: bool) -> None:
        """Queue writes to these ports in the ring instead of exiting for each, or stop that."""
        nr = abi.REGISTER_COALESCED_MMIO if on else abi.UNREGISTER_COALESCED_MMIO
        request(self.fd, nr, abi.CoalescedZone(port, length, 1), f"coalesced port {port:#x}")

    def create_vcpu(self, index: int) -> Vcpu:
        """Return a vCPU whose APIC id is `index`."""
        fd = request(self.fd, abi.CREATE_VCPU, index, f"KVM_CREATE_VCPU {index}")
        return Vcpu(fd, index, self._system)

    def close(self) -> None:
        """Give the VM back to the kernel once its vCPUs are closed too."""
        os.close(self.fd)


class Vcpu:
    """One vCPU of the kernel and its shared page, struct kvm_run."""

    def __init__(self, fd: int, index: int, system: System) -> None:
        os.set_inheritable(fd, False)
        self.fd, self.index = fd, index
        self._map = mmap.mmap(fd, system.vcpu_mmap_size, mmap.MAP_SHARED)
        self.page = memoryview(self._map)
        self._words = self.page[:16].cast("I")
        ring = system.capability(Cap.COALESCED_PIO) and system.capability(Cap.COALESCED_MMIO)
        at = ring * mmap.PAGESIZE
        self.ring = self.page[at : at + mmap.PAGESIZE] if ring else None

    def run(self) -> int:
        """Run the guest until something needs user space; returns KVM_EXIT_*.

        A signal, or interrupt() before or during the call, ends it with Exit.INTR.
        """
        if _ioctl(self.fd, abi.RUN, 0) < 0:
            err = ctypes.get_errno()
            if err in {errno.EINTR, errno.EAGAIN}:  # EAGAIN: a waiting AP was poked
                return Exit.INTR
            raise KvmError(f"KVM_RUN on vCPU {self.index}: {os.strerror(err)}")
        return self._words[2]

    def interrupt(self, on: bool = True) -> None:
        """Make run() return at once, now and until switched off; see linux immediate_exit."""
        self.page[1] = on

    def _get(self, nr: int, struct: type[Structure], what: str) -> Structure:
        value = struct()
        request(self.fd, nr, value, what)
        return value

    def regs(self) -> abi.Regs:
        """Return the general registers."""
        return self._get(abi.GET_REGS, abi.Regs, "KVM_GET_REGS")  # type: ignore[return-value]

    def set_regs(self, regs: abi.Regs) -> None:
        """Set the general registers."""
        request(self.fd, abi.SET_REGS, regs, "KVM_SET_REGS")

    def sregs(self) -> abi.Sregs:
        """Return segment and control registers."""
        return self._get(abi.GET_SREGS, abi.Sregs, "KVM_GET_SREGS")  # type: ignore[return-value]

    def set_sregs(self, sregs: abi.Sregs) -> None:
        """Set segment and control registers."""
        request(self.fd, abi.SET_SREGS, sregs, "KVM_SET_SREGS")

    def lapic(self) -> abi.LapicState:
        """Return the local APIC's registers."""
        return self._get(abi.GET_LAPIC, abi.LapicState, "KVM_GET_LAPIC")  # type: ignore[return-value]

    def set_lapic(self, lapic: abi.LapicState) -> None:
        """Set the local APIC's registers."""
        request(self.fd, abi.SET_LAPIC, lapic, "KVM_SET_LAPIC")

    def set_msrs(self, msrs: Iterable[tuple[int, int]]) -> None:
        """Set model-specific registers. Raises KvmError naming the first one KVM refused."""
        rows = [abi.MsrEntry(index, 0, value) for index, value in msrs]
        table = abi.counted(abi.MsrEntry, len(rows), pad=True)()
        table.nr = len(rows)
        table.entries[:] = rows
        done = request(self.fd, abi.SET_MSRS, table, "KVM_SET_MSRS")
        if done < len(rows):
            raise KvmError(f"KVM refused MSR {rows[done].index:#x}")

    def set_cpuid(self, entries: Sequence[abi.CpuidEntry]) -> None:
        """Set what the guest's CPUID instruction answers."""
        table = abi.Cpuid(nr=len(entries))
        table.entries[: len(entries)] = entries
        request(self.fd, abi.SET_CPUID2, table, "KVM_SET_CPUID2")

    def clock_was_stopped(self) -> None:
        """Tell the guest's kvmclock that it was paused, so its watchdogs hold still."""
        # EINVAL: the guest has no kvmclock, and then there is nobody to tell.
        _ioctl(self.fd, abi.KVMCLOCK_CTRL, 0)

    def close(self) -> None:
        """Unmap the shared page and close the descriptor."""
        if self.ring is not None:
            self.ring.release()
        self._words.release()
        self.page.release()
        self._map.close()
        os.close(self.fd)
