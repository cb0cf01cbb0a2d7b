"""The address scheme of local interfaces: which subnet is interface i's of VM n. Pure arithmetic.

A local interface is a link between host and guest alone. As in vmd (reference §e.3), every
interface has a number in its VM, counted over all of the VM's interfaces, and every VM an id:

    host   pool | id << 8 | 2 × (index + 1)          100.64.ID.2   100.64.ID.4   ...
    guest  host + 1, a /31 (RFC 3021)                100.64.ID.3   100.64.ID.5   ...

IPv6 has a pool of its own. One of /56 or shorter has a /64 per interface, `id << 4 | index` after
the pool's bits, so that any guest configures itself (RFC 4862). A longer one, up to /64, is shared
as vmd shares it: /96 per interface, for addresses given by hand. Either way the last 64 bits are
the guest's IPv4 address, then 0:1 for the host and 0:2 for the guest. The guest's router is
fe80::1, the same on every local interface.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, NamedTuple

from config.errors import ConfigError

DEFAULT_POOL: Final = "100.64.0.0/10"  # RFC 6598: neither public nor anybody's private network
POOL_LENGTHS: Final = range(1, 17)
POOL6_LENGTHS: Final = range(1, 65)
NR_INDEXES: Final = 127  # interfaces per VM that fit the last byte of its addresses
NR_INDEXES6: Final = 16
LENGTH: Final = 31
ROUTER6: Final = "fe80::1"
_SHARED: Final = 56  # bits; a longer IPv6 pool has too few /64 to give


class Pool(NamedTuple):
    """Addresses that local interfaces take theirs from."""

    network: int  # 32 or 128 bits, host bits 0
    length: int
    bits: int  # 32: IPv4, 128: IPv6

    def __str__(self) -> str:
        return f"{_text(self.network, self.bits)}/{self.length}"

    @property
    def nr_ids(self) -> int:
        """VM ids go from 1 to this less one."""
        if self.bits == 32:
            return int(1 << (24 - self.length))
        return int(1 << max(60 - self.length, 0)) if self.length <= _SHARED else 1 << 24


class Link(NamedTuple):
    """The addresses of one local interface, as text. The IPv6 ones are "" and 0 without a pool."""

    host: str
    guest: str
    length: int = LENGTH
    host6: str = ""
    guest6: str = ""
    length6: int = 0  # 64: the guest configures itself; 96: by hand
    router6: str = ""  # the host's link-local address, what the guest routes to


def parse_pool(text: str) -> Pool:
    """Return the IPv4 pool "10.64.0.0/12"; /16 if no length is given, as in vmd.

    Raises ValueError with what is wrong, for the reader of vm.yaml.
    """
    return _parse(text, AF_INET, POOL_LENGTHS, "16")


def parse_pool6(text: str) -> Pool:
    """Return the IPv6 pool "fd00:1:2::/48". Raises ValueError with what is wrong."""
    return _parse(text, AF_INET6, POOL6_LENGTHS, "48")


def unique_pool6(global_id: bytes) -> Pool:
    """Return the unique local /48 of five random bytes (RFC 4193 §3.2)."""
    return Pool(int.from_bytes(b"\xfd" + global_id[:5].rjust(5, b"\0") + bytes(10)), 48, 128)


def link(pool: Pool, vm_id: int, index: int, pool6: Pool | None = None) -> Link:
    """Return the addresses of interface `index`, from 0, of VM `vm_id`, from 1.

    Raises ConfigError where the pools have none for it.
    """
    _within("id", vm_id, 1, pool.nr_ids, pool)
    _within("interface", index, 0, NR_INDEXES, pool)
    host = pool.network | vm_id << 8 | 2 * (index + 1)
    guest = host + 1
    made = Link(_text(host, 32), _text(guest, 32))
    if pool6 is None:
        return made
    own = pool6.length <= _SHARED
    subnet = pool6.network
    if own:
        _within("id", vm_id, 1, pool6.nr_ids, pool6)
        _within("interface", index, 0, NR_INDEXES6, pool6)
        subnet |= (vm_id << 4 | index) << 64
    host6 = subnet | guest << 32 | 1
    return made._replace(
        host6=_text(host6, 128),
        guest6=_text(host6 + 1, 128),
        length6=64 if own else 96,
        router6=ROUTER6,
    )


def _within(what: str, value: int, low: int, end: int, pool: Pool) -> None:
    if not low <= value < end:
        raise ConfigError(
            f"{what} {value} has no local address in {pool}: it has room for {low} to {end - 1}",
            hint="give a shorter prefix as the pool" if what == "id" else "move it further up",
        )


def _parse(text: str, family: int, lengths: range, default: str) -> Pool:
    address, _, length_text = text.partition("/")
    bits, example = (32, DEFAULT_POOL) if family == AF_INET else (128, "fd00:1:2::/48")
    try:
        network = int.from_bytes(inet_pton(family, address))
    except (OSError, ValueError, UnicodeEncodeError):
        raise ValueError(f"{address!r} is no address: write it as {example}") from None
    length_text = length_text if "/" in text else default
    if not (length_text.isascii() and length_text.isdigit() and int(length_text) in lengths):
        raise ValueError(f"the length after / is {lengths[0]} to {lengths[-1]}")
    pool = Pool(network, int(length_text), bits)
    rest = network & ((1 << bits - pool.length) - 1)
    if rest:
        right = pool._replace(network=network ^ rest)
        raise ValueError(f"bits are set beyond the first {pool.length}: did you mean {right}?")
    return pool


def _text(address: int, bits: int) -> str:
    return inet_ntop(AF_INET if bits == 32 else AF_INET6, address.to_bytes(bits // 8))
