"""The jail of device processes, looked at from outside, for root and for an ordinary user."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest

from config.errors import GuestError
from config.model import DiskConfig
from devices import jail, landlock, viornd
from devices.blkreq import HEADER
from devices.features import F_RING_RESET
from devices.viodev import ImsgType
from tests.devicehost import DeviceHost, shared_spawner
from tests.jailhost import USER, as_is, as_user, device, in_child, needs_root
from tests.jailhost import without_user_namespaces as no_userns
from vmm import jailview

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from devices.device import Device

ALL = {"user", "mount", "pid", "network", "ipc", "uts", "cgroup"}

WHO = [pytest.param(as_is, id="as-is"), pytest.param(as_user, id="user", marks=needs_root)]


def facts(pid: int) -> dict[str, Any]:
    """What the kernel says of a process that runs."""
    found = jailview.facts(pid)
    assert found is not None
    return found


def lacking(said: list[str]) -> set[str]:
    """The steps that a device process said it could not do."""
    words = "jail without "
    return {line[len(words) :].partition(":")[0] for line in said if line.startswith(words)}


def lines(pid: int, name: str) -> list[str]:
    """The lines of a file in /proc/PID."""
    with open(f"/proc/{pid}/{name}") as file:
        return file.read().splitlines()


@pytest.mark.parametrize("who", WHO)
def test_a_device_process_is_jailed(who: Callable[[], None]) -> None:
    """Everything that the design promises, as the kernel tells it."""
    with device(who, "required") as pids:
        found = facts(pids.device)
    assert {name for name, other in found["namespaces"].items() if other} == ALL
    assert found["root_empty"]
    assert set(found["capabilities"].values()) == {0}
    assert found["no_new_privs"]
    assert found["seccomp_filters"] == 2  # its own, and the spawner's
    assert found["limits"]["processes"] == found["limits"]["core file size"] == 0
    assert found["limits"]["open files"] == 1


@needs_root
def test_its_user_sees_as_much_as_the_kernel_shows() -> None:
    """`status --jail` of somebody who is not root: less is known, and nothing wrong."""
    with device(as_user, "required") as pids:

        def look() -> tuple[dict[str, Any], dict[str, Any]]:
            as_user()
            return facts(pids.device), facts(pids.vm)

        inside, outside = in_child(look)
    spaces = inside["namespaces"]
    assert spaces["user"] is spaces["mount"] is spaces["pid"] is True
    assert spaces["network"] is spaces["ipc"] is spaces["uts"] is spaces["cgroup"] is None
    assert inside["root_empty"] is True
    assert inside["seccomp_filters"] == 2
    assert outside["root_empty"] is False
    assert True not in outside["namespaces"].values()


@pytest.mark.parametrize("who", WHO)
def test_its_root_is_the_only_mount_and_read_only(who: Callable[[], None]) -> None:
    """Nothing of the host is mounted there, not even where it could not be reached."""
    with device(who, "required") as pids:
        [mount] = lines(pids.device, "mountinfo")
    assert " / / ro,nosuid,nodev,noexec" in mount
    assert " - tmpfs pyvmd ro,nr_inodes=1" in mount


@needs_root
def test_it_holds_nothing_but_its_own_descriptors() -> None:
    """Memory, eventfds, channels, its loop; no directory, no file, nothing of the VM process."""
    with device(as_is, "required") as pids:
        links = {
            os.readlink(f"/proc/{pids.device}/fd/{fd}")
            for fd in os.listdir(f"/proc/{pids.device}/fd")
        }
    kinds = {link.partition("[")[0].rstrip(":") for link in links}
    assert kinds == {"/dev/null", "anon_inode", "socket", "/memfd:guest (deleted)"}
    anonymous = {link for link in links if link.startswith("anon_inode")}
    assert anonymous == {f"anon_inode:[{kind}]" for kind in ("eventfd", "eventpoll", "timerfd")}


@needs_root
def test_root_does_not_stay_root() -> None:
    """As root, spawner and devices are nobody, in nobody's group and in no other."""
    with device(as_is, "required") as pids:
        for pid in (pids.spawner, pids.device):
            status = dict(line.split(":", 1) for line in lines(pid, "status"))
            real, effective, saved, for_files = status["Uid"].split()
            assert real == effective == for_files == "65534"
            assert saved == "0"  # whose holder may signal it; nothing here can become that
            assert status["Gid"].split() == ["65534"] * 4
            assert status["Groups"].split() == []
        assert lines(pids.device, "uid_map") == []  # no id has a name there


@needs_root
def test_a_users_device_has_nobody_elses_rights() -> None:
    """As a user it stays that user, who has no name in the device's user namespace."""
    with device(as_user, "required") as pids:
        assert facts(pids.device)["uid"] == USER
        assert lines(pids.device, "uid_map") == []
        # What belongs to a process that cannot be dumped, belongs to root.
        assert os.stat(f"/proc/{pids.device}/status").st_uid == 0


@pytest.mark.parametrize("who", WHO)
def test_the_spawner_is_jailed_too(who: Callable[[], None]) -> None:
    """It keeps what it takes to make namespaces, in a user namespace of its own."""
    with device(who, "required") as pids:
        found = facts(pids.spawner)
    assert {name for name, other in found["namespaces"].items() if other} == ALL - {"pid"}
    assert found["root_empty"]
    assert found["no_new_privs"]
    assert found["seccomp_filters"] == 1
    assert found["capabilities"]["CapEff"] == 1 << 21  # CAP_SYS_ADMIN
    assert found["capabilities"]["CapBnd"] == 0


@needs_root
def test_siblings_share_no_namespace() -> None:
    """Each device process has its own of every kind, apart from spawner and siblings."""
    with (
        shared_spawner("required") as spawner,
        DeviceHost("viornd", spawner=spawner) as one,
        DeviceHost("viornd", spawner=spawner) as other,
    ):
        pids = (spawner.pid, one.process.pid, other.process.pid)
        for name in jailview.NAMESPACES:
            inodes = {os.stat(f"/proc/{pid}/ns/{name}").st_ino for pid in pids}
            assert len(inodes) == (2 if name == "pid" else 3) + (name == "pid"), name


def test_a_report_says_what_was_applied() -> None:
    """Its summary, which goes to the log, names every step and what Landlock can do here."""
    with device(as_is, "required") as pids:
        [words] = [line for line in pids.said if line.startswith("jail: ")]
    for step in (*ALL, "empty root", "no capabilities", f"Landlock {landlock.abi()} (files"):
        assert step in words


def test_off_is_off() -> None:
    """With `jail: off` nothing at all is done, for who wants to debug a device."""
    with device(as_is, "off") as pids:
        found = facts(pids.device)
    assert not any(found["namespaces"].values())
    assert not found["root_empty"]
    assert (found["seccomp_filters"], found["no_new_privs"]) == (0, False)


@needs_root
def test_a_host_without_user_namespaces_is_named_to_a_user() -> None:
    """Best effort goes on with what is left, and says what is not."""
    with device(partial(no_userns, USER), "best-effort") as pids:
        found, without = facts(pids.device), lacking(pids.said)
    assert without == {f"{name} namespace" for name in ALL} | {"empty root"}
    assert found["seccomp_filters"] == 2
    assert found["no_new_privs"]
    assert set(found["capabilities"].values()) == {0}


@needs_root
def test_root_needs_no_user_namespaces() -> None:
    """Root makes the others by its own right; only what is really missing is said to be."""
    with device(partial(no_userns, 0), "best-effort") as pids:
        found, without = facts(pids.device), lacking(pids.said)
    assert without == {"user nobody", "user namespace"}
    assert found["root_empty"]
    assert set(found["capabilities"].values()) == {0}


@needs_root
@pytest.mark.parametrize("uid", [0, USER])
def test_required_does_not_start_without(uid: int) -> None:
    """A lack is fatal then, named, with the way round it."""
    with (
        pytest.raises(RuntimeError, match=r"HostError.*user namespace: .*`jail: best-effort`"),
        device(partial(no_userns, uid), "required"),
    ):
        pass


@needs_root
def test_the_vm_process_can_end_its_devices_after_it_has_become_its_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no capability then; the device's saved user id is what allows it."""
    monkeypatch.setattr(jail, "prepare", partial(_prepare_for, jail.prepare, USER))

    def scene() -> str:
        host = DeviceHost("viornd", jail="required")
        as_user()
        host.process.kill()
        return host.wait_end()

    assert in_child(scene) == f"killed by signal {signal.SIGKILL.value}"


def _prepare_for(prepare: Callable[..., None], uid: int, level: str, _uid: object = None) -> None:
    prepare(level, uid)


def _fail(name: str, _value: object) -> object:
    """Stand in for Device.setting: fail in one of several ways, inside the jail."""
    if name == "os":
        return os.read(-1, 1)
    if name == "unicode":
        raise RuntimeError("\udcff\N{SNOWMAN}")
    if name == "guest":
        raise GuestError("broken")
    if name == "chained":
        try:
            return 1 // 0
        except ZeroDivisionError as err:
            raise RuntimeError("second") from err
    return 1 // 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero", "ZeroDivisionError"),
        ("os", "Bad file descriptor"),
        ("unicode", "RuntimeError"),
        ("chained", "RuntimeError: second"),
    ],
)
def test_last_words_leave_the_jail(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    """What a device process dies of is told, though it can load nothing any more to tell it."""
    real = viornd.create

    def create(*args: Any) -> Device:
        made = real(*args)
        made.setting = _fail  # type: ignore[method-assign,assignment]
        return made

    monkeypatch.setattr(viornd, "create", create)
    with DeviceHost("viornd", jail="required") as host:
        host.async_.send(ImsgType.SETTING, b'{"name": "%s", "value": 0}' % name.encode())
        assert words in host.wait_said(words)
        assert host.wait_end() == "exit status 1"


class _Complains:
    def __del__(self) -> None:
        raise ValueError("from a destructor")


def test_an_error_nobody_can_catch_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints it with the line of source, which cannot be opened: it must not try."""
    real = viornd.create

    def create(*args: Any) -> Device:
        made = real(*args)
        made.setting = lambda name, value: bool(_Complains())  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(viornd, "create", create)
    with DeviceHost("viornd", jail="required") as host:
        assert host.ask(ImsgType.SETTING, {"name": "x", "value": 0}) == {"value": True}


@pytest.mark.parametrize("who", WHO)
def test_entropy_is_served_in_the_jail(who: Callable[[], None]) -> None:
    """The whole way: negotiation, requests, a rate limit with its timer, reset, pause."""

    def scene() -> int:
        who()
        with DeviceHost("viornd", {"rate": 1 << 20}, jail="required") as host:
            [queue] = host.start(F_RING_RESET)
            queue.add([], [4096])
            host.kick(0)
            assert host.wait_call(0, 5)
            host.ask(ImsgType.PAUSE)
            host.ask(ImsgType.UNPAUSE)
            host.status = 0
            return sum(used.written for used in queue.collect())

    assert in_child(scene) == 4096


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("who", WHO)
def test_a_disk_is_served_in_the_jail(who: Callable[[], None], cache: str, tmp_path: Path) -> None:
    """Every type of request, aligned and not, and a resize: none needs a call it may not make."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if cache == "none" else 0))
    settings = DiskConfig(path=str(path), format="raw", cache=cache)._asdict()

    def scene() -> list[int]:
        who()
        statuses = []
        with DeviceHost("vioblk", settings, jail="required", fds={"image": fd}) as host:
            [queue] = host.start()
            zeroes = (8).to_bytes(8, "little") + (8).to_bytes(4, "little") + bytes(4)
            for kind, data, room in (
                (1, b"x" * 4096, 0),  # OUT
                (0, b"", 4096),  # IN
                (0, b"", 512),  # shorter than a block of the host's
                (4, b"", 0),  # FLUSH
                (11, zeroes, 0),  # DISCARD
                (13, zeroes, 0),  # WRITE_ZEROES
                (8, b"", 20),  # GET_ID
            ):
                readable = [HEADER.pack(kind, 0, 0), *([data] if data else [])]
                queue.add(readable, [*([room] if room else []), 1])
                host.kick(0)
                assert host.wait_call(0, 5), f"request {kind} is not answered"
                [used] = queue.collect()
                statuses.append(queue.data(used.request)[-1])
            answer = host.ask(ImsgType.SETTING, {"name": "resize", "value": 2 << 20})
            assert "error" not in answer, answer
        return statuses

    try:
        assert in_child(scene) == [0] * 7
    finally:
        os.close(fd)
    assert path.stat().st_size == 2 << 20
