"""Queue pairs of a network device that are served by processes of their own."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from devices import nethdr as hdr
from devices.features import F_RING_PACKED, F_RING_RESET
from devices.viodev import CONFIG_CHANGE
from tests import netlab
from tests.conformance.test_net_send import tcp_frame
from tests.netdriver import HEADER
from tests.pairlab import MQ, PairLab, shared_out
from tests.pluglab import DEADLINE, wait_until
from tests.vionetlab import OWN, frame_of
from tools.viodriver.private import facts as facts_of

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("ring", [0, F_RING_PACKED])
def test_each_pair_has_a_process(launch_pairs: Callable[..., PairLab], ring: int) -> None:
    """Three pairs, three processes; each sends what its own queue has."""
    lab = launch_pairs(3, features=MQ | ring)
    pids = {facts["pid"] for facts in lab.told().values()}
    assert len(pids) == 3
    for pair in range(3):
        lab.send(*[frame_of(60 + i, i) for i in range(50)], queue=2 * pair + 1)
    assert len(lab.tap.receive(150)) == 150
    wait_until(lambda: lab.page.read()["tx_frames"] == 150)
    assert lab.network()["tx"]["frames"] == 150


def test_frames_come_by_all_pairs(launch_pairs: Callable[..., PairLab]) -> None:
    """The host spreads flows over the queues that are in use, and over no other (§5.1.6.5.5)."""
    lab = launch_pairs(3)
    for pair in range(3):
        lab.give(200, 512, queue=2 * pair)
    assert all(shared_out(lab, 150))
    assert lab.command(4, 0, b"\2\0") == 0
    first, second, third = shared_out(lab, 100)
    assert first
    assert second
    assert not third
    assert lab.command(4, 0, b"\1\0") == 0
    assert shared_out(lab, 50) == [50, 0, 0]
    assert lab.command(4, 0, b"\3\0") == 0
    assert all(shared_out(lab, 150))
    assert lab.command(4, 0, b"\4\0") == 1


def test_a_pair_that_is_not_used_sends_nothing(launch_pairs: Callable[..., PairLab]) -> None:
    """What is sent there comes back, and goes nowhere (§5.1.6.5.5.2)."""
    lab = launch_pairs(2)
    assert lab.command(4, 0, b"\1\0") == 0
    lab.send(*[frame_of(60)] * 20, queue=3)
    lab.send(frame_of(60, 1))
    assert [sent.data for sent in lab.tap.receive(1)] == [frame_of(60, 1)]
    assert lab.network()["tx"]["frames"] == 1


def test_filters_hold_for_all_pairs(launch_pairs: Callable[..., PairLab]) -> None:
    """Modes, addresses and VLANs: from the ack on, no pair lets through what another would not."""
    lab = launch_pairs(3, features=MQ | hdr.NET_F_CTRL_VLAN | hdr.NET_F_CTRL_MAC_ADDR)
    for pair in range(3):
        lab.give(200, 512, queue=2 * pair)
    other = bytes.fromhex("020000000001")
    base = tcp_frame(100)

    def arrive(to: bytes) -> int:
        before = lab.page.read()
        for number in range(30):
            lab.tap.send(to + base[6:34] + number.to_bytes(2) + base[36:])
        wait_until(lambda: seen(before) == 30)
        return lab.page.read()["rx_frames"] - before["rx_frames"]

    def seen(before: dict[str, int]) -> int:
        now = lab.page.read()
        return sum(now[name] - before[name] for name in ("rx_frames", "rx_filtered"))

    assert lab.command(0, 0, b"\0") == 0
    assert (arrive(OWN), arrive(other)) == (30, 0)
    table = (0).to_bytes(4, "little") * 2
    assert lab.command(1, 0, table) == 0
    assert (arrive(OWN), arrive(other)) == (30, 0)
    assert lab.command(1, 1, other) == 0
    assert (arrive(OWN), arrive(other)) == (0, 30)
    assert lab.command(0, 0, b"\1") == 0
    assert (arrive(OWN), arrive(other)) == (30, 30)


def test_offloads_at_run_time(launch_pairs: Callable[..., PairLab]) -> None:
    """Long frames that are on their way when offloads are switched off reach no pair's driver."""
    lab = launch_pairs(2, features=MQ | hdr.NET_F_GUEST_CSUM)
    lab.give(200, 4096, queue=0)
    lab.give(200, 4096, queue=2)
    assert lab.command(5, 0, bytes(8)) == 0
    assert all(shared_out(lab, 50))
    assert (
        lab.command(5, 0, (hdr.NET_F_GUEST_CSUM | hdr.NET_F_GUEST_TSO4).to_bytes(8, "little")) == 0
    )
    assert all(shared_out(lab, 50))
    assert lab.network()["rx"]["drops"] == {}


def test_link_down_is_down_for_all(launch_pairs: Callable[..., PairLab]) -> None:
    """What is sent is counted and comes back; with the link, traffic comes back."""
    lab = launch_pairs(2)
    lab.give(100, 512, queue=0)
    lab.give(100, 512, queue=2)
    assert lab.setting("link", False) is False
    assert lab.wait_call(CONFIG_CHANGE, DEADLINE)
    lab.send(*[frame_of(60)] * 7, queue=3)
    lab.send(*[frame_of(60)] * 3, queue=1)
    wait_until(lambda: lab.network()["tx"]["drops"] == {"link down": 10})
    lab.wait_life(1, lab.kill(1))
    lab.send(*[frame_of(60)] * 5, queue=3)
    wait_until(lambda: lab.network()["tx"]["drops"] == {"link down": 15})
    assert lab.setting("link", True) is True
    lab.send(frame_of(60, 9), queue=3)
    assert [sent.data for sent in lab.tap.receive(1)] == [frame_of(60, 9)]
    lab.tap.wait_running()
    assert all(shared_out(lab, 60))


def test_a_tap_that_is_taken_down_is_waited_for(launch_pairs: Callable[..., PairLab]) -> None:
    """Whichever pair meets it: the driver is told, and again when the tap is back."""
    lab = launch_pairs(2)
    lab.tap.set_up(False)
    lab.send(frame_of(60), queue=3)
    assert lab.wait_call(CONFIG_CHANGE, DEADLINE)
    assert lab.read_config(6, 2) & 1 == 0
    lab.tap.set_up(True)
    assert lab.wait_call(CONFIG_CHANGE, DEADLINE)
    assert lab.read_config(6, 2) & 1 == 1
    lab.send(frame_of(60, 3), queue=3)
    assert lab.tap.receive(1)[0].data == frame_of(60, 3)


def test_a_limit_is_for_all_pairs_together(launch_pairs: Callable[..., PairLab]) -> None:
    """Two pairs that send at once share what one would have had; also when one is new."""
    lab = launch_pairs(2)
    lab.tap.stop_listening()
    assert lab.setting("tx_pps", 400) == 400
    floods = {n: [lab.queues[n].place([HEADER + frame_of(60)]) for _ in range(64)] for n in (1, 3)}
    for index, requests in floods.items():
        lab.queues[index].submit(*requests)
    begun, done = time.monotonic(), {1: 0, 3: 0}
    while sum(done.values()) < 600:
        for index in floods:
            lab.kick(index)
            used = lab.queues[index].collect()
            done[index] += len(used)
            if used:
                lab.queues[index].submit(*[one.request for one in used])
        time.sleep(0.001)
    took = time.monotonic() - begun
    # The burst is a tenth of a second's worth, and each process may have it once.
    assert took > (600 - 2 * 40 - 2) / 400 * 0.95, (took, done)
    assert all(done.values())
    lab.wait_life(1, lab.kill(1))
    assert lab.setting("tx_pps", 0) == 0
    lab.wait_life(1, 1)


def test_a_capture_shows_all_pairs(launch_pairs: Callable[..., PairLab]) -> None:
    """Frames that another process carries are in it, too; until it ends."""
    lab = launch_pairs(2)
    lab.give(10, 512, queue=0)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    assert lab.setting("capture", {"snaplen": 96}, writing)["active"]
    os.close(writing)
    lab.send(frame_of(200, 1), queue=1)
    lab.send(frame_of(200, 2), queue=3)
    wait_until(lambda: lab.network()["capture"]["captured"] == 2)
    lab.wait_life(1, lab.kill(1))
    lab.send(frame_of(200, 3), queue=3)
    wait_until(lambda: lab.network()["capture"]["captured"] == 3)
    assert lab.setting("capture", None)["lost"] == 0
    lab.send(frame_of(200, 4), queue=3)
    data = b""
    while part := os.read(reading, 1 << 16):
        data += part
    os.close(reading)
    for seed in (1, 2, 3):
        assert frame_of(200, seed)[:96] in data
        assert frame_of(200, seed) not in data
    assert frame_of(200, 4)[:96] not in data


def test_a_local_link_answers_on_any_pair(launch_pairs: Callable[..., PairLab]) -> None:
    """A DHCP client gets its offer whichever queue it asks by; what is not for us goes out."""
    lab = launch_pairs(2, local=netlab.SETTINGS)
    lab.give(10, 2048, queue=0)
    discover = netlab.udp(netlab.bootp((53, bytes([netlab.DISCOVER]))))
    lab.send(discover, queue=3)
    answer = netlab.reply(netlab.see(lab.receive(1)).payload)
    assert (answer.type, answer.yiaddr) == (netlab.OFFER, "100.64.1.3")
    other = netlab.udp(b"no DHCP at all", ports=(1, 67))
    lab.send(other, queue=3)
    assert [sent.data for sent in lab.tap.receive(1)] == [other]


def test_a_pause_stops_all_pairs(launch_pairs: Callable[..., PairLab]) -> None:
    """Nobody touches guest memory until the end of it, a process that is new then neither."""
    lab = launch_pairs(2)
    lab.give(100, 512, queue=0)
    lab.give(100, 512, queue=2)
    lab.pause()
    life = lab.kill(1)
    lab.wait_life(1, life)
    before = lab.memory.read(0, 8 << 20)
    base = tcp_frame(100)
    for number in range(60):
        lab.tap.send(OWN + base[6:34] + number.to_bytes(2) + base[36:])
    lab.kick(0)
    lab.kick(2)
    lab.network()
    assert lab.memory.read(0, 8 << 20) == before
    lab.unpause()
    wait_until(lambda: lab.page.read()["rx_frames"] == 60)
    lab.send(frame_of(60), queue=3)


def test_nothing_is_written_after_a_reset(launch_pairs: Callable[..., PairLab]) -> None:
    """Once status reads 0, buffers are the guest's again, whatever the taps have."""
    lab = launch_pairs(2)
    base = tcp_frame(100)
    for turn in range(5):
        lab.give(100, 512, queue=0)
        lab.give(100, 512, queue=2)
        for number in range(100):
            lab.tap.send(OWN + base[6:34] + number.to_bytes(2) + base[36:])
        if turn % 2:
            lab.kill(1)
        lab.status = 0
        assert lab.status == 0
        before = lab.memory.read(0x10000, 1 << 20)
        lab.tap.send(OWN + base[6:])
        lab.read_config(0, 4)
        assert lab.memory.read(0x10000, 1 << 20) == before
        lab.begin()
    assert lab.status & 0x40 == 0


def test_one_queue_of_another_process_is_reset(launch_pairs: Callable[..., PairLab]) -> None:
    """It is served again from its beginning when the driver has enabled it again (§2.6.1)."""
    lab = launch_pairs(2, features=MQ | F_RING_RESET)
    lab.send(*[frame_of(60, n) for n in range(10)], queue=3)
    assert lab.disable(3)
    lab.wait_life(1, lab.kill(1))
    fresh = lab.drivers(lab.features, arena_bytes=4 << 20)[3]
    assert lab.enable(3, fresh)
    lab.queues[3] = fresh
    lab.send(*[frame_of(60, n) for n in range(10, 15)], queue=3)
    assert len(lab.tap.receive(15)) == 15


@pytest.mark.parametrize("how", [{"msix": False}, {"irqfd": False}, {"kicks": False}])
def test_other_ways_to_interrupt_and_kick(
    launch_pairs: Callable[..., PairLab], how: dict[str, bool]
) -> None:
    """Without MSI-X, ISR tells of what another process did; without irqfd, the VM process hears."""
    lab = launch_pairs(2, **how)
    lab.isr()
    lab.send(*[frame_of(60, n) for n in range(20)], queue=3)
    assert lab.isr() & 1 or how != {"msix": False}
    lab.wait_life(1, lab.kill(1))
    lab.send(*[frame_of(60, n) for n in range(20)], queue=3)
    assert len(lab.tap.receive(40)) == 40


def test_a_broken_ring_of_another_process(launch_pairs: Callable[..., PairLab]) -> None:
    """The device asks for a reset, no pair is served until then, and afterwards all are."""
    lab = launch_pairs(2)
    avail = lab.queues[3].avail_gpa
    lab.memory.write(avail + 2, (0x7000).to_bytes(2, "little"))
    lab.kick(3)
    assert lab.wait_call(CONFIG_CHANGE, DEADLINE)
    assert lab.status & 0x40
    before = lab.network()["tx"]["frames"]
    lab.queues[1].add([HEADER + frame_of(60)])
    lab.kick(1)
    assert lab.network()["tx"]["frames"] == before
    lab.begin()
    lab.send(frame_of(60), queue=3)
    lab.send(frame_of(60), queue=1)
    assert len(lab.tap.receive(2)) == 2


def test_the_jail_of_a_pair(launch_pairs: Callable[..., PairLab]) -> None:
    """Filtered as a network device is, with no more descriptors than it needs."""
    lab = launch_pairs(2)
    pid = lab.told()[1]["pid"]
    assert facts_of(pid)["Seccomp"] == ["2"]
    assert facts_of(pid)["NoNewPrivs"] == ["1"]
    taps = [
        link
        for link in (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
        if "tun" in link
    ]
    assert len(taps) == 1
