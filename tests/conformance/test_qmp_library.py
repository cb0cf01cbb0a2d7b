"""QMP as QEMU's own Python library sees it: `qemu.qmp` from PyPI, unchanged."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from devices.loop import Loop
from tests.unit.test_control import FakeVm
from tests.unit.turning import LoopThread
from vmm import safefile, sockets
from vmm.control import CAUSE_QUIT, COMMANDS, Control

if TYPE_CHECKING:
    from pathlib import Path

library: Any = pytest.importorskip("qemu.qmp", reason="the PyPI package qemu.qmp is not installed")


class SpeakingVm(FakeVm):
    """A FakeVm that sends the events of what it does."""

    control: Control

    def _note(self, what: str) -> Any:
        super()._note(what)
        events = {"pause": "STOP", "resume": "RESUME", "power button": "POWERDOWN"}
        if what.startswith(("reset", "quit")):
            name, cause = what.split()
            event = "RESET" if name == "reset" else "SHUTDOWN"
            self.control.emit(event, {"guest": False, "reason": cause})
        else:
            self.control.emit(events[what])


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A control socket, served on another thread."""
    dir_fd = safefile.open_dir(str(tmp_path))
    listener = sockets.listen("control.sock", dir_fd)
    os.close(dir_fd)
    loop, vm = Loop(), SpeakingVm()
    vm.control = Control(loop, listener, vm, lambda peer: True)
    with LoopThread(loop):
        yield str(tmp_path / "control.sock")
    vm.control.close()
    loop.close()


def talk(path: str, conversation: Callable[[Any], Awaitable[None]]) -> None:
    """Hold a conversation with the library's client."""

    async def main() -> None:
        client = library.QMPClient("web")
        await client.connect(path)
        try:
            await conversation(client)
        finally:
            await client.disconnect()

    asyncio.run(main())


def test_the_library_drives_a_vm(path: str) -> None:
    """Greeting, negotiation, queries, every operation with its event, and errors."""

    async def conversation(client: Any) -> None:
        assert client.greeting.QMP.capabilities == []
        names = [entry["name"] for entry in await client.execute("query-commands")]
        assert names == list(COMMANDS)
        with client.listener() as listener:
            for command, event in (
                ("stop", "STOP"),
                ("cont", "RESUME"),
                ("system_powerdown", "POWERDOWN"),
                ("system_reset", "RESET"),
                ("quit", "SHUTDOWN"),
            ):
                assert await client.execute(command) == {}
                assert (await listener.get())["event"] == event
        assert (await client.execute("query-status"))["running"] is True

    talk(path, conversation)


def test_the_library_understands_our_errors(path: str) -> None:
    """Errors arrive as the library's ExecuteError, with class and words."""

    async def conversation(client: Any) -> None:
        with pytest.raises(library.ExecuteError, match="has not been found") as caught:
            await client.execute("nope")
        assert caught.value.error_class == "CommandNotFound"
        with pytest.raises(library.ExecuteError, match="'x' is unexpected"):
            await client.execute("quit", {"x": CAUSE_QUIT})

    talk(path, conversation)
