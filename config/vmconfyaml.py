"""What a vm.conf(5) says, as a vm.yaml.

Nothing is lost silently: what has no place in vm.yaml, or was only guessed, becomes a remark.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import ConfigError
from config.units import format_size
from config.vmconflex import scan_scaled

if TYPE_CHECKING:
    from config.vmconf import Interface, Switch, Vm, VmConf

MIB: Final = 1 << 20
MAX_DISKS: Final = 16
_DOMAIN: Final = "rdomain has no counterpart: see network namespaces and VRFs of your host"


class Import(NamedTuple):
    """What came of a vm.conf."""

    content: dict[str, Any]  # of the vm.yaml
    remarks: tuple[str, ...]  # what to look at: file:line: text, or text alone


def convert(conf: VmConf, file: str) -> Import:
    """Return what a configuration becomes; `file` is its name, for remarks. Raises ConfigError."""
    return _Converter(file, conf).result()


def disk_format(path: str) -> str:
    """Return the format that vmd would find in an image, "" if it cannot be read."""
    head = _head(path, 4)
    return "" if head is None else "qcow2" if head == b"QFI\xfb" else "raw"


def write(content: dict[str, Any], source: str) -> str:
    """Return a vm.yaml's text; `source` is named in its first line."""
    import yaml  # its writer is for this alone

    name = source if source.isprintable() else "a vm.conf"
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return f"# from {name}\n\n{body}"


class _Converter:
    def __init__(self, file: str, conf: VmConf) -> None:
        self._file, self._conf = file, conf
        self._remarks = list(conf.remarks)
        self._mistakes: list[str] = []

    def result(self) -> Import:
        content: dict[str, Any] = {"vms": {vm.name: self._vm(vm) for vm in self._conf.vms}}
        if switches := {s.name: self._switch(s) for s in self._conf.switches if s.enable}:
            content["switches"] = switches
        self._options(content)
        if not self._conf.vms:
            self._mistakes.append(f"{self._file}:1: there is no vm in it")
        if self._mistakes:
            raise ConfigError("\n".join(self._mistakes))
        return Import(content, tuple(self._remarks))

    def _options(self, content: dict[str, Any]) -> None:
        options = self._conf.options
        if "stagger" in options:
            parallel, delay = options["stagger"]
            content["staggered-start"] = {"parallel": parallel, "delay": f"{delay}s"}
        defaults = {}
        if "prefix" in options:
            address, slash, length = options["prefix"].partition("/")
            defaults["local-prefix"] = f"{address}/{length if slash else 16}"
        if "inet6" in options:
            defaults["local-inet6"] = options["inet6"] or "auto"
        if defaults:
            content["defaults"] = defaults
        for word, text in (
            ("socket", "socket owner: each VM has its 'owner' instead"),
            ("agentx", "agentx: there is no SNMP agent; 'pyvmctl metrics' is for monitoring"),
        ):
            if word in options:
                self._remark(0, text)

    def _vm(self, vm: Vm) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        if vm.parent:
            keys["instance"] = vm.parent
        if not vm.enable:
            keys["enable"] = False
        if vm.memory:
            keys["memory"] = self._memory(vm)
        if vm.owner:
            keys["owner"] = vm.owner
        if boot := self._boot(vm):
            keys["boot"] = boot
        if vm.disks:
            keys["disks"] = [self._disk(vm, *disk) for disk in vm.disks]
        if vm.cdrom:
            keys["cdrom"] = self._path(vm.cdrom)
        nics = [self._interface(vm, nic) for nic in vm.interfaces]
        nics += [{} for _ in range(vm.nr_interfaces - len(nics))]
        if nics:
            keys["interfaces"] = nics
        if vm.allow is not None:
            keys["allow"] = list(vm.allow)
        if vm.allow_owner:
            text = (
                "allow instance owner: an instance has the rights of who starts it, and no others"
            )
            self._remark(vm.line, text)
        if vm.sev:
            self._remark(vm.line, "sev: encrypted guests are not supported")
        return keys

    def _memory(self, vm: Vm) -> str:
        try:
            size = scan_scaled(vm.memory)
        except ValueError as err:
            self._mistakes.append(f"{self._file}:{vm.line}: vm '{vm.name}': {err}")
            return ""
        if size < MIB:
            text = f"memory of {size} bytes is less than 1 MiB"
            self._mistakes.append(f"{self._file}:{vm.line}: vm '{vm.name}': {text}")
        return format_size(size - size % MIB)

    def _boot(self, vm: Vm) -> dict[str, Any]:
        if vm.boot and not _is_firmware(vm.boot):
            if vm.device:
                self._remark(vm.line, f"boot device {vm.device}: has no effect beside a kernel")
            text = f"boot {vm.boot}: taken for a kernel; one of OpenBSD boots through firmware only"
            self._remark(vm.line, text)
            return {"kernel": self._path(vm.boot)}
        boot: dict[str, Any] = {"firmware": self._path(vm.boot) if vm.boot else "seabios"}
        if vm.device:
            boot["order"] = [vm.device]
            text = (
                "boot device: the VM starts again after a reboot of its guest, which vmd's do not"
            )
            self._remark(vm.line, text)
        return {} if vm.parent and not vm.boot and not vm.device else boot

    def _disk(self, vm: Vm, path: str, kind: str) -> dict[str, Any]:
        if not kind:
            found = disk_format(path)
            kind = found or "raw"
            how = "found in its header" if found else "assumed, since it cannot be read"
            self._remark(vm.line, f"disk {path}: format {kind} was {how}")
        return {"path": self._path(path), "format": kind}

    def _path(self, path: str) -> str:
        """Return a path that means the same wherever the vm.yaml will be."""
        return os.path.join(os.path.dirname(os.path.abspath(self._file)), path)

    def _interface(self, vm: Vm, nic: Interface) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        if nic.local and nic.switch:
            self._remark(
                vm.line, f"local: not beside switch {nic.switch}, whose bridge has its frames"
            )
        elif nic.local:
            keys["local"] = True
        if nic.switch:
            keys["switch"] = nic.switch
            if all(
                switch.name != nic.switch or not switch.enable for switch in self._conf.switches
            ):
                self._mistakes.append(
                    f"{self._file}:{vm.line}: vm '{vm.name}': there is no switch '{nic.switch}'"
                )
        if nic.tap not in ("", "tap"):
            keys["tap"] = nic.tap
        if nic.lladdr and set(nic.lladdr) - set("0:"):
            keys["lladdr"] = nic.lladdr.lower()
        if nic.locked:
            keys["locked"] = True
        if not nic.up:
            keys["up"] = False
        if nic.group:
            self._remark(vm.line, _group(nic.group))
        if nic.rdomain is not None:
            self._remark(vm.line, _DOMAIN)
        return keys

    def _switch(self, switch: Switch) -> dict[str, Any]:
        keys: dict[str, Any] = {"bridge": switch.interface}
        if switch.interface.startswith("veb"):
            self._remark(switch.line, f"interface {switch.interface}: make a bridge of that name")
        if switch.locked:
            keys["locked"] = True
        if not switch.up:
            text = f"down: {switch.interface} stays as it is; see ip-link(8)"
            self._remark(switch.line, text)
        if switch.group:
            self._remark(switch.line, _group(switch.group))
        if switch.rdomain is not None:
            self._remark(switch.line, _DOMAIN)
        return keys

    def _remark(self, line: int, text: str) -> None:
        self._remarks.append(f"{self._file}:{line}: {text}" if line else f"{self._file}: {text}")


def _group(name: str) -> str:
    return f"group {name}: groups are numbers on Linux (ip link set ... group); give one as 'group'"


def _is_firmware(path: str) -> bool:
    """Tell firmware from a kernel: it is neither ELF nor a bzImage, and its size is in 64 KiB."""
    head = _head(path, 0x206)
    if head is None:
        return "bios" in path.lower()
    return not head.startswith(b"\x7fELF") and head[0x202:0x206] != b"HdrS"


def _head(path: str, length: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(length)
    except OSError:
        return None
