"""A network device of several processes, jailed, on a real tap: see `pluglab`.

with TapLab(2) as tap, PairLab(tap) as lab:
    lab.kill(1)
    lab.send(frame, queue=3)
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from config.model import NicConfig
from devices.features import F_RING_PACKED
from devices.nethdr import NET_F_MQ
from devices.spec import Block
from tests.conformance.test_net_send import tcp_frame
from tests.netdriver import FEATURES, NetDriver
from tests.pluglab import DEADLINE, PlugLab, lives, wait_until
from tests.vionetlab import OWN, SETTINGS
from vmm.net.network import Attached

if TYPE_CHECKING:
    from tests.taplab import TapLab

MQ: Final = FEATURES | NET_F_MQ
NAME: Final = "vionet0"


class PairLab(PlugLab, NetDriver):
    """The VM process, the guest and the host's network of one device."""

    def __init__(
        self,
        tap: TapLab,
        *,
        features: int = MQ,
        irqfd: bool = True,
        kicks: bool = True,
        msix: bool = True,
        **settings: Any,
    ) -> None:
        """Launch all processes, start the driver, and use all pairs."""
        self.tap, self.features = tap, features
        self.host = self
        self.count = len(tap.fds)
        taps = {f"tap{n}": fd for n, fd in enumerate(tap.fds)}
        settings = {**SETTINGS, "queues": self.count, **settings}
        nic = Attached(NAME, settings, taps, {}, self.count)
        super().__init__(
            NAME,
            2 * self.count + 1,
            SimpleNamespace(attached=lambda: [nic]),  # type: ignore[arg-type]
            irqfd=irqfd,
            kicks=kicks,
            queue_pairs=self.count > 1,
            interfaces=(NicConfig(),),
            packed=bool(features & F_RING_PACKED),
        )
        if msix:
            self.write(Block.MSIX, 1, 1)
        self.begin()

    def begin(self) -> None:
        """Reset the device, start a driver, and use all pairs."""
        self.queues = self.start(self.features, arena_bytes=4 << 20)
        if self.features & NET_F_MQ:
            assert self.command(4, 0, self.count.to_bytes(2, "little")) == 0

    def network(self) -> dict[str, Any]:
        """What the device has counted, as its first process tells."""
        facts: dict[str, Any] = self.setting("counters", None)
        return facts


def send_flows(lab: PairLab, frames: int) -> None:
    """Send frames to the guest, each of another flow: the kernel says which pair one comes by.

    It hashes them with a key that each boot of the host has another of.
    """
    base = tcp_frame(100)
    for number in range(frames):
        lab.tap.send(OWN + base[6:34] + number.to_bytes(2) + base[36:])


def shared_out(lab: PairLab, frames: int) -> list[int]:
    """Send frames of many flows to the guest; return how many arrived by each pair.

    For each buffer that is used there is another one.
    """
    send_flows(lab, frames)
    found = [0] * lab.count
    end = time.monotonic() + DEADLINE
    while sum(found) < frames:
        assert time.monotonic() < end, (found, lab.page.read(), lab.said, lab.lost)
        for pair in range(lab.count):
            used = len(lab.queues[2 * pair].collect())
            lab.give(used, 512, queue=2 * pair)
            found[pair] += used
        time.sleep(0.001)
    assert sum(found) == frames
    return found


def kill(lab: PairLab, who: tuple[int, ...]) -> None:
    """Kill the processes of these pairs at once."""
    told = lab.told()
    for number in who:
        with suppress(ProcessLookupError):  # it is dead, and nobody has noticed yet
            if told[number]["pid"]:  # else the next one is just being started
                os.kill(told[number]["pid"], signal.SIGKILL)


def settled(lab: PairLab) -> None:
    """Wait until a process that lives serves every pair."""
    wait_until(lambda: all(lives(facts["pid"]) for facts in lab.told().values()))
    assert not lab.lost
