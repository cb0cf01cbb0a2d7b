"""A CD-ROM drive whose process is killed at any line of it, and the next one goes on.

All is in this process: a death is an exception out of any line of `devices/`, after which only
what is shared is left: guest memory, in-flight areas, the journal, and what the VM process has.

    lab = DiscLab(tmp_path, DISC); lab.start()
    lab.die_after(17)           # lines of the device's code
    lab.ask(...)                # whoever is asked meanwhile
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from fcntl import F_DUPFD_CLOEXEC, fcntl
from typing import TYPE_CHECKING, Any, Final

import devices
from devices.spec import INFLIGHT_STRIDE
from devices.vioscsi import EVENTQ, Vioscsi
from devices.virtio import Registers
from tests.scsilab import ScsiLab
from vmm.cdrom import EMPTY, Drive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random
    from types import FrameType

CODE: Final = os.path.dirname(devices.__file__)
_SHARED: Final = "guestmem.py"  # its lock would stay taken


class Killed(BaseException):
    """The process is no more."""


class DiscLab(ScsiLab):
    """The VM process, the guest, and every process of the drive, one after the other."""

    def __init__(
        self, directory: Path, content: bytes | None, *, packed: bool = False, dying: Random | None
    ) -> None:
        """Make a drive with a disc or an empty one; `dying` says when its processes die."""
        self.areas = [memoryview(bytearray(INFLIGHT_STRIDE)) for _ in range(3)]
        self.packed, self.journal, self.lives = packed, "", 0
        self._dying, self._lines, self._dead = dying, 0, False
        self._given: list[int] = []
        self.called: set[int] = set()  # queues
        self._copies = 0
        super().__init__(directory, None, packed=packed, attention=True)
        if content is not None:
            os.close(self.burn(content))
        self.vm = Drive(EMPTY if content is None else str(self.image))
        self.vm.send = self._send
        self._launch()
        self.checkpoint()

    def close(self) -> None:
        """End all."""
        self._bury()
        self.vm.close()

    # Lives.

    def _launch(self) -> None:
        self.lives += 1
        self.scheduled, self.timers, self._dead = [], [], False
        discs = {int(name[4:]): self._give(fd) for name, fd in self.vm.fds.items()}
        self.device = Vioscsi(self.memory, self, None, discs)
        self.registers = Registers(
            self.device, self.memory, self, packed=self.packed, inflight=self.areas
        )
        if self.journal:
            self.registers.load(json.loads(self.journal))
            self.scheduled += range(3)
        else:
            number = 1 if discs else 0
            size = os.fstat(discs[1]).st_size if discs else 0
            self.device._changer.load({"disc": number, "size": size, "acted": 0, "refusal": ""})

    def _give(self, fd: int) -> int:
        """Return a copy of `fd` for the process, with a number that nobody else gets soon."""
        self._copies += 1
        self._given.append(fcntl(fd, F_DUPFD_CLOEXEC, 300 + self._copies % 500))
        return self._given[-1]

    def _bury(self) -> None:
        """Close what a process had, as its death does."""
        for fd in self._given:
            with contextlib.suppress(OSError):  # it has closed that
                os.close(fd)
        self._given.clear()

    def live(self, action: Callable[[], Any]) -> Any:
        """Do something in the process; again, in the next one, if it dies."""
        while True:
            try:
                return self._traced(action)
            except Killed:
                self._rise()

    def die(self) -> None:
        """Die at rest."""
        self._dead = True
        self._rise()

    def _rise(self) -> None:
        while True:
            self._bury()
            try:
                self._traced(self._launch)
            except Killed:
                continue
            return

    def _traced(self, action: Callable[[], Any]) -> Any:
        if self._dying is None and not self._lines:
            return action()
        self._lines = self._lines or self._dying.randint(1, 1200)  # type: ignore[union-attr]
        before = sys.gettrace()
        sys.settrace(self._entered)
        try:
            return action()
        finally:
            sys.settrace(before)

    def die_after(self, lines: int) -> None:
        """Have the process die once, after so many lines of its code."""
        self._lines = lines

    def _entered(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if name.startswith(CODE) and not name.endswith(_SHARED) else None

    def _line(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line" and self._lines:
            self._lines -= 1
            if not self._lines:
                self._dead = True
                raise Killed
        return self._line

    # What processes are asked.

    def serve(self) -> None:
        """Serve every scheduled queue, whoever does."""
        self.live(super().serve)

    def read(self, reg: int, size: int) -> int:
        return int(self.live(lambda: self.registers.read(reg, size)[0]))

    def write(self, reg: int, size: int, value: int) -> None:
        self.live(lambda: self.registers.write(reg, size, value))
        self.checkpoint()

    def _send(self, name: str, value: Any, fd: int) -> Any:
        """Do as Devices.set and LastingProcess."""

        def act() -> Any:
            try:
                if fd < 0:
                    return self.device.setting(name, value)
                copy = self._give(fd)
                try:
                    return self.device.take(name, value, copy)
                except Exception:
                    os.close(copy)
                    raise
            finally:
                self.checkpoint()

        try:
            return self.live(act)
        finally:
            self.serve()

    # What processes do.

    def checkpoint(self) -> None:
        if not self._dead:
            self.journal = json.dumps(self.registers.save(killed=True))

    def _heard(self) -> None:
        """Somebody hears of something: it is in the journal."""
        if not self._dead:
            state = json.loads(json.dumps(self.device.remember()))
            assert state == json.loads(self.journal)["device"]

    def interrupt(self, source: int) -> None:
        self._heard()
        self.called.add(source)

    def tell(self, word: str) -> None:
        self._heard()
        self.vm.said(word)

    def pass_time(self) -> None:
        """Let timers fire."""

        def fire() -> None:
            for timer in self.timers:
                timer.fire()

        self.live(fire)

    # The guest.

    def events(self) -> list[bytes]:
        """What has come by the event queue, for which it was called."""
        queue = self.queues[EVENTQ]
        found = [queue.data(used.request, used.written) for used in queue.collect()]
        if found and not queue.event_idx:
            assert EVENTQ in self.called
        self.called.clear()
        return found
