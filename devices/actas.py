"""Opening files with the rights of another user than this process's."""

from __future__ import annotations

import os
import pwd
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Open files with the rights of a user, if we are root and that is another one.

    For names that somebody else has chosen. The whole process changes, so no other thread may run.
    """
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    try:
        user = pwd.getpwuid(uid)
        gid, groups = user.pw_gid, os.getgrouplist(user.pw_name, user.pw_gid)
    except KeyError:
        gid, groups = uid, []  # a number that stands for nobody has no group but its own
    own_gid, own_groups = os.getegid(), os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(own_gid)
        os.setgroups(own_groups)
