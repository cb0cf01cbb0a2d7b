"""devices.bases: what a qcow2 image stands on is found, judged, opened and locked."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import ExitStack
from struct import pack
from typing import TYPE_CHECKING, Any

import pytest

from config.errors import ConfigError, HostError
from config.model import BootConfig, DiskConfig, VmConfig
from devices import bases, images
from devices.bases import MAX_IMAGES, Base, open_bases
from tests.descriptors import count_before
from tests.unit.image_lab import MIB, needs_qemu_img, qcow2, qemu_img, raw
from vmm.rows import rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmm.rows import Row

NOBODY = 65534
OpenChain = Callable[..., list[Base]]


@pytest.fixture
def chain() -> Iterator[OpenChain]:
    """Return a function that opens an overlay and its bases; they are closed with the test."""
    with ExitStack() as opened:

        def open_chain(path: Path | str, **how: Any) -> list[Base]:
            fd = images.open_disk(DiskConfig(path=str(path), format="qcow2"), "vioblk0")
            opened.callback(os.close, fd)
            return open_bases(fd, str(path), opened, device="vioblk0", **how)

        yield open_chain


def vm(tmp_path: Path, *disks: dict[str, Any], **fields: Any) -> VmConfig:
    """A VM with these disks."""
    made = tuple(DiskConfig(**{"format": "qcow2", **disk}) for disk in disks)
    return VmConfig("web", BootConfig(kernel=str(tmp_path / "k")), disks=made, **fields)


def open_and_close(path: Path) -> None:
    """Open a chain without locking the overlay."""
    with ExitStack() as opened:
        fd = os.open(path, os.O_RDONLY)
        opened.callback(os.close, fd)
        open_bases(fd, str(path), opened)


def access(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


# What is opened, and how


def test_an_image_that_stands_alone(tmp_path: Path, chain: OpenChain) -> None:
    """No base, nothing to open."""
    qcow2(tmp_path / "a.qcow2")

    assert chain(tmp_path / "a.qcow2") == []


def test_a_chain_is_opened_nearest_first(tmp_path: Path, chain: OpenChain) -> None:
    """Each base read-only, in the format its overlay tells."""
    raw(tmp_path / "c.img")
    qcow2(tmp_path / "b.qcow2", base="c.img", kind="raw")
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")

    found = chain(tmp_path / "a.qcow2")

    assert [(base.path, base.format) for base in found] == [
        (str(tmp_path / "b.qcow2"), "qcow2"),
        (str(tmp_path / "c.img"), "raw"),
    ]
    for base in found:
        assert access(base.fd) == os.O_RDONLY
        assert not os.get_inheritable(base.fd)
        assert os.path.samestat(os.fstat(base.fd), os.stat(base.path))


def test_a_relative_name_begins_where_its_image_is(tmp_path: Path, chain: OpenChain) -> None:
    """Not in the working directory, and at every level anew; an absolute one stays."""
    for place in ("one", "two", "three"):
        (tmp_path / place).mkdir()
    raw(tmp_path / "three" / "c.img")
    qcow2(tmp_path / "two" / "b.qcow2", base=str(tmp_path / "three" / "c.img"), kind="raw")
    qcow2(tmp_path / "one" / "a.qcow2", base="../two/b.qcow2", kind="qcow2")

    found = chain(tmp_path / "one" / "a.qcow2")

    assert os.path.samefile(found[0].path, tmp_path / "two" / "b.qcow2")
    assert found[1].path == str(tmp_path / "three" / "c.img")


def test_a_name_that_is_not_utf_8(tmp_path: Path, chain: OpenChain) -> None:
    """A file name is bytes."""
    name = os.fsdecode(b"b\xff.img")
    raw(tmp_path / name)
    qcow2(tmp_path / "a.qcow2", base=name, kind="raw")

    assert chain(tmp_path / "a.qcow2")[0].path == str(tmp_path / name)


def test_cache_none_holds_for_bases_too(tmp_path: Path, chain: OpenChain) -> None:
    """What the guest reads bypasses the page cache wherever it is."""
    raw(tmp_path / "b.img")
    qcow2(tmp_path / "a.qcow2", base="b.img", kind="raw")

    assert fcntl.fcntl(chain(tmp_path / "a.qcow2", direct=True)[0].fd, fcntl.F_GETFL) & os.O_DIRECT


def test_a_raw_base_is_never_looked_into(tmp_path: Path, chain: OpenChain) -> None:
    """A forged header in a raw base is data: the chain ends there."""
    qcow2(tmp_path / "b.img", base="/etc/passwd", kind="raw")
    qcow2(tmp_path / "a.qcow2", base="b.img", kind="raw")

    assert [base.format for base in chain(tmp_path / "a.qcow2")] == ["raw"]


@needs_qemu_img
def test_what_qemu_img_makes_is_understood(tmp_path: Path, chain: OpenChain) -> None:
    """Names and formats stand where QEMU puts them."""
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "b.qcow2", "1M")
    qemu_img(
        "create", "-q", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", tmp_path / "a.qcow2", "2M"
    )

    assert [base.path for base in chain(tmp_path / "a.qcow2")] == [str(tmp_path / "b.qcow2")]


# Mistakes, each with its remedy


def test_a_missing_base(tmp_path: Path, chain: OpenChain) -> None:
    """Who named it is said, and how to name another."""
    qcow2(tmp_path / "a.qcow2", base="gone.img", kind="raw")

    with pytest.raises(
        ConfigError, match=r"vioblk0: base .*/gone.img of .*/a.qcow2: cannot open: No such"
    ) as error:
        chain(tmp_path / "a.qcow2")

    assert f"image rebase -u -F raw -b PATH {tmp_path}/a.qcow2" in error.value.hint


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_chain_that_goes_round(tmp_path: Path, chain: OpenChain, length: int) -> None:
    """An image may not stand on itself, directly or by way of others, whatever it is called."""
    for index in range(length):
        qcow2(tmp_path / f"{index}.qcow2", base=f"{(index + 1) % length}.qcow2", kind="qcow2")
    (tmp_path / "link.qcow2").symlink_to("0.qcow2")

    with pytest.raises(ConfigError, match="goes round in circles"):
        chain(tmp_path / "link.qcow2")


def test_a_loop_that_does_not_hold_the_overlay(tmp_path: Path, chain: OpenChain) -> None:
    """A base that stands on itself is found, too."""
    qcow2(tmp_path / "b.qcow2", base="./b.qcow2", kind="qcow2")
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")

    with pytest.raises(ConfigError, match=r"/b.qcow2 of .*/b.qcow2: is .*/b.qcow2 again"):
        chain(tmp_path / "a.qcow2")


@pytest.mark.parametrize("images_", [MAX_IMAGES, MAX_IMAGES + 1])
def test_how_long_a_chain_may_be(tmp_path: Path, chain: OpenChain, images_: int) -> None:
    """As many images as the limit says; one more is refused."""
    qcow2(tmp_path / "0.qcow2")
    for index in range(1, images_):
        qcow2(tmp_path / f"{index}.qcow2", base=f"{index - 1}.qcow2", kind="qcow2")
    top = tmp_path / f"{images_ - 1}.qcow2"

    if images_ == MAX_IMAGES:
        assert len(chain(top)) == MAX_IMAGES - 1
    else:
        with pytest.raises(ConfigError, match=rf"is image {images_} of its chain"):
            chain(top)


@pytest.mark.parametrize(
    "name", ['json:{"file": {}}', "nbd://host/export", "nbd:unix:/s", "file:b.img", "http://h/x"]
)
def test_only_local_names(tmp_path: Path, chain: OpenChain, name: str) -> None:
    """What QEMU takes for a protocol is refused by name."""
    qcow2(tmp_path / "a.qcow2", base=name, kind="raw")

    with pytest.raises(ConfigError) as error:
        chain(tmp_path / "a.qcow2")

    assert f"its base '{name}' is no local file" in error.value.what
    assert "image rebase -u" in error.value.hint


def test_a_colon_behind_a_slash_is_a_name(tmp_path: Path, chain: OpenChain) -> None:
    """A file may be called so, if its name does not begin like a protocol's."""
    raw(tmp_path / "a:b.img")
    qcow2(tmp_path / "a.qcow2", base="./a:b.img", kind="raw")

    assert len(chain(tmp_path / "a.qcow2")) == 1


@pytest.mark.parametrize("kind", ["", "vmdk", "RAW"])
def test_a_base_of_no_known_format(tmp_path: Path, chain: OpenChain, kind: str) -> None:
    """A format that the header does not tell is not guessed, and there is a way to tell it."""
    raw(tmp_path / "b.img")
    qcow2(tmp_path / "a.qcow2", base="b.img", kind=kind)

    with pytest.raises(ConfigError) as error:
        chain(tmp_path / "a.qcow2")

    assert (f"'{kind}'" if kind else "does not say which format") in error.value.what
    assert f"image rebase -u -F raw -b {tmp_path}/b.img {tmp_path}/a.qcow2" in error.value.hint


def test_a_base_that_is_no_file(tmp_path: Path, chain: OpenChain) -> None:
    """A directory, a FIFO, a character device: refused at once."""
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name, what in (("d", "is a directory"), ("fifo", "neither"), ("/dev/null", "neither")):
        qcow2(tmp_path / "a.qcow2", base=name, kind="raw")
        with pytest.raises(ConfigError, match=what):
            open_and_close(tmp_path / "a.qcow2")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "magic at byte 0 is missing"),
        (b"plainly not a disk", "a qcow2 image begins with"),
        (b"QFI\xfb\0\0\0\3" + bytes(40), "the file has 48 bytes"),
    ],
)
@pytest.mark.parametrize("path", ["a.qcow2", "b.qcow2"])
def test_an_image_or_base_that_is_no_qcow2(
    tmp_path: Path, chain: OpenChain, path: str, content: bytes, complaint: str
) -> None:
    """The image is named with what is wrong in it; so is a base."""
    (tmp_path / "b.qcow2").write_bytes(content)
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")

    with pytest.raises(ConfigError, match=rf"vioblk0: .*/b.qcow2: .*{complaint}"):
        chain(tmp_path / path)


def test_an_image_that_cannot_be_read(
    tmp_path: Path, chain: OpenChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error names the image."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    qcow2(tmp_path / "a.qcow2")
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ConfigError, match=r"/a.qcow2: cannot read: Input/output error"):
        chain(tmp_path / "a.qcow2")


def test_what_was_opened_before_an_error_is_closed(tmp_path: Path) -> None:
    """The caller's stack has it."""
    qcow2(tmp_path / "b.qcow2", base="gone", kind="raw")
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")
    before = count_before()

    with pytest.raises(ConfigError):
        open_and_close(tmp_path / "a.qcow2")

    assert len(os.listdir("/proc/self/fd")) == before


# Locks


def test_overlays_share_a_base(tmp_path: Path) -> None:
    """Two disks on one base are what bases are for."""
    raw(tmp_path / "base.img")
    for name in ("a", "b"):
        qcow2(tmp_path / f"{name}.qcow2", base="base.img", kind="raw")
    disks = [{"path": str(tmp_path / f"{name}.qcow2")} for name in ("a", "b")]

    with ExitStack() as opened:
        found = [row.name for row in rows(vm(tmp_path, *disks), opened) if row.kind == "vioblk"]
        assert found == ["vioblk0", "vioblk1"]


def test_a_base_has_no_writer(tmp_path: Path, chain: OpenChain) -> None:
    """While an overlay is in use nobody may write to its base; reading is fine."""
    raw(tmp_path / "base.img")
    qcow2(tmp_path / "a.qcow2", base="base.img", kind="raw")
    chain(tmp_path / "a.qcow2")

    fd = os.open(tmp_path / "base.img", os.O_RDWR)
    try:
        whole = (os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack("@hhqqi4x", fcntl.F_RDLCK, *whole))
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, pack("@hhqqi4x", fcntl.F_WRLCK, *whole))
    finally:
        os.close(fd)


def test_a_base_that_somebody_writes_to(tmp_path: Path, chain: OpenChain) -> None:
    """It may be another disk of the same VM: then that is said."""
    raw(tmp_path / "base.img")
    qcow2(tmp_path / "a.qcow2", base="base.img", kind="raw")
    disk = DiskConfig(path=str(tmp_path / "base.img"), format="raw")
    fd = images.open_disk(disk, "vioblk1")
    try:
        with pytest.raises(HostError, match=r"base .* in use: another disk of this VM has it"):
            chain(tmp_path / "a.qcow2")
    finally:
        os.close(fd)


def test_the_nearest_base_can_be_opened_to_write(tmp_path: Path, chain: OpenChain) -> None:
    """For whoever writes an overlay's data down; what is below is for readers still."""
    qcow2(tmp_path / "c.qcow2")
    qcow2(tmp_path / "b.qcow2", base="c.qcow2", kind="qcow2")
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")

    found = chain(tmp_path / "a.qcow2", write=True)

    assert [access(base.fd) for base in found] == [os.O_RDWR, os.O_RDONLY]


# Whose rights


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_bases_are_opened_with_the_owners_rights(tmp_path: Path) -> None:
    """An image that its owner wrote cannot name a file that only root may read."""
    tmp_path.chmod(0o755)
    raw(tmp_path / "secret", data=b"root's own")
    (tmp_path / "secret").chmod(0o600)
    qcow2(tmp_path / "a.qcow2", base="secret", kind="raw")
    config = vm(tmp_path, {"path": str(tmp_path / "a.qcow2")}, owner=str(NOBODY))
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)

    with pytest.raises(ConfigError, match="Permission denied") as error, ExitStack() as opened:
        list(rows(config, opened))
    assert error.value.hint == f"make it readable for uid {NOBODY}"
    assert (os.geteuid(), os.getegid()) == (0, 0)

    (tmp_path / "secret").chmod(0o644)
    with ExitStack() as opened:
        assert "vioblk0" in [row.name for row in rows(config, opened)]


# What the device process and `status` get


def test_the_row_of_a_qcow2_disk(tmp_path: Path) -> None:
    """Descriptors image, base0, base1, formats in the same order; status tells paths as well."""
    raw(tmp_path / "c.img", 3 * MIB)
    qcow2(tmp_path / "b.qcow2", base="c.img", kind="raw")
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")

    with ExitStack() as opened:
        row: Row = list(rows(vm(tmp_path, {"path": str(tmp_path / "a.qcow2")}), opened))[1]
        assert list(row.fds) == ["image", "base0", "base1"]
        assert os.fstat(row.fds["base1"]).st_size == 3 * MIB
        assert access(row.fds["image"]) == os.O_RDWR

    assert row.settings["bases"] == ["qcow2", "raw"]
    assert row.facts == {
        "path": str(tmp_path / "a.qcow2"),
        "format": "qcow2",
        "readonly": False,
        "bases": [
            {"path": str(tmp_path / "b.qcow2"), "format": "qcow2"},
            {"path": str(tmp_path / "c.img"), "format": "raw"},
        ],
    }


def test_the_row_of_a_readonly_disk(tmp_path: Path) -> None:
    """readonly: true opens the overlay without the right to write."""
    qcow2(tmp_path / "a.qcow2")
    config = vm(tmp_path, {"path": str(tmp_path / "a.qcow2"), "readonly": True})

    with ExitStack() as opened:
        row = list(rows(config, opened))[1]
        assert access(row.fds["image"]) == os.O_RDONLY


def test_an_image_cannot_be_two_disks(tmp_path: Path) -> None:
    """Neither twice as it is, nor as a base of another."""
    qcow2(tmp_path / "b.qcow2")
    qcow2(tmp_path / "a.qcow2", base="b.qcow2", kind="qcow2")

    for first, second in (("a", "a"), ("a", "b"), ("b", "a")):
        disks = [{"path": str(tmp_path / f"{name}.qcow2")} for name in (first, second)]
        with pytest.raises(HostError, match=r"vioblk1: .*another disk"), ExitStack() as opened:
            list(rows(vm(tmp_path, *disks), opened))


def test_protocols_are_what_qemu_takes_for_them() -> None:
    """A colon before the first slash."""
    assert all(map(bases.has_protocol, ("a:b", ":", "nbd://x/y")))
    assert not any(map(bases.has_protocol, ("a", "./a:b", "/a:b", "a/b:c")))
