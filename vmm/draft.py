"""A new file that gets its name only when it is complete.

Until then it has none (O_TMPFILE), so nothing is left behind however its maker ends. Where the
file system cannot do that, it has a name with a dot in front, which goes on every error and on ^C.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Final, Self

from config.errors import HostError

_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.EACCES)


class Draft:
    """The file, open for reading and writing as `fd`. Use it in a `with`."""

    def __init__(self, path: str, mode: int = 0o600) -> None:
        """Make it beside `path`. Raises HostError."""
        self._directory, self._name = os.path.dirname(path) or ".", os.path.basename(path)
        self._path = path
        self._hidden = ""  # its name until it is complete, if it has one
        try:
            self._dir_fd = os.open(self._directory, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise HostError(f"{path}: cannot make it: {err.strerror}") from err
        try:
            self.fd = self._open(mode)
        except OSError as err:
            os.close(self._dir_fd)
            raise HostError(f"{path}: cannot make it: {err.strerror}") from err

    def _open(self, mode: int) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(".", flags | os.O_TMPFILE, mode, dir_fd=self._dir_fd)
        except OSError as err:
            if err.errno not in _NO_TMPFILE:
                raise
        self._hidden = self._other_name()
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return os.open(self._hidden, flags, mode, dir_fd=self._dir_fd)

    def _other_name(self) -> str:
        # Short enough however long the name is that it stands for.
        return f".pyvmd-{os.getpid()}-{os.urandom(4).hex()}"

    def resemble(self, status: os.stat_result) -> None:
        """Take on the mode, and as far as we may the owner, of the file it is to replace."""
        with suppress(OSError):
            os.fchown(self.fd, status.st_uid, status.st_gid)
        os.fchmod(self.fd, stat.S_IMODE(status.st_mode))

    def publish(self, *, replace: bool = False) -> None:
        """Bring it to the medium and give it its name, replacing what has that name if asked to.

        Raises HostError: also if the name is taken.
        """
        try:
            os.fsync(self.fd)
            if replace and not self._hidden:
                self._hidden = self._link(self._other_name())
            if replace:
                os.rename(
                    self._hidden, self._name, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd
                )
                self._hidden = ""
            else:
                self._link(self._name)
                self._remove()
            os.fsync(self._dir_fd)
        except FileExistsError as err:
            raise exists(self._path) from err
        except OSError as err:
            raise HostError(f"{self._path}: cannot finish it: {err.strerror}") from err

    def _link(self, name: str) -> str:
        # With a directory descriptor Python calls linkat(2), which can follow /proc's link.
        source = self._hidden or f"/proc/self/fd/{self.fd}"
        os.link(
            source,
            name,
            src_dir_fd=self._dir_fd,
            dst_dir_fd=self._dir_fd,
            follow_symlinks=not self._hidden,
        )
        return name

    def _remove(self) -> None:
        if self._hidden:
            with suppress(OSError):
                os.unlink(self._hidden, dir_fd=self._dir_fd)
            self._hidden = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()
        os.close(self.fd)
        os.close(self._dir_fd)


def exists(path: str) -> HostError:
    """Return the error of a name that is taken."""
    return HostError(f"{path}: exists already", hint="--force replaces it")
