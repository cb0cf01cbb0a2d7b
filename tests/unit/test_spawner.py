"""The spawner and the birth and death of device processes, with real ones."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import pytest

from config.errors import HostError
from devices import spawner as spawner_module
from devices import viodev
from devices.guestmem import Region
from devices.spec import SPECS
from devices.viodev import ChannelError, ImsgType
from tools.viodriver.private import DEADLINE, DeviceHost, facts, shared_spawner
from vmm.launch import Order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.launch import DeviceProcess, Spawner

LEVELS = ("off", "best-effort")


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    """A spawner of this test's own."""
    with shared_spawner() as spawner:
        yield spawner


def ended(pidfd: int) -> bool:
    """Wait for the end of a process."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(DEADLINE * 1e3))


def descriptors(pid: int) -> list[str]:
    """What a process has open."""
    return sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))


# Launching.


def test_a_kind_that_is_not_there(spawner: Spawner) -> None:
    """The spawner says why, and goes on."""
    order = Order("viotea", "viotea0", {}, (), {})
    with pytest.raises(HostError, match=r"could not launch viotea0: .*no device of kind 'viotea'"):
        spawner.launch(order, None)  # type: ignore[arg-type]
    DeviceHost("viornd", spawner=spawner).close()


def test_a_kind_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launch fails with the reason; other kinds do not suffer."""
    monkeypatch.setitem(SPECS, "viotea", SPECS["viornd"])
    with shared_spawner() as spawner:
        with pytest.raises(HostError, match=r"No module named 'devices\.viotea'"):
            spawner.launch(Order("viotea", "viotea0", {}, (), {}), None)  # type: ignore[arg-type]
        DeviceHost("viornd", spawner=spawner).close()


@pytest.mark.parametrize(
    ("settings", "fds", "words"),
    [
        ({"rate": "fast"}, {}, "TypeError"),
        ({}, {"memory": 0}, "memory"),  # /dev/null has no size
    ],
)
def test_a_device_that_does_not_start_says_why(
    spawner: Spawner, settings: dict[str, object], fds: dict[str, int], words: str
) -> None:
    """Its words are the error; the spawner goes on."""
    with open("/dev/null") as null:
        given = {name: null.fileno() for name in fds}
        with pytest.raises(HostError, match=words):
            DeviceHost("viornd", settings, fds=given, spawner=spawner)
    DeviceHost("viornd", spawner=spawner).close()


def test_memory_outside_the_file_is_refused(spawner: Spawner) -> None:
    """A region list that the memfd does not have ends before READY."""
    memory = os.memfd_create("small")
    os.ftruncate(memory, 4096)
    with pytest.raises(HostError, match="leaves its file"):
        DeviceHost("viornd", regions=[Region(0, 8192, 0)], fds={"memory": memory}, spawner=spawner)
    os.close(memory)


def test_a_device_has_its_own_descriptors_only(spawner: Spawner) -> None:
    """Nothing of the VM process or of a sibling: not even what was inheritable."""
    secret, other = os.pipe()
    os.set_inheritable(secret, True)
    with (
        shared_spawner() as late,
        DeviceHost("viornd", spawner=late) as sibling,
        DeviceHost("viornd", spawner=late) as host,
    ):
        assert sibling.process.pid != host.process.pid
        found = descriptors(host.process.pid)
        kinds = [name.split(":")[0] for name in found]
        assert kinds.count("socket") == 2
        # callN, callc, kickN, resample, and what wakes the loop
        assert kinds.count("anon_inode") - found.count("anon_inode:[timerfd]") == 6
        assert [name for name in found if name.startswith("/") and "memfd" not in name] == [
            "/dev/null"
        ] * 3
        assert not {"pipe"} & set(kinds)
        # The spawner keeps none of it once it waits for the next word again.
        while facts(late.pid)["State"][0] != "S":
            pass
        kept = [name.split(":")[0] for name in descriptors(late.pid)]
        assert "pipe" not in kept
        assert kept.count("socket") == 1
    os.close(secret)
    os.close(other)


def test_titles_say_whose_they_are(spawner: Spawner) -> None:
    """ps(1) shows the VM and the device."""
    with DeviceHost("viornd", spawner=spawner) as host:
        for pid, title in ((spawner.pid, b"test/spawn"), (host.process.pid, b"test/viornd0")):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                assert file.read().rstrip(b"\0") == b"pyvmd: " + title
            with open(f"/proc/{pid}/comm", "rb") as file:
                assert file.read().strip() == title


def test_the_terminal_and_handlers_stay_with_the_vm_process() -> None:
    """A ^C, and any signal the VM process handles in Python, mean nothing in its children."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with shared_spawner() as spawner, DeviceHost("viornd", spawner=spawner) as host:
            for pid in (spawner.pid, host.process.pid):
                assert os.getsid(pid) == spawner.pid != os.getsid(0)
                assert not int(facts(pid)["SigCgt"][0], 16) & 1 << signal.SIGUSR1 - 1
                assert int(facts(pid)["SigBlk"][0], 16) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


# Ends.


def test_a_death_is_told_with_its_status(spawner: Spawner) -> None:
    """At once, and by name; a launch that comes in between is not disturbed."""
    told: list[DeviceProcess] = []
    spawner.on_death = told.append
    first = DeviceHost("viornd", spawner=spawner)
    first.process.kill()
    with DeviceHost("viornd", spawner=spawner):
        assert first.wait_end() == "killed by signal 9"
        assert told == [first.process]


@pytest.mark.parametrize("level", LEVELS)
def test_devices_die_with_the_spawner(level: str) -> None:
    """Nobody would reap them: the kernel kills them."""
    host = DeviceHost("viornd", jail=level)
    pidfd = os.pidfd_open(host.process.pid)
    os.kill(host.spawner.pid, signal.SIGKILL)
    assert ended(pidfd)
    os.close(pidfd)
    host.close()


@pytest.mark.parametrize("level", LEVELS)
def test_all_end_when_the_vm_process_dies(level: str) -> None:
    """Killed, it closes nothing in order; its end of the channels is closed all the same."""
    ours, theirs = os.pipe()
    vm = os.fork()
    if not vm:
        try:
            host = DeviceHost("viornd", jail=level)
            os.write(theirs, f"{host.spawner.pid} {host.process.pid}\n".encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours) as file:
        pidfds = [os.pidfd_open(int(pid)) for pid in file.readline().split()]
    os.kill(vm, signal.SIGKILL)
    os.waitpid(vm, 0)
    for pidfd in pidfds:
        assert ended(pidfd)
        os.close(pidfd)


def test_a_child_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spawner waits for it only so long."""
    monkeypatch.setattr(spawner_module, "LEAVE_DEADLINE", 0.1)
    host = DeviceHost("viornd")
    pidfd = os.pidfd_open(host.process.pid)
    os.kill(host.process.pid, signal.SIGSTOP)
    host.spawner._channel.close()
    assert ended(pidfd)
    assert os.waitpid(host.spawner.pid, 0)[1] == 0
    os.close(pidfd)
    host.process.release()


@pytest.mark.parametrize("what", ["type", "json", "fd name", "no fd"])
def test_nonsense_is_answered_or_ends_the_spawner(what: str) -> None:
    """A VM process out of step: nothing is launched, nothing is left."""
    channel, theirs = viodev.pair("spawner", DEADLINE)
    pid = os.fork()
    if not pid:
        try:
            channel.close()
            spawner_module.serve(theirs, "test", "off")
        finally:
            os._exit(0)
    theirs.close()
    if what == "type":
        channel.send(ImsgType.PAUSE)
    elif what == "json":
        for data in (b"{", b"[]", b"7", b'{"fds": 3}', b'{"fds": []}', b'{"fds": [[]]}'):
            channel.send(ImsgType.LAUNCH, data)
            assert channel.receive().type == ImsgType.LOG, data
        channel.send(ImsgType.FD)
    else:
        channel.send(ImsgType.LAUNCH, b'{"kind": "viornd", "fds": ["sync"]}')
        channel.send(ImsgType.FD, b"other", fd=0 if what == "fd name" else None)
    with pytest.raises(ChannelError, match=r"closed|reset"):
        channel.receive()
    assert os.waitpid(pid, 0)[1] == 0
    channel.close()
