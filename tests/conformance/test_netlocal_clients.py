"""Real clients at a local interface: BusyBox, ISC, systemd-networkd and the kernel itself.

Each runs in network and mount namespaces of its own (`tests.netclient`), with a tap between it
and the responder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any, Final

import pytest

TOP: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SLAAC: Final = "fd00:1:2:10:fce1:bbff:fed1:1"  # the /64, and EUI-64 of the MAC address


def client(scenario: str, program: str) -> Any:
    """Run a scenario; skip where the host cannot."""
    if os.geteuid() != 0:
        pytest.skip("namespaces with a tap need root")
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("there is no /dev/net/tun")
    alone = ("unshare", "--net", "--mount", "--propagation", "private")
    ran = subprocess.run(
        (*alone, sys.executable, "-m", "tests.netclient", scenario),
        cwd=TOP,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def assert_told(event: dict[str, str], **more: str) -> None:
    """Check what a client's script was told."""
    usual = {
        "ip": "100.64.1.3",
        "mask": "255.255.255.254",
        "router": "100.64.1.2",
        "dns": "100.64.1.2",
        "server": "100.64.1.2",
        "hostname": "web",
        "domain": "example.org",
        "mtu": "1400",
        "lease": "3600",
    }
    for key, value in {**usual, **more}.items():
        assert event[key] == value, key


def test_busybox() -> None:
    """Bound, renewed over its own address, released."""
    found = client("udhcpc", "busybox")
    assert_told(found["bound"], siaddr="100.64.1.2")
    assert_told(found["renewed"])
    assert found["addresses"] == {"100.64.1.3": 31}
    assert found["gateways"] == ["100.64.1.2"]
    counts = found["counts"]
    assert counts["offer"] >= 1
    assert counts["ack"] >= 2
    assert counts["release"] == 1
    assert "nak" not in counts


def test_isc_dhclient() -> None:
    """Bound; rebooted with its lease; refused and given another address after a move."""
    found = client("dhclient", "dhclient")
    assert_told(found["bound"], search="example.net.")
    assert_told(found["again"], search="example.net.")
    assert found["counts"]["ack"] >= 2
    assert found["moved"]["ip"] == "100.64.1.5"
    assert found["moved"]["lease"] == str(0xFFFFFFFF)
    assert found["counts_moved"]["nak"] >= 1


def test_systemd_networkd() -> None:
    """Both families at once."""
    found = client("networkd", "/usr/lib/systemd/systemd-networkd")
    assert found["addresses"] == {"100.64.1.3": 31, SLAAC: 64}
    assert sorted(found["gateways"]) == ["100.64.1.2", "fe80::1"]


def test_linux_configures_itself() -> None:
    """The kernel's solicitation, and what it makes of the advertisement."""
    found = client("kernel", "ip")
    assert found["addresses"] == {SLAAC: 64}
    assert found["gateways"] == ["fe80::1"]
    assert found["mtu"] == 1400
    assert found["counts"] == {"advertisement": 1}
