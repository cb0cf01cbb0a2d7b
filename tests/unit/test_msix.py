"""vmm.msix: the table, the pending bits and the capability (PCI Local Bus 3.0 §6.8.2)."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.irq import Message
from vmm.msix import CONTROL_ENABLE, CONTROL_FUNCTION_MASK, Msix

ADDRESS = 0xFEE02000


class Table:
    """Registers of five vectors, and what they told their owner."""

    def __init__(self, nr_vectors: int = 5) -> None:
        self.changed: list[int] = []
        self.pending: set[int] = set()
        self.lock = threading.Lock()
        self.msix = Msix(nr_vectors, self.lock, self._note, self._answer)

    def _note(self, vector: int) -> None:
        assert self.lock.locked()
        self.changed.append(vector)

    def _answer(self, vector: int) -> bool:
        assert self.lock.locked()
        return vector in self.pending

    def program(self, vector: int, address: int = ADDRESS, data: int = 0x41) -> None:
        """Do what a driver does: message first, then the mask bit off."""
        self.msix.write(16 * vector, 4, address)
        self.msix.write(16 * vector + 4, 4, 0)
        self.msix.write(16 * vector + 8, 4, data)
        self.msix.write(16 * vector + 12, 4, 0)

    @property
    def pba(self) -> int:
        """Return where the capability says the pending bits are."""
        body, _ = self.msix.capability(0)
        return int(struct.unpack("<HII", body)[2])


@pytest.fixture
def table() -> Table:
    return Table()


def test_power_on_state_is_masked_and_disabled(table: Table) -> None:
    """§6.8.2.9: the mask bit of every vector is set after reset, everything else is 0."""
    for vector in range(5):
        assert [table.msix.read(16 * vector + at, 4) for at in (0, 4, 8, 12)] == [0, 0, 0, 1]
        assert table.msix.message(vector) is None


def test_capability_describes_table_and_pba(table: Table) -> None:
    """§6.8.2.3-5: table size is encoded as N-1; offsets carry the BAR in their low three bits."""
    body, writable = table.msix.capability(4)
    control, table_at, pba_at = struct.unpack("<HII", body)
    assert control == 4
    assert (table_at, table_at & 7) == (4, 4)
    assert pba_at & 7 == 4
    assert pba_at & ~7 >= 5 * 16
    assert struct.unpack("<H", writable)[0] == CONTROL_ENABLE | CONTROL_FUNCTION_MASK


@pytest.mark.parametrize("nr_vectors", [1, 64, 65, 128, 129, 2048])
def test_table_and_pba_do_not_overlap_and_fit_the_bar(nr_vectors: int) -> None:
    """A BAR is a power of two and holds both, whatever the number of vectors."""
    table = Table(nr_vectors)
    size = table.msix.bar_size
    assert size & (size - 1) == 0
    assert nr_vectors * 16 <= table.pba
    assert table.pba % 8 == 0
    assert table.pba + (nr_vectors + 63) // 64 * 8 <= size


@pytest.mark.parametrize("nr_vectors", [0, -1, 2049])
def test_impossible_table_sizes_are_refused(nr_vectors: int) -> None:
    """The size field has eleven bits, and a table of none cannot be said."""
    with pytest.raises(ValueError, match="vectors"):
        Table(nr_vectors)


def test_a_vector_sends_only_while_nothing_masks_it(table: Table) -> None:
    """§6.8.2.3, §6.8.2.9: enable, function mask and the vector's own mask must all agree."""
    table.program(2)
    assert table.msix.message(2) is None  # not enabled
    table.msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK)
    assert table.msix.message(2) is None
    table.msix.set_control(CONTROL_ENABLE)
    assert table.msix.message(2) == Message(ADDRESS, 0x41)
    table.msix.write(2 * 16 + 12, 4, 1)
    assert table.msix.message(2) is None


def test_eight_byte_accesses_reach_two_dwords_and_are_told_once(table: Table) -> None:
    """§6.8.2: aligned QWORD accesses are legal; data and mask then change together."""
    table.msix.set_control(CONTROL_ENABLE)
    table.msix.write(16, 8, ADDRESS)
    table.msix.write(24, 8, 0x0_0000_0055)
    assert table.changed == [1, 1]
    assert table.msix.message(1) == Message(ADDRESS, 0x55)
    assert table.msix.read(16, 8) == ADDRESS
    assert table.msix.read(24, 8) == 0x55


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, 2), (1, 1), (2, 2), (3, 1), (1, 4), (2, 4), (4, 8), (12, 8), (5 * 16 - 2, 4)],
)
def test_odd_and_straddling_accesses_do_nothing(table: Table, offset: int, size: int) -> None:
    """CVE-2020-13754: only aligned accesses of 4 and 8 bytes exist for the table and the PBA."""
    before = [table.msix.read(at, 4) for at in range(0, 80, 4)]
    table.msix.write(offset, size, (1 << 8 * size) - 1)
    assert [table.msix.read(at, 4) for at in range(0, 80, 4)] == before
    assert table.changed == []
    assert table.msix.read(offset, size) == (1 << 8 * size) - 1


def test_reserved_bits_read_zero(table: Table) -> None:
    """Bits 0-1 of the address and bits 1-31 of vector control stay 0."""
    table.msix.write(0, 4, 0xFFFFFFFF)
    table.msix.write(12, 4, 0xFFFFFFFE)
    assert table.msix.read(0, 4) == 0xFFFFFFFC
    assert table.msix.read(12, 4) == 0


def test_nothing_lies_between_table_and_pba_nor_after_it(table: Table) -> None:
    """What is no register reads 0 and swallows writes."""
    for offset in (5 * 16, table.pba - 8, table.pba + 8, table.msix.bar_size - 8):
        table.msix.write(offset, 8, 0xFFFFFFFFFFFFFFFF)
        assert table.msix.read(offset, 8) == 0
    assert table.changed == []


def test_pba_shows_what_is_pending_and_cannot_be_written(table: Table) -> None:
    """§6.8.2.10: one bit per vector, read-only; bits past the last vector are 0."""
    table.pending = {0, 3, 4, 5, 63}
    assert table.msix.read(table.pba, 4) == 0b11001
    table.msix.write(table.pba, 4, 0)
    table.msix.write(table.pba, 8, 0)
    assert table.msix.read(table.pba, 8) == 0b11001


def test_pba_of_many_vectors_has_many_words() -> None:
    """Vector n is bit n % 32 of dword n // 32."""
    table = Table(100)
    table.pending = {31, 32, 64, 99, 100}
    words = [table.msix.read(table.pba + 4 * n, 4) for n in range(4)]
    assert words == [1 << 31, 1, 1, 1 << 3]
    assert table.msix.read(table.pba + 8, 8) == 1 << 35 | 1


def test_a_message_that_is_no_interrupt_is_not_sent(table: Table) -> None:
    """A device has no way to write to guest memory by choosing a message address."""
    table.msix.set_control(CONTROL_ENABLE)
    table.program(0, address=0x1000)
    assert table.msix.message(0) is None
    table.msix.write(0, 4, ADDRESS)
    table.msix.write(4, 4, 1)
    assert table.msix.message(0) is None
    table.msix.write(4, 4, 0)
    assert table.msix.message(0) == Message(ADDRESS, 0x41)


@given(
    st.lists(st.tuples(st.integers(0, 4095), st.sampled_from([1, 2, 4, 8]), st.integers(0))),
)
def test_no_access_breaks_the_registers(accesses: list[tuple[int, int, int]]) -> None:
    """Whatever a guest writes, reads fit their size and only existing vectors are told of."""
    table = Table(3)
    for offset, size, value in accesses:
        table.msix.write(offset, size, value & ((1 << 8 * size) - 1))
        assert 0 <= table.msix.read(offset, size) < 1 << 8 * size
    assert set(table.changed) <= {0, 1, 2}
    table.msix.reset()
    assert table.msix.read(12, 4) == 1
