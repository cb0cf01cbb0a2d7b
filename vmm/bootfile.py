"""The files a guest boots from: opened once, read by offset, unpacked if they are gzip.

Everything in them is hostile. A reader here returns what it was asked for or says which file
is too short; it never returns less.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Final, NamedTuple

from config.errors import ConfigError, HostError

GZIP_MAGIC: Final = b"\x1f\x8b"

_CHUNK: Final = 1 << 20  # bytes unpacked at a time
_HOST_TROUBLE: Final = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_HINTS: Final = {
    errno.ENOENT: "check boot.{kind} in vm.yaml",
    errno.EACCES: "make it readable for uid {uid}",
    errno.EPERM: "make it readable for uid {uid}",
}


class Image(NamedTuple):
    """One open file; no read moves its position, so a guest reset can load it again."""

    fd: int
    path: str
    kind: str  # "kernel", "initrd" or "firmware", for messages
    size: int

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. For headers: callers bound `length`.

        Raises ConfigError if the file ends before, HostError if it cannot be read.
        """
        if offset + length > self.size:
            raise self.truncated(offset + length)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`, usually guest RAM, from `offset`: the kernel copies, Python does not.

        Raises ConfigError if the file ends before, HostError if it cannot be read.
        """
        if offset + len(view) > self.size:
            raise self.truncated(offset + len(view))
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as err:
                raise HostError(f"{self}: cannot read at {offset + done}: {err.strerror}") from err
            if not got:  # the file shrank since its size was taken
                raise self.truncated(offset + len(view))
            done += got

    def truncated(self, needed: int) -> ConfigError:
        """Return the error that says the file should hold `needed` bytes."""
        return self.wrong(f"truncated: it ends before byte {needed}", "copy it again")

    def wrong(self, what: str, hint: str = "") -> ConfigError:
        """Return the error that says what is wrong with this file."""
        return ConfigError(f"{self}: {what}", hint=hint)


def open_image(path: str, kind: str) -> int:
    """Open one of them for reading and return the descriptor, the caller's to close.

    Raises ConfigError for what the user must mend (missing, not readable, not a regular
    file, empty), HostError for what the host refused.
    """
    try:
        # Non-blocking: a FIFO or a terminal must be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as err:  # a NUL, or what no file name can be encoded from
        raise ConfigError(f"{kind} {path!r}: not a file name") from err
    except OSError as err:
        error = HostError if err.errno in _HOST_TROUBLE else ConfigError
        hint = _HINTS.get(err.errno or 0, "").format(kind=kind, uid=os.geteuid())
        raise error(f"{kind} {path}: cannot open: {err.strerror}", hint=hint) from err
    try:
        image_of(fd, path, kind)
    except ConfigError:
        os.close(fd)
        raise
    return fd


def image_of(fd: int, path: str, kind: str) -> Image:
    """Wrap an open descriptor with the size the file has now; it stays the caller's.

    Raises ConfigError unless it is a regular file with something in it.
    """
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        what = "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise ConfigError(f"{kind} {path}: {what}", hint=f"boot.{kind} names a plain file")
    if not info.st_size:
        raise ConfigError(f"{kind} {path}: the file is empty", hint="copy it again")
    return Image(fd, path, kind, info.st_size)


def gunzip(image: Image, limit: int) -> Image:
    """Unpack a gzip file into a memfd of at most `limit` bytes; the caller closes its fd.

    A memfd and not bytes: the result is read by offset like any file, goes straight from
    there to guest RAM, and is gone with its descriptor. Raises ConfigError.
    """
    import zlib  # saves 1 ms for everybody else

    fd = os.memfd_create("pyvmd-kernel", os.MFD_CLOEXEC)
    try:
        stream = zlib.decompressobj(wbits=31)  # 31: a gzip frame around the deflate stream
        taken = size = 0
        while not stream.eof:
            packed = stream.unconsumed_tail
            if not packed:
                packed = image.read(taken, min(_CHUNK, image.size - taken))
                taken += len(packed)
            if not packed:
                raise image.wrong("truncated: the gzip stream does not end", "copy it again")
            plain = stream.decompress(packed, _CHUNK)
            size += len(plain)
            if size > limit:
                raise image.wrong(
                    f"unpacks to more than the {limit >> 20} MiB of RAM it would go to",
                    "give the VM more memory",
                )
            _write_all(fd, plain)
    except zlib.error as err:
        os.close(fd)
        raise image.wrong(f"damaged gzip stream: {err}", "copy it again") from err
    except BaseException:
        os.close(fd)
        raise
    return Image(fd, image.path, image.kind, size)


def _write_all(fd: int, data: bytes) -> None:
    """Append to a memfd; a full tmpfs is the host's trouble. Raises HostError."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except OSError as err:
            raise HostError(f"cannot unpack the kernel: {err.strerror}") from err
