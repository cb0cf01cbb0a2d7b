"""What a device process does with messages, good and bad, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from devices.features import F_VERSION_1
from devices.viodev import ChannelError, ImsgType, MsgType, ViodevMsg
from devices.virtio import CommonCfg
from tests.odddevice import open_odd
from tools.viodriver.private import DeviceHost
from tools.viodriver.registers import READY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.launch import Spawner

QUIET = 0.2  # seconds in which nothing may happen


@pytest.mark.parametrize(
    "request_",
    [b"", b"{", b"[]", b"7", b'"name"', b"{}", b'{"name": "rate"}', b"\xff", b"[" * 9999],
)
def test_a_setting_that_is_none_is_answered(host: DeviceHost, request_: bytes) -> None:
    """Nonsense gets an error, not silence and not an end."""
    host.async_.send(ImsgType.SETTING, request_)
    answer = host.async_.receive()
    assert answer.type == ImsgType.SETTING
    assert json.loads(answer.data).keys() == {"error"}


def test_shutdown_ends_it(host: DeviceHost) -> None:
    """SHUTDOWN on the sync channel: exit 0."""
    host.sync.send_msg(ViodevMsg(MsgType.SHUTDOWN))
    assert host.wait_end() == "exit status 0"


@pytest.mark.parametrize("channel", ["sync", "async_"])
def test_a_closed_channel_ends_it(spawner: Spawner, channel: str) -> None:
    """The VM process is gone, and with it the device's reason to be: exit 0."""
    host = DeviceHost("viornd", spawner=spawner)
    getattr(host, channel).close()
    assert host.wait_end() == "exit status 0"
    (host.sync if channel == "async_" else host.async_).close()


def sent(host: DeviceHost, what: str) -> None:
    """Send something that no VM process sends."""
    if what == "reply":
        host.sync.send_msg(ViodevMsg(MsgType.READY))
    elif what == "short":
        host.sync.send(ImsgType.DEVOP_MSG, b"short")
    elif what == "type":
        host.sync.send(ImsgType.PAUSE)
    else:
        host.async_.send_msg(ViodevMsg(MsgType.IO_READ))


@pytest.mark.parametrize("what", ["reply", "short", "type", "access"])
def test_a_message_out_of_place_ends_it_with_words(spawner: Spawner, what: str) -> None:
    """A VM process that does not keep to the protocol: exit 1, and the reason in the log."""
    host = DeviceHost("viornd", spawner=spawner)
    sent(host, what)
    assert host.wait_said("VM process: sent").startswith("3 ")
    assert host.wait_end() == "exit status 1"
    host.sync.close()
    host.async_.close()


def test_a_descriptor_is_not_taken(spawner: Spawner) -> None:
    """A device process has what it was launched with; the jail lets it receive no other."""
    host = DeviceHost("viornd", spawner=spawner)
    host.sync.send(ImsgType.DEVOP_MSG, ViodevMsg(MsgType.IO_READ).pack(), fd=host.sync.fileno())
    assert host.wait_end() in {"exit status 1", f"killed by signal {signal.SIGSYS.value}"}
    host.sync.close()
    host.async_.close()


def test_a_fault_in_a_device_ends_it_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a request's error nor the guest's: exit 1, and the place in the code in the log."""
    with open_odd(monkeypatch, **{"raise": True}) as host:
        assert host.negotiate(F_VERSION_1)
        [queue, _] = host.drivers(F_VERSION_1)
        assert host.enable(0, queue)
        host.status = READY
        line = host.wait_said("ZeroDivisionError")
        assert "divided by the guest" in line
        assert "Odd.kick" in line
        assert host.wait_end() == "exit status 1"
        with pytest.raises(ChannelError):
            host.read(0, 1)


def test_an_interrupted_frame_is_waited_for(host: DeviceHost) -> None:
    """A register access that comes in two pieces is one."""
    frame = (
        (28).to_bytes(4, "big")
        + b"".join(n.to_bytes(4, "little") for n in (ImsgType.DEVOP_MSG, 28, 0, 0))
        + ViodevMsg(MsgType.IO_READ, CommonCfg.NUM_QUEUES, 2).pack()
    )
    with socket.socket(fileno=os.dup(host.sync.fileno())) as sock:
        sock.sendall(frame[:9])
        assert not host.wait_call(0, QUIET)
        sock.sendall(frame[9:])
    assert host.sync.receive_msg().data == 1


def test_two_devices_of_one_spawner_are_two(spawner: Spawner) -> None:
    """Two devices of one spawner do not see each other's registers."""
    hosts: Sequence[DeviceHost] = [DeviceHost("viornd", spawner=spawner) for _ in range(2)]
    hosts[0].start()
    assert [host.status for host in hosts] == [READY, 0]
    for host in hosts:
        host.close()
