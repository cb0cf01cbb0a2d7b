"""vCPU threads: KVM_RUN, decode the exit, hand it to the bus, again.

A gate stands between two exits; pausing and stopping close it. Whoever closes the gate pokes
every thread with a signal, and `immediate_exit` catches a thread on its way into the guest.
"""

from __future__ import annotations

import signal
import threading
import time
from enum import Enum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from config.errors import KvmError
from vmm.kvmabi import Exit, InternalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus import Bus
    from vmm.kvm import Vcpu

KICK: Final = signal.SIGUSR1
PARK_LOOK: Final = 0.1  # seconds between looks at what a vCPU may wait for
PARK_DEADLINE: Final = 10.0  # seconds; an exit handler is at most one device deadline long

# struct kvm_run, the union behind the fixed part (linux/kvm.h).
_UNION: Final = 32
_IO: Final = Struct("<BBHIQ")  # direction, size, port, count, offset of the data
_MMIO: Final = Struct("<Q8sIB")  # address, data, length, is_write
_MMIO_DATA: Final = _UNION + 8
_INTERNAL: Final = Struct("<IIQB15s")  # suberror, count of u64, flags, instruction length, bytes
_INSTRUCTION_GIVEN: Final = 1
_SYSTEM_EVENT: Final = Struct("<I")
_HARDWARE_REASON: Final = Struct("<Q")


def catch_kick() -> None:
    """Make the kick signal harmless; it need only interrupt KVM_RUN. For the main thread."""
    signal.signal(KICK, lambda _number, _frame: None)


class Gate:
    """What every vCPU thread obeys between two exits: run, park, or leave."""

    class Mode(Enum):
        """The order that stands."""

        RUN = "run"
        PARK = "park"
        LEAVE = "leave"

    def __init__(self) -> None:
        self.mode = Gate.Mode.PARK
        self._parked = 0
        self._changed = threading.Condition()

    def set(self, mode: Mode) -> None:
        """Give a new order; the caller pokes the threads."""
        with self._changed:
            self.mode = mode
            self._changed.notify_all()

    def wait(self) -> bool:
        """Called by a vCPU thread: park until told otherwise; False means leave."""
        with self._changed:
            self._parked += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.mode is not Gate.Mode.PARK)
            self._parked -= 1
            return self.mode is Gate.Mode.RUN

    def all_parked(self, count: int, meanwhile: Callable[[], object]) -> bool:
        """Wait until `count` threads are parked; False if one did not come in time.

        `meanwhile` is called now and then: a thread may wait for what the caller has to do.
        """
        end = time.monotonic() + PARK_DEADLINE
        while time.monotonic() < end:
            with self._changed:
                if self._changed.wait_for(lambda: self._parked == count, PARK_LOOK):
                    return True
            meanwhile()
        return False


class Exits(NamedTuple):
    """What a vCPU thread needs of the machine to serve exits."""

    pio: Bus
    mmio: Bus
    drain: Callable[[], object]  # takes coalesced writes, before every exit
    reset: Callable[[str], None]
    power_off: Callable[[str], None]
    failed: Callable[[KvmError], None]  # this VM cannot go on


class VcpuThread:
    """Runs one vCPU. Counts its exits by reason, for those who ask."""

    def __init__(self, vcpu: Vcpu, exits: Exits, gate: Gate) -> None:
        self.vcpu, self._exits, self._gate = vcpu, exits, gate
        self.counts: dict[int, int] = dict.fromkeys(Exit, 0)
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.index}", daemon=True)

    def start(self) -> None:
        """Start the thread; it waits at the gate."""
        self._thread.start()

    def poke(self) -> None:
        """Bring the thread to its gate soon, out of the guest if need be."""
        self.vcpu.interrupt()
        ident = self._thread.ident
        if ident is not None and self._thread.is_alive():
            signal.pthread_kill(ident, KICK)

    def join(self) -> None:
        """Wait until the thread has left."""
        if self._thread.ident is not None:
            self._thread.join(PARK_DEADLINE)
            if self._thread.is_alive():
                raise KvmError(f"vCPU {self.vcpu.index} does not stop")

    def _main(self) -> None:
        # Every other signal belongs to the main thread, which sleeps in epoll and must be woken.
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {KICK})
        try:
            self._run()
        except KvmError as err:
            self._exits.failed(err)
        except Exception as err:  # a bug of ours must end the VM, not one thread of it
            self._exits.failed(KvmError(f"vCPU {self.vcpu.index}: {type(err).__name__}: {err}"))

    def _run(self) -> None:
        run, drain, gate, counts = self.vcpu.run, self._exits.drain, self._gate, self.counts
        serve: dict[int, Callable[[int], None]] = {Exit.IO: self._io, Exit.MMIO: self._mmio}
        while True:
            if gate.mode is not Gate.Mode.RUN:
                if not gate.wait():
                    return
                self.vcpu.interrupt(False)
                continue  # the order may have changed again before interrupt(False)
            reason = run()
            counts[reason] = counts.get(reason, 0) + 1
            drain()
            serve.get(reason, self._rare)(reason)

    def _io(self, _reason: int) -> None:
        page = self.vcpu.page
        direction, size, port, count, offset = _IO.unpack_from(page, _UNION)
        pio = self._exits.pio
        for at in range(offset, offset + size * count, size):  # count > 1: REP INS/OUTS
            if direction:
                pio.write(port, size, int.from_bytes(page[at : at + size], "little"))
            else:
                page[at : at + size] = pio.read(port, size).to_bytes(size, "little")

    def _mmio(self, _reason: int) -> None:
        page = self.vcpu.page
        address, data, size, is_write = _MMIO.unpack_from(page, _UNION)
        if is_write:
            self._exits.mmio.write(address, size, int.from_bytes(data[:size], "little"))
        else:
            value = self._exits.mmio.read(address, size)
            page[_MMIO_DATA : _MMIO_DATA + size] = value.to_bytes(size, "little")

    def _rare(self, reason: int) -> None:
        page = self.vcpu.page
        if reason in {Exit.INTR, Exit.IRQ_WINDOW_OPEN, Exit.SET_TPR, Exit.HLT}:
            return  # nothing to serve: the loop looks at the gate and goes back in
        if reason == Exit.SHUTDOWN:
            self._exits.reset("triple fault")
        elif reason == Exit.SYSTEM_EVENT:
            (kind,) = _SYSTEM_EVENT.unpack_from(page, _UNION)
            if kind == 2:  # KVM_SYSTEM_EVENT_RESET; 1 is shutdown, 3 crash
                self._exits.reset("KVM system event")
            else:
                self._exits.power_off("KVM system event" if kind == 1 else "guest crash")
        elif reason == Exit.INTERNAL_ERROR:
            raise KvmError(self._internal_error(), hint="see pyvmctl doctor")
        elif reason == Exit.FAIL_ENTRY:
            (hardware,) = _HARDWARE_REASON.unpack_from(page, _UNION)
            raise KvmError(f"the CPU refused to enter the guest: hardware reason {hardware:#x}")
        else:
            name = Exit(reason).name if reason in set(Exit) else "unknown"
            raise KvmError(f"vCPU {self.vcpu.index}: KVM exit {reason} ({name}) is not served")

    def _internal_error(self) -> str:
        """Say which instruction at which address KVM gave up on, in one sentence."""
        suberror, count, flags, length, code = _INTERNAL.unpack_from(self.vcpu.page, _UNION)
        regs, sregs = self.vcpu.regs(), self.vcpu.sregs()
        mode = "64-bit" if sregs.cs.l else "32-bit" if sregs.cs.db else "16-bit"
        where = f"{mode} code at {sregs.cs.selector:#06x}:{regs.rip:#x}, ring {sregs.cs.dpl}"
        if suberror != InternalError.EMULATION:
            known = InternalError(suberror).name if suberror in set(InternalError) else "unknown"
            return f"KVM internal error {suberror} ({known}) in {where}"
        what = "an instruction"
        if count >= 3 and flags & _INSTRUCTION_GIVEN:
            what = f"the instruction that begins {code[:length].hex(' ')}"
        return f"KVM cannot emulate {what} in {where}: this host's KVM cannot run this guest"
