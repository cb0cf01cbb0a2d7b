"""Register blocks in front of a device process: what is forwarded, and what is answered here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.spec import Block, Common, Legacy
from vmm.interrupts import CONFIG, NO_VECTOR
from vmm.virtio_pci import LegacyRegisters, ModernRegisters

if TYPE_CHECKING:
    from collections.abc import Callable


class FakeChannel:
    """A device process: remembers accesses, answers from a table."""

    def __init__(self) -> None:
        self.alive = True
        self.accesses: list[tuple[object, ...]] = []
        self.answers: dict[int, tuple[int, int]] = {}
        self.after_read: Callable[[int], None] = lambda reg: None

    def read(self, reg: int, size: int) -> tuple[int, int]:
        self.accesses.append((reg, size))
        answer = self.answers.get(reg, (0, 0))
        self.after_read(reg)
        return answer

    def write(self, reg: int, size: int, value: int) -> None:
        self.accesses.append((reg, size, value))


class FakeInterrupts:
    """Vectors of two queues, and the line."""

    def __init__(self, *, irqfd: bool = True) -> None:
        self.msix_enabled = False
        self.vectors: dict[int, int] = {}
        self.line = False
        self._irqfd = irqfd

    def vector(self, queue: int) -> int:
        return self.vectors.get(queue, NO_VECTOR)

    def set_vector(self, queue: int, vector: int) -> None:
        self.vectors[queue] = vector

    def clear_vectors(self) -> None:
        self.vectors.clear()
        self.lower()

    def call_fd(self, _queue: int) -> int | None:
        return 9 if self._irqfd else None

    def notify(self, _queue: int) -> None:
        self.line = True

    def lower(self) -> None:
        self.line = False


Lab = tuple[ModernRegisters, LegacyRegisters, FakeChannel, FakeInterrupts]


def make(*, irqfd: bool = True) -> Lab:
    """Both register blocks on one fake device."""
    channel, interrupts = FakeChannel(), FakeInterrupts(irqfd=irqfd)
    return (
        ModernRegisters(channel, interrupts),  # type: ignore[arg-type]
        LegacyRegisters(channel, interrupts),  # type: ignore[arg-type]
        channel,
        interrupts,
    )


def test_vectors_are_answered_here() -> None:
    """Per queue as selected, and for the configuration; the device never hears of them."""
    modern, _, channel, interrupts = make()
    modern.write(Common.QUEUE_SELECT, 2, 1)
    assert channel.accesses.pop() == (Common.QUEUE_SELECT, 2, 1)
    modern.write(Common.QUEUE_MSIX_VECTOR, 2, 5)
    modern.write(Common.MSIX_CONFIG, 2, 6)
    assert interrupts.vectors == {1: 5, CONFIG: 6}
    assert modern.read(Common.QUEUE_MSIX_VECTOR, 2) == 5
    assert modern.read(Common.MSIX_CONFIG, 2) == 6
    assert channel.accesses == []


def test_a_reset_takes_the_vectors() -> None:
    """Status 0, of the right width, is forwarded and clears what is mirrored here (§2.4)."""
    modern, _, channel, interrupts = make()
    modern.write(Common.QUEUE_SELECT, 2, 1)
    modern.write(Common.MSIX_CONFIG, 2, 6)
    modern.write(Common.DEVICE_STATUS, 2, 0)  # which the device drops
    modern.write(Common.DEVICE_STATUS, 1, 1)
    assert interrupts.vectors == {CONFIG: 6}
    modern.write(Common.DEVICE_STATUS, 1, 0)
    assert channel.accesses[-1] == (Common.DEVICE_STATUS, 1, 0)
    assert interrupts.vectors == {}
    modern.write(Common.QUEUE_MSIX_VECTOR, 2, 3)
    assert interrupts.vectors == {0: 3}


def test_what_is_between_the_blocks_stays_here() -> None:
    """A guest does not see the VM process's own registers, such as ISR_PEEK."""
    modern, _, channel, _ = make()
    for offset in (Block.NOTIFY, Block.NOTIFY + 2, Block.ISR_PEEK, Block.ISR + 0xFF):
        assert modern.read(offset, 1) == 0
    assert channel.accesses == []


@pytest.mark.parametrize("msix", [False, True])
def test_the_legacy_block_moves_up_with_msix(*, msix: bool) -> None:
    """Two vector registers come before the configuration while MSI-X is on (§4.1.4.10)."""
    _, legacy, channel, interrupts = make()
    interrupts.msix_enabled = msix
    legacy.write(Legacy.QUEUE_SELECT, 2, 1)
    legacy.write(0x14, 2, 7)
    legacy.write(0x16, 2, 8)
    legacy.read(0x18, 4)
    config = Block.LEGACY + Legacy.DEVICE
    if msix:
        assert interrupts.vectors == {CONFIG: 7, 1: 8}
        assert (legacy.read(0x14, 2), legacy.read(0x16, 2)) == (7, 8)
        assert channel.accesses[1:] == [(config, 4)]
    else:
        assert channel.accesses[1:] == [(config, 2, 7), (config + 2, 2, 8), (config + 4, 4)]


def test_reading_isr_lowers_the_line() -> None:
    """The reply says so, and the guest does not run before it is so."""
    modern, legacy, channel, interrupts = make()
    for block, reg in ((modern, int(Block.ISR)), (legacy, int(Legacy.ISR))):
        channel.answers = {Block.ISR: (1, -1), Block.LEGACY + Legacy.ISR: (1, -1)}
        interrupts.line = True
        assert block.read(reg, 1) == 1
        assert not interrupts.line


def test_an_interrupt_behind_the_answer_is_not_lost() -> None:
    """KICK messages come on another channel, to another thread, which may be quicker."""
    modern, _, channel, interrupts = make(irqfd=False)
    channel.answers = {Block.ISR: (1, -1), Block.ISR_PEEK: (1, 0)}
    channel.after_read = lambda reg: interrupts.notify(0) if reg == Block.ISR else None
    assert modern.read(Block.ISR, 1) == 1
    assert interrupts.line
    # Nothing new in ISR: the line stays low, also if there is nobody left to ask.
    channel.answers[Block.ISR_PEEK] = (0, 0)
    modern.read(Block.ISR, 1)
    assert not interrupts.line
    channel.answers[Block.ISR_PEEK] = (0xFF, 0)
    channel.alive = False
    modern.read(Block.ISR, 1)
    assert not interrupts.line


@pytest.mark.parametrize("reg", [Block.ISR_PEEK, Block.MSIX, Block.ISR + 0xFF])
def test_what_is_between_the_processes_is_no_guests_to_write(reg: int) -> None:
    """The VM process tells a device of MSI-X by a register that is not in the BAR."""
    modern, _, channel, _ = make()
    modern.write(reg, 1, 1)
    assert channel.accesses == []
