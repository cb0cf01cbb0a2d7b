"""devices.uring: reads, writes and syncs through io_uring(7)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
from typing import TYPE_CHECKING

import pytest

from config.errors import HostError
from devices import uringmake
from devices.uring import Ring, address
from devices.uringmake import OP_READ, OP_WRITE, make
from tests.descriptors import count_before

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
PATTERN = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def ring() -> Iterator[Ring]:
    try:
        ring = Ring(*make(8))
    except OSError as err:
        pytest.skip(f"no io_uring here: {err.strerror}")
    yield ring
    while ring.nr_in_flight:
        ring.wait()
        ring.reap()
    ring.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "a.img"
    path.write_bytes(PATTERN)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def results(ring: Ring) -> dict[int, int]:
    """Wait for everything in flight."""
    found: dict[int, int] = {}
    while ring.nr_in_flight:
        ring.wait()
        found.update(ring.reap())
    return found


def test_address_is_where_the_bytes_are() -> None:
    """The address of any view is known, also of a read-only one and of a part."""
    memory = mmap.mmap(-1, 8192)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    view = memoryview(memory)

    assert address(view) == address(view.toreadonly()) == place
    assert address(view.toreadonly()[100:4200]) == place + 100


def test_address_leaves_nothing_behind() -> None:
    """Asking for an address does not keep the memory exported."""
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)
    address(view)
    view.release()

    memory.close()  # BufferError if something still held it


def test_reads_of_one_view_and_of_many(ring: Ring, fd: int) -> None:
    """Views are filled in order, and the token says which request is done."""
    memory = bytearray(8192)
    view = memoryview(memory)
    ring.read(7, fd, [view[:4096]], 512)
    ring.read(1 << 63, fd, [view[4096:4100], view[4100:8000]], 8192)

    assert results(ring) == {7: 4096, 1 << 63: 3904}

    assert memory[:4096] == PATTERN[512 : 512 + 4096]
    assert memory[4096:8000] == PATTERN[8192 : 8192 + 3904]


@pytest.mark.parametrize("stable", [False, True])
def test_writes_of_one_view_and_of_many(ring: Ring, fd: int, stable: bool) -> None:
    """Read-only views are written from, in order."""
    view = memoryview(os.urandom(8192))
    ring.write(1, fd, [view[:512]], 0, stable=stable)
    ring.write(2, fd, [view[512:520], view[520:4096]], 65536, stable=stable)

    assert results(ring) == {1: 512, 2: 3584}

    assert os.pread(fd, 512, 0) == view[:512]
    assert os.pread(fd, 3584, 65536) == view[512:4096]


def test_sync(ring: Ring, fd: int) -> None:
    """A sync has result 0."""
    ring.sync(3, fd)

    assert results(ring) == {3: 0}


def test_an_error_is_a_negative_errno(ring: Ring, fd: int) -> None:
    """A request that fails takes nobody with it."""
    memory = memoryview(bytearray(512))
    ring.read(1, 9999, [memory], 0)
    ring.read(2, fd, [memory], 0)
    ring.read(3, fd, [memory], SIZE - 100)

    assert results(ring) == {1: -errno.EBADF, 2: 512, 3: 100}


def test_the_descriptor_is_readable_while_there_are_results(ring: Ring, fd: int) -> None:
    """An event loop can wait for the ring like for any descriptor."""
    poll = select.poll()
    poll.register(ring.fd, select.POLLIN)
    assert not poll.poll(0)
    ring.read(1, fd, [memoryview(bytearray(512))], 0)
    ring.submit()

    assert poll.poll(5000)
    assert ring.reap() == [(1, 512)]
    assert not poll.poll(0)


def test_a_full_ring_takes_nothing(ring: Ring, fd: int) -> None:
    """As many as entries may be in flight; what does not fit leaves no trace."""
    views = [memoryview(bytearray(512)) for _ in range(ring.entries + 1)]
    for token in range(ring.entries):
        ring.read(token, fd, [views[token]], 512 * token)
    with pytest.raises(BlockingIOError):
        ring.read(99, fd, [views[-1][:100], views[-1][100:]], 0)
    with pytest.raises(BlockingIOError):
        ring.sync(99, fd)

    assert results(ring) == dict.fromkeys(range(ring.entries), 512)


def test_the_rings_wrap(ring: Ring, fd: int) -> None:
    """Positions run on for ever; slots are reused, each time with its own request."""
    for turn in range(100):
        views = [memoryview(bytearray(512)) for _ in range(5)]
        for i, view in enumerate(views):
            ring.read(1000 * turn + i, fd, [view[:200], view[200:]], 512 * i + turn)
        assert results(ring) == {1000 * turn + i: 512 for i in range(5)}
        assert [bytes(v) for v in views] == [
            PATTERN[512 * i + turn : 512 * i + turn + 512] for i in range(5)
        ]


def test_memory_in_flight_stays(ring: Ring) -> None:
    """The ring keeps what the kernel may still write to, and lets go when that is over."""
    reader, writer = os.pipe()
    try:
        memory = mmap.mmap(-1, 4096)
        ring.read(1, reader, [memoryview(memory)[:1]], 0xFFFF_FFFF_FFFF_FFFF)
        ring.submit()
        with pytest.raises(BufferError):
            memory.close()
        os.write(writer, b"y")
        assert results(ring) == {1: 1}
        memory.close()
    finally:
        os.close(reader)
        os.close(writer)


def test_waiting_for_nothing_returns(ring: Ring) -> None:
    """wait() with nothing in flight does not hang."""
    ring.wait()
    ring.submit()

    assert ring.reap() == []


def test_requests_overlap(ring: Ring) -> None:
    """A request that has to wait does not hold up one behind it."""
    reader, writer = os.pipe()
    other, ready = os.pipe()
    try:
        os.write(ready, b"x")
        waiting, quick = bytearray(1), bytearray(1)
        ring.read(1, reader, [memoryview(waiting)], 0xFFFF_FFFF_FFFF_FFFF)
        ring.read(2, other, [memoryview(quick)], 0xFFFF_FFFF_FFFF_FFFF)
        ring.wait()
        assert ring.reap() == [(2, 1)]
        os.write(writer, b"y")
        assert results(ring) == {1: 1}
        assert waiting + quick == b"yx"
    finally:
        for end in (reader, writer, other, ready):
            os.close(end)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_a_host_without_io_uring(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Where it is not built in, or forbidden, the constructor says so and leaks nothing."""

    class Libc:
        @staticmethod
        def syscall(*_: int) -> int:
            ctypes.set_errno(number)
            return -1

    before = count_before()
    monkeypatch.setattr(uringmake, "_libc", Libc)
    with pytest.raises(OSError, match=os.strerror(number)):
        make(8)

    assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupted_call_is_made_again(
    ring: Ring, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINTR, EAGAIN and EBUSY are no errors: what was not taken is handed over again."""
    answers = [errno.EINTR, errno.EAGAIN, errno.EBUSY]
    real = uringmake._libc

    class Libc:
        @staticmethod
        def syscall(*arguments: int) -> int:
            if not answers:
                return int(real.syscall(*arguments))
            ctypes.set_errno(answers.pop())
            return -1

    monkeypatch.setattr(uringmake, "_libc", Libc)
    ring.read(1, fd, [memoryview(bytearray(512))], 0)
    ring.submit()
    monkeypatch.undo()

    assert results(ring) == {1: 512}
    assert not answers


def test_another_error_is_raised(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trying again would not mend is the caller's to know."""

    class Libc:
        @staticmethod
        def syscall(*_: int) -> int:
            ctypes.set_errno(errno.EBADF)
            return -1

    ring._unsubmitted = 1
    monkeypatch.setattr(uringmake, "_libc", Libc)
    with pytest.raises(OSError, match="Bad file descriptor"):
        ring.submit()
    ring._unsubmitted = 0


def test_transfers_by_address(ring: Ring, fd: int) -> None:
    """Many are handed over together, and beside those of the other kind."""
    memory = mmap.mmap(-1, 16384)
    view = memoryview(memory)
    view[8192:8704] = b"w" * 512
    hva = address(view)
    assert not ring.has_results
    ring.start(
        fd,
        [(1, OP_READ, hva, 4096, 512), (2, OP_WRITE, hva + 8192, 512, 4096), (3, OP_READ, 0, 1, 0)],
    )
    ring.write(4, fd, [view[8192:8704]], 8192, stable=True)
    assert results(ring) == {1: 4096, 2: 512, 3: -errno.EFAULT, 4: 512}
    assert bytes(view[:4096]) == (PATTERN * 2)[512:4608]
    for offset in (4096, 8192):
        assert os.pread(fd, 512, offset) == b"w" * 512
    view.release()
    memory.close()  # BufferError if the ring still held it


def test_no_more_transfers_than_there_is_room(ring: Ring, fd: int) -> None:
    """None of them is started then."""
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)
    read = OP_READ, address(view), 512, 0
    with pytest.raises(BlockingIOError):
        ring.start(fd, [(token, *read) for token in range(9)])
    assert ring.nr_in_flight == 0
    ring.start(fd, [(token, *read) for token in range(8)])
    with pytest.raises(BlockingIOError):
        ring.start(fd, [(8, *read)])
    assert results(ring) == dict.fromkeys(range(8), 512)
    for turn in range(40):  # and round the end of both rings
        ring.start(fd, [(token + 10 * turn, *read) for token in range(5)])
        assert results(ring) == {token + 10 * turn: 512 for token in range(5)}


def test_results_a_few_at_a_time(ring: Ring, fd: int) -> None:
    """The others are there the next time."""
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)
    ring.start(fd, [(token, OP_READ, address(view), 512, 0) for token in range(5)])
    found: list[tuple[int, int]] = []
    while ring.nr_in_flight:
        ring.wait()
        assert ring.has_results
        got = ring.reap(2)
        assert 1 <= len(got) <= 2
        found += got
    assert not ring.has_results
    assert sorted(found) == [(token, 512) for token in range(5)]


@pytest.mark.parametrize("handed_over", [True, False])
def test_what_a_killed_process_has_left_comes_first(fd: int, handed_over: bool) -> None:
    """The next one knows how much there is, waits for it, leaves out its results, and goes on."""
    made = make(8)
    source, sink = os.pipe()
    ready = os.eventfd(0)
    view = memoryview(mmap.mmap(-1, 4096))
    pid = os.fork()
    if not pid:
        ring = Ring(*made)
        for token in range(3):
            ring.read(token, fd, [view[512 * token : 512 * token + 512]], 512 * token)
        ring.wait()
        ring.read(3, source, [view[2048:2049]], 0)
        ring.read(4, source, [view[2049:2050]], 0)
        ring.submit()
        if not handed_over:
            ring.read(5, fd, [view[4000:4010]], 0)
        os.eventfd_write(ready, 1)
        signal.pause()
    os.eventfd_read(ready)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    ring = Ring(*made)
    assert (ring.nr_old, ring.nr_in_flight, ring.reap()) == (2, 2, [])
    os.write(sink, b"x")
    ring.wait()
    assert ring.reap() == []
    assert (ring.nr_old, ring.nr_in_flight) == (0, 0)
    ring.read(9, fd, [view[:512]], 1024)
    assert results(ring) == {9: 512}
    assert view[:512] == (PATTERN * 2)[1024:1536]
    assert not any(view[4000:4010])
    ring.close()
    for end in (source, sink, ready):
        os.close(end)


def test_a_ring_that_makes_no_sense() -> None:
    """A predecessor can write anything into it: the next one says so and ends."""
    made = make(8)
    ring = Ring(*made)
    ring._words[ring._cq_tail] = 100
    with pytest.raises(HostError, match="no sense"):
        Ring(*made)
    ring.close()


def test_a_ring_carries_out_nothing_else(ring: Ring, fd: int) -> None:
    """An operation that no disk needs, openat(2) for one, is refused by the kernel."""
    ring._put(18, 1, (0, 0), 0, fd=fd, flags=0)
    assert results(ring) == {1: -errno.EACCES}
