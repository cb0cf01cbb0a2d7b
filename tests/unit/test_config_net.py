"""Interfaces and switches of vm.yaml: every key arrives, every mistake is told at its place."""

from __future__ import annotations

import pytest

from config.errors import ConfigError
from config.load import load_text
from config.model import NicConfig, PortConfig, SwitchConfig, VmConfig

BOOT = "boot: {kernel: /k}\n"


def one(text: str) -> VmConfig:
    """Return the only VM of a file."""
    (vm,) = load_text(BOOT + text, "web.yaml").vms
    return vm


def mistakes(text: str) -> list[str]:
    """Return the complaints about a file, without its name."""
    with pytest.raises(ConfigError) as caught:
        load_text(text, "web.yaml")
    return [line.removeprefix("web.yaml:") for line in str(caught.value).split("\n")]


def test_every_key_of_an_interface_arrives() -> None:
    """A bare MAC address stays text, and is lower case afterwards."""
    vm = one(
        """\
interfaces:
  - switch: lan
    tap: tap7
    lladdr: FE:E1:BB:D1:00:01
    locked: yes
    mtu: 9000
    queues: 4
    link: no
    up: no
    group: 7
    rx-rate: 10M/s
    tx-rate: 1M/s
    rx-pps: 1000
    tx-pps: 2000
  - {local: true, nat: true, ports: [2222:22, "127.0.0.1:8080:80/tcp", 53:5353/udp]}
  - {type: user, ports: ["2223:22"]}
switches:
  lan: {bridge: br0, locked: yes, mtu: 1400, group: 3}
local-prefix: 10.64.0.0/12
local-inet6: fd00:1:2::/48
"""
    )
    assert vm.interfaces == (
        NicConfig(
            switch="lan",
            tap="tap7",
            lladdr="fe:e1:bb:d1:00:01",
            locked=True,
            mtu=9000,
            queues=4,
            link=False,
            up=False,
            group=7,
            rx_rate=10 << 20,
            tx_rate=1 << 20,
            rx_pps=1000,
            tx_pps=2000,
        ),
        NicConfig(
            local=True,
            nat=True,
            ports=(
                PortConfig("", 2222, 22, "tcp"),
                PortConfig("127.0.0.1", 8080, 80, "tcp"),
                PortConfig("", 53, 5353, "udp"),
            ),
        ),
        NicConfig(type="user", ports=(PortConfig("", 2223, 22, "tcp"),)),
    )
    assert vm.switches == (SwitchConfig("lan", "br0", locked=True, mtu=1400, group=3),)
    assert (vm.local_prefix, vm.local_inet6) == ("10.64.0.0/12", "fd00:1:2::/48")


def test_an_address_of_zeros_is_any() -> None:
    """As in vmd."""
    assert one("interfaces: [{lladdr: '00:00:00:00:00:00'}]").interfaces == (NicConfig(),)


def test_a_prefix_without_a_length_has_vmds() -> None:
    """/16."""
    assert one("local-prefix: 10.9.0.0").local_prefix == "10.9.0.0/16"


def test_switches_of_a_file_reach_each_of_its_vms() -> None:
    """They stand beside `vms`, before or after; so do prefixes below `defaults`."""
    config = load_text(
        """\
vms:
  a: {boot: {kernel: /k}, interfaces: [{switch: lan}]}
  b: {boot: {kernel: /k}, interfaces: [{switch: lan}, {local: yes}]}
defaults: {local-inet6: auto}
switches: {lan: {}}
""",
        "web.yaml",
    )
    assert [vm.switches for vm in config.vms] == [(SwitchConfig("lan"),)] * 2
    assert [vm.local_inet6 for vm in config.vms] == ["auto"] * 2


@pytest.mark.parametrize(
    ("nic", "line"),
    [
        ("{lladdr: fe:e1:bb:d1:00}", "lladdr: expected a MAC address such as fe:e1:bb:d1:00:01"),
        ("{lladdr: '01:00:5e:00:00:01'}", "that is a group's address, not a station's)"),
        ("{mtu: 67}", "mtu: expected an integer from 68 to 65521 (got '67')"),
        ("{local: yes, mtu: 575}", "mtu: must be 576 or more for a local interface"),
        ("{queues: 9}", "queues: expected an integer from 1 to 8"),
        ("{tap: sixteen-letters-}", "tap: expected an interface name of at most 15 characters"),
        ("{tap: fd:2}", "0 to 2 are standard input and output)"),
        ("{tap: ..}", "(got '..')"),
        ("{tap: fd:5, queues: 2}", "queues: must be 1 with 'tap: fd:N'"),
        ("{tap: fd:5, local: yes}", "local: not allowed beside 'tap: fd:N'"),
        ("{local: yes, switch: lan}", "local: not allowed beside 'switch'"),
        ("{nat: yes}", "nat: needs 'local: true' beside it"),
        ("{local: yes, ports: ['1:1']}", "ports: needs 'nat: true' or 'type: user' beside it"),
        ("{type: user, switch: lan}", "switch: has no meaning beside 'type: user'"),
        ("{type: user, up: no}", "up: has no meaning beside 'type: user'"),
        ("{type: user, queues: 2}", "queues: must be 1 with 'type: user'"),
        ("{type: user, ports: ['22']}", "ports[0]: expected a port forward such as 2222:22"),
        ("{type: user, ports: ['0:22']}", "ports go from 1 to 65535)"),
        ("{type: user, ports: ['22:65536']}", "ports go from 1 to 65535)"),
        ("{type: user, ports: ['300.1.1.1:1:1']}", "300.1.1.1 is no IPv4 address)"),
        ("{type: user, ports: ['1:1', '1:1']}", "1/tcp leads to web.interfaces[0] already"),
        ("{rdomain: 1}", "rdomain: unknown key"),
    ],
)
def test_mistakes_in_an_interface(nic: str, line: str) -> None:
    """Each is told with the index of the interface and the key at fault."""
    (told,) = mistakes(f"{BOOT}interfaces: [{nic}]\nswitches: {{lan: {{}}}}")
    assert told.startswith("2:")
    assert "interfaces[0]" in told
    assert line in told


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "interfaces: [{}, {switch: lann}]\nswitches: {lan: {}}",
            "2:1: interfaces: [1].switch: no switch 'lann' (there are: lan)",
        ),
        (
            "interfaces: [{switch: lan}]",
            "2:1: interfaces: [0].switch: no switch 'lan' (the file has no 'switches')",
        ),
        (
            "interfaces: [{lladdr: fe:e1:bb:d1:0:1}]",
            "2:23: interfaces[0].lladdr: expected a MAC address",
        ),
        (
            "interfaces: [{tap: t}, {tap: t}]",
            "2:1: interfaces: web.interfaces[1].tap: t is that of web.interfaces[0] already",
        ),
        (
            "interfaces: [{type: user, ports: ['1:1']}, {type: user, ports: ['127.0.0.1:1:2']}]",
            "2:1: interfaces: web.interfaces[1].ports: 1/tcp leads to web.interfaces[0] already",
        ),
        ("switches: {lan: {bridge: br0, up: no}}", "switches.lan.up: not allowed beside 'bridge'"),
        (
            "switches: {thirteen-long: {}}",
            "switches.thirteen-long.name: more than 12 characters: its bridge could not be named",
        ),
        ("local-prefix: 100.64.0.1/10", "local-prefix: expected an IPv4 prefix such as 100.64."),
        ("local-prefix: 100.64.0.0/17", "local-prefix: expected"),
        ("local-inet6: fd00::/65", "local-inet6: expected auto or an IPv6 prefix such as"),
    ],
)
def test_mistakes_beside_interfaces(text: str, line: str) -> None:
    """What interfaces have to do with each other and with switches."""
    (told,) = mistakes(BOOT + text)
    assert line in told


@pytest.mark.parametrize(
    ("a", "b", "line"),
    [
        (
            "{lladdr: 'fe:e1:bb:d1:00:01'}",
            "{lladdr: 'FE:E1:BB:D1:00:01'}",
            "1:1: vms: b.interfaces[0].lladdr: fe:e1:bb:d1:00:01 is that of a.interfaces[0] alr",
        ),
        ("{tap: t}", "{tap: t}", "vms: b.interfaces[0].tap: t is that of a.interfaces[0] already"),
        (
            "{local: yes, nat: yes, ports: ['127.0.0.1:1:1']}",
            "{local: yes, nat: yes, ports: ['1:1']}",
            "vms: b.interfaces[0].ports: 1/tcp leads to a.interfaces[0] already",
        ),
    ],
)
def test_what_two_vms_cannot_both_have(a: str, b: str, line: str) -> None:
    """A MAC address, a tap, a port of the host."""
    vm = "  {0}: {{boot: {{kernel: /k}}, interfaces: [{1}]}}\n"
    (told,) = mistakes("vms:\n" + vm.format("a", a) + vm.format("b", b))
    assert line in told


def test_ports_of_two_protocols_or_addresses_do_not_clash() -> None:
    """Only the same address or any, the same number and the same protocol do."""
    ports = "['1:1', '1:1/udp', '127.0.0.1:2:1', '127.0.0.2:2:1']"
    assert len(one(f"interfaces: [{{type: user, ports: {ports}}}]").interfaces[0].ports) == 4


def test_switches_are_the_files() -> None:
    """Below `vms` or `defaults` they are refused."""
    vm = "vms: {a: {boot: {kernel: /k}, switches: {lan: {}}}}"
    (told,) = mistakes(vm)
    assert "vms.a.switches: belongs to the file: give it beside 'vms'" in told
    (told,) = mistakes("vms: {a: {boot: {kernel: /k}}}\ndefaults: {switches: {lan: {}}}")
    assert "defaults.switches: cannot be the same for all" in told


def test_an_instance_has_its_templates_interfaces() -> None:
    """But not a fixed address or tap, which only one can have."""
    text = (
        "vms:\n"
        "  a: {{enable: no, boot: {{kernel: /k}}, interfaces: [{{{}}}]}}\n"
        "  b: {{instance: a}}\n"
    )
    config = load_text(text.format("local: yes"), "web.yaml")
    assert [vm.interfaces for vm in config.vms] == [(NicConfig(local=True),)] * 2
    (told,) = mistakes(text.format("tap: t"))
    assert "b.interfaces[0].tap: t is that of a.interfaces[0] already" in told
