"""Leases of local interfaces: which guest has which address, and whether it has ever asked for it.

Every local interface has one address for its guest, for as long as the VM runs (vmd, reference
§e.3), and its device process gives it to nobody else. So there is no file of leases: what there is
to know, the VMs say themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vmm import survey, verb_status

if TYPE_CHECKING:
    from collections.abc import Iterator


def leases() -> list[dict[str, Any]]:
    """Return the leases of all VMs that run and answer, by VM and interface. Raises HostError."""
    found = []
    for info in survey.survey():
        live = verb_status.facts(info)["live"] if info.alive else None
        found += [{"vm": info.name, **lease} for lease in of_vm(live)]
    return found


def of_vm(live: Any) -> Iterator[dict[str, Any]]:
    """Yield the leases in what a VM process says of itself, which may be anything.

    `given` is how often the guest was told its address by DHCP or BOOTP.
    """
    devices = live.get("devices") if isinstance(live, dict) else None
    for device in devices if isinstance(devices, list) else ():
        if not isinstance(device, dict):
            continue
        name, lladdr = device.get("name"), device.get("lladdr")
        addresses, network = device.get("addresses"), device.get("network")
        local = network.get("local") if isinstance(network, dict) else None
        if not (isinstance(name, str) and isinstance(lladdr, str) and isinstance(local, dict)):
            continue
        if not (isinstance(addresses, list) and all(isinstance(each, str) for each in addresses)):
            continue
        given = sum(n for n in map(local.get, ("ack", "bootp")) if type(n) is int)
        if addresses:
            yield {"nic": name, "lladdr": lladdr, "addresses": addresses, "given": given}
