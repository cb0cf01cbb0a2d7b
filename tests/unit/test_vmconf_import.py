"""pyvmctl import: vm.conf(5) in, vm.yaml out, and a word about all that is not the same."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from config.load import load_file
from config.model import StaggerConfig

if TYPE_CHECKING:
    from pathlib import Path

    from config.model import Config
    from tests.unit.cli_fakes import Pyvmctl


class Importer:
    """Imports a text, as its user would."""

    def __init__(self, path: Path, pyvmctl: Pyvmctl) -> None:
        self.path, self._pyvmctl = path, pyvmctl

    def __call__(self, text: str, *options: str) -> Config:
        assert self.status(text, *options) == 0, self._pyvmctl.err
        (self.path / "vm.yaml").write_text(self._pyvmctl.out)
        return load_file(str(self.path / "vm.yaml"))

    def status(self, text: str, *options: str) -> int:
        (self.path / "vm.conf").write_text(text)
        return self._pyvmctl("import", str(self.path / "vm.conf"), *options)

    @property
    def remarks(self) -> list[str]:
        """What was said, without the file's name."""
        return [
            line.removeprefix(f"{self.path}/vm.conf:").strip()
            for line in self._pyvmctl.err.splitlines()
        ]


@pytest.fixture
def conf(tmp_path: Path, pyvmctl: Pyvmctl) -> Importer:
    return Importer(tmp_path, pyvmctl)


def test_a_vm(conf: Importer) -> None:
    """Firmware, disks, memory, owner and a CD-ROM arrive; the result is a vm.yaml."""
    config = conf("""\
vm "web" {
    disable
    memory 1.5G
    disk "/web.img" format raw
    disk "/data.qcow2" format qcow2
    cdrom "/install.iso"
    boot device cdrom
    owner alice:staff
}
""")
    (vm,) = config.vms
    assert (vm.name, vm.enable, vm.memory, vm.owner) == ("web", False, 3 << 29, "alice:staff")
    assert [(disk.path, disk.format) for disk in vm.disks] == [
        ("/web.img", "raw"),
        ("/data.qcow2", "qcow2"),
    ]
    assert (vm.boot.firmware, vm.boot.order) == ("seabios", ("cdrom",))
    assert "install.iso" in str(vm.cdrom)
    assert conf.remarks == [
        "1: boot device: the VM starts again after a reboot of its guest, which vmd's do not"
    ]


def test_memory_is_rounded_down_as_vmd_does(conf: Importer) -> None:
    """To whole MiB; a bare number is bytes."""
    for text, size in (("2097151", 1 << 20), ("512M", 512 << 20), ("0.5G", 512 << 20)):
        assert conf(f"vm x {{ memory {text}\n disk /d format raw }}\n").vms[0].memory == size
    for text, told in (
        ("1K", "memory of 1024 bytes is less than 1 MiB"),
        ("1Z", "'1Z' is not a size"),
    ):
        assert conf.status(f"vm x {{ memory {text} }}\n") == 2
        assert conf.remarks[0] == f"1: vm 'x': {told}"


def test_formats_are_looked_up_once(conf: Importer, tmp_path: Path) -> None:
    """Where vmd would look at each start, the import says what it has seen."""
    (tmp_path / "q").write_bytes(b"QFI\xfb" + bytes(100))
    (tmp_path / "r").write_bytes(bytes(100))
    lines = "\n".join(f"disk {tmp_path}/{name}" for name in "qrn")
    (vm,) = conf(f"vm x {{ {lines} }}\n").vms
    assert [disk.format for disk in vm.disks] == ["qcow2", "raw", "raw"]
    assert [remark.rpartition("format ")[2] for remark in conf.remarks] == [
        "qcow2 was found in its header",
        "raw was found in its header",
        "raw was assumed, since it cannot be read",
    ]


def test_kernels_and_firmware(conf: Importer, tmp_path: Path) -> None:
    """There is one word for both in vm.conf."""
    kernel, bzimage, bios = (tmp_path / name for name in ("bsd", "bzImage", "bios.bin"))
    kernel.write_bytes(b"\x7fELF" + bytes(0x300))
    bzimage.write_bytes(bytes(0x202) + b"HdrS" + bytes(0x100))
    bios.write_bytes(bytes(1 << 16))
    for path in (kernel, bzimage):
        (vm,) = conf(f"vm x {{ boot {path}\n boot device net }}\n").vms
        assert (vm.boot.kernel, vm.boot.firmware) == (str(path), "")
        assert "boot device net: has no effect beside a kernel" in conf.remarks[0]
        assert "taken for a kernel" in conf.remarks[1]
    (vm,) = conf(f"vm x {{ boot {bios}\n boot device disk }}\n").vms
    assert (vm.boot.firmware, vm.boot.order) == (str(bios), ("disk",))
    (vm,) = conf("vm x { disk d format raw }\n").vms
    assert vm.disks[0].path == f"{tmp_path}/d"
    (vm,) = conf("vm x { boot /etc/firmware/vmm-bios\n disk /d format raw }\n").vms
    assert vm.boot.firmware == "/etc/firmware/vmm-bios"


def test_instances_and_options(conf: Importer) -> None:
    """Templates, what they allow, and the start of many."""
    config = conf("""\
staggered start parallel 4 delay 30
socket owner :staff
local prefix 10.0.0.0
local inet6
agentx
vm a { disk /a format raw
    allow instance { disk memory owner bob } }
vm a instance b { disk /b format raw
    memory 1G }
vm c { disk /c format raw
    sev }
""")
    a, b, _ = config.vms
    assert (a.allow, b.instance, b.memory) == (("disk", "memory"), "a", 1 << 30)
    assert b.boot == a.boot
    assert config.staggered_start == StaggerConfig(4, 30.0)
    assert (a.local_prefix, a.local_inet6) == ("10.0.0.0/16", "auto")
    assert [re.sub("^[0-9]+: ", "", remark).split(":")[0] for remark in conf.remarks] == [
        "allow instance owner",
        "sev",
        "socket owner",
        "agentx",
    ]


def test_interfaces_and_switches(conf: Importer) -> None:
    """With their own words; a count is filled up; what Linux has not is said."""
    config = conf("""\
switch uplink { interface br0
    locked lladdr
    group ext
    rdomain 1 }
switch off { interface veb0
    disable }
switch ether { interface veb1
    down }
vm x { disk /x format raw
    interfaces 4
    interface { switch uplink, locked lladdr FE:E1:BB:D1:00:01
        group dmz }
    local interface tap3 down rdomain 7
    interface lladdr 00:00:00:00:00:00
}
""")
    nics = config.vms[0].interfaces
    assert len(nics) == 4
    first, second, third, fourth = nics
    assert (first.switch, first.locked, first.lladdr) == ("uplink", True, "fe:e1:bb:d1:00:01")
    assert (second.local, second.tap, second.up) == (True, "tap3", False)
    assert third == fourth
    switches = {switch.name: switch for switch in config.vms[0].switches}
    assert set(switches) == {"uplink", "ether"}
    assert (switches["uplink"].bridge, switches["uplink"].locked) == ("br0", True)
    assert switches["ether"].bridge == "veb1"
    words = " ".join(conf.remarks)
    assert [words.count(word) for word in ("group dmz", "group ext", "rdomain", "veb1")] == [
        1,
        1,
        2,
        2,
    ]
    assert conf.status("vm x { disk /x format raw\n interface switch none }\n") == 2
    assert "there is no switch 'none'" in conf.remarks[0]


def test_macros_from_outside_and_an_output_file(conf: Importer, tmp_path: Path) -> None:
    """-D wins; -o makes a file, and never replaces one."""
    text = "dir = /home\nvm x { disk $dir/x format raw }\n"
    out = str(tmp_path / "out.yaml")
    assert conf.status(text, "-D", "dir=/srv", "-o", out) == 0
    assert load_file(out).vms[0].disks[0].path == "/srv/x"
    with open(out) as file:
        assert file.readline() == f"# from {tmp_path}/vm.conf\n"
    assert conf.status(text, "-o", out) == 1
    assert "File exists" in conf.remarks[-1]
    for word in ("dir", "=x"):
        assert conf.status(text, "-D", word) == 2


def test_what_vm_yaml_does_not_take_is_refused(conf: Importer, tmp_path: Path) -> None:
    """A name that only vmd allows: nothing is written, and the place in the result is told."""
    out = str(tmp_path / "out.yaml")
    assert conf.status('vm "7up" { disk /x format raw }\n', "-o", out) == 2
    assert "vms.7up" in conf.remarks[0]
    assert not os.path.exists(out)
    assert conf.status("") == 2
    assert conf.remarks == ["1: there is no vm in it"]
    assert conf.status("zork\n") == 2


def test_names_of_yaml_are_only_names(conf: Importer) -> None:
    """What looks like a number, a truth or a comment in YAML arrives as it was."""
    odd: dict[str, Any] = {"owner": "0123", "disk": "/a: b #c"}
    (vm,) = conf(f'vm yes {{ owner {odd["owner"]}\n disk "{odd["disk"]}" format raw }}\n').vms
    assert (vm.name, vm.owner, vm.disks[0].path) == ("yes", "0123", odd["disk"])
