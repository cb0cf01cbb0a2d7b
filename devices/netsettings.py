"""Settings of a local interface: a JSON object, checked and turned into bytes for frames.

What may be left out has a default:

    lladdr        guest's MAC address, "fe:e1:bb:d1:00:01"
    host_lladdr   the tap's MAC address; "": the guest's with its last byte one up, as in vmd
    address       guest's IPv4 address, "100.64.1.3"
    host          host's IPv4 address, "100.64.1.2": DHCP server, and router unless `router`
    length        prefix length, 31; from 1 to 32
    router        default route; "": the host
    dns           resolvers, IPv4 and IPv6 mixed, at most 8; []: the host, as in vmd
    hostname      guest's name; "": not told
    domain        domain it is in; "": not told
    search        domains that names are looked up in, at most 6 and together 243 characters, so
                  that they fit one option; []: not told
    lease         seconds; 0: for ever, as in vmd
    mtu           68 to 65535; 0: not told
    boot_file     what a guest is to load, "auto_install" in vmd's network boot; "": nothing
    address6      guest's IPv6 address; "": no IPv6 on this interface, and the rest is unused
    length6       its prefix length; 64: the guest configures itself, other: only told as on-link
    router6       host's link-local address, "fe80::1": the guest's router
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME_MAX: Final = 253  # characters of a domain name (RFC 1035 §2.3.4)
_LABEL_MAX: Final = 63
_SEARCH_MAX: Final = 243  # characters; with 2 more each they fit 255


class Settings(NamedTuple):
    """The settings above as they go into frames: addresses in network byte order."""

    lladdr: bytes  # 6
    host_lladdr: bytes  # 6
    address: bytes  # 4
    host: bytes  # 4
    length: int
    router: bytes  # 4
    dns: tuple[bytes, ...]  # 4 each
    dns6: tuple[bytes, ...]  # 16 each
    hostname: bytes
    domain: bytes
    search: tuple[bytes, ...]
    lease: int
    mtu: int
    boot_file: bytes
    address6: bytes  # 16, or b"" for no IPv6
    length6: int
    router6: bytes  # 16


def parse(settings: Mapping[str, Any]) -> Settings:
    """Check the settings. Raises ConfigError that names the one at fault."""
    known = {**_DEFAULTS, **settings}
    if strange := known.keys() - _DEFAULTS.keys():
        raise ConfigError(f"local: there is no setting {min(strange)!r}")
    lladdr = _lladdr(known, "lladdr")
    host = _address(known["host"], "host", AF_INET)
    dns = [_address(each, "dns") for each in _list(known, "dns", 8)]
    address6 = known["address6"]
    return Settings(
        lladdr=lladdr,
        host_lladdr=_lladdr(known, "host_lladdr")
        if known["host_lladdr"]
        else lladdr[:5] + bytes([lladdr[5] + 1 & 255]),
        address=_address(known["address"], "address", AF_INET),
        host=host,
        length=_int(known, "length", 1, 32),
        router=_address(known["router"], "router", AF_INET) if known["router"] else host,
        dns=tuple(each for each in dns if len(each) == 4) if dns else (host,),
        dns6=tuple(each for each in dns if len(each) == 16),
        hostname=_name(known["hostname"], "hostname"),
        domain=_name(known["domain"], "domain"),
        search=_search(known),
        lease=_int(known, "lease", 0, 0xFFFF_FFFF),
        mtu=_int(known, "mtu", 68, 65535) if known["mtu"] else 0,
        boot_file=_text(known["boot_file"], "boot_file", 127),
        address6=_address(address6, "address6", AF_INET6) if address6 else b"",
        length6=_int(known, "length6", 1, 128),
        router6=_address(known["router6"], "router6", AF_INET6),
    )


_DEFAULTS: Final[dict[str, Any]] = {
    "lladdr": "",
    "host_lladdr": "",
    "address": "",
    "host": "",
    "length": 31,
    "router": "",
    "dns": [],
    "hostname": "",
    "domain": "",
    "search": [],
    "lease": 0,
    "mtu": 0,
    "boot_file": "",
    "address6": "",
    "length6": 64,
    "router6": "fe80::1",
}


def _lladdr(settings: Mapping[str, Any], key: str) -> bytes:
    """Return six bytes of a MAC address that one station may have."""
    parts = str(settings[key]).split(":")
    if len(parts) == 6 and all(len(part) == 2 for part in parts):
        try:
            found = bytes.fromhex("".join(parts))
        except ValueError:
            found = b"\1"
        if len(found) == 6 and not found[0] & 1 and any(found):
            return found
    raise ConfigError(f"local: {key}: {settings[key]!r} is no station's MAC address")


def _address(text: Any, key: str, *families: int) -> bytes:
    """Return the bytes of an address of one of `families`, or of either."""
    for family in families or (AF_INET, AF_INET6):
        try:
            return inet_pton(family, text)
        except (OSError, ValueError, TypeError):
            continue
    raise ConfigError(f"local: {key}: {text!r} is no IP address that would do")


def _int(settings: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"local: {key}: {value!r} is no integer from {low} to {high}")
    return value


def _list(settings: Mapping[str, Any], key: str, most: int) -> list[Any]:
    value = settings[key]
    if not isinstance(value, list | tuple) or len(value) > most:
        raise ConfigError(f"local: {key}: {value!r} is no list of at most {most}")
    return list(value)


def _search(settings: Mapping[str, Any]) -> tuple[bytes, ...]:
    """Return the domains to look names up in; a wire name is at most two bytes longer each."""
    names = tuple(_name(each, "search") for each in _list(settings, "search", 6))
    if sum(map(len, names)) > _SEARCH_MAX or not all(names):
        raise ConfigError(f"local: search: {settings['search']!r} is too much or has an empty name")
    return names


def _text(value: Any, key: str, most: int) -> bytes:
    if not isinstance(value, str) or not value.isascii() or len(value) > most:
        raise ConfigError(f"local: {key}: {value!r} is not ASCII of at most {most} characters")
    return value.encode()


def _name(value: Any, key: str) -> bytes:
    """Return a domain name; vm.yaml's reader has checked which characters it may have."""
    name = _text(value, key, _NAME_MAX)
    if name and not all(0 < len(label) <= _LABEL_MAX for label in name.split(b".")):
        raise ConfigError(f"local: {key}: {value!r} is no domain name")
    return name
