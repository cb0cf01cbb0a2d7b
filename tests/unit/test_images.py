"""devices.images: opening and locking disk images, and what is said when that cannot be."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
from contextlib import contextmanager
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError, HostError
from config.model import DiskConfig
from devices import images, imageuser
from devices.title import set_title
from tests.descriptors import count_before
from tests.loopdev import loop_device
from tests.qcow2lab import needs_qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOBODY = 65534


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(8192))
    return path


@pytest.fixture
def open_disk() -> Iterator[Callable[..., int]]:
    """Return a function of path and settings; what it opened is closed with the test."""
    opened: list[int] = []

    def open_(path: Path | str, **settings: Any) -> int:
        settings = {"format": "raw", **settings}
        opened.append(images.open_disk(DiskConfig(path=str(path), **settings), "vioblk0"))
        return opened[-1]

    yield open_
    for fd in opened:
        os.close(fd)


def flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


# What is opened, and how


def test_a_writable_image_can_be_read_and_written(
    image: Path, open_disk: Callable[..., int]
) -> None:
    """The descriptor does what a disk needs, is not inherited, and waits as io_uring wants."""
    fd = open_disk(image)

    assert os.pwrite(fd, b"x", 8000) == 1
    assert flags(fd) & (os.O_ACCMODE | os.O_NONBLOCK | os.O_DIRECT) == os.O_RDWR
    assert not os.get_inheritable(fd)


def test_a_readonly_image_needs_no_right_to_write(
    image: Path, open_disk: Callable[..., int]
) -> None:
    """readonly: true opens for reading only, so that a read-only file will do."""
    fd = open_disk(image, readonly=True)

    assert flags(fd) & os.O_ACCMODE == os.O_RDONLY


def test_cache_none_goes_past_the_page_cache(image: Path, open_disk: Callable[..., int]) -> None:
    """cache: none opens with O_DIRECT."""
    assert flags(open_disk(image, cache="none")) & os.O_DIRECT


def test_a_symbolic_link_leads_to_its_image(
    image: Path, tmp_path: Path, open_disk: Callable[..., int]
) -> None:
    """Names such as /dev/disk/by-id/... are links."""
    (tmp_path / "link").symlink_to(image)

    assert os.path.samestat(os.fstat(open_disk(tmp_path / "link")), image.stat())


# Mistakes, each with its remedy


def test_a_missing_image(tmp_path: Path, open_disk: Callable[..., int]) -> None:
    """The message names the device, the path and how to make an image."""
    with pytest.raises(
        ConfigError, match=r"vioblk0: disk .*/no.img: cannot open: No such file"
    ) as e:
        open_disk(tmp_path / "no.img")

    assert "pyvmctl create" in e.value.hint


def test_an_image_without_permission(image: Path, open_disk: Callable[..., int]) -> None:
    """The message says for whom the image has to become what."""
    image.chmod(0o400)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        with pytest.raises(ConfigError, match="Permission denied") as error:
            open_disk(image)
        assert error.value.hint == f"make it readable and writable for uid {os.geteuid()}"
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_directory(tmp_path: Path, open_disk: Callable[..., int], readonly: bool) -> None:
    """A directory is called one, however it was opened."""
    with pytest.raises(ConfigError, match="is a directory"):
        open_disk(tmp_path, readonly=readonly)


def test_neither_file_nor_block_device(tmp_path: Path, open_disk: Callable[..., int]) -> None:
    """A FIFO is refused at once, not waited for; so is a character device."""
    os.mkfifo(tmp_path / "fifo")

    for path in (tmp_path / "fifo", "/dev/null"):
        with pytest.raises(ConfigError, match="neither file nor block device"):
            open_disk(path)


def test_a_socket(tmp_path: Path, open_disk: Callable[..., int]) -> None:
    """What open(2) refuses in an unusual way is still an error with a name in it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(HostError, match=r"/s: cannot open: No such device"):
            open_disk(tmp_path / "s")


def test_a_name_that_is_none(open_disk: Callable[..., int]) -> None:
    """A NUL in a path is a mistake of the configuration."""
    with pytest.raises(ConfigError, match="not a file name"):
        open_disk("a\0b")


@pytest.mark.parametrize(("size", "block"), [(0, 512), (511, 512), (512, 4096), (4095, 4096)])
def test_shorter_than_a_block(
    image: Path, open_disk: Callable[..., int], size: int, block: int
) -> None:
    """An image shorter than a sector, or than the block size set for it, is no disk."""
    os.truncate(image, size)

    with pytest.raises(ConfigError, match=f"has {size} bytes, less than one block of {block}"):
        open_disk(image, block_size=block)


def test_one_block_is_a_disk(image: Path, open_disk: Callable[..., int]) -> None:
    """The smallest disk has one sector."""
    os.truncate(image, 512)

    open_disk(image)


def test_the_format_is_never_guessed(image: Path, open_disk: Callable[..., int]) -> None:
    """A guest's forged qcow2 header in a raw image is data."""
    image.write_bytes(b"QFI\xfb" + bytes(8188))

    open_disk(image)


def test_a_file_system_without_direct_io(
    image: Path, open_disk: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cache: none never falls back in silence: the message names the file system."""

    def refuse(path: str, flags: int) -> int:
        assert flags & os.O_DIRECT
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"a.img: cache none: \w+ has no O_DIRECT") as error:
        open_disk(image, cache="none")

    assert error.value.hint == "use cache: writeback"


def test_file_system_names_the_innermost_mount() -> None:
    """The type is that of the mount a path is in, not of one whose name begins alike."""
    assert images.file_system("/proc/self/stat") == "proc"
    assert images.file_system("/procession") == images.file_system("/")


@pytest.mark.parametrize(
    ("failed", "error"),
    [(errno.EIO, HostError), (errno.EMFILE, HostError), (errno.ETXTBSY, ConfigError)],
)
def test_whose_fault_it_is(
    image: Path,
    open_disk: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    failed: int,
    error: type[Exception],
) -> None:
    """Trouble of the host is not reported as a mistake in vm.yaml."""

    def refuse(path: str, flags: int) -> int:
        raise OSError(failed, os.strerror(failed))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(error, match="cannot open"):
        open_disk(image)


# Locks


def test_one_writer(image: Path, open_disk: Callable[..., int]) -> None:
    """An image that somebody writes to is nobody else's, neither to write nor to read."""
    open_disk(image)

    for readonly in (False, True):
        with pytest.raises(HostError, match="in use: another disk of this VM has it"):
            open_disk(image, readonly=readonly)


def test_many_readers(image: Path, open_disk: Callable[..., int]) -> None:
    """Readers share an image, and keep writers out."""
    open_disk(image, readonly=True)
    open_disk(image, readonly=True)

    with pytest.raises(HostError, match="in use"):
        open_disk(image)


def test_the_lock_lives_as_long_as_any_copy(image: Path, open_disk: Callable[..., int]) -> None:
    """The device process's copy holds the lock when ours is closed, and the last one frees it."""
    disk = DiskConfig(path=str(image), format="raw")
    first = images.open_disk(disk, "vioblk0")
    copy = os.dup(first)
    os.close(first)
    with pytest.raises(HostError, match="in use"):
        open_disk(image)

    os.close(copy)

    open_disk(image)


def test_the_lock_covers_what_the_image_grows_by(
    image: Path, open_disk: Callable[..., int]
) -> None:
    """The lock has no end, so a grown image is locked as a whole, and other tools' bytes are."""
    open_disk(image)
    other = os.open(image, os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, pack("@hhqqi4x", fcntl.F_RDLCK, 0, 1 << 40, 1, 0))
    finally:
        os.close(other)


def test_a_refused_image_is_closed_again(image: Path, open_disk: Callable[..., int]) -> None:
    """Every error leaves no descriptor behind."""
    open_disk(image)
    before = count_before()

    with pytest.raises(HostError):
        open_disk(image)

    assert len(os.listdir("/proc/self/fd")) == before


@contextmanager
def qemu_has(image: Path, *, write: bool) -> Iterator[int]:
    """QEMU's tool has the image open, to write or to read; its pid."""
    words = ["qemu-io", *([] if write else ["-r"]), "-f", "raw", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        try:
            qemu.stdin.write("read 0 512\n")
            qemu.stdin.flush()
            assert "read 512/512" in qemu.stdout.readline()
            yield qemu.pid
        finally:
            qemu.stdin.close()
            qemu.wait(60)


@needs_qemu
def test_an_image_that_qemu_writes_to(image: Path, open_disk: Callable[..., int]) -> None:
    """It is nobody else's, not even to be read, and what has it is named."""
    with qemu_has(image, write=True) as pid:
        for readonly in (False, True):
            with pytest.raises(HostError, match=rf"in use: process {pid} \(qemu-io"):
                open_disk(image, readonly=readonly)
        with image.open("rb") as file:
            assert imageuser.locked(file.fileno()) == "writes"
    open_disk(image)


@needs_qemu
def test_an_image_that_qemu_reads(image: Path, open_disk: Callable[..., int]) -> None:
    """It can be read here as well, by any number, and not be written to."""
    with qemu_has(image, write=False):
        with pytest.raises(HostError, match="in use"):
            open_disk(image)
        open_disk(image, readonly=True)
        open_disk(image, readonly=True)
        with image.open("rb") as file:
            assert imageuser.locked(file.fileno()) == "reads"


@needs_qemu
@pytest.mark.parametrize("readonly", [False, True])
def test_qemu_keeps_out(image: Path, open_disk: Callable[..., int], readonly: bool) -> None:
    """Of an image that is written to here altogether; of one that is read it stays a reader."""
    open_disk(image, readonly=readonly)
    for command, allowed in (("read 0 512", readonly), ("write 0 512", False)):
        words = ["qemu-io", *(["-r"] if "read" in command else []), "-f", "raw"]
        done = subprocess.run(
            [*words, "-c", command, str(image)], check=False, capture_output=True, text=True
        )
        assert ("lock" not in done.stderr) == allowed, done.stderr


@contextmanager
def holder(image: Path, title: str) -> Iterator[int]:
    """A process of that title, "" for its own, that has the image; its pid."""
    held, ready = os.pipe()
    done, finish = os.pipe()
    pid = os.fork()
    if pid == 0:
        images.open_disk(DiskConfig(path=str(image), format="raw"), "vioblk0")
        if title:
            set_title(title)
        os.write(ready, b"1")
        os.close(finish)
        os.read(done, 1)
        os._exit(0)
    try:
        os.read(held, 1)
        yield pid
    finally:
        for fd in (held, ready, done, finish):
            os.close(fd)
        os.waitpid(pid, 0)


def test_the_holder_of_a_lock_is_named(image: Path, open_disk: Callable[..., int]) -> None:
    """Who has the image open is found in /proc and named with its title."""
    with (
        holder(image, "") as pid,
        pytest.raises(HostError, match=rf"in use: process {pid} \(.+\) has it open") as error,
    ):
        open_disk(image)
    assert "readonly: true" in error.value.hint


def test_the_vm_that_has_the_lock_is_named(image: Path, open_disk: Callable[..., int]) -> None:
    """A device process's title tells which VM it belongs to."""
    with (
        holder(image, "web/vioblk0") as pid,
        pytest.raises(HostError, match=rf"VM web has it open \(vioblk0, process {pid}\)"),
    ):
        open_disk(image)


# Block devices


def test_a_block_device_is_a_disk(tmp_path: Path, open_disk: Callable[..., int]) -> None:
    """A block device is opened exclusively: the second writer is refused, whoever it is."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    with loop_device(str(backing)) as path:
        fd = images.open_disk(DiskConfig(path=path, format="raw"), "vioblk0")
        try:
            assert os.pwrite(fd, b"x" * 512, 0) == 512
            with pytest.raises(HostError, match="in use: another disk of this VM has it"):
                open_disk(path)
        finally:
            os.close(fd)


def test_a_block_device_without_medium(tmp_path: Path, open_disk: Callable[..., int]) -> None:
    """A device of no size is no disk."""
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    with loop_device(str(tmp_path / "backing")) as path:
        pass  # detached now
    with pytest.raises(ConfigError, match="has 0 bytes"):
        open_disk(path)
