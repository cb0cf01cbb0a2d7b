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


def resolve(words: str, vm: str = "") -> Owner:
    """Return who `user`, `user:group` or `:group` is; "" is this process's user.

    Numbers stand for themselves. Raises HostError, naming the VM, for a name that this host does
    not know.
    """
    user, _, group = words.partition(":")
    uid, gid = os.geteuid(), None
    unknown, tool = f"user '{user}'", "useradd"
    try:
        if user:
            uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        unknown, tool = f"group '{group}'", "groupadd"
        if group:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        hint = f"{tool} makes one; a number needs no name"
        raise HostError(f"owner '{words}': no {unknown} on this host", vm=vm, hint=hint) from None
    return Owner(uid, gid)


def user_name(uid: int) -> str:
    """Return the name of a user, or the number if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
