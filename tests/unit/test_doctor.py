"""The host report: every fact is found by trying, and every lack comes with its remedy."""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import sys
from typing import TYPE_CHECKING, Final

import pytest

from config.errors import HostError
from vmm import checks, cli, doctor, firmware, kvm, probe
from vmm.checks import Check

if TYPE_CHECKING:
    from pathlib import Path

# Programs read these from `doctor --json`: none may go, and a new one is added here.
KEYS: Final = [
    "python",
    "kernel",
    "kvm",
    "kvm_module",
    "stock_kernels",
    "groups",
    "runtime_directory",
    "tun",
    "nft",
    "passt",
    "net_admin",
    "vhost_net",
    "seabios",
    "landlock",
    "seccomp",
    "user_namespaces",
    "cgroup",
    "memory",
    "bytecode",
]


def all_fine(monkeypatch: pytest.MonkeyPatch, **found: Check) -> None:
    """Let every check say "ok", apart from those given."""

    def answer(check: Check) -> object:
        return lambda: check

    report = tuple(
        (name, answer(found.get(name, Check("ok", "fine", value=True)))) for name in KEYS
    )
    monkeypatch.setattr(doctor, "CHECKS", report)


def test_the_checks_have_stable_names() -> None:
    """The keys of `doctor --json` are an interface."""
    assert [name for name, _ in doctor.CHECKS] == KEYS


def test_a_fine_host_can_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per check, and exit status 0 where a VM can start, warnings or not."""
    tun = Check("warn", "no tun", "modprobe tun", False)
    all_fine(monkeypatch, tun=tun)

    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(KEYS)
    assert "ok    python             fine" in lines
    assert "warn  tun                no tun -> modprobe tun" in lines


def test_one_failed_check_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no VM can do without decides the exit status; JSON says the same."""
    no_kvm = Check("fail", "no KVM", "load it")
    no_kernels = Check("warn", "not known", value=False)
    all_fine(monkeypatch, kvm=no_kvm, stock_kernels=no_kernels)

    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["can_start"] is False
    assert report["stock_kernels"] is False
    assert list(report["checks"]) == KEYS
    assert report["checks"]["kvm"] == {
        "state": "fail",
        "text": "no KVM",
        "remedy": "load it",
        "value": None,
    }


def test_a_check_that_breaks_does_not_break_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A /proc file that is not there is a warning, and the other checks still run."""

    def broken() -> Check:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/proc/x")

    monkeypatch.setattr(doctor, "CHECKS", (("memory", broken), ("python", checks.python)))
    report = doctor.examine()

    assert report["memory"].state == "warn"
    assert "No such file" in report["memory"].text
    assert report["python"].state == "ok"


def test_without_kvm_nothing_starts() -> None:
    """No /dev/kvm: a failure that says which modules and what firmware setting to look for."""
    check = doctor.kvm_device("/nonexistent/kvm")

    assert check.state == "fail"
    assert "/nonexistent/kvm" in check.text
    assert "kvm_intel or kvm_amd" in check.remedy


def test_without_permission_group_and_command_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """EACCES on /dev/kvm: the remedy has the device's own group and this user's own name."""
    device = tmp_path / "kvm"
    device.touch(0o660)
    device.chmod(0o660)

    def denied(path: str) -> kvm.System:
        raise HostError(f"cannot open {path}: Permission denied") from PermissionError()

    monkeypatch.setattr(kvm, "System", denied)
    check = doctor.kvm_device(str(device))

    group = grp.getgrgid(os.stat(device).st_gid).gr_name
    user = pwd.getpwuid(os.getuid()).pw_name
    assert check.state == "fail"
    assert check.remedy == f"usermod -aG {group} {user}, then log in again"


def test_a_device_closed_to_its_group_needs_more_than_membership(tmp_path: Path) -> None:
    """If the group may not open the device either, joining it would not help."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o600)

    assert checks.join_group(str(device)).startswith(f"chgrp kvm {device} && chmod 660 {device}")


@pytest.mark.parametrize(
    ("answer", "state", "value"),
    [
        ((True, ""), "ok", True),
        ((False, "int3 is not emulated"), "warn", False),
    ],
)
def test_stock_kernels_are_found_by_trying(
    answer: tuple[bool, str], state: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe's word is taken; a no gives its reason and where such guests run instead."""
    monkeypatch.setattr(probe, "can_run_stock_kernels", lambda: answer)
    check = doctor.stock_kernels()

    assert (check.state, check.value) == (state, value)
    assert answer[1] in check.text
    assert ("kvmhost" in check.remedy) is not value


def test_stock_kernels_without_kvm_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the probe cannot even run, the answer for programs is false, not null."""

    def no_kvm() -> tuple[bool, str]:
        raise HostError("cannot open /dev/kvm: No such file or directory")

    monkeypatch.setattr(probe, "can_run_stock_kernels", no_kvm)

    assert doctor.stock_kernels().value is False


def test_the_runtime_directory_must_be_safe_and_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that others can write to fails; one that is still to be made is fine, if it can be."""
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    check = doctor.runtime_directory()
    assert check.state == "fail"
    assert str(tmp_path) in check.text
    assert "PYVMD_RUNTIME_DIR" in check.remedy

    tmp_path.chmod(0o700)
    assert doctor.runtime_directory() == Check("ok", str(tmp_path), value=str(tmp_path))
    monkeypatch.setenv("PYVMD_RUNTIME_DIR", f"{tmp_path}/a/b")
    assert doctor.runtime_directory().state == "ok"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert doctor.runtime_directory().state == "fail"


def test_a_missing_device_names_its_module() -> None:
    """No /dev/net/tun: the module to load, and what it is for."""
    check = checks.device("/nonexistent/tun", "tun", "for networks")

    assert check.state == "warn"
    assert check.remedy == "modprobe tun"
    assert "for networks" in check.text


def test_a_forbidden_device_names_its_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A device of another group: the group to join."""
    device = tmp_path / "tun"
    device.touch()
    device.chmod(0o660)

    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    check = checks.device(str(device), "tun", "for networks")

    assert check.state == "warn"
    assert check.remedy.startswith("usermod -aG ")


def test_seabios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it is, or the package to install; a damaged one is a warning too."""
    path = tmp_path / "bios.bin"
    monkeypatch.setattr(firmware, "SEABIOS_PATHS", (str(path),))
    check = doctor.seabios()
    assert (check.state, check.remedy, check.value) == ("warn", "apt-get install seabios", "")

    path.write_bytes(b"half of it")
    check = doctor.seabios()
    assert check.state == "warn"
    assert "no multiple of 64 KiB" in check.text

    path.write_bytes(bytes(65536 - 16) + b"\xea" + bytes(15))
    assert doctor.seabios() == Check("ok", str(path), value=str(path))


def test_seccomp_needs_the_kill_action(tmp_path: Path) -> None:
    """A kernel whose filters can only kill a thread, or that has none, is told."""
    actions = tmp_path / "actions_avail"
    actions.write_text("kill_process kill_thread trap errno allow\n")
    assert checks.seccomp(str(actions)).state == "ok"

    actions.write_text("kill_thread trap errno allow\n")
    assert checks.seccomp(str(actions)).state == "warn"
    assert checks.seccomp("/nonexistent").state == "warn"


@pytest.mark.parametrize(
    ("mount", "own", "controllers", "state"),
    [
        ("cgroup2 {dir} cgroup2 rw 0 0\n", "0::/a\n", "cpu memory pids\n", "ok"),
        ("cgroup2 {dir} cgroup2 rw 0 0\n", "0::/a\n", "\n", "warn"),
        ("cgroup2 {dir} cgroup2 rw 0 0\n", "0::/gone\n", "cpu\n", "warn"),
        ("cgroup {dir} cgroup rw,cpu 0 0\n", "3:cpu:/a\n", "cpu\n", "warn"),
    ],
)
def test_cgroup_delegation(
    mount: str, own: str, controllers: str, state: str, tmp_path: Path
) -> None:
    """Only a version 2 cgroup of our own, writable and with controllers, can limit a VM."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cgroup.controllers").write_text(controllers)
    (tmp_path / "mounts").write_text(mount.format(dir=tmp_path))
    (tmp_path / "own").write_text(own)

    check = checks.cgroup(str(tmp_path / "mounts"), str(tmp_path / "own"))

    assert check.state == state
    assert bool(check.remedy) is (state == "warn")


def test_little_memory_is_a_warning(tmp_path: Path) -> None:
    """Free memory is MemAvailable, in bytes; too little for a small VM is told."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\nMemAvailable:  102400 kB\nHugePages_Total: 0\n")

    assert checks.memory(str(meminfo)) == Check("warn", "100M free", "stop something", 100 << 20)


def test_modules_that_cannot_be_kept_compiled_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installation without .pyc files that the user cannot write slows every start."""
    (tmp_path / "a.py").touch()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert checks.bytecode([str(tmp_path)]).state == "ok"

    monkeypatch.setattr(os, "access", lambda *_: False)
    check = checks.bytecode([str(tmp_path)])
    assert check.state == "warn"
    assert "compileall" in check.remedy

    cache = tmp_path / "__pycache__"
    cache.mkdir()
    (cache / f"a.{sys.implementation.cache_tag}.pyc").touch()
    assert checks.bytecode([str(tmp_path)]).state == "ok"


def test_a_child_that_hangs_or_crashes_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying out namespaces cannot hang the report or end it."""
    monkeypatch.setattr(checks, "_DEADLINE_MS", 10)
    reader, writer = os.pipe()
    assert checks._in_child(lambda: len(os.read(reader, 1))) == errno.ETIMEDOUT
    os.close(reader)
    os.close(writer)

    monkeypatch.setattr(checks, "_DEADLINE_MS", 5000)
    assert checks._in_child(lambda: 7) == 7
    assert checks._in_child(lambda: 1 // 0) == errno.EIO
