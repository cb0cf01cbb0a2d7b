"""What the VM process holds of its networks: settings and descriptors for the network devices."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vmm import log
from vmm.net.keeper import Work
from vmm.net.passt import Passt
from vmm.net.plan import guest_lladdr, plan

if TYPE_CHECKING:
    from contextlib import ExitStack

    from config.localnet import Link
    from config.model import VmConfig
    from vmm.net.plan import Nic
    from vmm.rundir import RunDir

_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")  # of a host name (RFC 1123 §2.1)


class Attached(NamedTuple):
    """What one network device is made with."""

    name: str
    settings: dict[str, Any]
    fds: dict[str, int]
    facts: dict[str, Any]  # for `status`
    pairs: int


class Network:
    """All networks of one VM, being set up from the beginning of its start on."""

    def __init__(self, config: VmConfig, rundir: RunDir, parts: ExitStack) -> None:
        """Begin; with one thread only. `parts` clears away. Raises ConfigError, HostError."""
        self._nics = plan(config, rundir.id)
        self._parts = parts
        self._work: Work | None = None
        taps = [nic for nic in self._nics if nic.tap]
        if taps:
            self._work = Work(taps, rundir.lock_fd, rundir.dir_fd)
            parts.callback(self._work.close)
        self._users: dict[int, Passt] = {}
        for nic in self._nics:
            if not nic.tap:
                self._users[nic.number] = user = Passt(nic, rundir.owner)
                parts.callback(os.close, user.fd)

    def attached(self) -> list[Attached]:
        """Wait until everything is set up, and return it in order.

        Raises ConfigError, HostError.
        """
        facts, fds = self._work.result() if self._work else ([], [])
        for fd in fds:
            self._parts.callback(os.close, fd)
        told, queues = iter(facts), iter(fds)
        found = []
        for nic in self._nics:
            if nic.tap:
                taps = {f"tap{n}": next(queues) for n in range(nic.config.queues)}
                found.append(_on_tap(nic, next(told), taps))
            else:
                user = self._users[nic.number]
                user.ready()
                found.append(_on_stream(nic, user.fd))
            where = found[-1].facts["tap"] or "passt"
            log.info(f"on {where}, MAC address {found[-1].settings['lladdr']}", nic.device)
        return found


def _on_tap(nic: Nic, fact: dict[str, Any], fds: dict[str, int]) -> Attached:
    settings = _settings(nic, fact["lladdr"], fact["mtu"], "tap")
    if nic.link:
        settings["local"] = _local(nic, nic.link, fact, settings["mtu"])
    return _attached(nic, settings, fds, fact["tap"])


def _on_stream(nic: Nic, fd: int) -> Attached:
    lladdr = nic.config.lladdr or guest_lladdr(nic.vm, nic.number)
    settings = _settings(nic, lladdr, nic.mtu, "stream")
    return _attached(nic, settings, {"stream0": fd}, "")


def _settings(nic: Nic, lladdr: str, mtu: int, backend: str) -> dict[str, Any]:
    config = nic.config
    return {
        "lladdr": lladdr,
        "locked": nic.locked,
        "mtu": mtu,
        "queues": config.queues,
        "link": config.link,
        "rx_rate": config.rx_rate,
        "tx_rate": config.tx_rate,
        "rx_pps": config.rx_pps,
        "tx_pps": config.tx_pps,
        "local": None,
        "backend": backend,
    }


def _local(nic: Nic, link: Link, fact: dict[str, Any], mtu: int) -> dict[str, Any]:
    """Return what devices.netsettings wants."""
    return {
        "lladdr": fact["lladdr"],
        "host_lladdr": fact["host_lladdr"],
        "address": link.guest,
        "host": link.host,
        "length": link.length,
        "dns": fact["dns"],
        "hostname": nic.vm if all(map(_LABEL.fullmatch, nic.vm.split("."))) else "",
        "mtu": mtu,
        "address6": link.guest6,
        "length6": link.length6 or 64,
    }


def _attached(nic: Nic, settings: dict[str, Any], fds: dict[str, int], tap: str) -> Attached:
    facts = {
        "type": nic.config.type,
        "tap": tap,
        "switch": nic.config.switch,
        "bridge": nic.bridge,
        "lladdr": settings["lladdr"],
        "addresses": [a for a in (nic.link.guest, nic.link.guest6) if a] if nic.link else [],
    }
    return Attached(nic.device, settings, fds, facts, nic.config.queues)
