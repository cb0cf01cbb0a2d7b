"""The entropy device, in a process of its own: virtio 1.2 §5.4."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.spec import SPECS
from devices.viodev import CONFIG_CHANGE, ImsgType
from devices.viornd import MAX_REQUEST
from tools.viodriver.private import DeviceHost
from tools.viodriver.registers import NEEDS_RESET

if TYPE_CHECKING:
    from typing import Any

    from tools.viodriver import DriverQueue, Used
    from vmm.launch import Spawner

DEADLINE = 10.0


def open_rng(spawner: Spawner, **settings: Any) -> DeviceHost:
    """Return an entropy device in a new process."""
    return DeviceHost("viornd", settings, spawner=spawner)


def answers(host: DeviceHost, queue: DriverQueue, count: int, *, kick: bool = True) -> list[Used]:
    """Kick, and wait until `count` requests have come back."""
    done: list[Used] = []
    if kick:
        host.kick(0)
    while len(done) < count:
        done += queue.collect()
        if len(done) < count and not queue.enable_calls():
            assert host.wait_call(0, DEADLINE), f"{len(done)} of {count} came back"
    return done


def test_what_the_driver_finds(spawner: Spawner) -> None:
    """One queue, no configuration, no feature bits of its own (§5.4.2 to §5.4.4)."""
    assert (SPECS["viornd"].virtio_id, SPECS["viornd"].queues) == (4, (64,))
    with open_rng(spawner) as host:
        assert host.offered() & 0xFF_FFFF == 0
        assert host.offered() & F_IN_ORDER
        assert host.read_config(0, 4) == 0


@pytest.mark.parametrize(
    "features", [0, F_EVENT_IDX, F_IN_ORDER, F_RING_PACKED, F_RING_PACKED | F_EVENT_IDX]
)
def test_buffers_are_filled(spawner: Spawner, features: int) -> None:
    """The device places random bytes into each buffer, and says how many (§5.4.6.2)."""
    with open_rng(spawner, packed=bool(features & F_RING_PACKED)) as host:
        [queue] = host.start(features)
        sizes = [1, 16, 64, 4096, 3, 65536]
        for size in sizes:
            queue.add([], [size])
        done = answers(host, queue, len(sizes))
        assert [used.request.writable_bytes for used in done] == sizes
        if not features & F_IN_ORDER:  # else lengths but the last are not told
            assert [used.written for used in done] == sizes
        large = queue.data(done[-1].request)
        assert len(set(large)) == 256
        assert len({large[at : at + 16] for at in range(0, len(large), 16)}) == 4096


def test_any_number_of_segments(spawner: Spawner) -> None:
    """A buffer may come in pieces; all are filled, and nothing beyond them."""
    with open_rng(spawner) as host:
        [queue] = host.start(F_INDIRECT_DESC)
        pieces = [1, 0, 7, 512, 0, 100] + [33] * 50
        request = queue.place([], pieces, indirect=True)
        guard = queue.arena.take(16)
        host.memory.write(guard, bytes(16))
        queue.submit(request)
        [used] = answers(host, queue, 1)
        assert used.written == sum(pieces)
        assert len(set(queue.data(request))) > 200
        assert host.memory.read(guard, 16) == bytes(16)


def test_a_long_buffer_is_filled_in_part(spawner: Spawner) -> None:
    """It MAY use less than the whole buffer (§5.4.6.2): at most 64 KiB each, used.len says so."""
    with open_rng(spawner) as host:
        [queue] = host.start(arena_bytes=1 << 20)
        queue.add([], [MAX_REQUEST - 100, 300, 1 << 18])
        [used] = answers(host, queue, 1)
        assert used.written == MAX_REQUEST
        rest = queue.data(used.request)[MAX_REQUEST:]
        assert rest == bytes(len(rest))


def test_an_empty_buffer_comes_back_empty(spawner: Spawner) -> None:
    """No room is no reason to stall the queue."""
    with open_rng(spawner) as host:
        [queue] = host.start()
        queue.add([], [0])
        queue.add([], [8])
        assert [used.written for used in answers(host, queue, 2)] == [0, 8]


def test_a_readable_buffer_needs_a_reset(spawner: Spawner) -> None:
    """The driver MUST NOT place a device-readable buffer (§5.4.6.1); a reset mends it."""
    with open_rng(spawner) as host:
        [queue] = host.start()
        queue.add([b"seed"], [8])
        host.kick(0)
        assert host.wait_call(CONFIG_CHANGE, DEADLINE)
        assert host.status & NEEDS_RESET
        assert queue.collect() == []
        [queue] = host.start()
        queue.add([], [8])
        assert [used.written for used in answers(host, queue, 1)] == [8]


def test_more_than_a_wake_up_is_worth(spawner: Spawner) -> None:
    """A full ring of large requests takes several turns, and needs one kick."""
    with open_rng(spawner) as host:
        [queue] = host.start(F_EVENT_IDX, arena_bytes=64 * 65536)
        for _ in range(60):
            queue.add([], [65536])
        assert all(used.written == 65536 for used in answers(host, queue, 60))


def test_the_rate_is_kept(spawner: Spawner) -> None:
    """With a rate, a burst of one second's worth, then so much per second and no more."""
    rate = 40_000
    with open_rng(spawner, rate=rate) as host:
        [queue] = host.start(F_EVENT_IDX)
        start = time.monotonic()
        written = 0
        while written < 2 * rate:
            queue.add([], [8192])
            written += answers(host, queue, 1)[0].written
        seconds = time.monotonic() - start
        # Two seconds' worth, less the burst, less one request that ran into debt.
        assert seconds >= (2 * rate - rate - 8192) / rate
        assert seconds < DEADLINE


def test_the_rate_bounds_one_request(spawner: Spawner) -> None:
    """A slow device answers a large request in part rather than in an hour."""
    with open_rng(spawner, rate=100) as host:
        [queue] = host.start()
        queue.add([], [65536])
        assert answers(host, queue, 1)[0].written == 100


def test_the_rate_can_be_changed(spawner: Spawner) -> None:
    """At run time; who waits for the old rate is served at the new one, at once."""
    with open_rng(spawner, rate=1) as host:
        [queue] = host.start()
        queue.add([], [1])
        answers(host, queue, 1)
        for _ in range(50):
            queue.add([], [1000])
        host.kick(0)
        host.read(0, 4)  # now the kick has been served, as far as the old rate goes
        host.read(0, 4)
        assert host.ask(ImsgType.SETTING, {"name": "rate", "value": 0}) == {"value": 0}
        assert len(answers(host, queue, 50, kick=False)) == 50


@pytest.mark.parametrize("value", [-1, "fast", None, True, 1.5, 10**40])
def test_a_rate_that_is_none_is_refused(spawner: Spawner, value: object) -> None:
    """A wrong word changes nothing and is answered in words."""
    with open_rng(spawner) as host:
        answer = host.ask(ImsgType.SETTING, {"name": "rate", "value": value})
        assert "rate" in answer["error"]
        answer = host.ask(ImsgType.SETTING, {"name": "colour", "value": 1})
        assert "colour" in answer["error"]


def test_a_value_that_grows_when_it_is_repeated(spawner: Spawner) -> None:
    """The error would be longer than a message; it is cut, and the device lives on."""
    with open_rng(spawner) as host:
        value = "'" * 9000 + '"'
        answer = host.ask(ImsgType.SETTING, {"name": "rate", "value": value})
        assert answer["error"].startswith("rate: ")
        assert host.ask(ImsgType.SETTING, {"name": "rate", "value": 5}) == {"value": 5}
