"""Address scheme of local interfaces: vmd's, byte by byte, and errors that name the remedy."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError
from config.localnet import (
    DEFAULT_POOL,
    Pool,
    link,
    parse_pool,
    parse_pool6,
    unique_pool6,
)

POOL = parse_pool(DEFAULT_POOL)


@pytest.mark.parametrize(
    ("vm_id", "index", "host", "guest"),
    [
        (1, 0, "100.64.1.2", "100.64.1.3"),
        (1, 1, "100.64.1.4", "100.64.1.5"),
        (7, 3, "100.64.7.8", "100.64.7.9"),
        (256, 0, "100.65.0.2", "100.65.0.3"),  # the id spills over into the second byte
        (16383, 126, "100.127.255.254", "100.127.255.255"),
    ],
)
def test_addresses_are_vmds(vm_id: int, index: int, host: str, guest: str) -> None:
    """Prefix | id << 8 | 2(n+1), the guest one above, /31."""
    made = link(POOL, vm_id, index)
    assert (made.host, made.guest, made.length) == (host, guest, 31)
    assert (made.host6, made.guest6, made.length6, made.router6) == ("", "", 0, "")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_two_interfaces_share_an_address(data: st.DataObject) -> None:
    """Within a pool, whatever its length, /31s and /64s are disjoint and inside."""
    pool = Pool(10 << 24, data.draw(st.integers(8, 16)), 32)
    pool6 = Pool(0xFD00_0001_00 << 88, data.draw(st.sampled_from([40, 48, 51])), 128)
    ids = st.integers(1, min(pool.nr_ids, pool6.nr_ids) - 1)
    one, other = (
        (data.draw(ids), data.draw(st.integers(0, 15))),
        (data.draw(ids), data.draw(st.integers(0, 15))),
    )
    nets = []
    for vm_id, index in (one, other):
        made = link(pool, vm_id, index, pool6)
        net = ipaddress.ip_interface(f"{made.host}/{made.length}").network
        net6 = ipaddress.ip_interface(f"{made.host6}/{made.length6}").network
        assert ipaddress.ip_address(made.guest) in net
        assert ipaddress.ip_address(made.guest6) in net6
        assert ipaddress.ip_address(made.guest) in ipaddress.ip_network(str(pool))
        assert ipaddress.ip_address(made.guest6) in ipaddress.ip_network(str(pool6))
        nets.append((net, net6))
    if one != other:
        assert not nets[0][0].overlaps(nets[1][0])
        assert not nets[0][1].overlaps(nets[1][1])


def test_a_short_ipv6_pool_gives_each_interface_a_64() -> None:
    """The interface's number follows the pool's bits; the guest's IPv4 address fills the rest."""
    made = link(POOL, 2, 1, parse_pool6("fd00:1:2::/48"))
    assert made.host6 == "fd00:1:2:21:6440:205:0:1"
    assert made.guest6 == "fd00:1:2:21:6440:205:0:2"
    assert (made.length6, made.router6) == (64, "fe80::1")


def test_a_long_ipv6_pool_is_shared_as_in_vmd() -> None:
    """Eight bytes of prefix, the guest's IPv4 address, 0:1 for the host, /96."""
    made = link(POOL, 2, 1, parse_pool6("fd00:1:2:3::/64"))
    assert made.host6 == "fd00:1:2:3:6440:205:0:1"
    assert made.length6 == 96


@pytest.mark.parametrize(
    ("vm_id", "index", "pool6", "complaint"),
    [
        (0, 0, None, "id 0 has no local address in 10.1.0.0/16: it has room for 1 to 255"),
        (256, 0, None, "id 256 has no"),
        (1, 127, None, r"interface 127 has no .* 0 to 126"),
        (1, -1, None, "interface -1"),
        (16, 0, "fd00::/56", r"id 16 has no .* fd00::/56: it has room for 1 to 15"),
        (1, 16, "fd00::/48", r"interface 16 has no .* fd00::/48: it has room for 0 to 15"),
    ],
)
def test_what_does_not_fit_is_refused(
    vm_id: int, index: int, pool6: str | None, complaint: str
) -> None:
    """An exhausted pool is named with its room."""
    with pytest.raises(ConfigError, match=complaint):
        link(parse_pool("10.1.0.0"), vm_id, index, parse_pool6(pool6) if pool6 else None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("10.0.0.0/17", "1 to 16"),
        ("10.0.0.0/0", "1 to 16"),
        ("10.0.0.0/", "1 to 16"),
        ("10.0.0.0/-1", "1 to 16"),
        ("10.0.0.0/²", "1 to 16"),
        ("10.64.1.0/12", r"did you mean 10\.64\.0\.0/12\?"),
        ("10.64/12", "no address"),
        ("fd00::/8", "no address"),
        ("1\0.2.3.4", "no address"),
        ("\udcff", "no address"),
    ],
)
def test_bad_pools_are_refused(text: str, complaint: str) -> None:
    """Each mistake has its sentence."""
    with pytest.raises(ValueError, match=complaint):
        parse_pool(text)


def test_bad_ipv6_pools_are_refused() -> None:
    """Up to /64, and no host bits."""
    with pytest.raises(ValueError, match="1 to 64"):
        parse_pool6("fd00::/65")
    with pytest.raises(ValueError, match="did you mean fd00::/48"):
        parse_pool6("fd00::1")


def test_pools_print_as_they_are_written() -> None:
    """So that messages can name them."""
    assert str(parse_pool("10.64.0.0/12")) == "10.64.0.0/12"
    assert str(unique_pool6(bytes.fromhex("0102030405"))) == "fd01:203:405::/48"
