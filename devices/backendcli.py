"""The command line of a vhost-user back end: `python -m devices vioblk --socket-path=… disk.img`.

Follows the "backend program conventions" of the vhost-user specification: --socket-path or --fd,
--print-capabilities, no daemon, SIGTERM ends it. What the device needs is opened here, with the
rights of whoever starts it; the socket comes last, so that a program which cannot serve does not
listen.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import stat
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final

from config.errors import ConfigError, HostError, PyvmError
from config.model import DiskConfig
from config.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

#: How it was called, by its installed name or as a module.
PROGRAM: Final = "pyvmd-device" if sys.argv[0].endswith("pyvmd-device") else "python -m devices"
ADDRESS_MAX: Final = 107  # bytes of a Unix socket's path

TAP_HINT: Final = (
    "run as root, or have root make the tap for you: ip tuntap add NAME mode tap user YOU, "
    "with multi_queue for several --queues"
)

#: What --print-capabilities says: types and features of QEMU's docs/interop/vhost-user.json.
CAPABILITIES: Final[dict[str, dict[str, Any]]] = {
    "vioblk": {"type": "block", "features": ["read-only", "blk-file"]},
    "vionet": {"type": "net"},
    "vioscsi": {"type": "scsi"},
    "viornd": {"type": "rng"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the program; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in CAPABILITIES and "--print-capabilities" in arguments:
        print(json.dumps(CAPABILITIES[arguments[0]], indent=2))
        return 0
    options = _parser().parse_args(arguments)
    with ExitStack() as opened:
        try:
            return _serve(options, opened)
        except PyvmError as err:
            sys.stderr.write(f"{PROGRAM} {options.kind}: {err}\n")
            return err.exit_status


def _serve(options: argparse.Namespace, opened: ExitStack) -> int:
    """Open what the device needs, then the socket, and serve. Raises PyvmError."""
    from devices.backend import SIGNALS, Plan, Supervisor

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings, fds = _OPEN[options.kind](options, opened)
    settings["packed"] = True
    level = options.jail or ("required" if os.geteuid() == 0 else "best-effort")
    plan = Plan(options.kind, settings, fds, level, options.verbose)
    path = options.socket_path
    sock = _listen(path, opened) if path else _given(options.fd)
    return Supervisor(plan, sock).run()


# Devices.


def _open_vioblk(
    options: argparse.Namespace, opened: ExitStack
) -> tuple[dict[str, Any], dict[str, int]]:
    from devices import bases, images

    path = os.path.abspath(options.blk_file or options.image or "")
    if bool(options.blk_file) == bool(options.image):
        raise ConfigError("an image is needed, once: IMAGE or --blk-file")
    if not options.format:
        raise ConfigError(
            f"the format of {path} is never guessed, since a guest could forge it",
            hint="say --format raw, or --format qcow2",
        )
    disk = DiskConfig(
        path=path,
        format=options.format,
        readonly=options.read_only,
        cache=options.cache,
        serial=options.serial,
        queues=options.queues,
        block_size=options.block_size,
    )
    fds = {"image": images.open_disk(disk, "")}
    opened.callback(os.close, fds["image"])
    chain: list[bases.Base] = []
    if disk.format == "qcow2":
        direct = disk.cache == "none"
        chain = bases.open_bases(fds["image"], path, opened, direct=direct)
    fds.update((f"base{index}", base.fd) for index, base in enumerate(chain))
    return {**disk._asdict(), "bases": [base.format for base in chain]}, fds


def _open_vionet(
    options: argparse.Namespace, opened: ExitStack
) -> tuple[dict[str, Any], dict[str, int]]:
    from devices import tun

    settings = {
        "backend": "tap",
        "lladdr": options.mac,
        "locked": options.locked,
        "mtu": options.mtu,
        "queues": options.queues,
        "link": True,
        "rx_rate": 0,
        "tx_rate": 0,
        "rx_pps": 0,
        "tx_pps": 0,
        "local": None,
    }
    if options.tap:
        try:
            taps = tun.open_queues(options.tap, options.queues, "")
        except HostError as err:
            raise HostError(err.what, hint=TAP_HINT) from err
        for fd in taps:
            opened.callback(os.close, fd)
    else:
        taps = options.tap_fd
        if len(taps) != options.queues:
            what = f"{len(taps)} times --tap-fd for --queues {options.queues}"
            raise ConfigError(what, hint="each pair of queues needs one")
        for fd in taps:
            tun.name_of(fd, "")
            os.set_inheritable(fd, False)
    return settings, {f"tap{index}": fd for index, fd in enumerate(taps)}


def _open_vioscsi(
    options: argparse.Namespace, opened: ExitStack
) -> tuple[dict[str, Any], dict[str, int]]:
    from devices import images

    if not options.cdrom:
        return {}, {}
    fd = images.open_disc(os.path.abspath(options.cdrom), "")
    opened.callback(os.close, fd)
    return {}, {"disc1": fd}


def _open_viornd(
    options: argparse.Namespace, _opened: ExitStack
) -> tuple[dict[str, Any], dict[str, int]]:
    return {"rate": options.rate}, {}


_OPEN: Final = {
    "vioblk": _open_vioblk,
    "vionet": _open_vionet,
    "vioscsi": _open_vioscsi,
    "viornd": _open_viornd,
}


# Sockets.


def _listen(path: str, opened: ExitStack) -> socket.socket:
    """Listen at `path`; one that a dead back end left is taken over. Raises PyvmError."""
    if len(os.fsencode(path)) > ADDRESS_MAX:
        raise ConfigError(f"--socket-path {path}: longer than {ADDRESS_MAX} bytes")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        before = os.umask(0o077)  # whoever connects has our images
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(16)
    except OSError as err:
        sock.close()
        raise HostError(f"cannot listen at {path}: {err.strerror}") from err
    made = os.stat(path)
    opened.callback(_remove, path, made)
    return sock


def _clear(path: str) -> None:
    """Remove a socket that nobody listens at. Raises HostError if somebody does, OSError."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise HostError(f"{path} is there and no socket", hint="remove it, or name another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise HostError(f"somebody listens at {path} already")


def _remove(path: str, made: os.stat_result) -> None:
    """Remove our socket, unless the name is another's by now."""
    with suppress(OSError):
        if os.path.samestat(os.lstat(path), made):
            os.unlink(path)


def _given(fd: int) -> socket.socket:
    """Take the socket that we were started with. Raises ConfigError."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as err:
        raise ConfigError(f"--fd {fd}: {err.strerror}") from err
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ConfigError(f"--fd {fd}: is no Unix stream socket")
    os.set_inheritable(fd, False)
    sock.setblocking(True)
    return sock


# Words.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Serve a virtio device over vhost-user."
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    blk = _kind(kinds, "vioblk", "a disk", "disk.img --format raw")
    blk.add_argument("image", nargs="?", metavar="IMAGE", help="image file or block device")
    blk.add_argument("--blk-file", metavar="PATH", help="the same, by its conventional name")
    blk.add_argument("--format", choices=("raw", "qcow2"), help="of the image; never guessed")
    blk.add_argument("--read-only", action="store_true", help="the guest cannot write")
    blk.add_argument(
        "--cache",
        choices=("writeback", "none"),
        default="writeback",
        help="none: past the page cache (default: writeback)",
    )
    blk.add_argument("--queues", type=_count, default=1, metavar="N", help="(default: 1)")
    blk.add_argument("--serial", default="", metavar="TEXT", help="at most 20 bytes")
    blk.add_argument(
        "--block-size", type=int, default=512, metavar="BYTES", help="logical block (default: 512)"
    )
    net = _kind(kinds, "vionet", "a network interface", "--tap tap0 --mac 52:54:00:12:34:56")
    way = net.add_mutually_exclusive_group(required=True)
    way.add_argument("--tap", metavar="NAME", help="host interface, made if it is not there")
    way.add_argument(
        "--tap-fd",
        type=int,
        action="append",
        metavar="N",
        help="an open tap (IFF_NO_PI, IFF_VNET_HDR), once per pair of queues",
    )
    net.add_argument(
        "--mac",
        type=_mac,
        default="52:54:00:12:34:56",
        metavar="ADDRESS",
        help="(default: %(default)s)",
    )
    net.add_argument("--locked", action="store_true", help="frames with that address only")
    net.add_argument("--mtu", type=_mtu, default=0, metavar="BYTES", help="told to the guest")
    net.add_argument("--queues", type=_count, default=1, metavar="N", help="pairs (default: 1)")
    scsi = _kind(kinds, "vioscsi", "a CD-ROM drive", "--cdrom debian.iso")
    scsi.add_argument("--cdrom", metavar="PATH", help="ISO image or block device; empty without")
    rng = _kind(kinds, "viornd", "entropy", "--rate 1M")
    rng.add_argument(
        "--rate", type=_rate, default=0, metavar="BYTES", help="per second (default: no limit)"
    )
    return parser


def _kind(kinds: Any, kind: str, what: str, example: str) -> argparse.ArgumentParser:
    """Add a kind of device, with the options that all have."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        kind,
        help=what,
        description=f"Serve {what} over vhost-user, to one front end after another.",
        epilog=f"example: {PROGRAM} {kind} --socket-path /tmp/{kind}.sock {example}",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", metavar="PATH", help="Unix socket to listen at")
    where.add_argument(
        "--fd", type=int, metavar="N", help="socket to serve, listening or connected already"
    )
    parser.add_argument(
        "--print-capabilities", action="store_true", help="say what it is, in JSON, and leave"
    )
    parser.add_argument(
        "--jail",
        choices=("required", "best-effort", "off"),
        help="how strict (default: required for root, else best-effort)",
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _count(word: str) -> int:
    number = int(word)
    if not 1 <= number <= 64:
        raise argparse.ArgumentTypeError(f"{number} is not 1 to 64")
    return number


def _mac(word: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", word) or int(word[1], 16) & 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no address of a station")
    return word.lower()


def _mtu(word: str) -> int:
    number = int(word)
    if not 68 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not 68 to 65535")
    return number


def _rate(word: str) -> int:
    try:
        return parse_size(word)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
