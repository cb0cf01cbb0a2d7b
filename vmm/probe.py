"""Can this host's KVM run stock kernels? Found by trying, not from a module's name.

Some KVMs (kvm_pvm, for one) run ring-0 guest code in an instruction emulator that lacks what
every Linux kernel needs. A guest of a few dozen bytes, vmm/probe.S, executes just that.
`python -m vmm.probe` says so and exits 0 for yes, 1 for no.
"""

from __future__ import annotations

import sys
import threading
from struct import pack
from typing import TYPE_CHECKING, Final

from config.errors import PyvmError
from vmm import cpu
from vmm.boot import Entry
from vmm.bus import Bus
from vmm.kvm import System, Vm
from vmm.loader import BOOT_CS
from vmm.memory import MIB, Ram
from vmm.vcpu import Exits, Gate, VcpuThread, catch_kick

if TYPE_CHECKING:
    from config.errors import KvmError

PAYLOAD: Final = bytes.fromhex(
    "cc480fc70e0f20e0480fbae8120f22e031c9b80300000031d20f01d10fae2fb04be6f4f448cf"
)
_RESUME: Final = 0x24  # offset of `resume` in PAYLOAD

_PML4, _PDPT, _PD, _IDT, _CODE, _SCRATCH, _STACK = (page << 12 for page in range(1, 8))
_GDT: Final = _IDT + 0x800
_PRESENT_WRITABLE: Final = 3
_LARGE: Final = 0x80
_DEADLINE: Final = 5.0  # seconds; an answer takes well under a millisecond


class _Answer:
    """The debug-exit port of the probe: any write is a yes."""

    def __init__(self) -> None:
        self.reason = "the probe guest did not answer"
        self.passed = False
        self.done = threading.Event()

    def read(self, _offset: int, _size: int) -> int:
        return 0

    def write(self, _offset: int, _size: int, _value: int) -> None:
        self.passed, self.reason = True, ""
        self.done.set()

    def failed(self, why: KvmError | str) -> None:
        """Remember why the guest could not go on."""
        self.reason = why if isinstance(why, str) else why.what
        self.done.set()


def can_run_stock_kernels() -> tuple[bool, str]:
    """Try it. Returns whether, and if not why. Raises HostError if there is no usable KVM."""
    catch_kick()
    answer = _Answer()
    system = System()
    vm = Vm(system)
    ram = Ram("probe", MIB)
    vcpu = None
    try:
        ram.plug_into(vm)
        vm.create_chips()
        vcpu = vm.create_vcpu(0)
        table = cpu.cpuid(system.supported_cpuid(), 0, 1, tsc_deadline=False)
        cpu.set_up(vcpu, table, _place(ram))
        sregs = vcpu.sregs()
        sregs.idt.base, sregs.idt.limit = _IDT, 4 * 16 - 1
        vcpu.set_sregs(sregs)
        ports = Bus("port")
        ports.claim(0xF4, 1, answer, "probe")
        gate = Gate()
        exits = Exits(ports, Bus("address"), bool, answer.failed, answer.failed, answer.failed)
        thread = VcpuThread(vcpu, exits, gate)
        thread.start()
        gate.set(Gate.Mode.RUN)
        answer.done.wait(_DEADLINE)
        gate.set(Gate.Mode.LEAVE)
        thread.poke()
        thread.join()
    finally:
        if vcpu is not None:
            vcpu.close()
        vm.close()
        ram.close()
        system.close()
    return answer.passed, answer.reason


def _place(ram: Ram) -> Entry:
    """Write code, one 2 MiB identity page, a GDT and the IDT gate of vector 3."""
    write = ram.memory.write
    write(_PML4, pack("<Q", _PDPT | _PRESENT_WRITABLE))
    write(_PDPT, pack("<Q", _PD | _PRESENT_WRITABLE))
    write(_PD, pack("<Q", _PRESENT_WRITABLE | _LARGE))
    write(_GDT, pack("<QQQQ", 0, 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF))
    handler = _CODE + _RESUME
    gate = pack("<HHBBHII", handler & 0xFFFF, BOOT_CS, 0, 0x8E, handler >> 16, 0, 0)
    write(_IDT + 3 * len(gate), gate)
    write(_CODE, PAYLOAD)
    regs = (("rsi", _SCRATCH), ("rdi", _SCRATCH + 64), ("rsp", _STACK))
    return Entry(mode="long", rip=_CODE, regs=regs, cr3=_PML4, gdt=_GDT, gdt_limit=4 * 8 - 1)


def main() -> int:
    """Print the answer; exit status 0 for yes, 1 for no."""
    try:
        passed, why = can_run_stock_kernels()
    except PyvmError as err:
        passed, why = False, str(err)
    sys.stdout.write("stock kernels: yes\n" if passed else f"stock kernels: no: {why}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
