"""pyvmctl net, nic and pcap: what there is of networks, and interfaces of running VMs."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from config.errors import EXIT_DONE, HostError, PyvmError
from config.units import format_rate, parse_rate
from devices.lines import printable
from vmm import survey
from vmm.leases import leases
from vmm.qmpclient import QmpClient
from vmm.rundir import CONTROL
from vmm.table import Column, Paint, say, say_json, table, tell, wants_colour
from vmm.usage import (
    PROGRAM,
    UsageError,
    Verb,
    colour_argument,
    group,
    json_argument,
    name_argument,
    verbs,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser

COMMAND_SECONDS: Final = 10.0  # for an answer
SNAPLEN: Final = 65549  # bytes of a frame; with offloads they are long
TAPS: Final = (
    Column("TAP", 15),
    Column("VM", 16),
    Column("NIC", 3),
    Column("MTU", 5),
    Column("LINK", 4),
    Column("LLADDR", 17),
    Column("BRIDGE", 15),
    Column("ADDRESSES", 0),
)
_RATES: Final = ("rx_rate", "tx_rate", "rx_pps", "tx_pps")
_FDNAME: Final = "pcap"
_CHUNK: Final = 1 << 16


def _net_arguments(to: ArgumentParser) -> None:
    json_argument(to)
    colour_argument(to)


def _net(options: Any) -> int:
    from vmm.net import keeper

    found = {**keeper.listing(), "leases": leases()}
    if options.json:
        say_json(found)
        return EXIT_DONE
    rows = [
        [
            tap["name"],
            tap["vm"],
            str(tap["nic"]),
            str(tap["mtu"]),
            "up" if tap["up"] and tap["carrier"] else "down",
            tap["lladdr"],
            tap["bridge"] or "-",
            ", ".join(tap["addresses"]) or "-",
        ]
        for tap in found["taps"]
    ]
    say(table(TAPS, rows, Paint(wants_colour(options.color, sys.stdout)), {}))
    for bridge in found["bridges"]:
        whose = f"switch {bridge['switch']}" if bridge["switch"] else "not ours"
        say(f"bridge {bridge['name']} ({whose}): {', '.join(bridge['members']) or 'nobody'}")
    for name in found["tables"]:
        say(f"nft table inet {name}")
    for lease in found["leases"]:
        where = f"{lease['vm']}/{lease['nic']}, {lease['lladdr']}"
        times = f"given {lease['given']} times" if lease["given"] else "not asked for yet"
        say(printable(f"lease {lease['addresses'][0]} ({where}): {times}"))
    return EXIT_DONE


def _nic(text: str) -> str:
    """Return the device's name. Raises what argparse turns into an error."""
    number = text.removeprefix("vionet")
    if not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected an interface such as 0 or vionet0: {text!r}")
    return f"vionet{int(number)}"


def _nic_argument(to: ArgumentParser, *, optional: bool = False) -> None:
    name_argument(to)
    what = "its number, from 0, or vionet0 ..."
    if optional:
        to.add_argument(
            "nic",
            metavar="NIC",
            type=_nic,
            nargs="?",
            default="vionet0",
            help=f"{what} (default: 0)",
        )
    else:
        to.add_argument("nic", metavar="NIC", type=_nic, help=what)


def _control(name: str) -> QmpClient:
    info = survey.lookup(name)
    if not info.alive:
        hint = "vm.yaml says what its interfaces start with"
        raise HostError("is not running", vm=info.name, hint=hint)
    return QmpClient(f"{info.path}/{CONTROL}", COMMAND_SECONDS)


def _set(control: QmpClient, nic: str, setting: str, value: Any) -> Any:
    return control.call("x-pyvmd-set-device", device=nic, setting=setting, value=value)


def _status_arguments(to: ArgumentParser) -> None:
    _nic_argument(to, optional=True)
    json_argument(to)


def _status(options: Any) -> int:
    with _control(options.name) as control:
        facts = _set(control, options.nic, "counters", None)
    if not isinstance(facts, dict):  # from a process that its guest may have taken over
        raise HostError("the answer is no set of counters", vm=options.name, device=options.nic)
    if options.json:
        say_json({"vm": options.name, "device": options.nic, **facts})
        return EXIT_DONE
    for key, value in facts.items():
        words = value.items() if isinstance(value, dict) else ()
        text = ", ".join(f"{word} {number}" for word, number in words) if words else value
        say(printable(f"{key + ':':<10} {text}"))
    return EXIT_DONE


def _link_arguments(to: ArgumentParser) -> None:
    _nic_argument(to)
    to.add_argument("state", metavar="up|down", choices=("up", "down"), help="the cable")


def _link(options: Any) -> int:
    with _control(options.name) as control:
        up = _set(control, options.nic, "link", options.state == "up")
    tell(f"{options.name}/{options.nic}: link {'up' if up is True else 'down'}")
    return EXIT_DONE


def _rate_arguments(to: ArgumentParser) -> None:
    _nic_argument(to)
    for way, what in (("rx", "to the guest"), ("tx", "from the guest")):
        to.add_argument(
            f"--{way}-rate", metavar="RATE", type=_rate, help=f"the most {what}, as 10M/s, or none"
        )
        to.add_argument(
            f"--{way}-pps",
            metavar="N",
            type=_pps,
            help=f"the most frames per second {what}, or none",
        )


def _rate(text: str) -> int:
    try:
        return 0 if text == "none" else parse_rate(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 10M/s or none: {text!r}") from None


def _pps(text: str) -> int:
    if text != "none" and not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"expected a number or none: {text!r}")
    return 0 if text == "none" else int(text)


def _set_rates(options: Any) -> int:
    wanted = {name: getattr(options, name) for name in _RATES if getattr(options, name) is not None}
    if not wanted:
        raise UsageError("nic rate: which limit?", hint="--rx-rate, --tx-rate, --rx-pps, --tx-pps")
    with _control(options.name) as control:
        for name, value in wanted.items():
            _set(control, options.nic, name, value)
    told = [
        f"{name} {(format_rate(value) if name.endswith('rate') else value) if value else 'none'}"
        for name, value in wanted.items()
    ]
    tell(f"{options.name}/{options.nic}: {', '.join(told)}")
    return EXIT_DONE


def _pcap_arguments(to: ArgumentParser) -> None:
    _nic_argument(to, optional=True)
    to.add_argument("-w", dest="file", metavar="FILE", help="write to FILE (default: stdout)")
    to.add_argument(
        "-s", dest="snaplen", metavar="BYTES", type=int, default=SNAPLEN, help="of each frame"
    )


def _pcap(options: Any) -> int:
    if options.file is None and os.isatty(1):
        raise UsageError("pcap: that is no text for a terminal", hint="give -w FILE, or a pipe")
    with _control(options.name) as control:
        out = 1
        if options.file is not None:
            try:
                out = os.open(
                    options.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
                )
            except OSError as err:
                raise HostError(f"cannot write {options.file}: {err.strerror}") from err
        reader, writer = os.pipe()
        # The device must never wait for us; and it could not write to a file, in its jail.
        os.set_blocking(writer, False)
        try:
            control.pass_fd(_FDNAME, writer)
            os.close(writer)
            control.call(
                "x-pyvmd-set-device",
                device=options.nic,
                setting="capture",
                value={"snaplen": options.snaplen},
                fdname=_FDNAME,
            )
            _stream(control, options, reader, out)
        finally:
            os.close(reader)
    return EXIT_DONE


def _stream(control: QmpClient, options: Any, reader: int, out: int) -> None:
    """Copy until the VM or the user ends it; what has been captured by then is written."""
    totals: Any = None
    try:
        _copy(reader, out)
    except KeyboardInterrupt:
        totals = _set(control, options.nic, "capture", None)
        _copy(reader, out)  # to its end
    except BrokenPipeError:
        with suppress(PyvmError):
            _set(control, options.nic, "capture", None)
        raise
    if isinstance(totals, dict):
        tell(f"{totals.get('captured', 0)} frames captured, {totals.get('lost', 0)} lost")


def _copy(reader: int, out: int) -> None:
    while data := os.read(reader, _CHUNK):
        while data:
            data = data[os.write(out, data) :]


_ACTIONS: Final = {
    "status": Verb(
        name="nic status",
        summary="show what an interface has done",
        arguments=_status_arguments,
        run=_status,
        example=f"{PROGRAM} nic status web\n{PROGRAM} nic status web 1 --json",
    ),
    "link": Verb(
        name="nic link",
        summary="pull an interface's cable, or plug it in",
        arguments=_link_arguments,
        run=_link,
        example=f"{PROGRAM} nic link web 0 down",
        details="The guest sees it, and so does the host's interface.",
    ),
    "rate": Verb(
        name="nic rate",
        summary="change an interface's limits",
        arguments=_rate_arguments,
        run=_set_rates,
        example=f"{PROGRAM} nic rate web 0 --rx-rate 10M/s --tx-pps none",
    ),
}

VERBS = verbs(
    Verb(
        name="net",
        summary="list the host's interfaces, bridges, rules and leases of all VMs",
        arguments=_net_arguments,
        run=_net,
        example=f"{PROGRAM} net\n{PROGRAM} net --json",
        details="LLADDR is the guest's address, ADDRESSES are the host's.\n"
        "Rules show to root only. A lease is the guest's, asked for or not.",
    ),
    group("nic", "look at and change an interface of a running VM", "", _ACTIONS),
    Verb(
        name="pcap",
        summary="capture the frames of an interface",
        arguments=_pcap_arguments,
        run=_pcap,
        example=f"{PROGRAM} pcap web | tcpdump -n -r -\n{PROGRAM} pcap web 1 -w web.pcapng",
        details="Writes pcapng until ^C, or until the VM ends. Frames that the reader is too slow\n"
        "for are counted in the file, and not waited for.",
    ),
)
