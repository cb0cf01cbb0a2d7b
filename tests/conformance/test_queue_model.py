"""Random ring traffic, both layouts, all feature mixes, against a model of what a queue is.

The model is a list of requests and what became of each. Both layouts run the same operations,
and must show driver and device the same (§2.7 and §2.8 describe one thing in two encodings).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from devices.features import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from devices.inflight import inflight_bytes
from tests.rng import seeded
from tools.viodriver import NoRoomError, make_memory, open_driver

if TYPE_CHECKING:
    from devices.virtqueue import Chain

Operation = tuple[Any, ...]  # a method of Run, and its arguments

small = st.integers(0, 4)
lengths = st.lists(st.integers(0, 40), max_size=3)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), lengths, lengths, st.booleans()),
        st.tuples(st.just("add"), lengths, lengths, st.booleans()),
        st.tuples(st.just("pop"), small),
        st.tuples(st.just("push"), small, small),
        st.tuples(st.just("push_batch"), small),
        st.tuples(st.just("fill"), small, small),
        st.tuples(st.just("flush")),
        st.tuples(st.just("rewind"), small),
        st.tuples(st.just("drop_all")),
        st.tuples(st.just("collect")),
        st.tuples(st.just("calls"), st.booleans()),
        st.tuples(st.just("should_call")),
        st.tuples(st.just("kicks"), st.booleans()),
        st.tuples(st.just("restore")),
        st.tuples(st.just("kill")),
    ),
    min_size=10,
    max_size=80,
)
features = st.sets(st.sampled_from([F_INDIRECT_DESC, F_EVENT_IDX, F_IN_ORDER])).map(sum)


class Run:
    """One layout under the operations; asserts what the model says, and logs what was seen."""

    def __init__(self, size: int, mix: int, *, tracked: bool) -> None:
        self.driver = open_driver(make_memory(), size, 0x1000, mix)
        area_bytes = inflight_bytes(size, packed=bool(mix & F_RING_PACKED))
        self.area = memoryview(bytearray(area_bytes)) if tracked else None
        self.queue = self.driver.open_device(self.area)
        self.in_order, self.event_idx = bool(mix & F_IN_ORDER), bool(mix & F_EVENT_IDX)
        self.rng = seeded(size)
        self.texts: dict[int, bytes] = {}  # token → what the device must read
        self.available: list[int] = []  # tokens, as offered
        self.popped: list[int] = []  # tokens, since this process began
        self.flying: dict[int, Chain | None] = {}  # those not given back; None if dropped
        self.filled: dict[int, int] = {}  # token → written
        self.used: list[tuple[int, int]] = []  # not collected yet
        self.answers: dict[int, bytes] = {}
        self.nr_used = self.nr_uncalled = 0
        self.call_at: int | None = None  # number of the used entry to call for; None: no calls
        self.call_due = False
        self.kicks_armed = False
        self.log: list[Any] = []
        self.driver.disable_calls()
        self.driver.kick_needed()

    def step(self, operation: Operation) -> None:
        """Do one operation, then check what must hold at any time."""
        name, *arguments = operation
        getattr(self, name)(*arguments)
        assert self.queue.nr_in_flight == len(self.flying)
        assert self.queue.has_work() == bool(self.available)

    # The driver's operations.

    def add(self, readable: list[int], writable: list[int], indirect: bool) -> None:
        if not readable and not writable:
            return
        texts = [self.rng.randbytes(n) for n in readable]
        use_table = indirect and bool(self.driver.features & F_INDIRECT_DESC)
        try:
            token = self.driver.add(texts, writable, indirect=use_table)
        except NoRoomError:
            self.log.append("full")
            return
        self.texts[token] = b"".join(texts)
        self.available.append(token)
        kicked = self.driver.kick_needed()
        assert kicked or not self.kicks_armed, "the device waits for a kick that is not sent"
        if kicked and self.event_idx:
            self.kicks_armed = False

    def collect(self) -> None:
        for done in self.driver.collect():
            token, written = self.used.pop(0)
            assert (done.token, done.written) == (token, written)
            assert self.driver.data(done.request, written) == self.answers.pop(token, b"")[:written]
            self.log.append((token, written))
        assert not self.used

    def calls(self, wanted: bool) -> None:
        if not wanted:
            self.call_at = None
            self.driver.disable_calls()
            return
        self.collect()
        self.call_at = self.nr_used
        assert not self.driver.enable_calls()

    # The device's operations.

    def pop(self, limit: int) -> None:
        for chain in self.queue.pop_batch(limit):
            token = self.available.pop(0)
            assert b"".join(chain.readable) == self.texts[token]
            assert chain.readable_bytes == len(self.texts[token])
            assert chain.writable_bytes == sum(map(len, chain.writable))
            self.flying[token] = chain
            self.popped.append(token)
            self.log.append(("popped", token, chain.writable_bytes))
        if limit and self.available:
            assert len(self.flying) >= limit

    def push(self, which: int, portion: int) -> None:
        if (token := self._choose(which)) is not None:
            self.queue.push(*self._answer(token, portion))
            if self.in_order:
                self._flushed()
            else:
                self._is_used([token])

    def push_batch(self, count: int) -> None:
        tokens = [token for token in self.flying if token not in self.filled][::-1][:count]
        self.queue.push_batch([self._answer(token, 4) for token in tokens])
        if self.in_order:
            self._flushed()
        else:
            self._is_used(tokens)

    def fill(self, which: int, portion: int) -> None:
        if (token := self._choose(which)) is not None:
            self.queue.fill(*self._answer(token, portion))

    def flush(self) -> None:
        self.queue.flush()
        self._flushed()

    def rewind(self, count: int) -> None:
        latest = self.popped[len(self.popped) - count :] if count else []
        possible = len(latest) == count and all(token in self.flying for token in latest)
        assert self.queue.rewind(count) is possible
        if possible:
            for token in reversed(latest):
                self.popped.pop()
                del self.flying[token]
                self.filled.pop(token, None)
                self.available.insert(0, token)

    def drop_all(self) -> None:
        dropped, self.available = self.available, []
        assert self.queue.drop_all() == len(dropped)
        self.popped += dropped
        self.flying |= dict.fromkeys(dropped)
        self.filled |= dict.fromkeys(dropped, 0)
        if self.in_order:
            self._flushed()
        else:
            self._is_used(dropped)

    def should_call(self) -> None:
        expected = self.call_due
        if self.call_at is not None and self.nr_uncalled:
            hit = self.nr_used - self.nr_uncalled <= self.call_at < self.nr_used
            expected = expected or hit or not self.event_idx
        assert self.queue.should_call() is expected
        self.nr_uncalled, self.call_due = 0, False
        self.log.append(expected)

    def kicks(self, wanted: bool) -> None:
        if wanted:
            arrived = self.queue.enable_kicks()
            assert arrived is bool(self.available)
            self.kicks_armed = not arrived
        else:
            self.queue.disable_kicks()
            self.kicks_armed = False

    def restore(self) -> None:
        """Save the queue and go on in another process; only with nothing in flight."""
        if not self.flying:
            state = self.queue.save()
            self.queue = self.driver.open_device(self.area)
            self.queue.load(state)
            self.call_due, self.kicks_armed = True, False

    def kill(self) -> None:
        """Kill the device process; its successor gets back what was in flight."""
        if self.area is None:
            return
        self.queue = self.driver.open_device(self.area)
        chains = self.queue.resubmit()
        assert [b"".join(chain.readable) for chain in chains] == [
            self.texts[token] for token in self.flying
        ]
        self.flying = dict[int, "Chain | None"](zip(self.flying, chains, strict=True))
        self.popped.clear()
        self.filled.clear()
        self.call_due, self.kicks_armed = True, False

    # The model.

    def _choose(self, which: int) -> int | None:
        tokens = [token for token in self.flying if token not in self.filled]
        return tokens[which % len(tokens)] if tokens else None

    def _answer(self, token: int, portion: int) -> tuple[int, int]:
        """Write `portion` quarters of the answer; return the chain's head and how many bytes."""
        chain = self.flying[token]
        assert chain is not None
        written = chain.writable_bytes * portion // 4
        answer = bytes(token + i & 0xFF for i in range(written))
        at = 0
        for view in chain.writable:
            piece = answer[at : at + len(view)]
            view[: len(piece)] = piece
            at += len(piece)
        self.answers[token], self.filled[token] = answer, written
        return chain.head, written

    def _flushed(self) -> None:
        """What flush must have made used: all that is filled, or its oldest unbroken part."""
        if self.in_order:
            ready = []
            for token in self.flying:
                if token not in self.filled:
                    break
                ready.append(token)
        else:
            ready = list(self.filled)
        self._is_used(ready)

    def _is_used(self, tokens: list[int]) -> None:
        for token in tokens:
            self.used.append((token, self.filled.pop(token)))
            self.flying.pop(token, None)
        self.nr_used += len(tokens)
        self.nr_uncalled += len(tokens)


@settings(max_examples=400, deadline=None)
@given(ops=operations, mix=features, tracked=st.booleans(), power=st.integers(0, 4))
def test_2_7_and_2_8_traffic_agrees_with_the_model(
    ops: list[Operation], mix: int, tracked: bool, power: int
) -> None:
    """§2.7, §2.8: what is offered is popped, in order and whole; what is pushed is collected.

    Notifications are sent when asked for. Both layouts look the same from either side.
    """
    logs = []
    for layout in (0, F_RING_PACKED):
        run = Run(1 << power, mix | layout, tracked=tracked)
        for operation in [*ops, ("pop", 32), ("push_batch", 32), ("flush",), ("collect",)]:
            run.step(operation)
        assert not run.available
        logs.append(run.log)
    assert logs[0] == logs[1]
