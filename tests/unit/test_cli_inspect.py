"""pyvmctl inspect: everything as JSON, and a vm.yaml that means the same VM."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import pytest
import yaml

from config.load import load_text
from config.model import VmConfig
from config.spell import plain, spell

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.cli_fakes import FakeVm, Pyvmctl

RICH: Final = """\
defaults: {vcpus: 3}
switches: {uplink: {bridge: br0, locked: yes}, inner: {mtu: 9000}}
vms:
  base:
    memory: 1G
    boot: {kernel: /k, initrd: /i, cmdline: "console=ttyS0 quiet: yes"}
    debug: {console: true, eventfds: false}
    rng: {rate: 1M/s}
    transitional: true
    allow: [memory, disk, boot, cdrom, interface, instance]
  web:
    instance: base
    boot: {firmware: seabios, order: [cdrom, disk]}
    owner: "1000:50"
    enable: no
    disks:
      - {path: /a b.qcow2, format: qcow2, readonly: yes, cache: none, serial: "007"}
      - {path: "/yes", format: raw, queues: 4, block-size: 4096, opt-io-size: 64K}
    cdrom: empty
    interfaces:
      - {switch: uplink, lladdr: "52:54:00:12:34:56", queues: 2, rx-rate: 10M/s, tx-pps: 500}
      - {local: true, nat: yes, tap: vm7}
      - {type: user, ports: ["2222:22", "127.0.0.1:53:53/udp"], link: no}
    local-prefix: 10.0.0.0/16
    local-inet6: auto
    vmmci: {ack-timeout: 1.5, shutdown-timeout: 5m}
    limits: {cpu: 150%, memory: 2G}
    vhost-user: [{type: fs, socket: /run/files.sock, tag: home}]
    jail: best-effort
    packed: true
    allow: []
  bare: {boot: {kernel: /k}, vmmci: no}
"""


@pytest.fixture
def vms() -> dict[str, VmConfig]:
    """What RICH says, by name."""
    return {vm.name: vm for vm in load_text(RICH, "/vm.yaml").vms}


@pytest.mark.parametrize("name", ["base", "web", "bare"])
def test_what_is_spelled_means_the_same(name: str, vms: dict[str, VmConfig]) -> None:
    """For every key that a VM can have; through JSON, as vm.json keeps it; templates are gone."""
    keys = spell(json.loads(json.dumps(plain(vms[name]))))
    again = load_text(yaml.safe_dump(keys, sort_keys=False), "/other.yaml")
    assert again.vms == (vms[name]._replace(instance=""),)
    assert again.warnings == ()


def test_the_rich_file_sets_every_key(vms: dict[str, VmConfig]) -> None:
    """Or the test above would not see one that is not spelled."""
    defaults = VmConfig._field_defaults
    given = {
        name for vm in vms.values() for name in defaults if getattr(vm, name) != defaults[name]
    }
    assert set(defaults) - given == set()


def test_inspect_prints_all(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """What status says, and the configuration; of a VM that has ended, too."""
    vm = fake_vm(config={"cdrom": "/i.iso"}, info={"uptime": 5.0})
    assert pyvmctl("inspect", "web") == 0
    found = json.loads(pyvmctl.out)
    assert pyvmctl("status", "--json", "web") == 0
    assert found.pop("config")["cdrom"] == "/i.iso"
    assert found == json.loads(pyvmctl.out)
    vm.kill()
    assert pyvmctl("inspect", "1") == 0
    found = json.loads(pyvmctl.out)
    assert (found["state"], found["config"]["cdrom"]) == ("crashed", "/i.iso")


def test_inspect_as_yaml(
    pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], vms: dict[str, VmConfig]
) -> None:
    """It is a file that validates."""
    fake_vm(config=plain(vms["base"]))
    assert pyvmctl("inspect", "--format", "yaml", "web") == 0
    assert load_text(pyvmctl.out, "/x.yaml").vms == (vms["base"],)


@pytest.mark.parametrize("damage", [{"disks": 5}, {"disks": [5]}, {"boot": []}, {"vmmci": {}}])
def test_a_damaged_configuration_is_said(
    damage: dict[str, object], pyvmctl: Pyvmctl, fake_vm: Callable[..., FakeVm], run_root: Path
) -> None:
    """The VM's owner can write what he likes there."""
    fake_vm(config=damage)
    assert pyvmctl("inspect", "--format", "yaml", "web") == 1
    assert pyvmctl.err == "pyvmctl: web: its vm.json is damaged\n"


def test_nobody_of_that_name(pyvmctl: Pyvmctl) -> None:
    """Exit status 3."""
    assert pyvmctl("inspect", "web") == 3
