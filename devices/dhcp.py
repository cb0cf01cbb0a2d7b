"""DHCP and BOOTP responder with one lease: the guest's address (RFC 2131, vmd's reference §e.3).

    DISCOVER                        → OFFER; ACK at once if it asks for that (RFC 4039)
    REQUEST for the guest's address → ACK: selecting, init-reboot, renewing, rebinding
    REQUEST for another address     → NAK
    REQUEST to another server       not ours
    INFORM                          → ACK without an address
    DECLINE, RELEASE                taken note of; the address stays the guest's
    no message type, or options that make no sense → BOOTREPLY

As vmd: mask, router and DNS are always told, for ever is the lease unless another is set, and
`siaddr` is the host. Where vmd is short of RFC 2131 we are not: renewals (`ciaddr`), INFORM,
relay agents, clients whose message is shorter than 300 bytes, the broadcast flag, a list of
parameters in the client's order, and NAK only as an answer to REQUEST. A type that a client does
not send is not ours: vmd answers NAK, which would throw a guest off its address.

Who decides that a frame is for us and from the guest is `netlocal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from devices.dhcpwire import BROADCAST_FLAG, FIXED, Message, Option, Type, build, parse
from devices.frames import wire_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.netsettings import Settings

SERVER_PORT: Final = 67
CLIENT_PORT: Final = 68

FOREVER: Final = 0xFFFF_FFFF  # seconds (RFC 2131 §3.3)
_BOOTP_ROOM: Final = 60  # bytes of options after the cookie (RFC 1048)
_UDP_HEADS: Final = 28  # IPv4 and UDP
_MIN_SIZE: Final = 576  # bytes of a packet that every client takes (RFC 2132 §9.10)
_MAX_SIZE: Final = 1500
_NOWHERE: Final = bytes(4)
_EVERYWHERE: Final = b"\xff" * 4
# Told to a client that lists nothing, and after what a client lists: the first three always.
_ALWAYS: Final = (Option.MASK, Option.ROUTER, Option.DNS)
_USUAL: Final = (
    *_ALWAYS,
    *(Option.HOSTNAME, Option.DOMAIN, Option.BROADCAST, Option.MTU, Option.SEARCH),
)
_OFFER_KINDS: Final = {Type.OFFER: "offer", Type.ACK: "ack"}


class Answer(NamedTuple):
    """What becomes of a message that is ours."""

    kind: str  # "offer", "ack", "nak", "bootp", "decline", "release": for counters
    payload: bytes = b""  # of UDP; b"" for no answer
    to: bytes = _EVERYWHERE  # IPv4 address
    port: int = CLIENT_PORT
    broadcast: bool = False  # on Ethernet


class Responder:
    """Answers one client."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._values = dict(_values(settings))

    def answer(self, data: bytes, lladdr: bytes) -> Answer | None:
        """Return the answer to UDP payload `data` from the station `lladdr`; None: not ours."""
        message = parse(data)
        if message is None or message.hlen != 6 or message.htype != 1:
            return None
        if message.chaddr[:6] != lladdr or message.file:
            return None
        if message.hops and message.giaddr == _NOWHERE:
            return None
        kind = message.options.get(Option.TYPE, b"")
        if len(kind) != 1:
            return self._bootp(message)
        if not self._for_us(message.options):
            return None
        match kind[0]:
            case Type.DISCOVER if Option.RAPID_COMMIT in message.options:
                return self._lease(message, Type.ACK, ((Option.RAPID_COMMIT, b""),))
            case Type.DISCOVER:
                return self._lease(message, Type.OFFER)
            case Type.REQUEST if self._wants_ours(message):
                return self._lease(message, Type.ACK)
            case Type.REQUEST:
                return self._nak(message)
            case Type.INFORM:
                return self._inform(message)
            case Type.DECLINE:
                return Answer("decline")
            case Type.RELEASE:
                return Answer("release")
        return None

    def _for_us(self, options: dict[int, bytes]) -> bool:
        """Tell whether the message goes to us or to any server, and can be understood."""
        if options.get(Option.SERVER, self._settings.host) != self._settings.host:
            return False
        return len(options.get(Option.REQUESTED, _NOWHERE)) == 4

    def _wants_ours(self, message: Message) -> bool:
        """Tell whether a REQUEST is for the guest's address (RFC 2131 §4.3.2).

        Renewing and rebinding have it in `ciaddr`, others in an option. In neither: as vmd, ours.
        """
        wanted = message.options.get(Option.REQUESTED, _NOWHERE)
        if wanted == _NOWHERE:
            wanted = message.ciaddr
        return wanted in (self._settings.address, _NOWHERE)

    def _lease(
        self, message: Message, kind: Type, more: tuple[tuple[int, bytes], ...] = ()
    ) -> Answer:
        """Give the guest its address."""
        lease = self._settings.lease or FOREVER
        options = [*self._opening(kind), (Option.LEASE, lease.to_bytes(4)), *more]
        if lease != FOREVER:
            options += [
                (Option.T1, (lease // 2).to_bytes(4)),
                (Option.T2, (lease * 7 // 8).to_bytes(4)),
            ]
        data = build(
            message,
            [*options, *self._parameters(message)],
            yiaddr=self._settings.address,
            siaddr=self._settings.host,
            ciaddr=message.ciaddr if kind == Type.ACK else _NOWHERE,
            file=self._settings.boot_file,
            room=_room(message),
        )
        return self._send(_OFFER_KINDS[kind], message, data)

    def _inform(self, message: Message) -> Answer:
        """Tell parameters to one that has its address from elsewhere (RFC 2131 §4.3.5)."""
        data = build(
            message,
            [*self._opening(Type.ACK), *self._parameters(message)],
            siaddr=self._settings.host,
            ciaddr=message.ciaddr,
            file=self._settings.boot_file,
            room=_room(message),
        )
        return self._send("ack", message, data)

    def _nak(self, message: Message) -> Answer:
        """Take back the address that the client thinks it has; always broadcast."""
        relayed = message.giaddr != _NOWHERE
        data = build(
            message,
            [
                *self._opening(Type.NAK),
                (Option.MESSAGE, b"not an address of this link"),
                *_client_id(message),
            ],
            flags=message.flags | BROADCAST_FLAG if relayed else message.flags,
            room=_room(message),
        )
        if relayed:
            return self._send("nak", message, data)
        return Answer("nak", data, broadcast=True)

    def _bootp(self, message: Message) -> Answer:
        """Answer without message type, lease and overload (RFC 951, 1048)."""
        plain = message._replace(options={})
        data = build(
            plain,
            [(code, self._values[code]) for code in _USUAL if code in self._values],
            yiaddr=self._settings.address,
            siaddr=self._settings.host,
            ciaddr=message.ciaddr,
            file=self._settings.boot_file,
            room=_BOOTP_ROOM,
        )
        return self._send("bootp", plain, data)

    def _opening(self, kind: Type) -> list[tuple[int, bytes]]:
        return [(Option.TYPE, bytes((kind,))), (Option.SERVER, self._settings.host)]

    def _parameters(self, message: Message) -> Iterator[tuple[int, bytes]]:
        """Yield what the client asks for, in its order, then what is told unasked.

        The mask comes before the router whatever the order (RFC 2132 §3.3). First of all comes
        the client's identifier, which may be too long for what is left after the others.
        """
        yield from _client_id(message)
        asked = message.options.get(Option.PARAMETERS, b"")
        routes = (Option.ROUTES,) if Option.ROUTES in self._values else ()
        order = dict.fromkeys((*routes, Option.MASK, *asked, *(_ALWAYS if asked else _USUAL)))
        for code in order:
            if code in self._values:
                yield code, self._values[code]

    @staticmethod
    def _send(kind: str, message: Message, data: bytes) -> Answer:
        """Address an answer (RFC 2131 §4.1)."""
        if message.giaddr != _NOWHERE:
            return Answer(kind, data, message.giaddr, SERVER_PORT)
        if message.ciaddr != _NOWHERE:
            return Answer(kind, data, message.ciaddr)
        yiaddr = data[16:20]
        if message.flags & BROADCAST_FLAG or yiaddr == _NOWHERE:
            return Answer(kind, data, broadcast=True)
        return Answer(kind, data, yiaddr)


def _client_id(message: Message) -> Iterator[tuple[int, bytes]]:
    """Yield the client's identifier, which answers repeat (RFC 6842)."""
    identifier = message.options.get(Option.CLIENT_ID, b"")
    if 0 < len(identifier) <= 255:
        yield Option.CLIENT_ID, identifier


def _room(message: Message) -> int:
    """Return how many bytes of options this client takes after the cookie."""
    told = message.options.get(Option.MAX_SIZE, b"")
    size = int.from_bytes(told) if len(told) == 2 else _MIN_SIZE
    return min(max(size, _MIN_SIZE), _MAX_SIZE) - _UDP_HEADS - FIXED.size - 4


def _values(settings: Settings) -> Iterator[tuple[int, bytes]]:
    """Yield what can be told, whoever asks."""
    mask = (0xFFFF_FFFF << 32 - settings.length) & 0xFFFF_FFFF
    yield Option.MASK, mask.to_bytes(4)
    yield Option.ROUTER, settings.router
    if settings.dns:
        yield Option.DNS, b"".join(settings.dns)
    if settings.hostname:
        yield Option.HOSTNAME, settings.hostname
    if settings.domain:
        yield Option.DOMAIN, settings.domain
    if settings.search:
        yield Option.SEARCH, b"".join(wire_name(name) for name in settings.search)
    if settings.mtu:
        yield Option.MTU, settings.mtu.to_bytes(2)
    if settings.length < 31:  # a /31 has no broadcast address (RFC 3021 §2.2)
        address = int.from_bytes(settings.address)
        yield Option.BROADCAST, (address | ~mask & 0xFFFF_FFFF).to_bytes(4)
    if settings.length == 32:  # neither of them is on a link of the guest's: say that they are
        hosts = dict.fromkeys((settings.router, settings.host))
        here = b"".join(b"\x20" + host + _NOWHERE for host in hosts)
        yield Option.ROUTES, here + b"\0" + settings.router
