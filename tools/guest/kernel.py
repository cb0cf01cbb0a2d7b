"""Finds the installed kernel, takes its ELF file out of the bzImage, picks modules for a guest."""

from __future__ import annotations

import gzip
import lzma
import os
from struct import unpack_from
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_SETUP_SECTS = 0x1F1  # u8: 512-byte sectors of real-mode code after the first
_HEADER_MAGIC = 0x202  # "HdrS"
_PAYLOAD = 0x248  # u32 offset from the end of that code, u32 length
_ELF = b"\x7fELF"


class GuestImageError(Exception):
    """A guest image cannot be made; the text names the remedy."""


def newest_kernel(boot: str = "/boot") -> str:
    """Return the path of the most recent vmlinuz. Raises GuestImageError if there is none."""
    found = [entry for entry in os.scandir(boot) if entry.name.startswith("vmlinuz-")]
    if not found:
        raise GuestImageError(f"no kernel in {boot} (apt-get install linux-image-amd64)")
    return max(found, key=lambda entry: entry.stat().st_mtime).path


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Return the ELF file inside a bzImage (Linux: Documentation/arch/x86/boot.rst).

    Raises GuestImageError if there is none or its compression is neither xz nor gzip.
    """
    if bzimage[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise GuestImageError("not a bzImage: it has no setup header")
    offset, length = unpack_from("<II", bzimage, _PAYLOAD)
    start = (bzimage[_SETUP_SECTS] + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        image = lzma.LZMADecompressor().decompress(payload)  # ends before the size that follows
    elif payload.startswith(b"\x1f\x8b"):
        image = gzip.decompress(payload)
    else:
        raise GuestImageError(f"unknown compression of the kernel: {payload[:4].hex()}")
    if not image.startswith(_ELF):
        raise GuestImageError("the kernel's payload is not an ELF file")
    return image


def module_files(directory: str, wanted: Iterable[str]) -> dict[str, str]:
    """Return the lines of modules.dep for `wanted` and all they need: path → paths, in order.

    Paths are relative to `directory` (/lib/modules/VERSION). Raises GuestImageError for an
    unknown name; a module built into the kernel needs no file.
    """
    depends = dict(_dependency_lines(directory))
    paths = {module_name(path): path for path in depends}
    with open(f"{directory}/modules.builtin", encoding="ascii") as file:
        builtin = {module_name(line.strip()) for line in file}
    chosen: dict[str, str] = {}
    queue = [module_name(name) for name in wanted]
    while queue:
        name = queue.pop()
        if name in builtin:
            continue
        if name not in paths:
            raise GuestImageError(f"the kernel of {directory} has no module {name}")
        path = paths[name]
        if path not in chosen:
            chosen[path] = depends[path]
            queue += [module_name(needed) for needed in depends[path].split()]
    return dict(sorted(chosen.items()))


def module_name(path: str) -> str:
    """Return a module's name as the kernel spells it: "a/virtio-rng.ko" is virtio_rng."""
    return os.path.basename(path).split(".ko", 1)[0].replace("-", "_")


def alias_lines(directory: str, paths: Iterable[str]) -> list[str]:
    """Return the lines of modules.alias that lead to one of `paths`."""
    names = {module_name(path) for path in paths}
    with open(f"{directory}/modules.alias", encoding="ascii") as file:
        return [line for line in file if line.rsplit(" ", 1)[-1].strip() in names]


def _dependency_lines(directory: str) -> list[tuple[str, str]]:
    with open(f"{directory}/modules.dep", encoding="ascii") as file:
        lines = [line.strip().partition(":") for line in file]
    return [(path, needs.strip()) for path, _, needs in lines]
