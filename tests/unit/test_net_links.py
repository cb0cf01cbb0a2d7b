"""Taps, bridges, addresses and rules on a real kernel, each test in a namespace of its own."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import HostError
from config.load import load_text
from devices import passing, tun
from tests.descriptors import count_before
from tests.kvm.lab import wait_for
from tests.netns import Namespace, namespace
from vmm.net import keeper, plan, rules
from vmm.net.network import Network
from vmm.rundir import NETWORK, RunDir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from config.model import VmConfig
    from vmm.net.network import Attached


@pytest.fixture
def ns(runtime_dir: str) -> Iterator[Namespace]:
    """A namespace that must be as it was at the end."""
    with namespace() as made:
        yield made


def vm(text: str, name: str = "web") -> VmConfig:
    """Return the VM that `text` describes, beside its name and kernel."""
    return load_text(f"name: {name}\nboot: {{kernel: /k}}\n{text}", "x.yaml").vms[0]


@contextmanager
def network(text: str, name: str = "web") -> Iterator[list[Attached]]:
    """The networks of a VM, from its start to its end."""
    rundir = RunDir(name)
    rundir.take()
    try:
        with ExitStack() as parts:
            yield Network(vm(text, name), rundir, parts).attached()
    finally:
        rundir.discard()


def flags(fd: int) -> int:
    """Return how a tap was opened."""
    flags: int = struct.unpack_from("16xH", fcntl.ioctl(fd, tun.TUNGETIFF, bytes(40)))[0]
    return flags


def test_a_plain_tap(ns: Namespace) -> None:
    """Up, marked, with vmd's MAC addresses, no IPv6 of the host's, and gone with its descriptor."""
    with network("interfaces: [{}]") as [nic]:
        link = ns.links()["vm1if0"]
        assert "UP" in link["flags"]
        assert link["ifalias"] == f"pyvmd vm=web nic=0 lladdr={nic.settings['lladdr']}"
        assert link["address"][:8] == "fe:e1:ba"
        assert nic.settings["lladdr"][:11] == "fe:e1:bb:d1"
        assert ns.addresses("vm1if0") == []
        assert link["linkinfo"]["info_data"]["persist"] is False
        assert (nic.settings["backend"], nic.settings["local"], nic.settings["mtu"]) == (
            "tap",
            None,
            0,
        )
        want = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR
        assert flags(nic.fds["tap0"]) & (want | tun.IFF_MULTI_QUEUE) == want
        assert not os.get_inheritable(nic.fds["tap0"])
    assert ns.untouched()


def test_queues_that_there_is_no_room_for(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have so many descriptors and no more; that is told, and nothing is left."""
    receive, limits = passing.receive, resource.getrlimit(resource.RLIMIT_NOFILE)

    def nearly_full(*words: Any) -> Any:
        os.close(free := os.dup(2))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        try:
            return receive(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    before = count_before()
    with monkeypatch.context() as patch:
        patch.setattr(passing, "receive", nearly_full)
        with (
            pytest.raises(HostError, match="no descriptors are left for all queues"),
            network("interfaces: [{queues: 4}]"),
        ):
            pass
    assert len(os.listdir("/proc/self/fd")) == before
    assert ns.untouched()


def test_no_keeper_stays_where_nothing_would_outlast_the_vm(ns: Namespace) -> None:
    """Its taps go by themselves."""
    with network("interfaces: [{}]"):
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # the only child: the keeper
        assert ended is not None
        assert (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


def test_all_that_a_tap_can_be_told(ns: Namespace) -> None:
    """Name, queues, MTU, group, down."""
    text = "interfaces: [{tap: my.tap, queues: 3, mtu: 9000, group: 7, up: no}]"
    with network(text) as [nic]:
        link = ns.links()["my.tap"]
        assert (link["mtu"], link["group"], "UP" in link["flags"]) == (9000, "7", False)
        assert list(nic.fds) == ["tap0", "tap1", "tap2"]
        assert all(flags(fd) & tun.IFF_MULTI_QUEUE for fd in nic.fds.values())
        assert (nic.settings["mtu"], nic.settings["queues"], nic.pairs) == (9000, 3, 3)


def test_a_local_interface(ns: Namespace) -> None:
    """Vmd's addresses; only the guest's may come in; the device is told what it has to tell."""
    with network("interfaces: [{}, {local: yes}]\nlocal-inet6: fd00:1:2::/48") as [_, nic]:
        assert ns.addresses("vm1if1") == [
            "100.64.1.4/31",
            "fd00:1:2:11:6440:105:0:1/64",
            "fe80::1/64",
        ]
        assert ns.sysctl("ipv4/conf/vm1if1/rp_filter") == "1"
        assert ns.sysctl("ipv6/conf/vm1if1/accept_ra") == "0"
        local = nic.settings["local"]
        assert (local["address"], local["host"]) == ("100.64.1.5", "100.64.1.4")
        assert local["address6"] == "fd00:1:2:11:6440:105:0:2"
        assert local["host_lladdr"] == ns.links()["vm1if1"]["address"]
        assert local["hostname"] == "web"
    assert ns.untouched()


def test_a_mac_address_stays_from_start_to_start(ns: Namespace) -> None:
    """Vmd draws a new one each time; leases and interface names of guests live on this one."""
    with network("interfaces: [{}]") as [nic]:
        first = nic.settings["lladdr"]
    with network("interfaces: [{}]") as [nic]:
        assert nic.settings["lladdr"] == first


def test_a_switch_of_ours_lives_as_long_as_it_is_used(ns: Namespace) -> None:
    """Made with the first interface, at once forwarding, gone with the last."""
    lan = "interfaces: [{switch: lan}]\nswitches: {lan: {locked: yes, mtu: 1400, group: 5}}"
    with network(lan) as [one]:
        with network(lan, "db") as [two]:
            links = ns.links()
            assert links["vm1if0"]["master"] == links["vm2if0"]["master"] == "vm-lan"
            bridge = links["vm-lan"]
            assert bridge["ifalias"] == "pyvmd switch=lan"
            assert bridge["linkinfo"]["info_data"]["forward_delay"] == 0
            assert ns.addresses("vm-lan") == []
            assert (bridge["mtu"], links["vm1if0"]["mtu"], links["vm1if0"]["group"]) == (
                1400,
                1400,
                "5",
            )
            assert (one.settings["locked"], one.settings["mtu"]) == (True, 1400)
            assert one.settings["lladdr"] != two.settings["lladdr"]
            listed = keeper.listing()
            assert [(tap["vm"], tap["bridge"]) for tap in listed["taps"]] == [
                ("web", "vm-lan"),
                ("db", "vm-lan"),
            ]
            assert listed["bridges"][0]["members"] == ["vm1if0", "vm2if0"]
        assert set(ns.links()) == {"vm-lan", "vm1if0"}
    assert ns.untouched()


def test_a_bridge_that_was_there_stays_as_it_is(ns: Namespace) -> None:
    """Its MTU becomes the tap's, which would otherwise pull it down."""
    ns.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "1500")
    ns.run("ip", "link", "set", "br0", "mtu", "9000")
    before = ns.links()["br0"]
    with network("interfaces: [{switch: up}]\nswitches: {up: {bridge: br0}}") as [nic]:
        links = ns.links()
        assert (links["vm1if0"]["master"], links["vm1if0"]["mtu"]) == ("br0", 9000)
        assert nic.settings["mtu"] == 9000
        assert links["br0"]["mtu"] == 9000
    after = ns.links()["br0"]
    for key in ("mtu", "flags", "operstate", "group"):
        assert after[key] == before[key]
    assert after["linkinfo"]["info_data"]["forward_delay"] == 1500


@pytest.mark.parametrize(
    ("text", "prepare", "what", "hint"),
    [
        (
            "interfaces: [{switch: s}]\nswitches: {s: {bridge: br9}}",
            "",
            "switch s: there is no bridge br9",
            "ip link add br9 type bridge",
        ),
        (
            "interfaces: [{switch: s}]\nswitches: {s: {bridge: mine}}",
            "ip tuntap add mine mode tap",
            "switch s: mine is no bridge",
            "give the name of one",
        ),
        (
            "interfaces: [{switch: s}]\nswitches: {s: {}}",
            "ip link add vm-s type bridge",
            "there is a bridge vm-s that we have not made",
            "bridge: vm-s",
        ),
        (
            "interfaces: [{tap: mine, queues: 2}]",
            "ip tuntap add mine mode tap",
            "interface mine is there already, and is no multi_queue tap",
            "multi_queue",
        ),
        (
            "interfaces: [{tap: mine}]",
            "ip link add mine type bridge",
            "interface mine is there already, and is no single-queue tap",
            "give another name",
        ),
        (
            "interfaces: [{tap: mine}]",
            "ip tuntap add mine mode tap",
            "mine was there before, and is not up",
            "ip link set mine up",
        ),
        (
            "interfaces: [{tap: mine, mtu: 1400}]",
            "ip tuntap add mine mode tap",
            "mine was there before, and has an mtu of 1500, not 1400",
            "ip link set mine mtu 1400",
        ),
        (
            "interfaces: [{tap: mine, local: yes, up: no}]",
            "ip tuntap add mine mode tap",
            "mine was there before, and has not the address 100.64.1.2/31",
            "ip address add 100.64.1.2/31 dev mine",
        ),
        (
            "interfaces: [{tap: mine, local: yes, nat: yes}]",
            "ip tuntap add mine mode tap",
            "'nat' is for taps that we make",
            "leave 'tap' or 'nat' out",
        ),
        (
            "interfaces: [{}, {local: yes}]",
            "ip address add 100.64.1.4/32 dev lo",
            "100.64.1.4 is the address of lo already",
            "local-prefix",
        ),
    ],
)
def test_what_cannot_be_is_told_and_leaves_nothing(
    ns: Namespace, text: str, prepare: str, what: str, hint: str
) -> None:
    """The message names the thing at fault and what to do; what was made before it is gone."""
    if prepare:
        ns.run(*prepare.split())
    before = set(ns.links())
    with pytest.raises(HostError) as caught, network(text):
        pass
    assert what in caught.value.what
    assert hint in caught.value.hint
    assert caught.value.device.startswith("vionet")
    assert set(ns.links()) == before
    assert ns.tables() == []


def test_the_same_address_twice_on_a_switch_is_refused(ns: Namespace) -> None:
    """It names the VM that has it; an address of our own making steps aside."""
    lan = "switches: {lan: {}}\ninterfaces: [{switch: lan, lladdr: '%s'}]"
    with network(lan % "fe:e1:bb:d1:00:01"):
        with pytest.raises(HostError) as caught, network(lan % "fe:e1:bb:d1:00:01", "db"):
            pass
        assert caught.value.what == "MAC address fe:e1:bb:d1:00:01 is VM web's on switch lan"
    first = plan.guest_lladdr("db", 0)
    with (
        network(lan % first),
        network("switches: {lan: {}}\ninterfaces: [{switch: lan}]", "db") as [nic],
    ):
        assert nic.settings["lladdr"] == plan.guest_lladdr("db", 0, 1)


def test_a_tap_in_use_is_refused(ns: Namespace) -> None:
    """By name, whoever uses it."""
    with network("interfaces: [{tap: mine}]"):
        with pytest.raises(HostError) as caught, network("interfaces: [{tap: mine}]", "db"):
            pass
        assert caught.value.what == "tap mine is in use by another program"


def test_a_tap_that_was_there_is_used_as_it_is(ns: Namespace) -> None:
    """And is there afterwards."""
    ns.run("ip", "tuntap", "add", "mine", "mode", "tap")
    ns.run("ip", "link", "set", "mine", "up")
    before = ns.links()["mine"]
    with network("interfaces: [{tap: mine}]") as [nic]:
        assert nic.facts["tap"] == "mine"
        assert "ifalias" not in ns.links()["mine"]
    after = ns.links()["mine"]
    assert (after["address"], after["mtu"]) == (before["address"], before["mtu"])


def test_translation_comes_and_goes_with_its_interface(ns: Namespace) -> None:
    """Forwarding is opened for our taps alone, and shut again."""
    nat = "interfaces: [{local: yes, nat: yes, ports: ['2222:22', '10.1.1.1:53:53/udp']}]"
    other = nat.replace("2222", "2223").replace("10.1.1.1", "10.1.1.2")
    with network(nat):
        assert ns.tables() == ["pyvmd", "pyvmd_vm1if0"]
        assert ns.sysctl("ipv4/ip_forward") == "1"
        assert ns.sysctl("ipv4/conf/vm1if0/route_localnet") == "1"
        with network(other, "db"):
            assert ns.tables() == ["pyvmd", "pyvmd_vm1if0", "pyvmd_vm2if0"]
            assert '"vm2if0"' in ns.run("nft", "list", "set", "inet", "pyvmd", "taps")
        assert ns.tables() == ["pyvmd", "pyvmd_vm1if0"]
        assert ns.sysctl("ipv4/ip_forward") == "1"
        assert '"vm2if0"' not in ns.run("nft", "list", "set", "inet", "pyvmd", "taps")
        text = ns.run("nft", "list", "table", "inet", "pyvmd_vm1if0")
        assert 'ip saddr 100.64.1.3 oifname != "vm1if0" masquerade' in text
        assert "fib daddr type local tcp dport 2222 dnat ip to 100.64.1.3:22" in text
        assert "ip daddr 10.1.1.1 udp dport 53 dnat ip to 100.64.1.3:53" in text
    assert ns.untouched()


def test_a_router_stays_one_without_a_guard(ns: Namespace) -> None:
    """Where forwarding is on, others' packets are not ours to drop, nor the switch ours to turn."""
    rules.write_sysctl(rules.IP_FORWARD, 1)
    with network("interfaces: [{local: yes, nat: yes}]"):
        assert ns.tables() == ["pyvmd_vm1if0"]
        assert ns.sysctl("ipv4/conf/vm1if0/route_localnet") == "0"
    assert ns.tables() == []
    assert ns.sysctl("ipv4/ip_forward") == "1"


def test_rules_of_others_stay(ns: Namespace) -> None:
    """Also tables whose name begins like ours."""
    ns.run("nft", "add", "table", "inet", "pyvmdx")
    with network("interfaces: [{local: yes, nat: yes}]"):
        pass
    assert ns.tables() == ["pyvmdx"]


def test_a_failure_after_rules_clears_them_away(ns: Namespace) -> None:
    """The second interface cannot be; the first was complete."""
    text = "interfaces: [{local: yes, nat: yes}, {switch: lan}, {switch: no}]\nswitches:\n"
    with pytest.raises(HostError), network(text + "  lan: {}\n  no: {bridge: br9}\n"):
        pass
    assert ns.untouched()


def test_what_a_killed_keeper_leaves_is_cleared_by_the_next_look(ns: Namespace) -> None:
    """Everything of ours is known by its marks, so nobody need remember it."""
    text = "interfaces: [{local: yes, nat: yes}, {switch: lan}]\nswitches: {lan: {}}"
    rundir = RunDir("web")
    rundir.take()
    with ExitStack() as parts:
        made = Network(vm(text), rundir, parts)
        made.attached()
        assert made._work is not None
        os.kill(made._work._pid, signal.SIGKILL)
    wait_for(lambda: set(ns.links()) == {"vm-lan"}, "the end of the taps")
    assert ns.tables() == ["pyvmd", "pyvmd_vm1if0"]
    assert NETWORK in os.listdir(rundir.path)
    rundir.close()

    again = RunDir("web")
    again.take()
    assert ns.untouched()
    assert NETWORK not in os.listdir(rundir.path)
    again.discard()


def test_two_vms_that_start_at_once_share_a_switch(ns: Namespace) -> None:
    """Eight keepers race for one bridge: none fails, and it is gone after the last of them."""
    lan = "interfaces: [{switch: lan}]\nswitches: {lan: {}}"
    names = [f"v{n}" for n in range(8)]
    dirs = [RunDir(name) for name in names]
    with ExitStack() as parts:
        for each in dirs:
            each.take()
            parts.callback(each.discard)
        made = [Network(vm(lan, each.name), each, parts) for each in dirs]
        found = [each.attached() for each in made]
        assert len({nic.settings["lladdr"] for [nic] in found}) == 8
        assert len(keeper.listing()["bridges"][0]["members"]) == 8
    assert ns.untouched()


def test_a_tap_passed_as_a_descriptor(ns: Namespace) -> None:
    """It is the device's as it is; what is no tap is refused."""
    [fd] = tun.open_queues("mine", 1, "x")
    with network(f"interfaces: [{{tap: 'fd:{fd}', mtu: 1400}}]") as [nic]:
        assert nic.facts["tap"] == "mine"
        assert tun.name_of(nic.fds["tap0"], "x") == "mine"
        assert nic.settings["mtu"] == 1400
    assert set(ns.links()) == {"mine"}  # its opener still has it
    os.close(fd)
    null = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(HostError) as caught, network(f"interfaces: [{{tap: 'fd:{null}'}}]"):
        pass
    os.close(null)
    assert caught.value.what == f"descriptor {null} is no tap: Inappropriate ioctl for device"


def _as_nobody(ns: Namespace, text: str) -> Any:
    """Set a VM's networks up as a user without rights; return facts, or the error's text."""

    def work() -> Any:
        from vmm.net import links  # the user may not reach this interpreter's files

        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        facts, _ = links.set_up(plan.plan(vm(text), 1))
        return facts

    return keeper.apart(work)


def test_a_user_uses_a_tap_that_was_made_for_him(ns: Namespace) -> None:
    """In a bridge, if it is in it."""
    ns.run("ip", "tuntap", "add", "mine", "mode", "tap", "user", "nobody")
    ns.run("ip", "link", "add", "br0", "type", "bridge")
    ns.run("ip", "link", "set", "mine", "up")
    text = "interfaces: [{tap: mine, switch: s}]\nswitches: {s: {bridge: br0}}"
    with pytest.raises(
        HostError, match=r"mine was there before, and is not in bridge br0 .*master"
    ):
        _as_nobody(ns, text)
    ns.run("ip", "link", "set", "mine", "master", "br0")
    [facts] = _as_nobody(ns, text)
    assert facts["tap"] == "mine"


@pytest.mark.parametrize("text", ["interfaces: [{}]", "interfaces: [{tap: mine}]"])
def test_a_user_without_rights_is_told_the_three_ways(ns: Namespace, text: str) -> None:
    """Root, a tap made before, passt."""
    with pytest.raises(HostError) as caught:
        _as_nobody(ns, text)
    assert caught.value.what.startswith("no right to make or use tap")
    for word in ("as root", "ip tuntap add NAME mode tap user YOU", "type: user"):
        assert word in caught.value.hint
