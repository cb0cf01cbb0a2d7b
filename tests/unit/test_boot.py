"""vmm.boot: opening files, recognising kernels, and surviving whatever is in them."""

from __future__ import annotations

import gzip
import os
import resource
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import ConfigError, HostError
from tests.descriptors import count_before
from tests.unit import boot_images as make
from vmm import boot, bootfile
from vmm.loader import CMDLINE, GDT, PML4, ZERO_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVERY_KIND = {
    "bzimage": make.bzimage(),
    "pvh": make.pvh(),
    "vmlinux": make.elf(),
    "multiboot-elf": make.multiboot_elf(),
    "multiboot-flat": make.multiboot_flat(),
    "gzip": gzip.compress(make.pvh(), mtime=0),
}


@pytest.fixture
def guest() -> Iterator[make.Guest]:
    it = make.Guest()
    yield it
    it.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# Opening


def test_open_images_opens_kernel_and_initrd(tmp_path: Path) -> None:
    """open_images gives descriptors for both files and closes them when its block ends."""
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(b"k")
    initrd.write_bytes(b"i")
    before = count_before()

    with boot.open_images(make.config(kernel, initrd, "quiet")) as files:
        assert os.pread(files.kernel, 8, 0) == b"k"
        assert files.initrd is not None
        assert os.pread(files.initrd, 8, 0) == b"i"
        assert files.cmdline == "quiet"
        assert not os.get_inheritable(files.kernel)

    assert open_fds() == before


@pytest.mark.parametrize("kind", ["kernel", "initrd"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"/missing: cannot open: No such file.*check boot\.\w+ in vm.yaml"),
        ("file/below", r"/file/below: cannot open: Not a directory"),
        ("directory", r"/directory: a directory"),
        ("fifo", r"/fifo: not a regular file"),
        ("empty", r"/empty: the file is empty"),
        ("nul\0byte", r"not a file name"),
        ("x" * 300, r"File name too long"),
    ],
)
def test_open_images_refuses_what_is_no_file(
    tmp_path: Path, kind: str, name: str, message: str
) -> None:
    """A bad path is the user's to mend: ConfigError names it, at once, and leaks nothing."""
    (tmp_path / "file").write_bytes(b"good")
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    good, bad = str(tmp_path / "file"), f"{tmp_path}/{name}"
    paths = make.config(bad) if kind == "kernel" else make.config(good, bad)
    before = count_before()

    with pytest.raises(ConfigError, match=message) as caught:
        boot.open_images(paths)

    assert str(caught.value).startswith(f"{kind} ")
    assert open_fds() == before


def test_open_images_says_who_may_not_read(tmp_path: Path) -> None:
    """Without read permission the message says which user needs it."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"k")
    path.chmod(0)
    user = os.geteuid() or 65534
    os.seteuid(user)  # root reads everything
    try:
        with pytest.raises(ConfigError, match=rf"Permission denied.*readable for uid {user}"):
            boot.open_images(make.config(path))
    finally:
        os.seteuid(os.getuid())


def test_open_images_blames_the_host_when_descriptors_run_out(tmp_path: Path) -> None:
    """Too many open files is no fault of vm.yaml: HostError."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"k")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(HostError, match="Too many open files"):
            boot.open_images(make.config(path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_read_error_is_the_hosts(guest: make.Guest, tmp_path: Path) -> None:
    """A file that cannot be read, here one open for writing only, ends in HostError."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(make.bzimage())
    fd = os.open(path, os.O_WRONLY)

    with (
        boot.BootImages(fd, str(path), None, "", "") as files,
        pytest.raises(HostError, match="cannot read at 0: Bad file descriptor"),
    ):
        boot.load(guest.memory, guest.e820, files, 0)


def test_a_file_that_shrinks_while_it_is_read() -> None:
    """A file cut off after its size was taken is truncated, not read for ever."""
    with make.images(make.bzimage()) as files:
        image = bootfile.image_of(files.kernel, "vmlinuz", "kernel")
        os.ftruncate(files.kernel, 1000)

        with pytest.raises(
            ConfigError, match="kernel vmlinuz: truncated: it ends before byte 1100"
        ):
            image.read(900, 200)


def test_a_failed_load_leaves_no_hold_on_ram(tmp_path: Path) -> None:
    """After an error in the middle of filling RAM, RAM can be unmapped while it propagates."""
    path = tmp_path / "initrd"
    path.write_bytes(b"initrd")
    guest = make.Guest()
    with make.images(make.bzimage()) as files:
        initrd = os.open(path, os.O_WRONLY)
        unreadable = files._replace(initrd=initrd, initrd_path=str(path))
        try:
            boot.load(guest.memory, guest.e820, unreadable, 0)
        except HostError as err:
            assert str(err) == f"initrd {path}: cannot read at 0: Bad file descriptor"  # noqa: PT017
            guest.close()
        else:
            pytest.fail("loaded an initrd that cannot be read")
        finally:
            os.close(initrd)


# Recognising


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("bzimage", "long"),
        ("pvh", "protected"),
        ("vmlinux", "long"),
        ("multiboot-elf", "protected"),
        ("multiboot-flat", "protected"),
        ("gzip", "protected"),
    ],
)
def test_each_kind_loads(guest: make.Guest, name: str, mode: str) -> None:
    """Every kind of kernel is recognised by its content and starts in its own mode."""
    assert guest.load(EVERY_KIND[name]).mode == mode


def test_pvh_wins_over_multiboot(guest: make.Guest) -> None:
    """A kernel with both a PVH note and a Multiboot header starts as PVH."""
    code = make.Part(make.multiboot_header() + b"\xf4" * 52)
    notes = make.Part(make.note(b"Xen", 18, (2 * make.MIB + 20).to_bytes(4, "little")), type=4)

    entry = guest.load(make.elf([code, notes], bits=32))

    assert entry.rip == 2 * make.MIB + 20
    assert dict(entry.regs).keys() == {"rbx"}


@pytest.mark.parametrize(
    ("data", "looks_like"),
    [
        (b"\0" * 100, ""),
        (b"x", ""),
        (b"070701" + b"0" * 104, ": it looks like a cpio archive, as an initrd is"),
        (b"\x28\xb5\x2f\xfd" + b"0" * 100, ": it looks like packed with zstd"),
        (b"QFI\xfb" + b"0" * 100, ": it looks like a qcow2 disk image"),
        (b"\0" * 0x1FE + b"\x55\xaa", ": it looks like a boot sector, as of a disk image"),
        (b"MZ" + b"\0" * 100, ": it looks like an EFI program"),
        (
            make.multiboot_header(checksum=1),
            ": its Multiboot header is cut off, misaligned, or has a wrong checksum",
        ),
        (b"\xcc" + make.multiboot_header(), ": its Multiboot header is cut off, misaligned, or"),
        (make.multiboot_flat()[:50], ": its Multiboot header is cut off"),
        (b"\0" * 8180 + make.multiboot_header(0x10003, (0,) * 5), ": its Multiboot header is cut"),
        (b"\0" * 8192 + make.multiboot_header(), ""),
        (gzip.compress(b"hello", mtime=0), ""),
        (gzip.compress(gzip.compress(make.bzimage(), mtime=0), mtime=0), ""),
    ],
)
def test_what_is_no_kernel(guest: make.Guest, data: bytes, looks_like: str) -> None:
    """Anything else is refused by name, with a guess at what it is and what would do."""
    with pytest.raises(ConfigError) as caught:
        guest.load(data)

    text = str(caught.value)
    assert text.startswith(f"not a kernel: kernel.img{looks_like}")
    assert text.endswith("(pyvmd boots bzImage, ELF vmlinux, multiboot images)")


# gzip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(make.bzimage(), mtime=0)[:-20], "truncated: the gzip stream does not end"),
        (gzip.compress(make.bzimage(), mtime=0)[:5], "truncated: the gzip stream does not end"),
        (b"\x1f\x8b\x08\0" + b"\xff" * 100, "damaged gzip stream"),
        (gzip.compress(bytes(64 * make.MIB), mtime=0), "unpacks to more than the 8 MiB of RAM"),
    ],
)
def test_bad_gzip_is_refused(guest: make.Guest, data: bytes, message: str) -> None:
    """A gzip file that ends early, is damaged, or would not fit RAM is refused; no fd is left."""
    before = count_before()

    with pytest.raises(ConfigError, match=f"kernel kernel.img: {message}"):
        guest.load(data)

    assert open_fds() == before


@pytest.mark.parametrize("size", [100, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_gzip_unpacks_all_of_it(guest: make.Guest, size: int) -> None:
    """What is loaded from a gzip file is what was packed, also across the unpacking chunks."""
    code = os.urandom(size // 2) + bytes(size - size // 2)
    before = count_before()

    entry = guest.load(gzip.compress(make.elf([make.Part(code)]), 1))

    assert guest.memory.read(entry.rip, size) == code
    assert open_fds() == before


# Loading again


@pytest.mark.parametrize("name", EVERY_KIND)
def test_load_can_be_repeated(guest: make.Guest, name: str) -> None:
    """A second load, as at a guest reset, writes all that the first did, whatever RAM holds."""
    shots = []
    with make.images(EVERY_KIND[name], b"initrd" * 1000, "console=ttyS0") as files:
        for byte in (0xAA, 0x55):
            guest.fill(byte)
            os.lseek(files.kernel, 77 * byte, os.SEEK_SET)
            entry = boot.load(guest.memory, guest.e820, files, make.RSDP)
            shots.append(guest.memory.read(0, 8 * make.MIB))

    first, second = shots
    same = bytes.maketrans(b"\xaa", b"\x55")  # what neither load wrote
    assert first.translate(same) == second.translate(same)
    # And both wrote all that the kernel relies on.
    assert first[entry.gdt : entry.gdt + 48] == second[entry.gdt : entry.gdt + 48]
    assert first[CMDLINE : CMDLINE + 14] == second[CMDLINE : CMDLINE + 14] == b"console=ttyS0\0"
    assert first[2 * make.MIB : 2 * make.MIB + 64] == second[2 * make.MIB : 2 * make.MIB + 64]
    if entry.mode == "long":
        for table in range(PML4, PML4 + 6 * 4096, 4096), (ZERO_PAGE,):
            for page in table:
                assert first[page : page + 4096] == second[page : page + 4096]


# The command line, whoever takes it


@pytest.mark.parametrize("name", EVERY_KIND)
def test_the_command_line_arrives(guest: make.Guest, name: str) -> None:
    """Every protocol gets the command line as UTF-8 with its NUL."""
    guest.load(EVERY_KIND[name], cmdline="größe=1 quiet")

    assert guest.string(CMDLINE) == "größe=1 quiet".encode()


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_long_command_line_is_refused(guest: make.Guest, name: str) -> None:
    """A command line past 64 KiB is refused with both lengths, whatever the kernel says."""
    with pytest.raises(ConfigError, match=r"has 65536 bytes, kernel kernel.img takes at most \d+ "):
        guest.load(EVERY_KIND[name], cmdline="x" * 65536)


@pytest.mark.parametrize("cmdline", ["a\0b", "a\ud800"])
def test_a_command_line_that_is_no_text_is_refused(guest: make.Guest, cmdline: str) -> None:
    """NUL would cut the command line short, and a lone surrogate has no bytes: ConfigError."""
    with pytest.raises(ConfigError, match=r"boot\.cmdline"):
        guest.load(make.bzimage(), cmdline=cmdline)


# Hostile images


@pytest.mark.parametrize("name", EVERY_KIND)
def test_every_truncation_loads_or_is_refused(guest: make.Guest, name: str) -> None:
    """A kernel cut off at any byte either loads or ends in ConfigError, never otherwise."""
    data = EVERY_KIND[name]
    loaded = []
    with make.images(data) as files:
        for size in range(len(data), -1, -1):
            os.ftruncate(files.kernel, size)
            try:
                boot.load(guest.memory, guest.e820, files, make.RSDP)
            except ConfigError:
                continue
            loaded.append(size)

    # A flat file ends where it ends, so only its header must be whole.
    shortest = 64 if name == "multiboot-flat" else len(data)
    assert loaded == list(range(len(data), shortest - 1, -1))


def check_containment(guest: make.Guest, kernel: bytes) -> None:
    """Load, and check that a loader keeps its word whatever the headers say."""
    guest.memory.write(RESERVED, b"\xa5" * SIZE)
    try:
        entry = guest.load(kernel, b"initrd")
    except ConfigError:
        pass
    else:
        ram = [area for area in guest.e820 if area.type == 1]
        assert any(area.start <= entry.rip < area.start + area.size for area in ram)
        assert entry.gdt == GDT
    assert guest.memory.read(RESERVED, SIZE) == b"\xa5" * SIZE


RESERVED, SIZE = make.RESERVED[0], make.RESERVED[1] - make.RESERVED[0]
HEADERS = {  # which bytes of each kind are worth damaging
    "bzimage": range(0x1F1, 0x270),
    "pvh": range(len(EVERY_KIND["pvh"])),
    "vmlinux": range(120),
    "multiboot-elf": range(96),
    "multiboot-flat": range(32, 64),
    "gzip": range(len(EVERY_KIND["gzip"])),
}
INTERESTING = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_damaged_headers_load_or_are_refused(name: str) -> None:
    """With any header bytes changed, a load succeeds or ends in ConfigError.

    Either way nothing outside RAM is written, and a vCPU that starts does so inside RAM.
    """
    guest = make.Guest(4 * make.MIB + 4 * make.MIB)

    @settings(max_examples=120, deadline=None)
    @given(st.dictionaries(st.sampled_from(HEADERS[name]), INTERESTING, min_size=1, max_size=8))
    def damage(changes: dict[int, int]) -> None:
        data = bytearray(EVERY_KIND[name])
        for offset, value in changes.items():
            data[offset] = value
        check_containment(guest, bytes(data))

    damage()
    guest.close()


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\x7fELF\2\1\1", b"\x7fELF\1\1\1", b"\x1f\x8b"])
)
def test_any_bytes_load_or_are_refused(data: bytes, magic: bytes) -> None:
    """Arbitrary files, also behind a true magic number, never raise but ConfigError."""
    guest = make.Guest()
    try:
        check_containment(guest, magic + data + b"\0")
    finally:
        guest.close()


def test_images_are_regular_files_for_load_too(guest: make.Guest) -> None:
    """load() checks the descriptors it is handed: a pipe cannot be read by offset."""
    ends = os.pipe()
    assert stat.S_ISFIFO(os.fstat(ends[0]).st_mode)
    try:
        with pytest.raises(ConfigError, match="kernel pipe: not a regular file"):
            boot.load(guest.memory, guest.e820, boot.BootImages(ends[0], "pipe", None, "", ""), 0)
    finally:
        os.close(ends[0])
        os.close(ends[1])
