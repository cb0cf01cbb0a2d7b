"""What networks need, before anything is made: names, addresses, command lines, rules as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from config.errors import ConfigError, HostError
from config.load import load_text
from vmm.net import links, passt, plan, programs, rules
from vmm.owner import Owner

if TYPE_CHECKING:
    from pathlib import Path

    from vmm.net.plan import Nic


def nics(text: str, vm_id: int = 3) -> list[Nic]:
    """Return what the VM of a vm.yaml needs."""
    [vm] = load_text(f"name: web\nboot: {{kernel: /k}}\n{text}", "x.yaml").vms
    return plan.plan(vm, vm_id)


def test_names_and_addresses_follow_from_the_id() -> None:
    """Interfaces are counted over all kinds."""
    found = nics(
        "interfaces: [{}, {local: yes}, {type: user}, {switch: s}, {tap: mine, switch: t}]\n"
        "switches: {s: {mtu: 1400, group: 9, locked: yes}, t: {bridge: br0}}"
    )
    assert [nic.tap for nic in found] == ["vm3if0", "vm3if1", "", "vm3if3", "mine"]
    assert [nic.bridge for nic in found] == ["", "", "", "vm-s", "br0"]
    assert [nic.own_bridge for nic in found] == [False, False, False, True, False]
    assert [(nic.mtu, nic.group, nic.locked) for nic in found[3:]] == [
        (1400, 9, True),
        (0, 0, False),
    ]
    assert found[1].link is not None
    assert (found[1].link.host, found[1].link.guest) == ("100.64.3.4", "100.64.3.5")


def test_an_interfaces_own_word_counts_more_than_its_switchs() -> None:
    """But for `locked`, which either can ask for."""
    [nic] = nics(
        "interfaces: [{switch: s, mtu: 1500, group: 1}]\n"
        "switches: {s: {mtu: 1400, group: 9, locked: yes}}"
    )
    assert (nic.mtu, nic.group, nic.locked) == (1500, 1, True)


def test_a_pool_that_is_too_small_says_so() -> None:
    """An id beyond it has no address."""
    with pytest.raises(ConfigError, match=r"id 256 has no local address in 10\.9\.0\.0/16"):
        nics("interfaces: [{local: yes}]\nlocal-prefix: 10.9.0.0/16", 256)


def test_what_must_be_cleared_away() -> None:
    """Bridges of ours and rules; taps go by themselves."""
    found = nics(
        "interfaces: [{}, {local: yes}, {local: yes, nat: yes}, {switch: s}, {switch: t}]\n"
        "switches: {s: {}, t: {bridge: br0}}"
    )
    assert [nic.lasting for nic in found] == [False, False, True, True, False]


def test_ipv6_of_this_host_is_the_same_at_every_start() -> None:
    """A unique local prefix; other hosts have others."""
    text = "interfaces: [{local: yes}]\nlocal-inet6: auto"
    [one], [two] = nics(text), nics(text)
    assert one.link is not None
    assert one.link == two.link
    assert re.fullmatch(r"fd[0-9a-f]{2}:.*", one.link.host6)
    assert one.link.length6 == 64


def test_mac_addresses_are_vmds_and_stay() -> None:
    """fe:e1:bb:d1 for the first interface; others differ."""
    assert plan.guest_lladdr("web", 0) == plan.guest_lladdr("web", 0)
    assert plan.guest_lladdr("web", 0).startswith("fe:e1:bb:d1:")
    assert plan.guest_lladdr("web", 15).startswith("fe:e1:bb:d0:")
    assert len({plan.guest_lladdr("web", 0, attempt) for attempt in range(20)}) > 15
    assert plan.guest_lladdr("web", 0)[12:] != plan.guest_lladdr("db", 0)[12:]


@pytest.mark.parametrize(
    ("guest", "host"),
    [
        ("fe:e1:bb:d1:12:34", "fe:e1:ba:d1:12:34"),
        ("52:54:00:00:00:01", "52:54:ff:00:00:01"),
        ("00:11:22:33:44:55", "02:11:21:33:44:55"),
    ],
)
def test_the_hosts_side_has_another_address(guest: str, host: str) -> None:
    """The third byte one less, as in vmd, and always a locally administered one."""
    assert plan.host_lladdr(guest) == host


@pytest.mark.parametrize("tap", ["vm3if0", "a-b", "a.b_c-", "-"])
def test_a_table_tells_whose_it_is(tap: str) -> None:
    """Whatever a tap may be called, nft can call the table so."""
    table = rules.table_name(tap)
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_./]*", table)
    assert rules.tap_of(table) == tap
    assert not rules.tap_of(rules.GUARD)


def test_rules_name_one_address_and_no_prefix() -> None:
    """Of the guest's: a wrong mask could translate a neighbour."""
    [nic] = nics("interfaces: [{local: yes, nat: yes, ports: ['53:5353/udp']}]")
    assert nic.link is not None
    text = rules.text(nic, nic.link)
    assert set(re.findall(r"[0-9.]+/[0-9]+", text)) == {"127.0.0.0/8"}
    assert "udp dport 53 dnat ip to 100.64.3.3:5353" in text


def test_passts_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the owner, if root starts it for one; else as passt likes."""
    [nic] = nics("interfaces: [{type: user, mtu: 1400, ports: ['2222:22', '127.0.0.1:53:5/udp']}]")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    words = passt.words("/p", nic, Owner(1000, None))
    assert words == [
        *("/p", "--fd", "3", "--quiet", "--no-map-gw", "--runas", "1000:1000", "--mtu", "1400"),
        *("--tcp-ports", "2222:22", "--udp-ports", "127.0.0.1/53:5"),
    ]
    assert "--runas" not in passt.words("/p", nic, Owner(0, None))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "--runas" not in passt.words("/p", nic, Owner(1000, None))


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what wants it and how to get it."""
    monkeypatch.setattr(programs, "PATH", ("/nonexistent",))
    with pytest.raises(HostError) as caught:
        programs.need("nft", "'nat: true'")
    assert str(caught.value) == "nft is not installed: 'nat: true' needs it (apt install nftables)"


def test_a_program_runs_without_a_shell(tmp_path: Path) -> None:
    """It reads what it is given; its status and all it says come back."""
    run = programs.Run(["/bin/sh", "-c", "cat; echo no >&2; echo $HOME; exit 7"], "text\n")
    assert run.wait() == (7, "text\nno\n\n")
    with pytest.raises(HostError, match=r"cannot run /nonexistent: No such file"):
        programs.Run(["/nonexistent"])


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["nameserver 127.0.0.53\n"], []),
        (
            ["nameserver 127.0.0.53\n", "nameserver 192.0.2.1\nnameserver 2001:db8::1\n"],
            ["192.0.2.1"],
        ),
        (["search x\n# nameserver 1.1.1.1\nnameserver 9.9.9.9 # x\n"], ["9.9.9.9"]),
        (
            ["".join(f"nameserver 192.0.2.{n}\n" for n in range(5))],
            [f"192.0.2.{n}" for n in range(3)],
        ),
        ([], []),
    ],
)
def test_resolvers_that_a_guest_can_reach(
    tmp_path: Path, files: list[str], found: list[str]
) -> None:
    """Not those on the host's loopback; three are as many as libc asks."""
    paths = [str(tmp_path / "none")]
    for n, text in enumerate(files):
        path = tmp_path / str(n)
        path.write_text(text)
        paths.append(str(path))
    assert links.resolvers(paths) == found
