"""What devices vm.yaml asks for: a row for each, with what it needs opened by our rights.

Slots are handed out as vmd does: entropy, interfaces, disks, what other programs serve beyond
those, the CD-ROM drive, vmmci last.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from config.errors import HostError
from devices import images
from devices.spec import SPECS, VHOST
from vmm import owner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import ExitStack

    from config.model import DiskConfig, VmConfig
    from devices.bases import Base
    from devices.spec import DeviceSpec
    from vmm.cdrom import Drive
    from vmm.net.network import Network
    from vmm.peers import Peers


class Row(NamedTuple):
    """One device that vm.yaml asks for."""

    kind: str  # in devices.spec.SPECS
    name: str
    settings: Mapping[str, Any]
    queues: int  # how many request queues
    fds: Mapping[str, int]  # what the device needs beside channels, memory and eventfds
    facts: Mapping[str, Any] = {}  # what `status --json` tells beyond what every device has
    other: DeviceSpec | None = None  # its spec, where that is not the kind's

    @property
    def spec(self) -> DeviceSpec:
        """What its PCI function is made from."""
        return self.other or SPECS[self.kind]

    @property
    def processes(self) -> int:
        """How many serve it: one for each queue of a tap, else one for all."""
        return max(sum(name.startswith("tap") for name in self.fds), 1)


def rows(
    config: VmConfig,
    opened: ExitStack,
    drive: Drive | None = None,
    network: Network | None = None,
    peers: Peers | None = None,
) -> Iterator[Row]:
    """Yield what vm.yaml asks for, files opened with our rights. Raises ConfigError, HostError."""
    if config.rng.vhost_user:
        yield _peer_row(peers, "viornd")
    else:
        yield Row("viornd", "viornd", {"rate": config.rng.rate}, 1, {})
    attached = {nic.name: nic for nic in (network.attached() if network else ())}
    for index in range(len(config.interfaces)):
        nic = attached.get(name := f"vionet{index}")
        if nic is None:
            yield _peer_row(peers, name)
        else:
            yield Row("vionet", nic.name, nic.settings, 2 * nic.pairs + 1, nic.fds, nic.facts)
    for index, disk in enumerate(config.disks):
        name = f"vioblk{index}"
        yield _peer_row(peers, name) if disk.vhost_user else _disk_row(disk, name, config, opened)
    for index in range(len(config.vhost_user)):
        yield _peer_row(peers, f"vhost{index}")
    if drive is not None:
        yield Row("vioscsi", drive.name, {}, len(SPECS["vioscsi"].queues), drive.fds, drive.facts)
    if config.vmmci.enabled:
        yield Row("vmmci", "vmmci", {}, 0, {})  # the last one, as in vmd


def _peer_row(peers: Peers | None, name: str) -> Row:
    """Connect to the program that serves a device."""
    if peers is None:
        raise HostError("is another program's, and nobody connects to that", device=name)
    peer = peers.get(name)
    place = peer.place
    return Row(VHOST, name, place.settings, place.queues, peer.fds, peer.facts, place.spec)


def open_drive(path: str, opened: ExitStack) -> Drive | None:
    """Return the CD-ROM drive with its disc, None if the VM has none."""
    if not path:
        return None
    from vmm.cdrom import Drive  # 1 ms, which most VMs do not spend

    drive = Drive(path)
    opened.callback(drive.close)
    return drive


def _disk_row(disk: DiskConfig, name: str, config: VmConfig, opened: ExitStack) -> Row:
    """Open a disk's image, and what it stands on."""
    fds = {"image": images.open_disk(disk, name)}
    opened.callback(os.close, fds["image"])
    bases: list[Base] = []
    if disk.format == "qcow2":
        from devices.bases import open_bases  # 2 ms, which a VM with raw disks does not spend

        uid = owner.resolve(config.owner, config.name).uid
        direct = disk.cache == "none"
        bases = open_bases(fds["image"], disk.path, opened, device=name, direct=direct, uid=uid)
    fds.update((f"base{index}", base.fd) for index, base in enumerate(bases))
    return Row(
        "vioblk",
        name,
        {**disk._asdict(), "bases": [base.format for base in bases]},
        disk.queues,
        fds,
        {
            "path": disk.path,
            "format": disk.format,
            "readonly": disk.readonly,
            "bases": [{"path": base.path, "format": base.format} for base in bases],
        },
    )
