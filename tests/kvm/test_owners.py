"""A VM of root's with an owner and a group, in its jail, used by a member of the group."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.guestvm import TREE, pyvmctl
from tests.kvm.lab import GUESTS
from tests.unit.test_owners import MEMBER, OWNER, STAFF, STRANGER, as_user
from vmm import cli

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users"),
]


def test_a_member_of_the_owners_group_uses_a_jailed_vm(runtime_dir: str, tmp_path: Path) -> None:
    """Sockets, and every file that the VM writes before and after it is confined."""
    os.chmod(runtime_dir, 0o755)  # noqa: S103  as root's own is
    text = f"""
name: hello
memory: 16M
boot: {{kernel: {TREE}/config/examples/hello.elf}}
owner: "{OWNER.uid}:{STAFF}"
"""
    (tmp_path / "vm.yaml").write_text(text)
    done = pyvmctl("start", str(tmp_path / "vm.yaml"))
    try:
        assert done.returncode == 0, done.stderr
        for name in ("vm.json", "pid", "log", "console.log", "lock"):
            status = os.stat(f"{runtime_dir}/hello/{name}")
            assert (status.st_mode & 0o777, status.st_gid) == (0o640, STAFF), name
        said = as_user(MEMBER, lambda: cli.main(["status", "hello"]))
        assert (said.status, said.out.endswith(" running hello\n")) == (0, True), said
        assert as_user(STRANGER, lambda: cli.main(["pause", "hello"])).status == 3
        assert as_user(MEMBER, lambda: cli.main(["pause", "hello"])).status == 0
        assert as_user(MEMBER, lambda: cli.main(["kill", "hello"])).status == 0
        assert os.stat(f"{runtime_dir}/hello/exit.json").st_mode & 0o777 == 0o640
    finally:
        pyvmctl("kill", "-a")


def test_two_users_stop_one_vm(runtime_dir: str, tmp_path: Path) -> None:
    """The owner and a member of his group: both may, the second begins nothing, a third not."""
    os.chmod(runtime_dir, 0o755)  # noqa: S103  as root's own is
    text = f"""
name: vm
memory: 16M
boot: {{kernel: {GUESTS}/stopping.bin, cmdline: h}}
owner: "{OWNER.uid}:{STAFF}"
vmmci: {{ack-timeout: 60s, shutdown-timeout: 60s}}
"""
    (tmp_path / "vm.yaml").write_text(text)
    done = pyvmctl("start", str(tmp_path / "vm.yaml"))
    try:
        assert done.returncode == 0, done.stderr
        for user, status in ((OWNER, 0), (STRANGER, 3), (MEMBER, 0)):
            assert as_user(user, lambda: cli.main(["stop", "vm"])).status == status
        with open(f"{runtime_dir}/vm/log") as file:
            log = file.read()
        assert [who.uid for who in (OWNER, MEMBER, STRANGER) if f"from uid {who.uid}," in log] == [
            OWNER.uid,
            MEMBER.uid,
        ]
        assert log.count("the guest is asked to stop") == 1
        assert as_user(MEMBER, lambda: cli.main(["kill", "vm"])).status == 0
        said = as_user(MEMBER, lambda: cli.main(["wait", "--json", "vm"]))
        assert (said.status, '"how": "forced"' in said.out) == (0, True), said
    finally:
        pyvmctl("kill", "-a")
