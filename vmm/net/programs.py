"""Short runs of nft(8) and passt(1), without a shell, an environment or our descriptors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from config.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH: Final = ("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin")
_PACKAGES: Final = {"nft": "nftables"}
_OUTPUT_MAX: Final = 1 << 20  # bytes
_PASSED: Final = 3


def find(name: str) -> str:
    """Return where a program is, "" if it is nowhere. The user's PATH does not count."""
    for directory in PATH:
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    return ""


def need(name: str, purpose: str) -> str:
    """Return where a program is. Raises HostError."""
    path = find(name)
    if not path:
        raise HostError(
            f"{name} is not installed: {purpose} needs it",
            hint=f"apt install {_PACKAGES.get(name, name)}",
        )
    return path


class Run:
    """A program that runs; it gets `text` to read, and `fd` as its descriptor 3."""

    def __init__(self, words: Sequence[str], text: str = "", fd: int = -1) -> None:
        """Start it. Raises HostError."""
        self._out = os.memfd_create("output", os.MFD_CLOEXEC)
        stdin = os.memfd_create("input", os.MFD_CLOEXEC)
        try:
            os.write(stdin, text.encode())
            os.lseek(stdin, 0, os.SEEK_SET)
            # Number 3 is taken in any case: ours may be one that programs inherit.
            passed = fd if fd >= 0 else stdin
            places = [(stdin, 0), (self._out, 1), (self._out, 2), (passed, _PASSED)]
            actions = [(os.POSIX_SPAWN_DUP2, *place) for place in places]
            self._pid = os.posix_spawn(
                words[0], list(words), {"LC_ALL": "C"}, file_actions=actions, setsigmask=[]
            )
        except OSError as err:
            os.close(self._out)
            raise HostError(f"cannot run {words[0]}: {err.strerror}") from err
        finally:
            os.close(stdin)

    def wait(self) -> tuple[int, str]:
        """Return its exit status and what it has said."""
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        said = os.pread(self._out, _OUTPUT_MAX, 0).decode(errors="replace")
        os.close(self._out)
        return status, said
