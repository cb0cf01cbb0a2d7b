"""Who a VM belongs to: `owner: user:group` of vm.yaml, as numbers and back."""

from __future__ import annotations

import grp
import os
import pwd
from typing import NamedTuple

from config.errors import HostError


class Owner(NamedTuple):
    """A user, and the group whose members may use the VM too, if any."""

    uid: int
    gid: int | None


def resolve(words: str) -> Owner:
    """Return who `user`, `user:group` or `:group` is; "" is this process's user.

    Numbers stand for themselves. Raises HostError for a name that this host does not know.
    """
    user, _, group = words.partition(":")
    uid, gid = os.geteuid(), None
    try:
        if user:
            uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        if group:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise HostError(f"owner '{words}': no such user or group on this host") from None
    return Owner(uid, gid)


def user_name(uid: int) -> str:
    """Return the name of a user, or the number if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
