"""VM processes without a VM, for tests of pyvmctl: real directory, sockets and process, no guest.

A child of the test takes the runtime directory as a VM process does and serves the real control
and console sockets. What it is asked shows in `asked`, and it can be deaf or stubborn.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any, Final

from devices.loop import READ, Loop
from vmm import cli, log, vm
from vmm.console import Console
from vmm.control import Control
from vmm.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

TOP: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEADLINE: Final = 10.0  # seconds; every wait here ends in milliseconds when all is well
CONFIG: Final = {"name": "web", "vcpus": 2, "memory": 512 << 20, "owner": ""}


class FakeOperations:
    """What a control client can do to the fake: note it, and end when told."""

    def __init__(self, rundir: RunDir, end: Callable[[int], None], answers: dict[str, Any]) -> None:
        self.name, self._rundir, self._end, self._answers = rundir.name, rundir, end, answers
        self._status = "running"
        self.emit: Callable[..., None] = lambda name, data: None

    def status(self) -> str:
        return self._status

    def info(self) -> dict[str, Any]:
        facts = {"status": self._status, "memory_resident": 88 << 20, "vcpus": 2}
        return {**facts, **self._answers.get("info", {})}

    def pause(self) -> None:
        self._status = "paused"
        self._note("pause")

    def resume(self) -> None:
        self._status = "running"
        self._note("resume")

    def reset(self, cause: str) -> None:
        self._note(f"reset {cause}")
        self.emit("RESET", {"guest": False, "reason": cause})

    def power_button(self) -> None:
        self._note("power button")

    def ctrl_alt_del(self) -> None:
        self._note("ctrl-alt-del")

    def send_break(self) -> None:
        self._note("break")

    def set_device(self, device: str, setting: str, value: Any, fd: int = -1) -> Any:
        self._note(f"{device}: {setting} = {value!r}")
        return self._answers.get("settings", {}).get(setting)

    def ask(self, goal: str) -> dict[str, Any]:
        self._note(f"ask {goal}")
        if goal == "stop" and "obeys" in self._answers:
            self._end(self._answers["obeys"])
        if goal == "reboot" and "reboots" in self._answers:
            self.emit(*self._answers["reboots"])
        return {"again": False, "goal": goal, "way": "vmmci", "state": "asked"}

    def move_tray(
        self, device: str, action: str, *, force: bool = False, fd: int = -1, path: str = ""
    ) -> Any:
        disc = os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) if fd >= 0 else ""
        self._note(f"{device}: {action} {disc} {path} {force}")
        return self._answers.get("tray", {"medium": path or None, "tray_open": not path})

    def quit(self, cause: str) -> None:
        self._note(f"quit {cause}")
        if not self._answers.get("stubborn"):
            self._end(0)

    def _note(self, what: str) -> None:
        log.info(f"asked: {what}")


class FakeVm:
    """A child process that is VM `name`, as far as pyvmctl can see."""

    def __init__(self, name: str = "web", **answers: Any) -> None:
        """`deaf`: sockets there, nobody serves them. `stubborn`: ignores quit and SIGTERM.

        `obeys`: ends with that status when asked to stop. `reboots`: the event and its data that
        follow when it is asked to reboot. `exit`: more facts of its end. `info`: those of
        x-pyvmd-info.
        `settings`: the answers to settings of devices, by name.
        `owner`: whose it is, and whose the process becomes.
        `tray`: the answer to what is done to the CD-ROM drive.
        `echo`: the console sends back what it gets, and ends the VM on "poweroff".
        """
        ready, tell = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(ready)
                self._serve(name, answers, tell)
            finally:
                os._exit(99)
        os.close(tell)
        assert os.read(ready, 1) == b"!", "the fake VM did not start"
        os.close(ready)
        self._reaped = False

    def _serve(self, name: str, answers: dict[str, Any], tell: int) -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        rundir = RunDir(name, answers.get("owner"))
        rundir.take()
        log.setup(rundir.vm_log, vm=name)
        loop = Loop()

        def end(status: int) -> None:
            facts = {"reason": "host-qmp-quit", "status": status, "guest": False}
            rundir.write_exit({**facts, **answers.get("exit", {})})
            loop.stop()

        operations = FakeOperations(rundir, end, answers)
        permitted = rundir.permitted
        control = Control(loop, rundir.listen_control(), operations, permitted)
        operations.emit = control.emit

        def typed(data: bytes) -> int:
            console.output(data)
            if b"poweroff" in data:
                end(answers.get("status", 0))
            return len(data)

        console = Console(loop, rundir.listen_console(), rundir.console_log, typed, permitted)
        if "owner" in answers:
            vm.give(rundir)
            os.setgroups([])
            os.setresgid(*[rundir.owner.gid or rundir.owner.uid] * 3)
            os.setresuid(*[rundir.owner.uid] * 3)
        rundir.running({**CONFIG, "name": name, **answers.get("config", {})})
        if answers.get("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            stop_fd, stop = os.pipe()
            loop.add(stop_fd, READ, lambda _: end(0))
            signal.signal(signal.SIGTERM, lambda *_: os.write(stop, b"!") and None)
        os.write(tell, b"!")
        os.close(tell)
        if answers.get("deaf"):
            while True:
                signal.pause()
        loop.run()
        console.close()
        control.close()
        rundir.close()
        os._exit(0)

    def kill(self) -> None:
        """End it as by `kill -9`, and reap it."""
        if not self._reaped:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()

    def reap(self) -> None:
        """Wait for its end."""
        os.waitpid(self.pid, 0)
        self._reaped = True


class Pyvmctl:
    """Runs pyvmctl in this process and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        """Run one command line; its exit status."""
        status = cli.main(words)
        self.out, self.err = self._capsys.readouterr()
        return status


def log_of(root: Path, name: str = "web") -> str:
    """What the VM has logged."""
    return (root / name / "log").read_text()
