"""What a VM boots from; for direct boot: recognise a kernel, load it, say where vCPU 0 starts.

    bzImage ─────────────────────────────────────► linux.load_bzimage   64-bit, zero page
    ELF ── Xen note PHYS32_ENTRY ────────────────► pvh.load             32-bit, hvm_start_info
        ── Multiboot header ─────────────────────► multiboot.load       32-bit, multiboot_info
        ── x86-64 ───────────────────────────────► linux.load_vmlinux   64-bit, zero page
    flat file with a Multiboot header ───────────► multiboot.load
    gzip around any of these: unpacked, then as above

The files are opened once, with the caller's rights, and stay open: a guest reset loads the
same bytes again, when the VM process could no longer open them. A load of a gzip file needs a
memfd; nothing else here needs more than preadv.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from config.errors import ConfigError
from vmm import bootfile, elf, linux, multiboot, pvh
from vmm.loader import E820Range, Entry, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from config.model import BootConfig
    from devices.guestmem import GuestMemory
    from vmm.bootfile import Image
    from vmm.firmware import Firmware

__all__ = ["BootImages", "E820Range", "Entry", "load", "open_boot", "open_images"]

_HEAD: Final = multiboot.SEARCH  # bytes enough to recognise every kind
_KINDS: Final = "pyvmd boots bzImage, ELF vmlinux, multiboot images"

# What people give instead of a kernel: offset, bytes there, what that is
_LOOKS_LIKE: Final = (
    (0, b"070701", "a cpio archive, as an initrd is"),
    (0, b"\xfd7zXZ\0", "packed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "packed with zstd"),
    (0, b"BZh", "packed with bzip2"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0x38, b"ARM\x64", "an arm64 kernel"),
    (0x1FE, b"\x55\xaa", "a boot sector, as of a disk image"),
    (0, b"MZ", "an EFI program"),
    (0, b"#!", "a script"),
)


class BootImages(NamedTuple):
    """Kernel and initrd, open for reading; as a context manager, closes them."""

    kernel: int  # descriptor
    kernel_path: str  # for messages
    initrd: int | None
    initrd_path: str
    cmdline: str

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.kernel)
        if self.initrd is not None:
            os.close(self.initrd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_boot(config: BootConfig) -> BootImages | Firmware:
    """Open what `config` starts with. Raises ConfigError for a bad path, HostError otherwise."""
    if config.firmware:
        from vmm.firmware import open_firmware  # and fw_cfg, which a kernel does not need

        return open_firmware(config.firmware)
    return open_images(config)


def open_images(config: BootConfig) -> BootImages:
    """Open kernel and initrd. Raises ConfigError for a bad path, HostError otherwise."""
    kernel = bootfile.open_image(config.kernel, "kernel")
    initrd = None
    try:
        if config.initrd:
            initrd = bootfile.open_image(config.initrd, "initrd")
    except BaseException:
        os.close(kernel)
        raise
    return BootImages(kernel, config.kernel, initrd, config.initrd, config.cmdline)


def load(memory: GuestMemory, e820: Sequence[E820Range], boot: BootImages, acpi_rsdp: int) -> Entry:
    """Put kernel, initrd, command line and boot tables into guest RAM.

    May be called again after a guest reset: it writes every byte that it relies on, and the
    descriptors' positions do not matter. `acpi_rsdp` is the RSDP's GPA, or 0.

    Raises ConfigError for images or a memory size that the user must change, HostError if a
    file cannot be read. RAM then holds part of the images.
    """
    kernel = bootfile.image_of(boot.kernel, boot.kernel_path, "kernel")
    initrd = None
    if boot.initrd is not None:
        initrd = bootfile.image_of(boot.initrd, boot.initrd_path, "initrd")
    target = Target(memory, e820, acpi_rsdp, initrd, boot.cmdline)
    if _head(kernel).startswith(bootfile.GZIP_MAGIC):
        kernel = bootfile.gunzip(kernel, target.ram_end)
        try:
            return _load(target, kernel)
        finally:
            os.close(kernel.fd)
    return _load(target, kernel)


def _load(target: Target, kernel: Image) -> Entry:
    """Choose the protocol, in the order of the drawing above."""
    head = _head(kernel)
    if linux.is_bzimage(head):
        return linux.load_bzimage(target, kernel)
    header = multiboot.find(head)
    if head.startswith(elf.MAGIC):
        file = elf.parse(kernel)
        entry = pvh.entry_point(file)
        if entry is not None:
            return pvh.load(target, file, entry)
        if header is None:
            if file.machine == elf.EM_X86_64:
                return linux.load_vmlinux(target, file)
            raise kernel.wrong(
                "a 32-bit ELF with neither a PVH note nor a Multiboot header",
                "use an amd64 kernel, or one built with CONFIG_PVH",
            )
    if header is None:
        raise _not_a_kernel(kernel, head)
    return multiboot.load(target, kernel, header)


def _head(image: Image) -> bytes:
    return image.read(0, min(image.size, _HEAD))


def _not_a_kernel(kernel: Image, head: bytes) -> ConfigError:
    what = ""
    if multiboot.HEADER_MAGIC in head:
        what = ": its Multiboot header is cut off, misaligned, or has a wrong checksum"
    else:
        for offset, magic, name in _LOOKS_LIKE:
            if head[offset:].startswith(magic):
                what = f": it looks like {name}"
                break
    return ConfigError(f"not a kernel: {kernel.path}{what}", hint=_KINDS)
