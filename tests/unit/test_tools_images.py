"""tools/guest: the archive writer and what is taken from a kernel package."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path
from struct import pack_into

import pytest

from tools.guest import cpio, kernel

ELF = b"\x7fELF" + bytes(60)


def entries(archive: bytes) -> list[tuple[str, int, bytes, list[int]]]:
    """Return name, mode, data and all header fields of each entry, read as the kernel reads."""
    found, at = [], 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = (at + 110 + name_size + 3) & ~3
        found.append((name, fields[1], archive[start : start + size], fields))
        at = (start + size + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found


def test_archive_holds_every_node_and_its_directories() -> None:
    """The kernel makes nothing that is not in the archive, so directories come before content."""
    nodes = {
        "init": cpio.file(b"#!", 0o755),
        "bin/sh": cpio.link("busybox"),
        "dev/console": cpio.character_device(5, 1),
        "lib/a/b.ko": cpio.file(b"12345"),
    }
    found = entries(cpio.archive(nodes))
    assert [(name, oct(mode), data) for name, mode, data, _ in found] == [
        ("bin", "0o40755", b""),
        ("bin/sh", "0o120777", b"busybox"),
        ("dev", "0o40755", b""),
        ("dev/console", "0o20600", b""),
        ("init", "0o100755", b"#!"),
        ("lib", "0o40755", b""),
        ("lib/a", "0o40755", b""),
        ("lib/a/b.ko", "0o100644", b"12345"),
        ("TRAILER!!!", "0o0", b""),
    ]
    console = next(fields for name, _, _, fields in found if name == "dev/console")
    assert console[9:11] == [5, 1]
    assert len({fields[0] for _, _, _, fields in found}) == len(found)  # inodes: no hard links


def test_the_same_nodes_give_the_same_bytes() -> None:
    """An image is reproducible: order, owner, clock and compressor leave no trace."""
    one = cpio.initramfs({"a": cpio.file(b"1"), "b/c": cpio.file(b"2")})
    two = cpio.initramfs({"b/c": cpio.file(b"2"), "a": cpio.file(b"1")})
    assert one == two
    assert one[4:8] == bytes(4)  # gzip's time stamp
    for _, _, _, fields in entries(gzip.decompress(one)):
        assert fields[2:4] == [0, 0]  # uid, gid
        assert fields[5] == 0  # mtime


def bzimage(payload: bytes) -> bytes:
    """Return the least that has a setup header and a payload, with code before and after it."""
    image = bytearray(3 * 512 + 0x2C0) + payload + b"code after it"
    image[0x1F1] = 2  # setup_sects
    image[0x202:0x206] = b"HdrS"
    pack_into("<II", image, 0x248, 0x2C0, len(payload))
    return bytes(image)


@pytest.mark.parametrize(
    "packed", [lzma.compress(ELF) + b"\x40\0\0\0", gzip.compress(ELF, mtime=0)]
)
def test_vmlinux_comes_out_of_a_bzimage(packed: bytes) -> None:
    """The payload may end with its unpacked size, which is no part of the stream."""
    assert kernel.extract_vmlinux(bzimage(packed)) == ELF


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (b"\x7fELF" + bytes(4096), "not a bzImage"),
        (bzimage(b"(\xb5/\xfd" + bytes(32)), "unknown compression of the kernel: 28b52ffd"),
        (bzimage(gzip.compress(b"MZ", mtime=0)), "not an ELF file"),
    ],
)
def test_what_holds_no_vmlinux_is_named(image: bytes, complaint: str) -> None:
    """A kernel that cannot be unpacked says why."""
    with pytest.raises(kernel.GuestImageError, match=complaint):
        kernel.extract_vmlinux(image)


@pytest.fixture
def modules(tmp_path: Path) -> str:
    """Return a module directory: virtio-net needs failover and virtio, which is built in."""
    (tmp_path / "modules.dep").write_text(
        "net/virtio_net.ko: core/net-failover.ko core/failover.ko\n"
        "core/net-failover.ko: core/failover.ko\ncore/failover.ko:\nfs/other.ko:\n"
    )
    (tmp_path / "modules.builtin").write_text("kernel/virtio.ko\n")
    (tmp_path / "modules.alias").write_text(
        "# comment\nalias virtio:d00000001v* virtio_net\nalias fs-other other\n"
    )
    return str(tmp_path)


def test_a_module_brings_what_it_needs(modules: str) -> None:
    """Dependencies come along, dash or underscore; what is built in needs no file."""
    files = kernel.module_files(modules, ["virtio-net", "virtio"])
    assert files == {
        "core/failover.ko": "",
        "core/net-failover.ko": "core/failover.ko",
        "net/virtio_net.ko": "core/net-failover.ko core/failover.ko",
    }
    assert kernel.alias_lines(modules, files) == ["alias virtio:d00000001v* virtio_net\n"]


def test_an_unknown_module_is_named(modules: str) -> None:
    """A driver that the kernel does not have is an error, not a guest without it."""
    with pytest.raises(kernel.GuestImageError, match="has no module vioblk"):
        kernel.module_files(modules, ["vioblk"])


def test_the_newest_kernel_is_taken(tmp_path: Path) -> None:
    """With several kernels installed the newest is used; with none the remedy is named."""
    with pytest.raises(kernel.GuestImageError, match="apt-get install linux-image-amd64"):
        kernel.newest_kernel(str(tmp_path))
    for age, name in enumerate(["vmlinuz-2", "vmlinuz-10", "vmlinuz-9"]):
        path = tmp_path / name
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert kernel.newest_kernel(str(tmp_path)) == str(tmp_path / "vmlinuz-2")
