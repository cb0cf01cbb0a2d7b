"""Interrupt delivery against a model, with a device that signals in the middle of every ioctl.

Promises checked after every step: a vector that may send owes nothing; nothing is sent without a
signal, twice for one, by a vector that must be silent, or with a message nobody programmed; the
pending bits say what is owed; and while INTx is on, the line is high whenever ISR is not 0.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.interrupt_lab import ADDRESS, ENABLE, FUNCTION_MASK, INTX_OFF, MASTER, Lab
from vmm.interrupts import CONFIG, NO_VECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.irq import Message

SOURCES: Final = (0, 1, CONFIG)
VECTORS: Final = (0, 1, 2)

# What the device does at successive moments inside the guest's operation.
plans = st.lists(st.sampled_from([None, *SOURCES]), max_size=10)
sources = st.sampled_from(SOURCES)
vectors = st.sampled_from(VECTORS)


class Delivery(RuleBasedStateMachine):
    """The guest's registers as the model knows them, and what each source is owed."""

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab()
        self.queue_of = {self.lab.interrupts.call_fd(queue): queue for queue in SOURCES}
        self.lab.vm.on_message = self.on_message
        self.lab.vm.on_pin = self.on_pin
        self.lab.vm.adversary = self.strike
        self.lab.command(0)  # memory decoding, so that the table can be reached
        self.plan: list[int | None] = []
        self.enabled = self.function_masked = self.intx_off = self.master = False
        self.vector = dict.fromkeys(SOURCES, NO_VECTOR)
        self.masked = dict.fromkeys(VECTORS, True)
        self.entry = dict.fromkeys(VECTORS, (0, 0))
        self.signals = dict.fromkeys(SOURCES, 0)  # by eventfd, not delivered yet
        self.notified = dict.fromkeys(SOURCES, False)  # by notify(), not delivered yet
        self.legal: dict[int, set[int]] = {queue: set() for queue in SOURCES}

    def teardown(self) -> None:
        """Free the descriptors."""
        self.lab.vm.adversary = lambda: None
        self.lab.close()

    # The model.

    @property
    def intx_on(self) -> bool:
        return not self.enabled and not self.intx_off

    def data(self, queue: int) -> int | None:
        """What `queue` may send now, or None."""
        vector = self.vector[queue]
        if not self.enabled or self.function_masked or not self.master or vector == NO_VECTOR:
            return None
        address, data = self.entry[vector]
        return None if self.masked[vector] or address != ADDRESS else data

    def on_message(self, message: Message, fd: int | None) -> None:
        """Something reached the guest."""
        assert message.address == ADDRESS
        if fd is None:
            queue = next(
                queue
                for queue in SOURCES
                if self.notified[queue] and message.data in self.legal[queue]
            )
            self.notified[queue] = False
            return
        queue = self.queue_of[fd]
        assert self.signals[queue], "a message without a signal"
        assert message.data in self.legal[queue], "a message that must not be sent"
        self.signals[queue] = 0

    def on_pin(self, fd: int) -> None:
        """A signal went to the pin: ISR is what tells of it."""
        assert not self.enabled or self.changing, "the pin is used with MSI-X on"
        assert self.lab.isr, "the pin is raised for what was served"
        self.signals[self.queue_of[fd]] = 0

    def strike(self) -> None:
        """The device uses the moment."""
        queue = self.plan.pop(0) if self.plan else None
        if queue is not None:
            self.signals[queue] += 1
            self.lab.signal(queue)

    changing = False

    @contextmanager
    def change(self, plan: list[int | None]) -> Iterator[None]:
        """Set the model in the body; what is legal before or after is legal meanwhile."""
        before = {queue: self.data(queue) for queue in SOURCES}
        yield
        for queue in SOURCES:
            both = {before[queue], self.data(queue)}
            self.legal[queue] = {data for data in both if data is not None}
        self.plan, self.changing = list(plan), True

    def settle(self) -> None:
        """The operation is over; from now on only the present state is legal."""
        self.plan, self.changing = [], False
        for queue in SOURCES:
            data = self.data(queue)
            self.legal[queue] = set() if data is None else {data}
            if self.intx_on:
                self.signals[queue] = 0  # ISR keeps it, see line_follows_isr
            if not self.enabled:
                self.notified[queue] = False

    # The guest.

    @initialize(ready=st.booleans())
    def load_driver(self, ready: bool) -> None:
        """Half of the runs begin where a driver that uses MSI-X begins."""
        if ready:
            self.command(master=True, intx_off=False, plan=[])
            self.control(enabled=True, function_masked=False, plan=[])
            for vector, queue in enumerate(SOURCES):
                self.program(vector, 0, plan=[])
                self.mask(vector, masked=False, plan=[])
                self.set_vector(queue, vector, plan=[])

    @rule(vector=vectors, masked=st.booleans(), plan=plans)
    def mask(self, vector: int, masked: bool, plan: list[int | None]) -> None:
        with self.change(plan):
            self.masked[vector] = masked
        self.lab.mask(vector, masked)
        self.settle()

    @rule(vector=vectors, data=st.integers(0, 3), plan=plans)
    def program(self, vector: int, data: int, plan: list[int | None]) -> None:
        data = data << 4 | vector
        for register, value in ((0, ADDRESS), (2, data)):
            with self.change(plan):
                address, old = self.entry[vector]
                self.entry[vector] = (ADDRESS, old) if register == 0 else (address, data)
            self.lab.table(vector, register, value)
            self.settle()

    @rule(vector=vectors, plan=plans)
    def misprogram(self, vector: int, plan: list[int | None]) -> None:
        with self.change(plan):
            self.entry[vector] = (0x1000, self.entry[vector][1])
        self.lab.table(vector, 0, 0x1000)
        self.settle()

    @rule(enabled=st.booleans(), function_masked=st.booleans(), plan=plans)
    def control(self, enabled: bool, function_masked: bool, plan: list[int | None]) -> None:
        with self.change(plan):
            self.enabled, self.function_masked = enabled, function_masked
        self.lab.control(ENABLE * enabled | FUNCTION_MASK * function_masked)
        self.settle()

    @rule(master=st.booleans(), intx_off=st.booleans(), plan=plans)
    def command(self, master: bool, intx_off: bool, plan: list[int | None]) -> None:
        with self.change(plan):
            self.master, self.intx_off = master, intx_off
        self.lab.command(MASTER * master | INTX_OFF * intx_off)
        self.settle()

    @rule(queue=sources, vector=st.sampled_from([*VECTORS, NO_VECTOR, 3]), plan=plans)
    def set_vector(self, queue: int, vector: int, plan: list[int | None]) -> None:
        if self.vector[queue] == NO_VECTOR:
            self.signals[queue], self.notified[queue] = 0, False
        with self.change(plan):
            self.vector[queue] = vector if vector in VECTORS else NO_VECTOR
        assert self.lab.interrupts.set_vector(queue, vector) == self.vector[queue]
        self.settle()

    @rule(plan=plans)
    def read_isr(self, plan: list[int | None]) -> None:
        with self.change(plan):
            pass
        self.lab.read_isr()
        self.settle()

    @rule()
    def eoi(self) -> None:
        self.lab.eoi()
        self.settle()
        assert self.lab.line == (self.lab.isr and self.intx_on)

    # The device, between operations.

    @rule(queue=sources)
    def signal(self, queue: int) -> None:
        self.signals[queue] += 1
        self.lab.signal(queue)
        self.settle()

    @rule(queue=sources)
    def notify(self, queue: int) -> None:
        self.lab.isr = True
        self.notified[queue] = self.enabled and self.vector[queue] != NO_VECTOR
        self.lab.interrupts.notify(queue)
        self.settle()

    @rule(plan=plans)
    def reset(self, plan: list[int | None]) -> None:
        """The machine resets: the device, too, after whatever it did last."""
        with self.change(plan):
            pass
        self.lab.guest.bus.reset()
        self.plan, self.lab.isr = [], False
        self.enabled = self.function_masked = self.intx_off = self.master = False
        self.vector = dict.fromkeys(SOURCES, NO_VECTOR)
        self.masked = dict.fromkeys(VECTORS, True)
        self.entry = dict.fromkeys(VECTORS, (0, 0))
        self.signals = dict.fromkeys(SOURCES, 0)
        self.lab.guest.bus.connect()
        self.lab.command(0)  # memory decoding, so that the table can be reached
        self.settle()

    # The promises.

    @invariant()
    def nothing_is_owed_by_a_vector_that_may_send(self) -> None:
        for queue in SOURCES:
            if self.data(queue) is not None:
                assert not self.signals[queue], "a signal was lost"
                assert not self.notified[queue], "a notification was lost"

    @invariant()
    def pending_bits_say_what_is_owed(self) -> None:
        if not self.enabled or not self.lab.function.command & 2:
            return
        owed = 0
        for queue, vector in self.vector.items():
            if vector != NO_VECTOR and (self.signals[queue] or self.notified[queue]):
                owed |= 1 << vector
        assert self.lab.pba() == owed

    @invariant()
    def line_follows_isr(self) -> None:
        if self.intx_on and self.lab.isr:
            assert self.lab.line, "an INTx interrupt was lost"
        if self.enabled or self.intx_off:
            assert not self.lab.line

    @invariant()
    def status_bit_follows_isr(self) -> None:
        assert self.lab.status_bit() == (self.lab.isr and not self.enabled)


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
