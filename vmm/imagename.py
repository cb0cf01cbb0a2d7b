"""Images as people name them on a command line, and which format a name says.

    qcow2:PATH, raw:PATH     the format is said
    PATH.qcow2, PATH.raw     and here by the name's ending, in either case
    PATH                     else by an option; a new image is raw then, as with vmctl(8)

The content of an existing image never makes it qcow2: whoever owns a raw disk can write a header
that names any file of the host as its base. It may make it raw, since no guest can get rid of a
qcow2 header.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from vmm.usage import UsageError

FORMATS: Final = ("raw", "qcow2")
QCOW2_MAGIC: Final = b"QFI\xfb"


class ImageName(NamedTuple):
    """A path, and the format that its spelling says."""

    path: str
    format: str  # of FORMATS; "" if the spelling says none


def parse(word: str, option: str = "") -> ImageName:
    """Take a name apart; `option` is a format said beside it, "" for none. Raises UsageError."""
    prefix, colon, rest = word.partition(":")
    if colon and prefix in FORMATS:
        if option not in ("", prefix):
            raise UsageError(f"{word}: is named {prefix}, and the option says {option}")
        path, said = rest, prefix
    else:
        ending = os.path.splitext(word)[1][1:].lower()
        path, said = word, option or (ending if ending in FORMATS else "")
    if not path or "\0" in path:
        raise UsageError(f"{word!r}: not a file name")
    return ImageName(path, said)


def settle(name: ImageName, head: bytes) -> str:
    """Return the format of an existing image that begins with `head`. Raises UsageError."""
    if name.format:
        return name.format
    if head.startswith(QCOW2_MAGIC):
        raise UsageError(
            f"{name.path}: begins like a qcow2 image, but so can a raw one that its guest wrote",
            hint=f"if you trust it, say qcow2:{name.path}, else raw:{name.path}",
        )
    return "raw"
