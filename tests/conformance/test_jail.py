"""The jail of device processes, looked at from outside, for root and for an ordinary user."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import pytest

from devices import jail, landlock, privileges, syscalls
from tests.jailhost import USER, as_is, as_user, device, in_child, needs_root
from tests.jailhost import without_user_namespaces as no_userns
from tools.viodriver.private import DeviceHost, shared_spawner
from vmm import jailview

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


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
def test_a_root_that_may_only_chroot_has_an_empty_root() -> None:
    """Root in most containers: no namespaces, but a directory that is gone makes a root."""

    def contained() -> None:
        no_userns(0)
        privileges.drop_capabilities(keep=1 << 18)  # CAP_SYS_CHROOT

    with device(contained, "best-effort") as pids:
        found, without = facts(pids.device), lacking(pids.said)
    assert without == {"user nobody", *(f"{name} namespace" for name in ALL)}
    assert found["root_empty"]
    assert set(found["capabilities"].values()) == {0}


@needs_root
def test_a_root_that_cannot_be_exchanged_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An initramfs cannot be pivoted away from; nothing else is different."""
    real = syscalls.call

    def call(name: str, *args: Any) -> int:
        if name == "pivot_root":
            raise OSError(errno.EINVAL, "pivot_root")
        return real(name, *args)

    monkeypatch.setattr(syscalls, "call", call)
    with device(as_is, "required") as pids:
        found = facts(pids.device)
        spaces = [os.stat(f"/proc/{pid}/ns/user").st_ino for pid in (pids.spawner, pids.device)]
    assert {name for name, other in found["namespaces"].items() if other} == ALL
    assert found["root_empty"]
    assert spaces[0] != spaces[1]


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
