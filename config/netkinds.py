"""Kinds of values that only networks have: hardware addresses, interface names, ports, prefixes."""

from __future__ import annotations

import re
from socket import AF_INET, inet_pton
from typing import Any, Final

from config import localnet
from config.kinds import Int, Text
from config.model import PortConfig

IFNAMSIZ: Final = 16  # linux/if.h, with the NUL
_MAC: Final = r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"
_NAME: Final = r"[A-Za-z0-9_.-]{1,15}"


class Lladdr(Text):
    """A MAC address of one station. All zeros is "", as in vmd: any."""

    def __init__(self) -> None:
        super().__init__("a MAC address such as fe:e1:bb:d1:00:01", 17, _MAC)

    def read(self, text: str) -> str:
        """Return it in lower case. Raises ValueError."""
        address = super().read(text).lower()
        if int(address[:2], 16) & 1:
            raise self.refuse(text, "that is a group's address, not a station's")
        return address if address.strip("0:") else ""


class InterfaceName(Text):
    """A network interface of the host; `or_fd` also takes "fd:5", a descriptor."""

    def __init__(self, *, or_fd: bool = False) -> None:
        what = f"an interface name of at most {IFNAMSIZ - 1} characters"
        pattern = rf"{_NAME}|fd:[0-9]{{1,6}}" if or_fd else _NAME
        super().__init__(f"{what}, or fd:N" if or_fd else what, 64, pattern)

    def read(self, text: str) -> str:
        """Return the name. Raises ValueError."""
        name = super().read(text)
        if name in (".", "..", "all", "default"):  # the kernel's own
            raise self.refuse(text)
        if name.startswith("fd:") and int(name[3:]) < 3:
            raise self.refuse(text, "0 to 2 are standard input and output")
        return name


class Port(Text):
    """A port of the host and the guest's that stands behind it: "[ADDRESS:]HOST:GUEST[/tcp]"."""

    def __init__(self) -> None:
        super().__init__(
            "a port forward such as 2222:22, 127.0.0.1:8080:80 or 53:53/udp",
            40,
            r"([0-9.]{7,15}:)?[0-9]{1,5}:[0-9]{1,5}(/(tcp|udp))?",
        )

    def read(self, text: str) -> PortConfig:  # type: ignore[override]  # a record, not a word
        """Return it taken apart. Raises ValueError."""
        words, _, protocol = super().read(text).partition("/")
        *address, host, guest = words.split(":")
        for address_text in address:
            try:
                inet_pton(AF_INET, address_text)
            except OSError:
                raise self.refuse(text, f"{address_text} is no IPv4 address") from None
        for number in (host, guest):
            if not 0 < int(number) < 65536:
                raise self.refuse(text, "ports go from 1 to 65535")
        return PortConfig("".join(address), int(host), int(guest), protocol or "tcp")

    def show(self, value: Any) -> str:
        """Return it as vm.yaml would write it."""
        address = f"{value.address}:" if value.address else ""
        return f"{address}{value.port}:{value.guest_port}/{value.protocol}"


class Prefix(Text):
    """A pool of addresses for local interfaces; `words` stand for themselves."""

    def __init__(self, version: int, *words: str) -> None:
        example = localnet.DEFAULT_POOL if version == 4 else "fd00:1:2::/48"
        what = " or ".join((*words, f"an IPv{version} prefix such as {example}"))
        super().__init__(what, 64)
        self.version, self.words = version, words

    def read(self, text: str) -> str:
        """Return the prefix with its length. Raises ValueError."""
        if text in self.words:
            return text
        parse = localnet.parse_pool if self.version == 4 else localnet.parse_pool6
        try:
            return str(parse(super().read(text)))
        except ValueError as err:
            raise self.refuse(text, str(err)) from err


class PerSecond(Int):
    """A number per second, without a unit."""

    def __init__(self) -> None:
        super().__init__(1, 1_000_000_000)

    def show(self, value: Any) -> str:
        """Return the number; 0 is no limit."""
        return super().show(value) if value else "no limit"


def too_long(name: str) -> bool:
    """Tell whether the kernel would not take `name` for an interface."""
    return not re.fullmatch(_NAME, name)
