"""virtio network device (virtio 1.2 §5.1) on a tap, or on a socket of passt: its processes.

    queues: 1                  one process: `netdevice`
    queues: N, in a VM         `netleader`, the first pair's process, with everything that is not a
                               pair's own; N - 1 of `netpair`, and between them `netlink`
    queues: N, elsewhere       one process: behind vhost-user a connection has no more

Where there are several, each can be killed and another goes on (`lasting`, `netlink`). All of them
enter the same jail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from devices.netdevice import Vionet
from devices.stream import Stream
from devices.tap import Tap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.device import Device, Host
    from devices.guestmem import GuestMemory
    from devices.netleader import LeadingHost
    from devices.netpair import DrivenHost

__all__ = ["Vionet", "create"]


def create(
    settings: Mapping[str, Any], fds: dict[str, int], memory: GuestMemory, host: Host
) -> Device:
    """Make the device on `tap0`, `tap1`, … or `stream0`. Settings: those of Vionet.

    With `apart` it has `tap0` alone, and `pair1`, `bell1`, … lead to the processes of the other
    pairs. Each of those is made with `pair`, its number, on its own `tap0`, `link` and `bell`.
    Both want spec.QUEUE_PAIRS to be there already where a process can open no file.
    Raises HostError if the descriptors are of the wrong kind, ConfigError.
    """
    if settings.get("pair"):
        from devices.netpair import NetPair  # spec.QUEUE_PAIRS

        return NetPair(memory, cast("DrivenHost", host), settings, fds)
    if settings.get("apart"):
        from devices.netleader import Leader  # spec.QUEUE_PAIRS

        others = {
            number: (fds.pop(f"pair{number}"), fds.pop(f"bell{number}"))
            for number in range(1, settings["queues"])
        }
        backend = Tap([fds.pop("tap0")])
        return Leader(memory, cast("LeadingHost", host), backend, settings, others)
    if settings["backend"] == "stream":
        return Vionet(memory, host, Stream(fds.pop("stream0")), settings)
    taps = [fds.pop(f"tap{n}") for n in range(settings["queues"])]
    return Vionet(memory, host, Tap(taps), settings)
